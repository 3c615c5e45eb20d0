"""The engine: `step()` is schedule, stage rows, forward, sample, post-process. One thread calls it.

Other threads reach it through `add`, `cancel` and `use`, which put calls into a mailbox that the
next step empties.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolhouse.engine.block_manager import BlockManager
from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.latency import Latencies
from tolhouse.engine.row_providers import CachedRows, NoRows, RowProvider
from tolhouse.engine.runner import Runner
from tolhouse.engine.sampler import Logprobs, prompt_logprobs, sample
from tolhouse.engine.scheduler import ScheduledChunk, Scheduler, token_ids
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.errors import Corrupt, Internal, Overloaded, PromptTooLong, TolhouseError
from tolhouse.logs import log
from tolhouse.tracing import Span, under

_SCORED_TOKENS = 256  # prompt tokens whose logits are in memory at once
Step = list[ScheduledChunk]


class Engine:
    def __init__(
        self,
        runner: Runner,
        rows: RowProvider,
        cache: BlockManager,
        max_running: int,
        max_waiting: int,
        max_step_tokens: int,
    ) -> None:
        self.runner, self.rows, self.cache, self.max_waiting = runner, rows, cache, max_waiting
        self.table = rows.manifest.ref if rows.manifest else ""  # of new sequences
        self._served = {self.table: (runner, rows)}  # by table version: all that sequences use
        self._retired: Counter[str] = Counter()  # row counts of versions no longer in use
        self._lock = threading.Lock()  # of the two
        self.scheduler = Scheduler(cache, max_running, max(max_running, max_step_tokens))
        self.tokens = self.steps = 0  # sampled tokens, and steps run
        self.step_seconds = self.forward_seconds = 0.0  # all of it, and the model's part
        self.latencies = Latencies()
        self._mailbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # from any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._mailbox.put(None)
        self._thread.join()
        for _, rows in self._served.values():
            rows.close()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; Overloaded if the queue is full, PromptTooLong if it can never run."""
        need, capacity = sequence.most_tokens, self.cache.capacity_tokens
        if need > capacity:
            message = (
                f"prompt and answer need {need} tokens of KV cache; this worker has {capacity}"
            )
            raise PromptTooLong(message)
        if self.waiting >= self.max_waiting:
            message = (
                f"{self.waiting} requests are waiting already, the most that this worker queues"
            )
            raise Overloaded(f"{message}: try again later")
        sequence.times = [time.perf_counter()]
        self._mailbox.put(lambda: self._enter(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence at the next step, without further output, unless it has ended."""
        self._mailbox.put(lambda: self.scheduler.remove(sequence))

    def use(self, runner: Runner, rows: CachedRows) -> None:
        """Let new sequences begin with another version of the table; others end with theirs."""
        self._mailbox.put(lambda: self._use(runner, rows))

    def tables(self) -> list[str]:
        """ "name@version" of all versions in use."""
        with self._lock:
            return [table for table in self._served if table]

    def counts(self) -> Counter[str]:
        """Row counts of all versions so far, by field of `RowCounts`."""
        with self._lock:
            total = self._retired.copy()
            for _, rows in self._served.values():
                total.update(rows.counts())
            return total

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting) + self._mailbox.qsize()

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    # from the engine's thread

    def step(self) -> None:
        """One more token for each decoding sequence, and what fits of the waiting prompts."""
        step = self.scheduler.schedule()
        if len(self._served) == 1:
            self._step(step, self.runner, self.rows)
            return
        for table, (runner, rows) in list(self._served.items()):
            self._step([chunk for chunk in step if chunk.sequence.table == table], runner, rows)
        self._retire()

    def _step(self, step: Step, runner: Runner, rows: RowProvider) -> None:
        started = time.perf_counter()
        step, launched, staged = self._launch(step, runner, rows)
        if not staged:
            return
        ready = time.perf_counter()
        hidden_TD = runner.finish(launched, staged)
        self._prefetch(step, rows)
        ends = np.cumsum([chunk.count for chunk in step]).tolist()
        sampling = [(c.sequence, end - 1) for c, end in zip(step, ends, strict=True) if c.samples]
        scores = self._score_prompts(step, ends, hidden_TD)
        sampled_BD = hidden_TD[[last for _, last in sampling]]
        logits_BV = runner.logits(sampled_BD) if sampling else sampled_BD
        computed = time.perf_counter()
        tokens, logprobs = sample(logits_BV, [sequence.state for sequence, _ in sampling])
        results = zip(tokens, logprobs, strict=True)
        sampled = dict(zip((sequence for sequence, _ in sampling), results, strict=True))
        self._post_process(step, sampled, scores)
        self.steps += 1
        self.forward_seconds += computed - ready
        self.step_seconds += time.perf_counter() - started

    def _enter(self, sequence: Sequence) -> None:
        sequence.table = self.table
        self.scheduler.add(sequence)

    def _use(self, runner: Runner, rows: CachedRows) -> None:
        table = rows.manifest.ref
        if table in self._served:  # rolled back before its last sequence ended
            rows.close()
        else:
            with self._lock:
                self._served = {**self._served, table: (runner, rows)}
        self.table, (self.runner, self.rows) = table, self._served[table]

    def _retire(self) -> None:
        """Close versions that no sequence uses any more."""
        sequences = self.scheduler.running + self.scheduler.waiting
        used = {self.table, *(sequence.table for sequence in sequences)}
        for table in self._served.keys() - used:
            with self._lock:
                served = dict(self._served)
                _, rows = served.pop(table)
                self._served = served
                self._retired.update(rows.counts())
            # in a thread, since a fetch may be under way
            threading.Thread(target=rows.close, name="close rows", daemon=True).start()

    def _launch(
        self, step: Step, runner: Runner, rows: RowProvider
    ) -> tuple[Step, Any, StagedRows | None]:
        """Launch a step and stage its rows; without sequences that end as theirs can't be had."""
        while step:
            # the first layer's attention needs no row: a device is busy with it meanwhile
            launched = runner.launch(step)
            try:
                with under(chunk.sequence.span for chunk in step):
                    staged = rows.stage(token_ids(step))
                staged.scales = _scales(step, rows)
                return step, launched, staged
            except TolhouseError as error:
                step = [chunk for chunk in step if self._survives(chunk, error, rows)]
        return step, None, None

    def _survives(self, chunk: ScheduledChunk, error: TolhouseError, rows: RowProvider) -> bool:
        """Whether the rows of a chunk can be had after `error`; if not, its sequence has ended."""
        ids = token_ids([chunk])
        try:
            # a bad row fails sequences that need it; a source that is down, all that miss a row
            if len(rows.missing(ids)):
                if not isinstance(error, Corrupt):
                    raise error
                rows.stage(ids)
            return True
        except TolhouseError as failure:
            self._end(chunk.sequence, Output(error=failure))
            return False

    def _prefetch(self, step: Step, rows: RowProvider) -> None:
        """Fetch rows of the next pieces of prompts while the model computes this step."""
        room = self.scheduler.max_step_tokens
        ids: list[int] = []
        spans: list[Span] = []
        done = {chunk.sequence: chunk.last for chunk in step}
        table = rows.manifest.ref if rows.manifest else ""
        for sequence in self.scheduler.running + self.scheduler.waiting:
            if len(ids) >= room:
                break
            start = done.get(sequence, sequence.computed)
            part = sequence.ids[start : start + room - len(ids)]
            if part and sequence.table == table:
                ids += part
                spans.append(sequence.span)
        if ids:
            with under(spans):
                rows.prefetch(np.array(ids, np.uint32))

    def _score_prompts(
        self, step: Step, ends: list[int], hidden_TD: Tensor
    ) -> dict[Sequence, Logprobs]:
        """Log probabilities of this step's prompt tokens, where asked for and not emitted yet."""
        scores: dict[Sequence, Logprobs] = {}
        for chunk, end in zip(step, ends, strict=True):
            sequence, k = chunk.sequence, chunk.sequence.sampling.prompt_logprobs
            last = min(chunk.last, sequence.prompt_tokens - 1)
            if k is None or sequence.scored >= last:
                continue
            score = Logprobs([], [], [])
            for at in range(sequence.scored, last, _SCORED_TOKENS):
                next_ids = sequence.ids[at + 1 : min(at + _SCORED_TOKENS, last) + 1]
                first = end - chunk.last + at
                logits_TV = self.runner.logits(hidden_TD[first : first + len(next_ids)])
                score += prompt_logprobs(logits_TV, next_ids, k)
            sequence.scored = last
            scores[sequence] = score
        return scores

    def _post_process(
        self,
        step: Step,
        sampled: dict[Sequence, tuple[int, Logprobs | None]],
        scores: dict[Sequence, Logprobs],
    ) -> None:
        now = time.perf_counter()
        for chunk in step:
            sequence = chunk.sequence
            sequence.computed = chunk.last
            self.cache.commit(sequence, chunk.first, chunk.last)
            output = Output(prompt_logprobs=scores.get(sequence))
            if sequence in sampled:
                output = sequence.append(*sampled[sequence], output.prompt_logprobs)
                self.tokens += len(output.tokens)
                self.latencies.token(sequence, now, ended=bool(output.finish_reason))
            if output.finish_reason:
                self._end(sequence, output)
            elif output.tokens or output.prompt_logprobs:
                sequence.emit(output)

    def _end(self, sequence: Sequence, output: Output) -> None:
        self.scheduler.remove(sequence)
        sequence.emit(output)

    @torch.inference_mode()
    def _run(self) -> None:
        while self.read_mail():
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - a defect: these sequences end, the worker lives on
                log.exception("engine step failed")
                message = (
                    f"the engine failed: {type(error).__name__}; the worker's log has the details"
                )
                for sequence in list(self.scheduler.running):
                    self._end(sequence, Output(error=Internal(message)))

    def read_mail(self, *, wait: bool = True) -> bool:
        """Make the calls of other threads, waiting for one while idle. False: stop."""
        while True:
            idle = not self.scheduler.running and not self.scheduler.waiting
            try:
                call = self._mailbox.get(block=wait and idle)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()


def _scales(step: Step, rows: RowProvider) -> Tensor | None:
    """Factors of each layer's rows for each token, float32 [N, T]; None where all are 1."""
    if isinstance(rows, NoRows) or not any(chunk.sequence.sampling.probes for chunk in step):
        return None
    scales_NT = torch.ones(rows.num_rows, sum(chunk.count for chunk in step))
    for chunk, part_NT in zip(step, scales_NT.split([c.count for c in step], 1), strict=True):
        sampling = chunk.sequence.sampling
        layer_scales = torch.tensor(sampling.layer_scales or (1.0,))[:, None]
        part_NT[:] = sampling.row_scale * layer_scales
        part_NT[sorted(sampling.absent_layers)] = 0
    return scales_NT.to(rows.device)
