"""Rows of open tables: from the hot rows if they are there, else from the store, and then kept.

The hot rows lie in a segment that clients on the same machine map (table/shared.py). They are filled with the manifest's
frequent tokens when a table is opened, and kept by the row cache's policy from then on.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from tolhouse.errors import Corrupt, TolhouseError, Unavailable
from tolhouse.store import Store, resolve, tables
from tolhouse.table.rowcache import RowCache, capacity_for
from tolhouse.table.shared import Segment
from tolhouse.table.spec import Buffer, Manifest
from tolhouse.telemetry import event

Arrival = asyncio.Future[dict[int, Buffer]]  # of verified records from the store, by token

_MOST_OPEN_TABLES = 8
_READ_BYTES = 4 << 20  # read from the store at once


@dataclass
class OpenTable:
    manifest: Manifest
    segment: Segment
    hot: RowCache
    reading: dict[int, Arrival] = field(default_factory=dict)  # rows on their way from the store

    def lacks(self, ids: np.ndarray, read: dict[int, Buffer] | None = None) -> bool:
        """Whether one of `ids` is neither hot nor among those just read."""
        cold = ids[self.hot.slot_of[ids] < 0]
        return len(cold) > 0 and (not read or any(i not in read for i in cold.tolist()))

    def records(self, ids: np.ndarray, read: dict[int, Buffer]) -> list[Buffer]:
        """Records of `ids`, hot or among those just read, where they lie: good until the loop runs something else."""
        size, flat = self.manifest.record_bytes, self.segment.bytes
        slots = self.hot.slots(ids)
        if not read:
            return [flat[slot * size : (slot + 1) * size] for slot in slots.tolist()]
        found = zip(ids.tolist(), slots.tolist(), strict=True)
        return [flat[slot * size : (slot + 1) * size] if slot >= 0 else read[i] for i, slot in found]


class HotRows:
    """Belongs to the event loop; store reads run in threads. Each open table has its own `hot_bytes`."""

    def __init__(self, store: Store, hot_bytes: int) -> None:
        self.store, self.hot_bytes = store, hot_bytes
        self._open: OrderedDict[str, OpenTable] = OrderedDict()
        self._filling: set[asyncio.Task] = set()
        self._taken = 0  # rows that clients took from segments now closed

    async def table(self, ref: str) -> OpenTable:
        """The table "name@version", opened on first use; NotFound if the store lacks it."""
        table = self._open.get(ref)
        if table is None:
            manifest = await asyncio.to_thread(resolve, self.store, ref)
            table = self._open.get(ref) or self._opened(manifest)
            while len(self._open) > _MOST_OPEN_TABLES:
                self._close(next(iter(self._open)))
        self._open.move_to_end(ref)
        return table

    async def open_published(self) -> None:
        """Open the tables that names stand for, so that they are filled before anyone asks."""
        found = await asyncio.to_thread(lambda: [m.ref for m, published in tables(self.store) if published])
        for ref in found[:_MOST_OPEN_TABLES]:
            with suppress(TolhouseError):  # who asks for it will be told
                await self.table(ref)

    async def parts(self, table: OpenTable, ids: np.ndarray, step: int) -> AsyncIterator[tuple[np.ndarray, dict[int, Buffer]]]:
        """Runs of `step` ids, and the verified records of those that had to be read.

        The others are hot until the caller awaits something. While it sends a run, the next ones are read.
        """
        arrivals: dict[int, Arrival] = {}
        ahead = 0
        for first in range(0, max(1, len(ids)), step):
            while ahead < len(ids) and ahead <= first + step:
                window = max(step, _READ_BYTES // table.manifest.record_bytes)
                arrivals |= self._begin(table, ids[ahead : ahead + window])
                ahead += window
            part = ids[first : first + step]
            read: dict[int, Buffer] = {}
            for i in part.tolist() if arrivals else ():
                if i in arrivals:
                    read[i] = (await asyncio.shield(arrivals.pop(i)))[i]  # others may wait for it when this caller goes away
            while table.lacks(part, read):  # what was hot has been evicted since
                read |= {i: (await asyncio.shield(arrival))[i] for i, arrival in self._begin(table, part).items()}
            yield part, read

    def _begin(self, table: OpenTable, ids: np.ndarray) -> dict[int, Arrival]:
        """Start to read those `ids` that are not hot; they are hot afterwards, if there is room.

        A row that someone else is reading already is waited for, not read again.
        """
        wanted = list(dict.fromkeys(ids[table.hot.slot_of[ids] < 0].tolist()))
        self._read(table, [i for i in wanted if i not in table.reading])
        return {i: table.reading[i] for i in wanted}

    def taken(self) -> int:
        """Rows that clients took from the segments themselves."""
        return self._taken + sum(int(table.segment.taken[0]) for table in self._open.values())

    def close(self) -> None:
        for task in self._filling:
            task.cancel()
        for ref in list(self._open):
            self._close(ref)

    def _opened(self, manifest: Manifest) -> OpenTable:
        segment = Segment.create(manifest, capacity_for(manifest, self.hot_bytes))
        table = OpenTable(manifest, segment, RowCache(segment.slab, segment.slot_of, segment.uses))
        self._open[manifest.ref] = table
        if manifest.frequent and segment.capacity:
            task = asyncio.create_task(self._fill(table))
            self._filling.add(task)
            task.add_done_callback(self._filling.discard)
        return table

    def _close(self, ref: str) -> None:
        table = self._open.pop(ref, None)
        if table:
            self._taken += int(table.segment.taken[0])
            table.segment.close()

    async def _fill(self, table: OpenTable) -> None:
        """Read the frequent tokens' rows, and others while there is room; the most frequent arrive last, and so leave last."""
        seen = set(table.manifest.frequent)
        others = (i for i in range(table.manifest.vocab_size) if i not in seen)  # a BPE gives frequent tokens low ids
        frequent = list(islice(chain(table.manifest.frequent, others), table.segment.capacity))[::-1]
        step = max(1, _READ_BYTES // table.manifest.record_bytes)
        try:
            for start in range(0, len(frequent), step):
                part = [i for i in frequent[start : start + step] if table.hot.slot_of[i] < 0 and i not in table.reading]
                if arrival := self._read(table, part, main=True):
                    await arrival
        except TolhouseError as error:
            event("hot rows not filled", table=table.manifest.ref, reason=str(error))
        else:
            event("hot rows filled", table=table.manifest.ref, rows=len(table.hot))

    def _read(self, table: OpenTable, ids: list[int], *, main: bool = False) -> Arrival | None:
        """Have a thread read `ids`, which nobody reads yet; they are in `table.reading` until they have come.

        Each record goes into its slot while the next is on its way.
        """
        if not ids:
            return None
        loop, wanted = asyncio.get_running_loop(), np.array(ids, np.uint32)
        arrival: Arrival = loop.create_future()
        table.reading.update(dict.fromkeys(ids, arrival))
        slots = table.hot.reserve(wanted, main=main)
        size, flat = table.manifest.record_bytes, table.segment.bytes

        def read() -> dict[int, Buffer]:
            found: dict[int, Buffer] = {}
            for places, records in self.store.records(table.manifest, wanted):
                for i, slot, record in zip(wanted[places].tolist(), slots[places].tolist(), records, strict=True):
                    found[i] = record
                    if slot >= 0:
                        flat[slot * size : (slot + 1) * size] = record
            return found

        def ended(done: asyncio.Future[dict[int, Buffer]]) -> None:
            for i in ids:
                del table.reading[i]
            error = Unavailable("the read was given up") if done.cancelled() else done.exception()
            if error is None:
                table.hot.settle(wanted, slots)
                arrival.set_result(done.result())
                return
            table.hot.release(slots)
            if isinstance(error, Corrupt):
                self._close(table.manifest.ref)  # deleted, or built anew in other shards: read its manifest again
            arrival.set_exception(error)
            arrival.exception()  # nobody may be waiting

        loop.run_in_executor(None, read).add_done_callback(ended)
        return arrival
