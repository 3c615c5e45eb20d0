"""The row cache: a slab of fixed size with records of one table, and S3-FIFO eviction.

In S3-FIFO (Yang et al., SOSP 2023), rows enter a small queue with a tenth of the slots. Rows that
are used again move to the main queue. Other rows are evicted, and enter the main queue if they
return soon. Each use saves a row from one eviction round of the main queue. The owner of the cache
writes records into the slots that the cache assigns. Not thread-safe.
"""

from collections import deque

import numpy as np

from tolhouse.table.manifest import Manifest

MOST_USES = 3
_SMALL_SHARE = 10  # the small queue has one slot in ten


class RowCache:
    def __init__(self, slab: np.ndarray, vocab_size: int) -> None:
        """`slab` is uint8 [capacity, record_bytes], allocated by the owner."""
        self.slab, self.capacity = slab, len(slab)
        self.slot_of = np.full(vocab_size, -1, np.int32)
        self._uses = np.zeros(self.capacity, np.uint8)
        self._id_of = np.full(self.capacity, -1, np.int64)
        self._pins = np.zeros(self.capacity, np.int32)  # users of a slot, or 1 while reserved
        self._free = list(range(self.capacity - 1, -1, -1))
        self._small: deque[int] = deque()  # slots, with the oldest first
        self._main: deque[int] = deque()
        self._small_slots = max(1, self.capacity // _SMALL_SHARE)
        # For each row, the number of departures from the small queue when it left.
        self._left_at = np.full(vocab_size, -1 - self.capacity, np.int64)
        self._departures = 0

    def __len__(self) -> int:
        return self.capacity - len(self._free)

    def slots(self, ids: np.ndarray) -> np.ndarray:
        """Return the slots int32 [T] of `ids`, or -1 if not cached. Each hit counts as a use."""
        slots = self.slot_of[ids]
        self.use(slots[slots >= 0])
        return slots

    def pin_all(self, ids: np.ndarray) -> np.ndarray | None:
        """Pin the rows of `ids` and return their slots, or return None if not all are cached.

        This does not count as a use.
        """
        slots = self.slot_of[ids]
        if slots.min(initial=0) < 0:
            return None
        self.pin(slots)
        return slots

    def reserve(self, ids: np.ndarray, *, main: bool = False) -> np.ndarray:
        """Assign slots int32 [T] to distinct `ids` that are not cached, or -1 if there is no room.

        Other rows are evicted. The owner writes the records into the slots and calls `commit`, or
        calls `release`. Until then the slots have no row. `main` is for rows that are surely hot.
        """
        slots = np.full(len(ids), -1, np.int32)
        room = self.capacity - np.count_nonzero(self._pins)
        for n, i in enumerate(ids[:room].tolist()):
            slot = self._free.pop() if self._free else self._evict()
            self._pins[slot] = 1
            self._id_of[slot], self._uses[slot] = i, 0
            is_back = self._departures - self._left_at[i] < self.capacity
            (self._main if main or is_back else self._small).append(slot)
            slots[n] = slot
        return slots

    def commit(self, ids: np.ndarray, slots: np.ndarray) -> None:
        """Cache `ids`, whose records the owner has written into their reserved `slots`."""
        given = slots >= 0
        self.slot_of[ids[given]] = slots[given]
        self.unpin(slots[given])

    def release(self, slots: np.ndarray) -> None:
        """Free reserved `slots` without a record."""
        given = slots[slots >= 0]
        self.unpin(given)
        for slot in given.tolist():
            (self._main if slot in self._main else self._small).remove(slot)
            self._id_of[slot] = -1
            self._free.append(slot)

    def pin(self, slots: np.ndarray) -> None:
        """Protect the rows in `slots` from eviction until `unpin`.

        Several users may pin a row. A repeated slot counts once.
        """
        self._pins[slots] += 1

    def unpin(self, slots: np.ndarray) -> None:
        """Undo one `pin` of the same `slots`."""
        self._pins[slots] -= 1

    def use(self, slots: np.ndarray) -> None:
        """Count a use of the rows in `slots`."""
        uses = self._uses[slots] + np.uint8(1)
        self._uses[slots] = np.minimum(uses, MOST_USES, out=uses)

    def _evict(self) -> int:
        """Evict a row and return its slot. At least one row must be unpinned."""
        small, main, spared = self._small, self._main, 0
        while True:
            is_small = bool(small) and (len(small) >= self._small_slots or spared >= len(main))
            slot = (small if is_small else main).popleft()
            pinned, uses = bool(self._pins[slot]), int(self._uses[slot])
            if not pinned and uses < (2 if is_small else 1):
                break
            if is_small:
                self._uses[slot] = 0
            else:
                spared += pinned
                self._uses[slot] = uses - (not pinned)
            main.append(slot)
        left = self._id_of[slot]
        if is_small:
            self._departures += 1
            self._left_at[left] = self._departures
        self.slot_of[left] = -1
        return slot


def capacity_for(manifest: Manifest, most_bytes: int) -> int:
    """Return the number of slots that fit into `most_bytes`, with at most one per token."""
    return min(most_bytes // manifest.record_bytes, manifest.vocab_size)
