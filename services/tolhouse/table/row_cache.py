"""The hot-row cache of worker and lookup service: records of one table in one slab bounded in bytes, kept by S3-FIFO.

S3-FIFO (Yang et al., SOSP 2023): newcomers pass through a small queue, a tenth of the slab. Those that are asked for
again while they wait go on to the main queue, the others leave and are remembered for a while; who comes back then goes
to the main queue at once. A hit only counts a use, of which each spares a row one round of the main queue.

The cache says which row belongs in which slot; its owner puts the bytes there. Not thread-safe: it belongs to one thread.
"""

from collections import deque

import numpy as np

from tolhouse.table.manifest import Manifest

MOST_USES = 3
_SMALL_SHARE = 10  # one slot in ten is for newcomers


class RowCache:
    def __init__(self, slab: np.ndarray, slot_of: np.ndarray, uses: np.ndarray) -> None:
        """`slab` uint8 [capacity, record_bytes]; `slot_of` int32 [V], all -1; `uses` uint8 [capacity]: memory of the owner's."""
        self.slab, self.slot_of, self.uses = slab, slot_of, uses
        self.capacity = len(slab)
        self.hits = self.misses = 0
        self._id_of = np.full(self.capacity, -1, np.int64)
        self._free = list(range(self.capacity - 1, -1, -1))
        self._small: deque[int] = deque()  # slots, oldest first
        self._main: deque[int] = deque()
        self._small_slots = max(1, self.capacity // _SMALL_SHARE)
        self._left_at = np.full(
            len(slot_of), -1 - self.capacity, np.int64
        )  # a clock of departures: who left lately is remembered
        self._departures = 0
        self._kept = np.zeros(self.capacity, bool)  # reserved, or in use

    @classmethod
    def private(cls, manifest: Manifest, most_bytes: int) -> "RowCache":
        """A cache in memory of its own, for at most all rows of the table."""
        capacity = capacity_for(manifest, most_bytes)
        slab = np.empty((capacity, manifest.record_bytes), np.uint8)  # pages are taken when written
        return cls(slab, np.full(manifest.vocab_size, -1, np.int32), np.zeros(capacity, np.uint8))

    def __len__(self) -> int:
        return self.capacity - len(self._free)

    def slots(self, ids: np.ndarray) -> np.ndarray:
        """Slots int32 [T] of `ids`, -1 where one is not cached. Each hit counts as a use."""
        slots = self.slot_of[ids]
        found = slots[slots >= 0]
        self.uses[found] = np.minimum(self.uses[found] + 1, MOST_USES)
        self.hits += len(found)
        self.misses += len(ids) - len(found)
        return slots

    def reserve(self, ids: np.ndarray, *, main: bool = False) -> np.ndarray:
        """Slots int32 [T] for the records of distinct `ids` that are not cached, at the expense of others; -1 without room.

        The owner writes the records there and then says `settle`, or `release`. Until then the slots are nobody's, and
        nobody gets them. `main`: these rows are known to be hot.
        """
        slots = np.full(len(ids), -1, np.int32)
        for place, i in enumerate(ids[: self.capacity - np.count_nonzero(self._kept)].tolist()):
            slot = self._free.pop() if self._free else self._evict()
            self._kept[slot] = True
            self._id_of[slot], self.uses[slot] = i, 0
            (
                self._main
                if main or self._departures - self._left_at[i] < self.capacity
                else self._small
            ).append(slot)
            slots[place] = slot
        return slots

    def settle(self, ids: np.ndarray, slots: np.ndarray) -> None:
        """The records of `ids` are in their reserved `slots`: from now on they are cached."""
        given = slots >= 0
        self.slot_of[ids[given]] = slots[given]
        self.unkeep(slots[given])

    def release(self, slots: np.ndarray) -> None:
        """Nothing came of these reserved `slots`."""
        given = slots[slots >= 0]
        self.unkeep(given)
        for slot in given.tolist():
            (self._main if slot in self._main else self._small).remove(slot)
            self._id_of[slot] = -1
            self._free.append(slot)

    def keep(self, slots: np.ndarray) -> None:
        """Let the rows in `slots` stay until `unkeep`."""
        self._kept[slots] = True

    def unkeep(self, slots: np.ndarray) -> None:
        self._kept[slots] = False

    def _evict(self) -> int:
        """A slot whose row has left; one at least is not kept."""
        small, main = self._small, self._main
        spared = 0
        while True:
            if small and (len(small) >= self._small_slots or spared >= len(main)):
                slot = small.popleft()
                if not self._kept[slot] and self.uses[slot] < 2:
                    i = int(self._id_of[slot])
                    self._departures += 1
                    self._left_at[i] = self._departures
                    break
                self.uses[slot] = 0
                main.append(slot)
            else:
                slot = main.popleft()
                if not self._kept[slot] and not self.uses[slot]:
                    i = int(self._id_of[slot])
                    break
                spared += bool(self._kept[slot])
                self.uses[slot] -= not self._kept[slot]
                main.append(slot)
        self.slot_of[i] = -1
        return slot


def capacity_for(manifest: Manifest, most_bytes: int) -> int:
    """Slots of a cache of at most `most_bytes`."""
    return min(most_bytes // manifest.record_bytes, manifest.vocab_size)
