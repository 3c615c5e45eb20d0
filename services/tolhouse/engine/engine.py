"""The engine: `step()` is schedule, stage rows, forward, sample, post-process. One thread calls it.

Other threads reach it through `add` and `cancel`, which leave word in a mailbox that the next step reads.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolhouse.engine.block_manager import BlockManager
from tolhouse.engine.dequant import Staged
from tolhouse.engine.latency import Latencies
from tolhouse.engine.row_providers import COUNTS, NoRows, Rows
from tolhouse.engine.runner import Runner
from tolhouse.engine.sampler import Logprobs, prompt_logprobs, sample
from tolhouse.engine.scheduler import Chunk, Scheduler
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.errors import Corrupt, Internal, Overloaded, PromptTooLong, TolhouseError
from tolhouse.logs import log
from tolhouse.tracing import Span, under

_RECENT = 16  # steps that count as of late
_SCORED_TOKENS = 256  # prompt tokens whose logits are in memory at once


class Engine:
    def __init__(
        self,
        runner: Runner,
        rows: Rows | NoRows,
        cache: BlockManager,
        max_running: int,
        max_waiting: int,
        max_step_tokens: int,
    ) -> None:
        self.runner, self.rows, self.cache, self.max_waiting = runner, rows, cache, max_waiting
        self.table = rows.manifest.ref if rows.manifest else ""  # what new sequences begin with
        self._served = {self.table: (runner, rows)}  # and the versions that running ones began with
        self._before = dict.fromkeys(COUNTS, 0)  # of versions that nobody uses any more
        self._lock = threading.Lock()  # of the two
        self.scheduler = Scheduler(cache, max_running, max(max_running, max_step_tokens))
        self.tokens = self.steps = 0  # sampled tokens, and steps run
        self.step_seconds = self.forward_seconds = 0.0  # all of it, and what of it was the model's
        self.pace = 0.0  # seconds of a forward, as of late
        self.sat_out = (
            0  # tokens that came a step later, so that others need not wait for their rows
        )
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
        """Queue a sequence; Overloaded if the queue is full, PromptTooLong if the KV cache could never hold it."""
        if sequence.most_tokens > self.cache.capacity_tokens:
            raise PromptTooLong(
                f"prompt and answer need {sequence.most_tokens} tokens of KV cache; this worker has {self.cache.capacity_tokens}"
            )
        if self.waiting >= self.max_waiting:
            raise Overloaded(
                f"{self.waiting} requests are waiting already, the most that this worker queues: try again later"
            )
        sequence.times = [time.perf_counter()]
        self._mailbox.put(lambda: self._enter(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence at the next step; nothing more is emitted for it. One that has ended is left alone."""
        self._mailbox.put(lambda: self.scheduler.remove(sequence))

    def use(self, runner: Runner, rows: Rows) -> None:
        """Let new sequences begin with another version of the table. Those that are there go on with theirs, until their end."""
        self._mailbox.put(lambda: self._use(runner, rows))

    def tables(self) -> list[str]:
        """ "name@version" of all versions in use."""
        with self._lock:
            return [table for table in self._served if table]

    def counts(self) -> dict[str, Any]:
        """COUNTS of all rows so far, whatever their version."""
        with self._lock:
            return {
                name: self._before[name]
                + sum(getattr(rows, name) for _, rows in self._served.values())
                for name in COUNTS
            }

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting) + self._mailbox.qsize()

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    # from the engine's thread

    def step(self) -> None:
        """One token more for all that decode, and what fits of the prompts that wait. Rows of two versions never meet in a forward."""
        step = self.scheduler.schedule()
        if len(self._served) == 1:
            self._step(step, self.runner, self.rows)
            return
        for table, (runner, rows) in list(self._served.items()):
            self._step([chunk for chunk in step if chunk.sequence.table == table], runner, rows)
        self._retire()

    def _step(self, step: list[Chunk], runner: Runner, rows: Rows | NoRows) -> None:
        started = time.perf_counter()
        step, begun, staged = self._begin(self._in_time(step, rows), runner, rows)
        if not staged:
            return
        ready = time.perf_counter()
        hidden_TD = runner.finish(begun, staged)
        self._prefetch(step, rows)
        ends = np.cumsum([chunk.last - chunk.first for chunk in step])
        sampling = [
            (chunk, int(end) - 1) for chunk, end in zip(step, ends, strict=True) if chunk.samples
        ]
        prompts = self._score_prompts(step, ends, hidden_TD)
        logits_BV = (
            self.runner.logits(hidden_TD[[end for _, end in sampling]])
            if sampling
            else hidden_TD[:0]
        )
        computed = time.perf_counter()
        tokens, logprobs = sample(logits_BV, [chunk.sequence.state for chunk, _ in sampling])
        self._post_process(
            step,
            dict(
                zip(
                    (c.sequence for c, _ in sampling),
                    zip(tokens, logprobs, strict=True),
                    strict=True,
                )
            ),
            prompts,
        )
        self.steps += 1
        self.forward_seconds += computed - ready
        self.pace += (computed - ready - self.pace) / _RECENT
        self.step_seconds += time.perf_counter() - started

    def _enter(self, sequence: Sequence) -> None:
        sequence.table = self.table
        self.scheduler.add(sequence)

    def _use(self, runner: Runner, rows: Rows) -> None:
        assert rows.manifest
        table = rows.manifest.ref
        if table in self._served:  # gone back to before its last sequence ended
            rows.close()
        else:
            with self._lock:
                self._served = {**self._served, table: (runner, rows)}
        self.table, (self.runner, self.rows) = table, self._served[table]

    def _retire(self) -> None:
        """Let go of versions that no sequence uses any more."""
        used = {self.table} | {
            sequence.table for sequence in self.scheduler.running + self.scheduler.waiting
        }
        for table, (_, rows) in list(self._served.items()):
            if table not in used:
                with self._lock:
                    self._served = {
                        ref: served for ref, served in self._served.items() if ref != table
                    }
                    self._before = {
                        name: count + getattr(rows, name) for name, count in self._before.items()
                    }
                threading.Thread(
                    target=rows.close, name="close rows", daemon=True
                ).start()  # a fetch may be under way

    def _in_time(self, step: list[Chunk], rows: Rows | NoRows) -> list[Chunk]:
        """Let sequences whose next row is late sit out, and its fetch run beside the step, where that loses less than to wait.

        A decoded token is known only when its row is wanted: a miss can't hide behind its own step, but behind that of others.
        """
        decoding = sum(chunk.decodes for chunk in step)
        if self.pace > decoding * rows.trip_seconds and self.steps % _RECENT:
            return step  # not even for one, as things were when last looked at
        ids = np.array([chunk.sequence.ids[chunk.first] for chunk in step[:decoding]], np.uint32)
        late = rows.late(ids)
        count = int(late.sum())
        if not count or count == len(step) or count * self.pace > decoding * rows.trip_seconds:
            return step
        with under(
            chunk.sequence.span for chunk, is_late in zip(step, late, strict=False) if is_late
        ):
            rows.prefetch(ids[late], late=True)
        late &= rows.coming(
            ids
        )  # for who is not on the way, for want of room or as another fetch is, nothing is won
        self.sat_out += int(late.sum())
        sit = {chunk.sequence for chunk, is_late in zip(step, late, strict=False) if is_late}
        return [chunk for chunk in step if chunk.sequence not in sit]

    def _begin(
        self, step: list[Chunk], runner: Runner, rows: Rows | NoRows
    ) -> tuple[list[Chunk], Any, Staged | None]:
        """A step that is launched, and its rows. Where they can't all be had, those sequences end with the error and the others go on."""
        while step:
            begun = runner.launch(
                step
            )  # the first layer's attention needs no row: a device is busy with it meanwhile
            try:
                with under(chunk.sequence.span for chunk in step):
                    staged = rows.stage(_ids(*step))
                staged.scales = _scales(step, rows)
                return step, begun, staged
            except TolhouseError as error:
                step = [chunk for chunk in step if self._survives(chunk, error, rows)]
        return step, None, None

    def _survives(self, chunk: Chunk, error: TolhouseError, rows: Rows | NoRows) -> bool:
        """Whether the rows of one chunk can be had after `error`; if not, its sequence has ended."""
        ids = _ids(chunk)
        try:
            # a bad row fails who asked for it; an unreachable service fails all who miss a row, without another wait
            if not rows.has(ids):
                if not isinstance(error, Corrupt):
                    raise error
                rows.stage(ids)
            return True
        except TolhouseError as failure:
            self._end(chunk.sequence, Output(error=failure))
            return False

    def _prefetch(self, step: list[Chunk], rows: Rows | NoRows) -> None:
        """Ask for the rows of the next pieces of prompts while the model computes those of this step."""
        scheduler, room = self.scheduler, self.scheduler.max_step_tokens
        ids: list[int] = []
        spans: list[Span] = []
        done = {chunk.sequence: chunk.last for chunk in step}
        for sequence in scheduler.running + scheduler.waiting:
            if not room:
                break
            if rows.manifest and sequence.table != rows.manifest.ref:
                continue
            start = done.get(sequence, sequence.computed)
            part = sequence.ids[start : start + room]
            ids += part
            spans += [sequence.span] if part else []
            room -= len(part)
        if ids:
            with under(spans):
                rows.prefetch(np.array(ids, np.uint32))

    def _score_prompts(
        self, step: list[Chunk], ends: np.ndarray, hidden_TD: Tensor
    ) -> dict[Sequence, Logprobs]:
        """The log probabilities of prompt tokens in this step, for sequences that want them and have not had them."""
        scores: dict[Sequence, Logprobs] = {}
        for chunk, end in zip(step, ends.tolist(), strict=True):
            sequence, k = chunk.sequence, chunk.sequence.sampling.prompt_logprobs
            last = min(chunk.last, sequence.prompt_tokens - 1)
            if k is None or sequence.scored >= last:
                continue
            score = Logprobs([], [], [])
            for at in range(sequence.scored, last, _SCORED_TOKENS):
                next_ids = sequence.ids[at + 1 : min(at + _SCORED_TOKENS, last) + 1]
                place = end - chunk.last + at
                score += prompt_logprobs(
                    self.runner.logits(hidden_TD[place : place + len(next_ids)]), next_ids, k
                )
            sequence.scored = last
            scores[sequence] = score
        return scores

    def _post_process(
        self,
        step: list[Chunk],
        sampled: dict[Sequence, tuple[int, Logprobs | None]],
        prompts: dict[Sequence, Logprobs],
    ) -> None:
        now = time.perf_counter()
        for chunk in step:
            sequence = chunk.sequence
            sequence.computed = chunk.last
            self.cache.seal(sequence, chunk.first, chunk.last)
            reason, new, end_id, logprob, prompt = "", [], None, None, prompts.get(sequence)
            if sequence in sampled:
                before = len(sequence.ids)
                token, logprob = sampled[sequence]
                reason = sequence.take(token)
                new = sequence.ids[before:]
                end_id = token if reason == "stop" else None
                self.tokens += len(new)
                self.latencies.token(sequence, now, ended=bool(reason))
            if new or reason or prompt:
                output = Output(
                    new,
                    reason,
                    None,
                    end_id,
                    logprob if sequence.sampling.max_tokens else None,
                    prompt,
                )
                if reason:
                    self._end(sequence, output)
                else:
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
                failure = Internal(
                    f"the engine failed: {type(error).__name__}; the worker's log has the details"
                )
                for sequence in list(self.scheduler.running):
                    self._end(sequence, Output(error=failure))

    def read_mail(self) -> bool:
        """Do what others asked for; sleep while there is nothing to run. False once the engine is to stop."""
        while True:
            idle = not self.scheduler.running and not self.scheduler.waiting
            try:
                word = self._mailbox.get(block=idle)
            except queue.Empty:
                return True
            if word is None:
                return False
            word()


def _ids(*step: Chunk) -> np.ndarray:
    return np.array(
        [i for chunk in step for i in chunk.sequence.ids[chunk.first : chunk.last]], np.uint32
    )


def _scales(step: list[Chunk], rows: Rows | NoRows) -> Tensor | None:
    """By what the rows of each layer are multiplied for each token, float32 [N, T]; None where all are added as they are."""
    if isinstance(rows, NoRows) or not any(chunk.sequence.sampling.probes for chunk in step):
        return None
    scales_NT = torch.ones(rows.num_rows, sum(chunk.last - chunk.first for chunk in step))
    start = 0
    for chunk in step:
        end, sampling = start + chunk.last - chunk.first, chunk.sequence.sampling
        scales_NT[:, start:end] = (
            sampling.row_scale * torch.tensor(sampling.layer_scales or (1.0,))[:, None]
        )
        scales_NT[sorted(sampling.absent_layers), start:end] = 0
        start = end
    return scales_NT.to(rows.device)
