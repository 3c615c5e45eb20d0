"""Hot rows: an in-memory cache over a row source.

Reads run in threads, and everything else in the event loop. Each open table has a row cache, which
is filled with the rows of frequent tokens first. Concurrent requests for a row share one read. A
bad row fails only the requests for it. Versions that are neither used nor published are closed.
"""

import asyncio
import time
from asyncio import Future
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from logging import WARNING

import numpy as np

from tolhouse.client.row_source import StoreRowSource
from tolhouse.errors import CorruptError, NotFoundError, TolhouseError
from tolhouse.logs import event
from tolhouse.store.base import LEASE_SECONDS
from tolhouse.store.registry import stands_for
from tolhouse.table.manifest import Buffer, Manifest, record_views
from tolhouse.table.row_cache import RowCache, capacity_for
from tolhouse.tracing import INVALID_SPAN, Span, under

_CHUNK_BYTES = 1 << 20  # the bytes of records in a chunk
_READ_BYTES = 4 << 20  # the bytes of records in a read
_MOST_OPEN_TABLES = 8
_READERS = 16  # threads; a hanging store blocks them until its timeout

Read = Future[dict[int, Buffer | CorruptError]]  # by token: a verified record, or an error


class OpenTable:
    """A table with its cache, and the reads in flight."""

    def __init__(self, manifest: Manifest, hot_bytes: int) -> None:
        self.manifest, self.used = manifest, time.monotonic()
        shape = capacity_for(manifest, hot_bytes), manifest.record_bytes
        self.cache = RowCache(np.empty(shape, np.uint8), manifest.vocab_size)
        self.flat = memoryview(self.cache.slab.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer
        self.reading: dict[int, Read] = {}

    def cold(self, ids: np.ndarray) -> list[int]:
        """Return the distinct ids that are not in the cache."""
        return list(dict.fromkeys(ids[self.cache.slot_of[ids] < 0].tolist()))


class HotRows:
    """Caches rows of all tables of `source`, with `hot_bytes` for each open table."""

    def __init__(
        self, source: StoreRowSource, hot_bytes: int, idle_seconds: float = 2 * LEASE_SECONDS
    ) -> None:
        self.source, self.hot_bytes, self.idle_seconds = source, hot_bytes, idle_seconds
        self.bad: dict[str, set[int]] = {}  # tokens of rows that could not be read, by table
        self.lost = asyncio.Event()  # set when a read of rows fails
        self.open: dict[str, OpenTable] = {}  # by "name@version", with the most recently used last
        self._tasks: set[asyncio.Task] = set()
        self._readers = ThreadPoolExecutor(_READERS, "store read")
        self._start(self._close_idle())

    def close(self) -> None:
        """Cancel tasks and reads."""
        for task in self._tasks:
            task.cancel()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def are_hot(self, ref: str, packed: bytes) -> bool:
        """Return whether the rows of `packed` token ids are all cached."""
        if not (table := self.open.get(ref)) or len(packed) % 4:
            return False
        ids = np.frombuffer(packed, "<u4")
        known = not len(ids) or int(ids.max()) < table.manifest.vocab_size
        return known and bool((table.cache.slot_of[ids] >= 0).all())

    async def table(self, ref: str) -> OpenTable:
        """Return the table "name@version", which opens on first use.

        Raises NotFoundError if there is no such table.
        """
        if ref not in self.open:
            manifest = await asyncio.to_thread(self.source.describe, ref)
            if ref not in self.open:
                self.open[ref] = OpenTable(manifest, self.hot_bytes)
                self._start(self._fill(self.open[ref]))
        table = self.open[ref] = self.open.pop(ref)
        for oldest in list(self.open)[:-_MOST_OPEN_TABLES]:
            del self.open[oldest]
        table.used = time.monotonic()
        self.source.use(table.manifest)
        return table

    async def open_published(self) -> None:
        """Open published tables, so that their caches are filled before the first request."""
        with suppress(TolhouseError):  # later requests report the error
            found = await asyncio.to_thread(self.source.tables)
            if not found:
                event("the store has no table yet", WARNING, store=self.source.url)
            for ref in [m.ref for m, published in found if published][:_MOST_OPEN_TABLES]:
                await self.table(ref)

    async def chunks(
        self, table: OpenTable, ids: np.ndarray, parent: Span = INVALID_SPAN
    ) -> AsyncIterator[tuple[list[Buffer], int]]:
        """Yield chunks of records, each with the number of records that were read from the store.

        The records are valid until the next await.

        Raises:
            CorruptError: With the tokens of all bad rows. All others are cached then.
        """
        bad: dict[int, CorruptError] = {}
        size, begun, ahead = table.manifest.record_bytes, dict[int, Read](), 0
        step = max(1, _CHUNK_BYTES // size)
        window = max(step, _READ_BYTES // size)
        for first in range(0, max(1, len(ids)), step):
            while ahead < min(len(ids), first + 2 * step):
                begun |= self._read(table, ids[ahead : ahead + window], parent)
                ahead += window
            part, read = ids[first : first + step], dict[int, Buffer]()
            while missing := [i for i in table.cold(part) if i not in read and i not in bad]:
                for i in missing:  # rows may be evicted in the meantime
                    arrival = begun.pop(i, None) or self._read(table, part, parent).get(i)
                    if arrival:
                        found = (await asyncio.shield(arrival))[i]
                        if isinstance(found, CorruptError):
                            bad[i] = found
                        else:
                            read[i] = found
            if bad:
                continue
            slots = table.cache.slots(part).tolist()
            records = [
                table.flat[slot * size : (slot + 1) * size] if slot >= 0 else read[i]
                for i, slot in zip(part.tolist(), slots, strict=True)
            ]
            yield records, len(read)
        if bad:
            raise CorruptError(str(next(iter(bad.values()))), bad)

    def _read(
        self, table: OpenTable, ids: np.ndarray, parent: Span = INVALID_SPAN, *, main: bool = False
    ) -> dict[int, Read]:
        """Start reads of uncached `ids`, and return the futures to wait for, by token."""
        cold = table.cold(ids)
        new = np.array([i for i in cold if i not in table.reading], np.uint32)
        if len(new):
            arrival: Read = asyncio.get_running_loop().create_future()
            arrival.add_done_callback(lambda done: done.cancelled() or done.exception())
            table.reading |= dict.fromkeys(new.tolist(), arrival)
            with under((parent,)):
                self._start(self._finish(table, new, arrival, main))
        return {i: table.reading[i] for i in cold}

    async def _finish(self, table: OpenTable, ids: np.ndarray, arrival: Read, main: bool) -> None:
        tokens = ids.tolist()
        try:
            fetch = partial(copy_context().run, self._fetch, table.manifest, ids)
            loop = asyncio.get_running_loop()
            records, error = await loop.run_in_executor(self._readers, fetch)
        except BaseException as failure:  # noqa: BLE001 - the waiting requests get the error
            arrival.set_exception(failure)
            if isinstance(failure, (NotFoundError, CorruptError)):
                self.lost.set()
        else:
            found: dict[int, Buffer | CorruptError] = dict(
                zip(tokens, record_views(records), strict=True)
            )
            if error:
                found |= dict.fromkeys(error.token_ids, error)
                self.bad.setdefault(table.manifest.ref, set()).update(error.token_ids)
                self.lost.set()
                intact = ~np.isin(ids, error.token_ids)
                ids, records = ids[intact], records[intact]
            arrival.set_result(found)
            await asyncio.sleep(0)  # send replies first
            slots = table.cache.reserve(ids, main=main)
            given = slots >= 0 if (slots < 0).any() else slice(None)  # a slice makes no copy
            table.cache.slab[slots[given]] = records[given]
            table.cache.commit(ids, slots)
        finally:
            for i in tokens:
                del table.reading[i]

    def _fetch(self, manifest: Manifest, ids: np.ndarray) -> tuple[np.ndarray, CorruptError | None]:
        """Read the records of `ids`, and return an error with the tokens of bad records."""
        out = np.empty((len(ids), manifest.record_bytes), np.uint8)
        try:
            return self.source.fetch_records(manifest, ids, out), None
        except CorruptError as error:
            if not error.token_ids:
                raise
            return out, error

    async def _fill(self, table: OpenTable) -> None:
        """Fill the cache with rows of frequent tokens, and of other tokens if there is room.

        The most frequent tokens are read last, so that they are evicted last.
        """
        frequent = table.manifest.frequent
        if not frequent or not table.cache.capacity:
            return
        # Low ids tend to be frequent.
        others = sorted({*range(table.manifest.vocab_size)} - {*frequent})
        ids = np.array([*frequent, *others][: table.cache.capacity][::-1], np.uint32)
        step = max(1, _READ_BYTES // table.manifest.record_bytes)
        try:
            for start in range(0, len(ids), step):
                for read in set(self._read(table, ids[start : start + step], main=True).values()):
                    await asyncio.shield(read)
        except TolhouseError as error:
            event("hot rows not filled", table=table.manifest.ref, reason=str(error))
            return
        await asyncio.sleep(0)
        event("hot rows filled", table=table.manifest.ref, rows=len(table.cache))

    async def _close_idle(self) -> None:
        """Close versions that are neither used nor published, each of which holds `hot_bytes`."""
        while True:
            await asyncio.sleep(self.idle_seconds / 4)
            for ref, table in list(self.open.items()):
                if time.monotonic() - table.used < self.idle_seconds:
                    continue
                with suppress(TolhouseError):  # if the store cannot be reached, keep all tables
                    if not await asyncio.to_thread(stands_for, self.source.store, ref):
                        self.open.pop(ref, None)
                        event("unused table closed", table=ref)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
