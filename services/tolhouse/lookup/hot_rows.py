"""Rows of open tables: from the hot rows if they are there, else from the store, and then kept.

The hot rows lie in this process' memory. They are filled with the manifest's
frequent tokens when a table is opened, and kept by the row cache's policy from then on. A version that nobody has used for a while is let go of,
unless its name stands for it.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from tolhouse import tracing
from tolhouse.errors import Corrupt, TolhouseError
from tolhouse.logs import event
from tolhouse.store import LEASE_SECONDS, Store, resolve, stands_for, tables
from tolhouse.table.manifest import Buffer, Manifest
from tolhouse.table.row_cache import RowCache

_MOST_OPEN_TABLES = 8
_IDLE_SECONDS = 2 * LEASE_SECONDS  # without a word from anyone who uses it, a table is closed
_READ_BYTES = 4 << 20  # read from the store at once

Arrival = Future[dict[int, Buffer]]  # of verified records from the store, by token


@dataclass
class OpenTable:
    manifest: Manifest
    hot: RowCache
    reading: dict[int, Arrival] = field(default_factory=dict)  # rows on their way from the store
    lock: threading.Lock = field(default_factory=threading.Lock)  # of `hot` and `reading`
    used: float = 0.0  # last, by the monotonic clock

    @property
    def flat(self) -> memoryview:
        """The hot rows' bytes."""
        return memoryview(self.hot.slab.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer

    @property
    def idle(self) -> bool:
        return time.monotonic() - self.used > _IDLE_SECONDS

    def lacks(self, ids: np.ndarray, read: dict[int, Buffer] | None = None) -> bool:
        """Whether one of `ids` is neither hot nor among those just read."""
        cold = ids[self.hot.slot_of[ids] < 0]
        return len(cold) > 0 and (not read or any(i not in read for i in cold.tolist()))

    def records(self, ids: np.ndarray, read: dict[int, Buffer]) -> list[Buffer]:
        """Records of `ids`, hot or among those just read, where they lie: good while the lock is held."""
        size, flat = self.manifest.record_bytes, self.flat
        slots = self.hot.slots(ids)
        if not read:
            return [flat[slot * size : (slot + 1) * size] for slot in slots.tolist()]
        found = zip(ids.tolist(), slots.tolist(), strict=True)
        return [
            flat[slot * size : (slot + 1) * size] if slot >= 0 else read[i] for i, slot in found
        ]


class HotRows:
    """Tables are opened on the event loop, rows are read in threads. Each open table has its own `hot_bytes`."""

    def __init__(self, store: Store, hot_bytes: int) -> None:
        self.store, self.hot_bytes = store, hot_bytes
        self.open: OrderedDict[str, OpenTable] = OrderedDict()
        self._filling: set[asyncio.Task] = set()
        self._loop = asyncio.get_running_loop()
        self._tidying = asyncio.create_task(self._tidy())

    async def table(self, ref: str) -> OpenTable:
        """The table "name@version", opened on first use; NotFound if the store lacks it."""
        table = self.open.get(ref)
        if table is None:
            manifest = await asyncio.to_thread(resolve, self.store, ref)
            table = self.open.get(ref) or self._opened(manifest)
            while len(self.open) > _MOST_OPEN_TABLES:
                self._close(next(iter(self.open)))
        self.open.move_to_end(ref)
        table.used = time.monotonic()
        return table

    async def open_published(self) -> None:
        """Open the tables that names stand for, so that they are filled before anyone asks."""
        found = await asyncio.to_thread(
            lambda: [m.ref for m, published in tables(self.store) if published]
        )
        for ref in found[:_MOST_OPEN_TABLES]:
            with suppress(TolhouseError):  # who asks for it will be told
                await self.table(ref)

    async def parts(
        self,
        table: OpenTable,
        ids: np.ndarray,
        step: int,
        parent: tracing.Span = tracing.INVALID_SPAN,
    ) -> AsyncIterator[tuple[np.ndarray, dict[int, Buffer]]]:
        """Runs of `step` ids, and the verified records of those that had to be read.

        The others were hot a moment ago: with the lock held, ask again. While one run is sent, the next ones are read.
        """
        arrivals: dict[int, Arrival] = {}
        ahead = 0
        for first in range(0, max(1, len(ids)), step):
            while ahead < len(ids) and ahead <= first + step:
                window = max(step, _READ_BYTES // table.manifest.record_bytes)
                arrivals |= self._begin(table, ids[ahead : ahead + window], parent)
                ahead += window
            part = ids[first : first + step]
            read: dict[int, Buffer] = {}
            for i in part.tolist() if arrivals else ():
                if i in arrivals:
                    read[i] = (await _arrived(arrivals.pop(i)))[i]
            yield part, read

    async def again(
        self, table: OpenTable, ids: np.ndarray, parent: tracing.Span = tracing.INVALID_SPAN
    ) -> dict[int, Buffer]:
        """The same for rows that have been evicted since."""
        return {
            i: (await _arrived(arrival))[i]
            for i, arrival in self._begin(table, ids, parent).items()
        }

    def close(self) -> None:
        for task in (self._tidying, *self._filling):
            task.cancel()
        for ref in list(self.open):
            self._close(ref)

    def _opened(self, manifest: Manifest) -> OpenTable:
        table = OpenTable(manifest, RowCache.private(manifest, self.hot_bytes))
        self.open[manifest.ref] = table
        if manifest.frequent and table.hot.capacity:
            task = asyncio.create_task(self._fill(table))
            self._filling.add(task)
            task.add_done_callback(self._filling.discard)
        return table

    async def _tidy(self) -> None:
        """Close versions that are neither in use nor published: each holds as many hot rows as the one in use."""
        while True:
            await asyncio.sleep(_IDLE_SECONDS / 4)
            for table in list(self.open.values()):
                if table.idle:
                    with suppress(TolhouseError):  # while the store is away, all stay
                        published = await asyncio.to_thread(
                            stands_for, self.store, table.manifest.ref
                        )
                        if table.idle and not published:
                            self._close(table.manifest.ref)
                            event("table closed: nobody uses it", table=table.manifest.ref)

    def _close(self, ref: str) -> None:
        self.open.pop(ref, None)

    async def _fill(self, table: OpenTable) -> None:
        """Read the frequent tokens' rows, and others while there is room; the most frequent arrive last, and so leave last."""
        seen = set(table.manifest.frequent)
        others = (
            i for i in range(table.manifest.vocab_size) if i not in seen
        )  # a BPE gives frequent tokens low ids
        frequent = np.array(
            list(islice(chain(table.manifest.frequent, others), table.hot.capacity))[::-1],
            np.uint32,
        )
        step = max(1, _READ_BYTES // table.manifest.record_bytes)
        try:
            for start in range(0, len(frequent), step):
                for arrival in set(
                    self._begin(table, frequent[start : start + step], main=True).values()
                ):
                    await _arrived(arrival)
        except TolhouseError as error:
            event("hot rows not filled", table=table.manifest.ref, reason=str(error))
        else:
            event("hot rows filled", table=table.manifest.ref, rows=len(table.hot))

    def _begin(
        self,
        table: OpenTable,
        ids: np.ndarray,
        parent: tracing.Span = tracing.INVALID_SPAN,
        *,
        main: bool = False,
    ) -> dict[int, Arrival]:
        """Have a thread read those `ids` that are not hot; they are hot afterwards, if there is room."""
        new, slots, arrivals = self._claim(table, ids, main=main)
        if new:
            asyncio.get_running_loop().run_in_executor(
                None, self._read, table, new, slots, arrivals[new[0]], parent
            )
        return arrivals

    def _claim(
        self, table: OpenTable, ids: np.ndarray, *, main: bool = False
    ) -> tuple[list[int], np.ndarray, dict[int, Arrival]]:
        """Of those `ids` that are not hot: the ones that nobody reads yet, slots for them, and what to wait for.

        A row that someone else is reading already is waited for, not read again.
        """
        with table.lock:
            wanted = list(dict.fromkeys(ids[table.hot.slot_of[ids] < 0].tolist()))
            new = [i for i in wanted if i not in table.reading]
            table.reading.update(dict.fromkeys(new, Future()))
            slots = table.hot.reserve(np.array(new, np.uint32), main=main)
            return new, slots, {i: table.reading[i] for i in wanted}

    def _read(
        self,
        table: OpenTable,
        ids: list[int],
        slots: np.ndarray,
        arrival: Arrival,
        parent: tracing.Span = tracing.INVALID_SPAN,
    ) -> None:
        """Read what was claimed. Each record goes into its slot while the next is on its way."""
        wanted, size, flat = (
            np.array(ids, np.uint32),
            table.manifest.record_bytes,
            table.flat,
        )
        found: dict[int, Buffer] = {}
        error: BaseException | None = None
        about: tracing.Attributes = {
            "server.address": self.store.url,
            "tolhouse.table": table.manifest.ref,
            "tolhouse.rows": len(ids),
        }
        trace = tracing.begin("store read", parent, about, tracing.CLIENT)
        try:
            for places, records in self.store.records(table.manifest, wanted):
                for i, slot, record in zip(
                    wanted[places].tolist(), slots[places].tolist(), records, strict=True
                ):
                    found[i] = record
                    if slot >= 0:
                        flat[slot * size : (slot + 1) * size] = record
        except BaseException as failure:  # noqa: BLE001 - whoever waits has to hear of it
            error = failure
        tracing.end(trace, str(error) if error else "")
        with table.lock:
            for i in ids:
                del table.reading[i]
            if error is None:
                table.hot.settle(wanted, slots)
            else:
                table.hot.release(slots)
        if error is None:
            arrival.set_result(found)
            return
        if isinstance(
            error, Corrupt
        ):  # deleted, or built anew in other shards: read its manifest again
            self._loop.call_soon_threadsafe(self._close, table.manifest.ref)
        arrival.set_exception(error)


async def _arrived(arrival: Arrival) -> dict[int, Buffer]:
    return await asyncio.shield(
        asyncio.wrap_future(arrival)
    )  # others may wait for it when this caller goes away
