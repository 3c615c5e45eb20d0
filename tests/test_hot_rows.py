"""Hot rows of several versions: those that nobody uses any more make room."""

import asyncio
from contextlib import closing
from pathlib import Path

import numpy as np
from tolhouse.client.row_source import StoreRowSource
from tolhouse.lookup.hot_rows import HotRows
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import build_table


def test_a_version_that_is_neither_used_nor_published_is_let_go_of(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The one in use and the published one stay; the other is opened anew when it is asked for."""
    url = f"file://{tmp_path}"
    published, used, idle = (
        build_table(checkpoint, url, name="let-go", codec=codec)
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
