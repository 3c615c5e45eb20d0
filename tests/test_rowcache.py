"""The row cache, against a slow SIEVE that is plainly right."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tolhouse.table.rowcache import RowCache

RECORD = 8


def record_of(ids: np.ndarray) -> np.ndarray:
    """A record that tells its token."""
    return ids.astype("<u8").view(np.uint8).reshape(-1, RECORD)


class Sieve:
    """SIEVE as the paper tells it: a list from oldest to newest, a visited bit each, and a hand."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.queue, self.visited, self.hand = capacity, [], {}, 0

    def access(self, ids: list[int]) -> list[bool]:
        hits = [i in self.visited for i in ids]
        for i, hit in zip(ids, hits, strict=True):
            if hit:
                self.visited[i] = True
        for i, hit in zip(ids, hits, strict=True):
            if not hit and self.capacity:
                if len(self.queue) == self.capacity:
                    self.evict()
                self.queue.append(i)
                self.visited[i] = False
        return hits

    def evict(self) -> None:
        at = self.hand
        while self.visited[self.queue[at]]:
            self.visited[self.queue[at]] = False
            at = (at + 1) % len(self.queue)
        del self.visited[self.queue.pop(at)]
        self.hand = at if at < len(self.queue) else 0  # past the newest, it begins with the oldest again


@given(st.integers(0, 6), st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True), max_size=40))
@settings(max_examples=400, deadline=None)
def test_the_cache_is_sieve_and_never_mixes_rows(capacity: int, batches: list[list[int]]) -> None:
    """Hits, contents and bytes are those of the slow one, whatever is asked for; the bound holds."""
    cache, slow = RowCache(capacity * RECORD + 7, RECORD, 100), Sieve(capacity)
    hits = asked = 0
    for batch in batches:
        ids = np.array(batch, np.uint32)
        out = np.zeros((len(ids), RECORD), np.uint8)
        cached = cache.gather(ids, out)
        assert slow.access(batch) == cached.tolist()
        assert record_of(ids[cached]).tobytes() == out[cached].tobytes()
        cache.insert(ids[~cached], record_of(ids[~cached]))
        assert set(slow.visited) == set(cache.slot_of)
        assert len(cache) <= capacity
        hits, asked = hits + int(cached.sum()), asked + len(ids)
        assert (hits, asked - hits) == (cache.hits, cache.misses)
    assert capacity * RECORD >= cache.slab.nbytes


def test_a_cache_never_takes_more_than_the_table_has() -> None:
    """A large budget over a small table allocates the table's rows."""
    assert (10, RECORD) == RowCache(1 << 40, RECORD, 10).slab.shape
