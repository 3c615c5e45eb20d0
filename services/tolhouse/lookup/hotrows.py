"""Rows of open tables: from the hot rows if they are there, else from the store, and then kept."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from tolhouse.errors import Corrupt, TolhouseError, Unavailable
from tolhouse.store import Store, resolve
from tolhouse.table.rowcache import RowCache
from tolhouse.table.spec import Buffer, Manifest

_MOST_OPEN_TABLES = 8


@dataclass
class OpenTable:
    manifest: Manifest
    hot: RowCache
    reading: dict[int, asyncio.Future] = field(default_factory=dict)  # rows on their way from the store


class HotRows:
    """Belongs to the event loop; store reads run in threads. Each open table has its own `hot_bytes`."""

    def __init__(self, store: Store, hot_bytes: int) -> None:
        self.store, self.hot_bytes = store, hot_bytes
        self._open: OrderedDict[str, OpenTable] = OrderedDict()

    async def table(self, ref: str) -> OpenTable:
        """The table "name@version", opened on first use; NotFound if the store lacks it."""
        table = self._open.get(ref)
        if table is None:
            manifest = await asyncio.to_thread(resolve, self.store, ref)
            hot = RowCache(self.hot_bytes, manifest.record_bytes, manifest.vocab_size)
            table = self._open.setdefault(ref, OpenTable(manifest, hot))
            while len(self._open) > _MOST_OPEN_TABLES:
                self._open.popitem(last=False)
        self._open.move_to_end(ref)
        return table

    async def missing(self, table: OpenTable, ids: list[int], read: dict[int, Buffer]) -> int:
        """Add to `read` the verified records of those `ids` that are neither there nor hot; how many those were.

        A row that someone else is reading already is waited for, not read again.
        """
        count = 0
        while wanted := [i for i in dict.fromkeys(ids) if i not in table.hot.slot_of and i not in read]:
            count = count or len(wanted)
            read |= await self._read(table, wanted)
        return count

    async def _read(self, table: OpenTable, missing: list[int]) -> dict[int, Buffer]:
        mine = [i for i in missing if i not in table.reading]
        theirs = {i: table.reading[i] for i in missing if i in table.reading}
        found: dict[int, Buffer] = {}
        if mine:
            done: asyncio.Future[dict[int, Buffer]] = asyncio.get_running_loop().create_future()
            done.add_done_callback(lambda future: future.exception())  # nobody may be waiting
            table.reading.update(dict.fromkeys(mine, done))
            wanted = np.array(mine, np.uint32)
            try:
                records = await asyncio.to_thread(self.store.records, table.manifest, wanted)
            except BaseException as error:
                if isinstance(error, Corrupt):
                    self._open.pop(table.manifest.ref, None)  # deleted, or built anew in other shards: read its manifest again
                done.set_exception(error if isinstance(error, TolhouseError) else Unavailable("the read was given up"))
                raise
            finally:
                for i in mine:
                    del table.reading[i]
            found = dict(zip(mine, records, strict=True))
            done.set_result(found)
            table.hot.insert(wanted, records)
        for i, other in theirs.items():
            found[i] = (await other)[i]
        return found
