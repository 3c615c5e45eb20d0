"""Hot rows of several versions, and rows that cannot be read."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from tolhouse.client.row_source import StoreRowSource
from tolhouse.errors import CorruptError
from tolhouse.lookup.hot_rows import HotRows, OpenTable
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import build_table, wait_until

from tests.tables import manifest_of, records_of, write


@contextmanager
def hot_rows(folder: Path, hot_bytes: int = 1 << 20, idle_seconds: float = 60) -> Iterator[HotRows]:
    url = f"file://{folder}"
    with closing(StoreRowSource(url, lambda: open_store(url))) as source:
        rows = HotRows(source, hot_bytes, idle_seconds)
        yield rows
        rows.close()


def ask(rows: HotRows, table: OpenTable, *ids: int) -> list[bytes]:
    """Return copies of the records of `ids`."""
    found: list[bytes] = []
    rows.send(table, np.array(ids, np.uint32), lambda part: found.extend(map(bytes, part)))
    return found


def test_an_unused_unpublished_version_is_closed(checkpoint: Path, tmp_path: Path) -> None:
    """Versions in use and the published version keep their hot rows; another version is closed and
    opened again on request."""
    published, used, idle = (
        build_table(checkpoint, f"file://{tmp_path}", name="unused", codec=codec)
        for codec in ("fp32", "int8", "int4")
    )
    with hot_rows(tmp_path, idle_seconds=0.4) as rows:
        publish(rows.source.store, published)
        first = {ref: rows.table(ref) for ref in (published, used, idle)}

        def closed() -> bool:
            assert first[used] is rows.table(used)
            return idle not in rows.open

        wait_until(closed)
        assert {published, used} == set(rows.open)
        again = rows.table(idle)
        assert again is not first[idle]
        assert 5 == len(ask(rows, again, *range(5)))


def test_a_corrupt_row_fails_only_requests_for_it(tmp_path: Path) -> None:
    """Requests that share a read with a corrupt row get their rows, and only the request for that
    row fails.

    Filling the cache skips the corrupt row.
    """
    manifest = manifest_of(num_shards=1, frequent=tuple(range(20)))
    with closing(open_store(f"file://{tmp_path}")) as store:
        write(store, manifest)
    (path,) = tmp_path.rglob("shard-*")
    data = bytearray(path.read_bytes())
    data[-43 * manifest.record_bytes] ^= 1  # the record of token 7 of 50
    path.write_bytes(data)
    records = records_of(manifest)
    with hot_rows(tmp_path) as rows, ThreadPoolExecutor(2) as pool:
        table = rows.table(manifest.ref)
        failed = pool.submit(ask, rows, table, 6, 7, 30)
        intact = pool.submit(ask, rows, table, 6, 30)
        with pytest.raises(CorruptError) as caught:
            failed.result()
        assert (7,) == caught.value.token_ids
        assert [records[6].tobytes(), records[30].tobytes()] == intact.result()
        wait_until(lambda: len(table.cache) == 49)
        for token in range(50):
            assert table.is_cached(np.array([token])) == (token != 7)
        with pytest.raises(CorruptError):
            ask(rows, table, 7)
        assert 49 == len(table.cache)


@pytest.mark.parametrize("room", [0, 3, 50])
def test_threads_share_a_small_cache(tmp_path: Path, room: int) -> None:
    """Concurrent requests get the right records in order, whether the cache holds none, some or all
    of them, and every row can be evicted afterwards."""
    manifest = manifest_of(num_shards=4)
    with closing(open_store(f"file://{tmp_path}")) as store:
        write(store, manifest)
    records = [record.tobytes() for record in records_of(manifest)]
    with hot_rows(tmp_path, room * manifest.record_bytes) as rows, ThreadPoolExecutor(8) as pool:
        table = rows.table(manifest.ref)

        def hammer(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(200):
                ids = random.integers(0, 50, random.integers(0, 20)).tolist()
                assert [records[i] for i in ids] == ask(rows, table, *ids)

        for done in [pool.submit(hammer, seed) for seed in range(8)]:
            done.result()
        assert not table.reading
        some = list(range(min(room, 50)))
        ask(rows, table, *some)
        assert table.is_cached(np.array(some, np.uint32))


def test_a_failed_send_releases_its_rows(tmp_path: Path) -> None:
    """If the receiver of records fails, its rows can be evicted again."""
    manifest = manifest_of(num_shards=1)
    with closing(open_store(f"file://{tmp_path}")) as store:
        write(store, manifest)
    with hot_rows(tmp_path, 10 * manifest.record_bytes) as rows:
        table = rows.table(manifest.ref)

        def fail(_: object) -> None:
            raise InterruptedError

        for _ in range(3):
            with pytest.raises(InterruptedError):
                rows.send(table, np.arange(10, dtype=np.uint32), fail)
        assert 10 == rows.send(table, np.arange(20, 30, dtype=np.uint32), len)
        assert table.is_cached(np.arange(20, 30))
