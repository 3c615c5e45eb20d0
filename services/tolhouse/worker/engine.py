"""The engine: `step()` is schedule, resolve rows, forward, sample, post-process. One thread calls it.

Other threads reach it through `add` and `cancel`, which leave word in a mailbox that the next step reads.
"""

import queue
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tolhouse.errors import Corrupt, Internal, Overloaded, PromptTooLong, TolhouseError
from tolhouse.model.transformer import Transformer
from tolhouse.telemetry import log
from tolhouse.worker.kv_cache import Decode, KVCache, Prefill
from tolhouse.worker.rows import NoRows, Rows
from tolhouse.worker.sampler import Logprobs, prompt_logprobs, sample
from tolhouse.worker.scheduler import Scheduler
from tolhouse.worker.sequence import Output, Sequence

_SCORED_TOKENS = 256  # prompt tokens whose logits are in memory at a time


class Engine:
    def __init__(
        self, model: Transformer, rows: Rows | NoRows, cache: KVCache, max_running: int, max_waiting: int, max_prefill_tokens: int
    ) -> None:
        self.model, self.rows, self.cache, self.max_waiting = model, rows, cache, max_waiting
        self.scheduler = Scheduler(cache, max_running, max_prefill_tokens)
        self.tokens = self.steps = 0  # sampled tokens, and steps run
        self._mailbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # from any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._mailbox.put(None)
        self._thread.join()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; Overloaded if the queue is full, PromptTooLong if the KV cache could never hold it."""
        if sequence.most_tokens > self.cache.capacity_tokens:
            raise PromptTooLong(
                f"prompt and answer need {sequence.most_tokens} tokens of KV cache; this worker has {self.cache.capacity_tokens}"
            )
        if self.waiting >= self.max_waiting:
            raise Overloaded(f"{self.waiting} requests are waiting already, the most that this worker queues: try again later")
        self._mailbox.put(lambda: self.scheduler.waiting.append(sequence))

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence at the next step; nothing more is emitted for it. One that has ended is left alone."""
        self._mailbox.put(lambda: self.scheduler.remove(sequence))

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting) + self._mailbox.qsize()

    @property
    def running(self) -> int:
        return len(self.scheduler.running)

    # from the engine's thread

    def step(self) -> None:
        """Prefill of the sequences that join, or one more token for all that run."""
        batch = self.scheduler.schedule()
        batch, rows_NTD = self._resolve(batch)
        if batch:
            hidden_TD = self._forward(batch, rows_NTD)
            last_B = torch.tensor([len(s.ids) - s.computed for s in batch]).cumsum(0) - 1
            tokens, logprobs = sample(self.model.lm_head(hidden_TD[last_B.to(hidden_TD.device)]), [s.state for s in batch])
            self._post_process(batch, tokens, logprobs, self._score_prompts(batch, hidden_TD))

    def _resolve(self, batch: list[Sequence]) -> tuple[list[Sequence], Tensor]:
        """The rows of the step. Where they can't all be had, those sequences end with the error and the others go on."""
        try:
            return batch, self.rows.resolve(np.concatenate([_new_ids(s) for s in batch]))
        except TolhouseError as error:
            kept, parts = [], [torch.empty(self.model.config.num_row_layers, 0, self.model.config.hidden_size)]
            for sequence in batch:
                ids = _new_ids(sequence)
                try:
                    # a bad row fails who asked for it; an unreachable service fails all who miss a row, without another wait
                    if not isinstance(error, Corrupt) and not self.rows.has(ids):
                        raise error  # noqa: TRY201 - this loop's failure is its own
                    parts.append(self.rows.resolve(ids))
                    kept.append(sequence)
                except TolhouseError as failure:
                    self._end(sequence, Output(error=failure))
            return kept, torch.cat([part.to(parts[-1].device) for part in parts], dim=1)

    def _forward(self, batch: list[Sequence], rows_NTD: Tensor) -> Tensor:
        """Final hidden states [T, D] of the batch's new tokens."""
        device = self.cache.k_NSHE.device
        ids_T = torch.tensor([i for s in batch for i in s.ids[s.computed :]], device=device)
        positions_T = torch.tensor([p for s in batch for p in range(s.computed, len(s.ids))], device=device)
        view = Decode(self.cache, batch) if batch[0].computed else Prefill(self.cache, batch)
        return self.model.hidden(ids_T, positions_T, view, rows_NTD)

    def _score_prompts(self, batch: list[Sequence], hidden_TD: Tensor) -> list[Logprobs | None]:
        """For sequences that want it, and whose prompt is in this step: the log probabilities of its tokens."""
        scores: list[Logprobs | None] = []
        start = 0
        for sequence in batch:
            first, end = sequence.computed, len(sequence.ids)
            k, score = sequence.sampling.prompt_logprobs, None
            if k is not None and first < sequence.prompt_tokens:
                score = Logprobs([], [], [])
                for at in range(first, sequence.prompt_tokens - 1, _SCORED_TOKENS):
                    next_ids = sequence.ids[at + 1 : min(at + 1 + _SCORED_TOKENS, sequence.prompt_tokens)]
                    place = start + at - first
                    score += prompt_logprobs(self.model.lm_head(hidden_TD[place : place + len(next_ids)]), next_ids, k)
            scores.append(score)
            start += end - first
        return scores

    def _post_process(
        self, batch: list[Sequence], tokens: list[int], logprobs: list[Logprobs | None], prompts: list[Logprobs | None]
    ) -> None:
        for sequence, token, logprob, prompt in zip(batch, tokens, logprobs, prompts, strict=True):
            sequence.computed = len(sequence.ids)
            reason = sequence.take(token)
            new = sequence.ids[sequence.computed :]
            end_id = token if reason == "stop" else None
            output = Output(new, reason, None, end_id, logprob if sequence.sampling.max_tokens else None, prompt)
            if reason:
                self._end(sequence, output)
            else:
                sequence.emit(output)
            self.tokens += len(new)
        self.steps += 1

    def _end(self, sequence: Sequence, output: Output) -> None:
        self.scheduler.remove(sequence)
        sequence.emit(output)

    @torch.inference_mode()
    def _run(self) -> None:
        while self._read_mailbox():
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - a defect: these sequences end, the worker lives on
                log.exception("engine step failed")
                for sequence in list(self.scheduler.running):
                    failure = Internal(f"the engine failed: {type(error).__name__}; the worker's log has the details")
                    self._end(sequence, Output(error=failure))

    def _read_mailbox(self) -> bool:
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


def _new_ids(sequence: Sequence) -> np.ndarray:
    return np.array(sequence.ids[sequence.computed :], np.uint32)
