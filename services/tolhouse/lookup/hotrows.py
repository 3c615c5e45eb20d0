"""Rows of open tables: from the hot rows if they are there, else from the store, and then kept."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from tolhouse.errors import Corrupt
from tolhouse.store import Store, resolve
from tolhouse.table.rowcache import RowCache
from tolhouse.table.spec import Manifest

_MOST_OPEN_TABLES = 8


@dataclass
class OpenTable:
    manifest: Manifest
    hot: RowCache


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

    async def read(self, table: OpenTable, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Verified records [T, record_bytes] of `ids`, and how many of them were hot."""
        out = np.empty((len(ids), table.manifest.record_bytes), np.uint8)
        hot = table.hot.gather(ids, out)
        missing = np.flatnonzero(~hot)
        if len(missing):
            wanted, inverse = np.unique(ids[missing], return_inverse=True)
            records = np.empty((len(wanted), table.manifest.record_bytes), np.uint8)
            try:
                await asyncio.to_thread(self.store.read, table.manifest, wanted, records)
            except Corrupt:
                self._open.pop(table.manifest.ref, None)  # deleted, or built anew in other shards: read its manifest again
                raise
            out[missing] = records[inverse]
            table.hot.insert(wanted, records)
        return out, len(ids) - len(missing)
