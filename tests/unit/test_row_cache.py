"""The row cache against a slow, simple S3-FIFO."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tolhouse.table.row_cache import RowCache, capacity_for

from tests.tables import manifest_of

VOCABULARY = 12
LISTS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5, unique=True)


def cache_of(capacity: int, vocab_size: int = VOCABULARY) -> RowCache:
    return RowCache(np.zeros((capacity, 8), np.uint8), vocab_size)


def fill(cache: RowCache, ids: np.ndarray, **more: bool) -> np.ndarray:
    """Add `ids` with records that identify their tokens."""
    slots = cache.reserve(ids, **more)
    cache.slab[slots[slots >= 0]] = record_of(ids[slots >= 0])
    cache.commit(ids, slots)
    return slots


def record_of(ids: np.ndarray) -> np.ndarray:
    return ids.astype("<u8").view(np.uint8).reshape(-1, 8)


class S3Fifo:
    """S3-FIFO as in the paper: two queues from oldest to newest, use counts, and a ghost queue."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.small, self.main, self.uses, self.ghosts = capacity, [], [], {}, []

    def access(self, ids: list[int]) -> list[bool]:
        hits = [i in self.uses for i in ids]
        kept = {i for i in ids if i in self.uses}
        for i in kept:
            self.uses[i] = min(3, self.uses[i] + 1)
        for i in [i for i in ids if i not in kept][: self.capacity - len(kept)]:
            if len(self.uses) == self.capacity:
                self.evict(kept)
            (self.main if i in self.ghosts else self.small).append(i)
            self.uses[i] = 0
            kept.add(i)
        return hits

    def evict(self, kept: set[int]) -> None:
        spared = 0
        while True:
            full = len(self.small) >= max(1, self.capacity // 10)
            if self.small and (full or spared >= len(self.main)):
                i = self.small.pop(0)
                if i not in kept and self.uses[i] < 2:
                    self.ghosts = [*self.ghosts, i][-self.capacity :]
                    break
                self.uses[i] = 0
                self.main.append(i)
            else:
                i = self.main.pop(0)
                if i not in kept and self.uses[i] == 0:
                    break
                spared += i in kept
                self.uses[i] -= i not in kept
                self.main.append(i)
        del self.uses[i]


@given(st.integers(0, 6), st.lists(LISTS, max_size=40))
@settings(max_examples=400, deadline=None)
def test_the_cache_is_s3_fifo_and_never_mixes_rows(capacity: int, batches: list[list[int]]) -> None:
    """Hits, contents and bytes equal those of the simple implementation; pinned rows stay, and the
    capacity holds."""
    cache, slow = cache_of(capacity), S3Fifo(capacity)
    for batch in batches:
        ids = np.array(batch, np.uint32)
        slots = cache.slots(ids)
        cached = slots >= 0
        assert slow.access(batch) == cached.tolist()
        cache.pin(slots[cached])
        slots[~cached] = fill(cache, ids[~cached])
        cache.unpin(slots[cached])
        given_ = slots >= 0
        assert min(len(ids), capacity) == given_.sum() == len(set(slots[given_].tolist()))
        assert record_of(ids[given_]).tobytes() == cache.slab[slots[given_]].tobytes()
        assert set(slow.uses) == set(np.flatnonzero(cache.slot_of >= 0).tolist())
        assert len(slow.uses) == len(cache)


@given(st.integers(1, 6), st.lists(st.tuples(LISTS, st.booleans()), max_size=40))
@settings(max_examples=200, deadline=None)
def test_released_reservations_leave_no_trace(
    capacity: int, batches: list[tuple[list[int], bool]]
) -> None:
    """A failed fetch leaves no row behind and does not lose a slot."""
    cache = cache_of(capacity)
    for batch, fails in batches:
        ids = np.array(batch, np.uint32)
        ids = ids[cache.slots(ids) < 0]
        if not fails:
            fill(cache, ids)
            continue
        slots = cache.reserve(ids)
        assert (cache.slot_of[ids] == -1).all()
        cache.release(slots)
        assert (cache.slot_of[ids] == -1).all()
    everything = np.arange(VOCABULARY, dtype=np.uint32)
    absent = everything[cache.slot_of < 0]
    assert min(capacity, len(absent)) == (fill(cache, absent) >= 0).sum()


def test_a_reserved_slot_is_not_reused() -> None:
    """While one reader's rows are being fetched, another reader gets other slots or none."""
    cache = cache_of(4)
    first = cache.reserve(np.array([0, 1, 2], np.uint32))
    second = cache.reserve(np.array([3, 4, 5], np.uint32))
    assert [True, False, False] == (second >= 0).tolist()
    assert 4 == len({*first.tolist(), second[0]})
    assert [-1] == cache.reserve(np.array([6], np.uint32)).tolist()


def test_a_cache_filled_with_hot_rows_keeps_them_through_a_scan() -> None:
    """Rows that are requested once pass through the small queue, and rows known to be hot stay."""
    cache = cache_of(20, 1000)
    hot = np.arange(18, dtype=np.uint32)
    fill(cache, hot, main=True)
    for i in range(100, 1000):
        fill(cache, np.array([i], np.uint32))
    assert (cache.slot_of[hot] >= 0).all()


def test_the_capacity_is_limited_by_the_budget_and_the_table() -> None:
    """The budget is rounded down to whole records and limited by the table's size."""
    manifest = manifest_of(codec_name="fp32", vocab_size=10, blocks=("ffn.0",), width=4)
    assert 24 == manifest.record_bytes
    assert [0, 1, 1, 10] == [capacity_for(manifest, most) for most in (23, 24, 47, 1 << 40)]
