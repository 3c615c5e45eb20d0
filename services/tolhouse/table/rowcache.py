"""The hot-row cache of worker and lookup service: records of one table in one slab bounded in bytes, kept by SIEVE.

SIEVE (Zhang et al., NSDI 2024): a queue in order of arrival whose entries carry a "visited" bit. To evict, a hand moves
from the oldest entry towards the newest, clears the bits it meets and takes the first entry without one. A hit only
sets a bit. Not thread-safe: the cache belongs to one thread.
"""

from collections.abc import Iterable

import numpy as np

from tolhouse.table.spec import Buffer


class RowCache:
    def __init__(self, capacity_bytes: int, record_bytes: int, most_rows: int) -> None:
        self.capacity = min(capacity_bytes // record_bytes, most_rows)
        self.slab = np.empty((self.capacity, record_bytes), np.uint8)  # pages are taken when written
        self.slot_of: dict[int, int] = {}
        self.hits = self.misses = 0
        self._id_of = np.zeros(self.capacity, np.int64)
        self._visited = np.zeros(self.capacity, bool)
        self._newer = [-1] * self.capacity  # towards the head of the queue
        self._older = [-1] * self.capacity
        self._head = self._tail = self._hand = -1

    def __len__(self) -> int:
        return len(self.slot_of)

    def __getitem__(self, token_id: int) -> memoryview:
        """The record of a cached token: a view that holds until the next insert."""
        slot = self.slot_of[token_id]
        self.hits += 1
        self._visited[slot] = True
        return self.slab[slot].data

    def gather(self, ids: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the records of cached `ids` into their places in `out` [T, record_bytes]; True where one was cached."""
        slots = np.fromiter((self.slot_of.get(i, -1) for i in ids.tolist()), np.int64, len(ids))
        cached = slots >= 0
        hits = int(cached.sum())
        if hits == len(ids):
            np.take(self.slab, slots, axis=0, out=out)
        elif hits:
            out[cached] = self.slab[slots[cached]]
        self._visited[slots[cached]] = True
        self.hits += hits
        self.misses += len(ids) - hits
        return cached

    def insert(self, ids: np.ndarray, records: Iterable[Buffer | np.ndarray]) -> None:
        """Take in the records of `ids`, at the expense of others once the slab is full."""
        if not self.capacity:
            return
        for i, record in zip(ids.tolist(), records, strict=True):
            if i in self.slot_of:
                continue
            slot = len(self.slot_of) if len(self.slot_of) < self.capacity else self._evict()
            self.slab[slot] = np.frombuffer(record, np.uint8)
            self.slot_of[i], self._id_of[slot], self._visited[slot] = slot, i, False
            self._newer[slot], self._older[slot] = -1, self._head
            if self._head >= 0:
                self._newer[self._head] = slot
            else:
                self._tail = slot
            self._head = slot

    def _evict(self) -> int:
        slot = self._hand if self._hand >= 0 else self._tail
        while self._visited[slot]:
            self._visited[slot] = False
            slot = self._newer[slot] if self._newer[slot] >= 0 else self._tail
        newer, older = self._newer[slot], self._older[slot]
        self._hand = newer
        if newer >= 0:
            self._older[newer] = older
        else:
            self._head = older
        if older >= 0:
            self._newer[older] = newer
        else:
            self._tail = newer
        del self.slot_of[int(self._id_of[slot])]
        return slot
