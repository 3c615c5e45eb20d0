"""Hot rows of several versions: those that nobody uses any more make room."""

import asyncio
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tolhouse.lookup import hot_rows as hotrows
from tolhouse.lookup.hot_rows import HotRows
from tolhouse.store import open_store, publish
from tolhouse.testing import build_table


def test_a_version_that_is_neither_used_nor_published_is_let_go_of(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one in use and the published one stay; the other is opened anew when it is asked for."""
    monkeypatch.setattr(hotrows, "_IDLE_SECONDS", 0.4)
    url = f"file://{tmp_path}"
    published, used, idle = (
        build_table(checkpoint, url, name="let-go", codec=codec)
        for codec in ("fp32", "int8", "int4")
    )

    async def run() -> None:
        with closing(open_store(url)) as store:
            publish(store, published)
            rows = HotRows(store, 1 << 20)
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
            async for part, read in rows.parts(again, ids, 5):
                assert [0, 1, 2, 3, 4] == part.tolist()
                assert set(read) <= {0, 1, 2, 3, 4}
            rows.close()

    asyncio.run(run())
