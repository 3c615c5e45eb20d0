"""The scheduler, which chooses the decoding sequences and the prompt chunks of each step.

A sequence gets blocks of the KV cache as it grows. When no block is free, the scheduler preempts
the last sequence in the order of the batch: it frees the blocks, and recomputes the sequence later.
The first sequence is never preempted, so every sequence finishes.
"""

import bisect
import operator
from dataclasses import dataclass

import numpy as np

from tolhouse.engine.block_manager import BlockManager
from tolhouse.engine.sequence import Sequence


@dataclass
class ScheduledChunk:
    """The tokens of a sequence from `first` up to but not including `last`, for one step."""

    sequence: Sequence
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first

    @property
    def places(self) -> tuple[int, int]:
        """The place of the first token in the cache, and the place after the last token."""
        return self.first - self.sequence.dropped, self.last - self.sequence.dropped

    @property
    def decodes(self) -> bool:
        """Whether the chunk is one sampled token. The last token of a prompt does not count."""
        return self.count == 1 and self.first >= max(1, self.sequence.prompt_tokens)

    @property
    def samples(self) -> bool:
        """Whether this step samples a new token for the sequence."""
        return self.last == len(self.sequence.ids)


Chunks = dict[Sequence, ScheduledChunk]
_rank = operator.attrgetter("priority", "arrival")


def token_ids(step: list[ScheduledChunk]) -> np.ndarray:
    """Return the token ids of a step, uint32 [T]."""
    ids = [i for chunk in step for i in chunk.sequence.ids[chunk.first : chunk.last]]
    return np.array(ids, np.uint32)


class Scheduler:
    """Owns the queue and the batch. Both are ordered by priority, then by arrival."""

    def __init__(self, cache: BlockManager, max_running: int, max_step_tokens: int) -> None:
        self.cache, self.max_running, policy = cache, max_running, cache.policy
        self._burst = 1 + len(policy.summary)  # the most tokens that a sampled token adds
        least = max_running * self._burst + policy.observed
        self.max_step_tokens = max(least, max_step_tokens)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._arrivals = 0

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self._arrivals
        sequence.follow(self.cache.policy)
        self._arrivals += 1
        bisect.insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence from the queue or the batch, and free its blocks."""
        for sequences in (self.running, self.waiting):
            if sequence in sequences:
                sequences.remove(sequence)
                self.cache.release(sequence)

    def schedule(self) -> list[ScheduledChunk]:
        """Return the next step. Decoding sequences come first, then chunks of prompts in order.

        A long prompt does not delay decoding sequences.
        """
        step: Chunks = {}
        budget, preemptions = self.max_step_tokens, self.preemptions
        for decoding in (True, False):
            for sequence in list(self.running):
                pending = len(sequence.ids) - sequence.computed
                first = sequence.computed
                last = first + min(pending, budget)
                count = sequence.policy.chunk_end(sequence, first, last) - first
                fits = count and decoding == (pending <= self._burst)
                if fits and self._make_room(sequence, count, step):
                    step[sequence] = ScheduledChunk(sequence, first, first + count)
                    budget -= count
        # Sequences are admitted in order. A small sequence does not overtake a large one, and none
        # is admitted in a step that preempted a sequence.
        full = self.preemptions > preemptions
        while not full and budget and self.waiting and len(self.running) < self.max_running:
            chunk = self._admit(self.waiting[0], budget)
            if not chunk:
                break
            step[chunk.sequence] = chunk
            budget -= chunk.count
        return sorted(step.values(), key=lambda chunk: not chunk.decodes)

    def _make_room(self, sequence: Sequence, count: int, step: Chunks) -> bool:
        """Allocate blocks for `count` more tokens, and preempt later sequences if necessary.

        Returns False if the sequence itself is or was preempted.
        """
        if sequence not in self.running:
            return False
        while not self.cache.grow(sequence, sequence.computed + count):
            last = self.running.pop()
            self.cache.release(last)
            last.computed = 0
            step.pop(last, None)
            bisect.insort(self.waiting, last, key=_rank)
            self.preemptions += 1
            if last is sequence:
                return False
        return True

    def _admit(self, sequence: Sequence, budget: int) -> ScheduledChunk | None:
        shared = self.cache.share(sequence)
        last = min(shared + budget, len(sequence.ids))
        last = sequence.policy.chunk_end(sequence, shared, last)
        # One block stays free for each running sequence. Their next tokens would otherwise preempt
        # the new sequence.
        lacking = sum(self.cache.lacking(sequence, last))
        fits = last > shared and lacking + len(self.running) <= self.cache.free_blocks
        if not fits or not self.cache.grow(sequence, last):
            self.cache.release(sequence)
            return None
        self.cache.prompt_tokens += sequence.policy.text_tokens(len(sequence.ids))
        self.cache.shared_tokens += shared
        self.waiting.pop(0)
        sequence.computed = shared
        bisect.insort(self.running, sequence, key=_rank)
        return ScheduledChunk(sequence, shared, last)
