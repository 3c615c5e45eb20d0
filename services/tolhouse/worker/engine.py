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
from tolhouse.worker.sampler import sample
from tolhouse.worker.scheduler import Scheduler
from tolhouse.worker.sequence import Sequence


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
            logits_BV = self._forward(batch, rows_NTD)
            self._post_process(batch, sample(logits_BV, batch))

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
                    self._end(sequence, [], "", failure)
            return kept, torch.cat([part.to(parts[-1].device) for part in parts], dim=1)

    def _forward(self, batch: list[Sequence], rows_NTD: Tensor) -> Tensor:
        """Logits [B, V] after the last token of each sequence."""
        device = self.cache.k_NSHE.device
        counts = [len(s.ids) - s.computed for s in batch]
        ids_T = torch.tensor([i for s in batch for i in s.ids[s.computed :]], device=device)
        positions_T = torch.tensor([p for s in batch for p in range(s.computed, len(s.ids))], device=device)
        view = Decode(self.cache, batch) if batch[0].computed else Prefill(self.cache, batch)
        hidden_TD = self.model.hidden(ids_T, positions_T, view, rows_NTD)
        last_B = torch.tensor(counts).cumsum(0) - 1
        return self.model.lm_head(hidden_TD[last_B.to(device)])

    def _post_process(self, batch: list[Sequence], tokens: list[int]) -> None:
        for sequence, token in zip(batch, tokens, strict=True):
            sequence.computed = len(sequence.ids)
            reason = sequence.take(token)
            new = sequence.ids[sequence.computed :]
            if reason:
                self._end(sequence, new, reason, None)
            else:
                sequence.emit(new, "", None)
            self.tokens += len(new)
        self.steps += 1

    def _end(self, sequence: Sequence, tokens: list[int], reason: str, error: TolhouseError | None) -> None:
        self.scheduler.remove(sequence)
        sequence.emit(tokens, reason, error)

    @torch.inference_mode()
    def _run(self) -> None:
        while self._read_mailbox():
            try:
                self.step()
            except Exception as error:  # noqa: BLE001 - a defect: these sequences end, the worker lives on
                log.exception("engine step failed")
                for sequence in list(self.scheduler.running):
                    self._end(sequence, [], "", Internal(f"the engine failed: {type(error).__name__}; the worker's log has the details"))

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
