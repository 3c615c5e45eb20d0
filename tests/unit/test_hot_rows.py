"""Hot rows of several versions, and rows that cannot be read."""

import asyncio
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tolhouse.client.row_source import StoreRowSource
from tolhouse.errors import CorruptError
from tolhouse.lookup.hot_rows import HotRows, OpenTable
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import build_table

from tests.tables import manifest_of, records_of, write


def test_an_unused_unpublished_version_is_closed(checkpoint: Path, tmp_path: Path) -> None:
    """Versions in use and the published version keep their hot rows; another version is closed and
    opened again on request."""
    url = f"file://{tmp_path}"
    published, used, idle = (
        build_table(checkpoint, url, name="unused", codec=codec)
        for codec in ("fp32", "int8", "int4")
    )

    async def run() -> None:
        with closing(StoreRowSource(url, lambda: open_store(url))) as source:
            publish(source.store, published)
            rows = HotRows(source, 1 << 20, idle_seconds=0.4)
            first = {ref: await rows.table(ref) for ref in (published, used, idle)}
            for _ in range(600):
                await asyncio.sleep(0.05)
                assert first[used] is await rows.table(used)
                if idle not in rows.open:
                    break
            assert {published, used} == set(rows.open)
            again = await rows.table(idle)
            assert again is not first[idle]
            ids = np.arange(5, dtype=np.uint32)
            found = [len(records) async for records, _ in rows.chunks(again, ids)]
            assert [5] == found
            rows.close()

    asyncio.run(run())


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

    async def ask(rows: HotRows, table: OpenTable, *ids: int) -> list[bytes]:
        wanted = np.array(ids, np.uint32)
        return [bytes(r) async for part, _ in rows.chunks(table, wanted) for r in part]

    async def run() -> None:
        url = f"file://{tmp_path}"
        with closing(StoreRowSource(url, lambda: open_store(url))) as source:
            rows = HotRows(source, 1 << 20)
            table = await rows.table(manifest.ref)
            both = ask(rows, table, 6, 7, 30), ask(rows, table, 6, 30)
            failed, intact = await asyncio.gather(*both, return_exceptions=True)
            assert isinstance(failed, CorruptError)
            assert (7,) == failed.token_ids
            assert [records[6].tobytes(), records[30].tobytes()] == intact
            while len(table.cache) < 49:
                await asyncio.sleep(0.01)
            assert [7] == table.cold(np.arange(50, dtype=np.uint32))
            with pytest.raises(CorruptError):
                await ask(rows, table, 7)
            assert 49 == len(table.cache)
            rows.close()

    asyncio.run(run())
