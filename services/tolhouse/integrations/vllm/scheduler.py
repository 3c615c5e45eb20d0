"""A scheduler that ends requests without rows, and no others, with an error.

The model computes logits that are not numbers for a request whose rows cannot be read. vLLM counts
these for each request (VLLM_COMPUTE_NANS_IN_LOGITS).
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from tolhouse.logs import event


class RowsScheduler(Scheduler):
    """For synchronous scheduling."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        # By request: the requests whose unfinished steps write its blocks, with the tokens of
        # these steps.
        self._sources: dict[str, dict[str, int]] = {}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        counts = model_runner_output.num_nans_in_logits or {}
        failed = {request_id for request_id, count in counts.items() if count}
        ended = self._end(failed) if failed else []
        self._forget(scheduler_output.num_scheduled_tokens)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in ended:
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            client = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            client.outputs.append(output)
        return outputs

    def _forget(self, scheduled: dict[str, int]) -> None:
        """Remove the sources whose steps are finished, given the tokens of a finished step."""
        for heir, sources in list(self._sources.items()):
            left = {name: tokens - scheduled.get(name, 0) for name, tokens in sources.items()}
            self._sources[heir] = {name: tokens for name, tokens in left.items() if tokens > 0}
            if not self._sources[heir]:
                del self._sources[heir]

    def _end(self, failed: set[str]) -> list[Request]:
        """End requests, and drop what they wrote to the prefix cache."""
        wrong = set[int]()
        while heirs := {heir for heir, of in self._sources.items() if of.keys() & failed} - failed:
            failed = failed | heirs
        for request_id in failed:
            if request := self.requests.get(request_id):
                wrong |= self._written(request)
        # Another request may have begun with blocks that a failed one wrote.
        for request in self.running:
            if wrong & self._written(request, every=True):
                failed = failed | {request.request_id}
                wrong |= self._written(request)
        self.kv_cache_manager.evict_blocks(wrong)
        ended = self.finish_requests(failed, RequestStatus.FINISHED_ERROR)
        event("requests ended without rows", requests=len(ended))
        return ended

    def _written(self, request: Request, *, every: bool = False) -> set[int]:
        """Return the blocks that unfinished steps write for a request, or `every` block of it."""
        done = 0 if every else request.num_computed_tokens - request.num_in_flight_tokens
        manager = self.kv_cache_manager
        groups = manager.get_block_ids(request.request_id)
        sizes = (group.block_size for group in manager.coordinator.single_type_managers)
        written = {
            block
            for ids, size in zip(groups, sizes, strict=True)
            for block in ids[max(0, done) // size :]
        }
        return written - {manager.block_pool.null_block.block_id}

    def _free_request_blocks(self, request: Request) -> None:
        """Drop what unfinished steps write from the prefix cache, because they may lack rows."""
        if request.num_in_flight_tokens:
            written, pool = self._written(request), self.kv_cache_manager.block_pool
            self.kv_cache_manager.evict_blocks(written)
            blocks = self._written(request, every=True)
            if shared := {block for block in blocks if pool.blocks[block].ref_cnt > 1}:
                for other in self.running:
                    if other is request:
                        continue
                    if shared & written & self._written(other, every=True):
                        self._add_source(other, request)
                    # The output of unfinished steps still reaches a preempted request.
                    if not request.is_finished() and shared & self._written(other):
                        self._add_source(request, other)
        super()._free_request_blocks(request)

    def _add_source(self, heir: Request, source: Request) -> None:
        if source.num_in_flight_tokens:
            sources = self._sources.setdefault(heir.request_id, {})
            sources[source.request_id] = source.num_in_flight_tokens


class AsyncRowsScheduler(RowsScheduler, AsyncScheduler):
    """For asynchronous scheduling."""


def new_scheduler(*, vllm_config: Any, **given: Any) -> Scheduler:
    """Make the scheduler. vLLM decides late whether scheduling is asynchronous."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    kind = AsyncRowsScheduler if asynchronous else RowsScheduler
    return kind(vllm_config=vllm_config, **given)
