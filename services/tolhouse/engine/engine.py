"""The engine. `step()` schedules, stages rows, runs the model, samples and post-processes.

One thread calls `step()`. Other threads call `add`, `cancel` and `use`, which put work into a
mailbox. The engine's thread empties the mailbox before each step.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from prometheus_client import Histogram
from torch import Tensor

from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.row_providers import RowProvider
from tolhouse.engine.runner import Launched, Runner
from tolhouse.engine.sampler import Logprobs, prompt_logprobs, sample
from tolhouse.engine.scheduler import ScheduledChunk, Scheduler, token_ids
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.errors import (
    CorruptError,
    InternalError,
    OverloadedError,
    PromptTooLongError,
    TolhouseError,
)
from tolhouse.logs import log
from tolhouse.tracing import INVALID_SPAN, Span, under

_SCORED_TOKENS = 256  # the maximum number of prompt tokens whose logits are in memory at once
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)  # seconds
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_WAIT = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7.5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2.5)
Step = list[ScheduledChunk]
Sampled = dict[Sequence, tuple[int, Logprobs | None]]
Scores = dict[Sequence, Logprobs]


class Engine:
    def __init__(self, runner: Runner, scheduler: Scheduler, max_waiting: int) -> None:
        self.runner = runner  # the runner for new sequences
        self.scheduler, self.cache, self.max_waiting = scheduler, scheduler.cache, max_waiting
        self._served = {self.table: runner}  # one runner for each table version in use
        self._retired: Counter[str] = Counter()  # row counts of versions no longer in use
        self._lock = threading.Lock()  # guards the two fields above
        self.tokens = self.steps = 0  # sampled tokens, and completed steps
        self.step_seconds = self.forward_seconds = 0.0  # time of steps, and of their forward passes
        self.histograms = [
            Histogram(f"tolhouse_worker_{name}_seconds", text, buckets=buckets, registry=None)
            for name, text, buckets in (
                ("time_to_first_token", "Time from queueing to the first token", _LONG),
                ("inter_token", "Time between consecutive tokens", _SHORT),
                ("request", "Time from queueing to the last token", _LONG),
                ("step_row_wait", "Time that a step waited for rows", _WAIT),
            )
        ]
        self._mailbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Any thread may call the methods below.

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._mailbox.put(None)
        self._thread.join()
        for runner in self._served.values():
            runner.rows.close()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises OverloadedError if the queue is full, and PromptTooLongError if the KV cache is too
        small for the sequence.
        """
        # The cache never holds the last sampled token.
        tokens = sequence.prompt_tokens + max(1, sequence.sampling.max_tokens) - 1
        lengths = sequence.prompt_tokens, tokens, self.scheduler.max_step_tokens
        need = self.cache.policy.most_places(*lengths)
        if need > (capacity := self.cache.capacity_tokens):
            raise PromptTooLongError(f"{need} tokens exceed this worker's KV cache of {capacity}")
        if self.waiting >= self.max_waiting:
            raise OverloadedError(
                f"this worker's queue of {self.max_waiting} is full: try again later"
            )
        sequence.times = [time.perf_counter()]
        self._mailbox.put(lambda: self._enter(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence before the next step, without further output, unless it has ended."""
        self._mailbox.put(lambda: self.scheduler.remove(sequence))

    def use(self, runner: Runner) -> None:
        """Use another table version for new sequences. Running sequences keep theirs."""
        self._mailbox.put(lambda: self._use(runner))

    @property
    def rows(self) -> RowProvider:
        return self.runner.rows

    @property
    def table(self) -> str:
        """The "name@version" that new sequences use, or "" for a base model."""
        return self.rows.table

    def tables(self) -> list[str]:
        """Return the "name@version" of every table version in use."""
        with self._lock:
            return [table for table in self._served if table]

    def counts(self) -> Counter[str]:
        """Return row counts since the start, over all versions, by field of `RowCounts`."""
        with self._lock:
            total = self._retired.copy()
            for runner in self._served.values():
                total.update(runner.rows.counts())
            return total

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting) + self._mailbox.qsize()

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    # Only the engine's thread calls the methods below.

    def step(self) -> None:
        """Compute a token for each decoding sequence, and as many prompt tokens as fit."""
        step = self.scheduler.schedule()
        for table, runner in self._served.items():
            self._step([chunk for chunk in step if chunk.sequence.table == table], runner)
        self._retire()

    def _step(self, step: Step, runner: Runner) -> None:
        started, waited = time.perf_counter(), runner.rows.wait_seconds
        step, launched, staged = self._launch(step, runner)
        if not launched or not staged:
            return
        ready = time.perf_counter()
        if runner.rows.table:
            self.histograms[-1].observe(runner.rows.wait_seconds - waited)
        hidden_TD = runner.finish(launched, staged)
        runner.move(step)
        self._prefetch(step, runner.rows)
        ends = np.cumsum([chunk.count for chunk in step]).tolist()
        last = {c.sequence: end - 1 for c, end in zip(step, ends, strict=True) if c.samples}
        scores = self._score_prompts(step, ends, hidden_TD, runner)
        sampled_BD = hidden_TD[list(last.values())]
        logits_BV = runner.logits(sampled_BD) if last else sampled_BD
        computed = time.perf_counter()
        tokens, logprobs = sample(logits_BV, [sequence.state for sequence in last])
        sampled = dict(zip(last, zip(tokens, logprobs, strict=True), strict=True))
        self._post_process(step, sampled, scores, runner.rows)
        self.steps += 1
        self.forward_seconds += computed - ready
        self.step_seconds += time.perf_counter() - started

    def _enter(self, sequence: Sequence) -> None:
        sequence.table = self.table
        self.scheduler.add(sequence)

    def _use(self, runner: Runner) -> None:
        with self._lock:
            self.runner = self._served.setdefault(runner.rows.table, runner)
        if self.runner is not runner:  # sequences still use the old runner of this version
            runner.rows.close()

    def _retire(self) -> None:
        """Close table versions that are no longer in use."""
        if len(self._served) == 1:
            return
        sequences = self.scheduler.running + self.scheduler.waiting
        for table in self._served.keys() - {self.table, *(s.table for s in sequences)}:
            with self._lock:
                rows = self._served.pop(table).rows
                self._retired.update(rows.counts())
            # A thread closes the rows, because a fetch may be in flight.
            threading.Thread(target=rows.close, name="close rows", daemon=True).start()

    def _launch(
        self, step: Step, runner: Runner
    ) -> tuple[Step, Launched | None, StagedRows | None]:
        """Launch a step and stage its rows. Sequences whose rows cannot be read end with an error.

        The returned step has the remaining sequences.
        """
        while step:
            # The first layer's attention needs no rows. A GPU computes it while rows arrive.
            launched = runner.launch(step)
            try:
                with under(chunk.sequence.span for chunk in step):
                    staged = runner.rows.stage(token_ids(step))
                staged.scales = _scales(step, runner.rows)
                return step, launched, staged
            except TolhouseError as error:
                step = [chunk for chunk in step if self._survives(chunk, error, runner.rows)]
        return step, None, None

    def _survives(self, chunk: ScheduledChunk, error: TolhouseError, rows: RowProvider) -> bool:
        """Return whether the rows of a chunk can be read despite `error`.

        If they cannot, its sequence ends with an error.
        """
        ids = token_ids([chunk])
        try:
            # A damaged row fails the sequences that need it. A source that is down fails every
            # sequence with a row that is not cached.
            if len(rows.missing(ids)):
                if not isinstance(error, CorruptError):
                    raise error
                rows.stage(ids)
            return True
        except TolhouseError as failure:
            self._end(chunk.sequence, Output(error=failure))
            return False

    def _prefetch(self, step: Step, rows: RowProvider) -> None:
        """Fetch the rows of the next prompt chunks while the model computes this step."""
        room = self.scheduler.max_step_tokens
        ids: list[int] = []
        spans: list[Span] = []
        done = {chunk.sequence: chunk.last for chunk in step}
        for sequence in self.scheduler.running + self.scheduler.waiting:
            start = done.get(sequence, sequence.computed)
            part = sequence.ids[start : start + room - len(ids)]
            if part and sequence.table == rows.table:
                ids += part
                spans.append(sequence.span)
        if ids:
            with under(spans):
                rows.prefetch(np.array(ids, np.uint32))

    def _score_prompts(
        self, step: Step, ends: list[int], hidden_TD: Tensor, runner: Runner
    ) -> Scores:
        """Return the requested log probabilities of this step's prompt tokens.

        Log probabilities that were emitted before are left out.
        """
        scores: Scores = {}
        for chunk, end in zip(step, ends, strict=True):
            sequence, k = chunk.sequence, chunk.sequence.sampling.prompt_logprobs
            last = min(chunk.last, sequence.prompt_tokens - 1)
            if k is None or sequence.scored >= last:
                continue
            score = Logprobs([], [], [])
            is_text, first = sequence.policy.is_text, end - chunk.last
            after = [n for n in range(sequence.scored + 1, last + 1) if is_text(n)]
            for start in range(0, len(after), _SCORED_TOKENS):
                part = after[start : start + _SCORED_TOKENS]
                next_ids = [sequence.ids[n] for n in part]
                logits_TV = runner.logits(hidden_TD[[first + n - 1 for n in part]])
                score += prompt_logprobs(logits_TV, next_ids, k)
            sequence.scored = last
            scores[sequence] = score
        return scores

    def _post_process(
        self, step: Step, sampled: Sampled, scores: Scores, rows: RowProvider
    ) -> None:
        now, (first, between, whole, _) = time.perf_counter(), self.histograms
        outputs = list[tuple[Sequence, Output]]()
        for chunk in step:
            sequence = chunk.sequence
            output = Output(prompt_logprobs=scores.get(sequence))
            if sequence in sampled:
                output = sequence.append(*sampled[sequence], output.prompt_logprobs)
            outputs.append((sequence, output))
        self._expect(outputs, rows)
        for chunk, (sequence, output) in zip(step, outputs, strict=True):
            sequence.computed = chunk.last
            self.cache.commit(sequence, chunk.first, chunk.last)
            self.cache.trim(sequence)
            if sequence in sampled:
                self.tokens += len(output.tokens)
                arrived, *last = sequence.times
                (between if last else first).observe(now - (last or [arrived])[0])
                sequence.times = [arrived, now]
            if output.finish_reason:
                whole.observe(now - sequence.times[0])
                self._end(sequence, output)
            elif output.tokens or output.prompt_logprobs:
                sequence.emit(output)

    def _expect(self, outputs: list[tuple[Sequence, Output]], rows: RowProvider) -> None:
        """Request the rows of the sampled tokens, which arrive while results are sent."""
        if any(sequence.span is not INVALID_SPAN for sequence, _ in outputs):
            return  # the spans of a trace have to begin and end in the same block
        going_on = [o.tokens[-1] for _, o in outputs if o.tokens and not o.finish_reason]
        rows.expect(np.array(going_on, np.uint32))

    def _end(self, sequence: Sequence, output: Output) -> None:
        self.scheduler.remove(sequence)
        sequence.emit(output)

    @torch.inference_mode()
    def _run(self) -> None:
        while self.read_mail():
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - a defect ends the sequences, not the worker
                log.exception("engine step failed")
                message = f"the engine failed: {type(error).__name__}; see the log of the worker"
                for sequence in list(self.scheduler.running):
                    self._end(sequence, Output(error=InternalError(message)))

    def read_mail(self, *, wait: bool = True) -> bool:
        """Run the work that other threads queued. Returns False when the engine has to stop.

        With `wait`, an idle engine waits for work.
        """
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
    """Return the factors of the rows by layer and token, float32 [N, T], or None if all are 1."""
    if not rows.table or not any(chunk.sequence.sampling.probes for chunk in step):
        return None
    parts = []
    for chunk in step:
        sampling = chunk.sequence.sampling
        layer_scales = sampling.layer_scales or (1.0,) * rows.num_rows
        scales_N = torch.tensor(layer_scales) * sampling.row_scale
        scales_N[sorted(sampling.absent_layers)] = 0
        parts.append(scales_N[:, None].expand(-1, chunk.count))
    return torch.cat(parts, 1).to(rows.device)
