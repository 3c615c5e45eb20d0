"""Which sequences run in the next step: new ones first, as long as batch and KV cache have room, else all running ones."""

from collections import deque

from tolhouse.worker.kv_cache import KVCache
from tolhouse.worker.sequence import Sequence


class Scheduler:
    """Owns the queue and the batch. A sequence gets all the blocks it may ever need when it joins: no step can run out."""

    def __init__(self, cache: KVCache, max_running: int, max_prefill_tokens: int) -> None:
        self.cache, self.max_running, self.max_prefill_tokens = cache, max_running, max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step: those that join, with their prompts, or else all that run, with a token each."""
        joining: list[Sequence] = []
        tokens = 0
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            tokens += len(sequence.ids)
            if (joining and tokens > self.max_prefill_tokens) or not self.cache.has_room(sequence.most_tokens):
                break  # in the order of arrival: a large one is not overtaken for ever
            self.waiting.popleft()
            sequence.blocks = self.cache.reserve(sequence.most_tokens)
            joining.append(sequence)
            self.running.append(sequence)
        return joining or list(self.running)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.cache.release(sequence.blocks)
            sequence.blocks = []
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
