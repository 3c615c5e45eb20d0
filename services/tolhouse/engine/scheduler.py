"""Which tokens are computed in the next step: one each of the sequences that decode, and pieces of prompts up to a limit.

A sequence gets blocks of the KV cache as it grows. Where none is left, the one that came last gives its blocks back and
is computed again later (preemption by recompute); the first in order always gets on, so that all get to their end.
"""

import bisect
from dataclasses import dataclass

from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.sequence import Sequence


@dataclass
class Chunk:
    """Tokens `first` to `last` (not included) of a sequence are computed in a step."""

    sequence: Sequence
    first: int
    last: int

    @property
    def decodes(self) -> bool:
        return self.last - self.first == 1 and self.first > 0

    @property
    def samples(self) -> bool:
        """Whether the sequence gets a new token from this step."""
        return self.last == len(self.sequence.ids)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


class Scheduler:
    """Owns the queue and the batch, both in order of priority and then of arrival."""

    def __init__(self, cache: BlockManager, max_running: int, max_step_tokens: int) -> None:
        self.cache, self.max_running, self.max_step_tokens = cache, max_running, max_step_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._arrivals = 0

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self._arrivals
        self._arrivals += 1
        bisect.insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and its blocks back."""
        for place in (self.running, self.waiting):
            if sequence in place:
                place.remove(sequence)
                self.cache.release(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step: those that decode first, so that a long prompt holds nobody up, then prompts, old ones before new."""
        step: dict[Sequence, Chunk] = {}
        budget, preempted = self.max_step_tokens, self.preemptions
        for decoding in (True, False):
            for sequence in list(self.running):
                pending = len(sequence.ids) - sequence.computed
                if (
                    sequence in step
                    or (pending == 1) != decoding
                    or not budget
                    or not self._make_room(sequence, min(pending, budget), step)
                ):
                    continue
                count = min(pending, budget)
                step[sequence] = Chunk(sequence, sequence.computed, sequence.computed + count)
                budget -= count
        while (
            budget
            and self.waiting
            and len(self.running) < self.max_running
            and preempted == self.preemptions
        ):
            chunk = self._admit(self.waiting[0], budget)
            if not chunk:
                break  # in order: a large one is not overtaken for ever
            step[chunk.sequence] = chunk
            budget -= chunk.last - chunk.first
        return sorted(step.values(), key=lambda chunk: not chunk.decodes)

    def _make_room(self, sequence: Sequence, count: int, step: dict[Sequence, Chunk]) -> bool:
        """Blocks for `count` more tokens, at the expense of those behind it; False if it had to go itself."""
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

    def _admit(self, sequence: Sequence, budget: int) -> Chunk | None:
        found = self.cache.share(sequence)
        count = min(len(sequence.ids) - found, budget)
        # a block is left for each that runs: who joins is not thrown out by the next token of another
        lacking = -(-(found + count) // BLOCK_TOKENS) - len(sequence.blocks)
        if lacking + len(self.running) > self.cache.free_blocks or not self.cache.grow(
            sequence, found + count
        ):
            self.cache.release(sequence)
            return None
        self.cache.prompt_tokens += len(sequence.ids)
        self.cache.found_tokens += found
        self.waiting.pop(0)
        sequence.computed = found
        bisect.insort(self.running, sequence, key=_rank)
        return Chunk(sequence, found, found + count)
