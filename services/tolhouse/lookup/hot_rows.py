"""Hot rows: an in-memory cache over a row source. Thread-safe.

Each open table has a row cache, which is filled with the rows of frequent tokens first. Missing
rows are read directly into the cache, and sent as they arrive. Concurrent requests for a row share
one read. A bad row fails only the requests for it. Versions that are neither used nor published are
closed.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import islice
from logging import WARNING
from operator import attrgetter
from queue import SimpleQueue

import numpy as np

from tolhouse.client.row_source import StoreRowSource
from tolhouse.errors import CorruptError, InvalidArgumentError, NotFoundError, TolhouseError
from tolhouse.logs import event
from tolhouse.store.base import ARRIVED_BYTES, LEASE_SECONDS
from tolhouse.store.registry import stands_for
from tolhouse.table.manifest import Buffer, Manifest, record_views, split_ref
from tolhouse.table.row_cache import RowCache, capacity_for

_PART_BYTES = 16 << 20  # the bytes of records that a request holds at a time
_FILL_BYTES = 4 << 20  # the bytes of records in a read that fills the cache
_MOST_OPEN_TABLES = 8
_READERS = 64  # threads that read for requests; a hanging store blocks them until its timeout
_FILLERS = 2  # threads that fill caches

Send = Callable[[list[Buffer]], object]
Records = dict[int, Buffer | CorruptError]  # records and the errors of bad rows, by token
Advance = Callable[[Records], object]
# The result of a read: records without room in the cache, and errors.
Read = Future[Records]


class OpenTable:
    """A table with its cache, and the reads in flight."""

    def __init__(self, manifest: Manifest, hot_bytes: int) -> None:
        self.manifest, self.used = manifest, time.monotonic()
        shape = capacity_for(manifest, hot_bytes), manifest.record_bytes
        self.cache = RowCache(np.empty(shape, np.uint8), manifest.vocab_size)
        self.lock = threading.Lock()  # guards the cache, and the next field
        self.reading: dict[int, Read] = {}  # by token
        self._flat = memoryview(self.cache.slab.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer

    def views(self, slots: np.ndarray) -> list[Buffer]:
        """Return views of the records in `slots`."""
        size = self.manifest.record_bytes
        return [self._flat[at : at + size] for at in (slots * np.int64(size)).tolist()]

    def unpin(self, slots: np.ndarray) -> None:
        with self.lock:
            self.cache.unpin(slots)

    def is_cached(self, ids: np.ndarray) -> bool:
        """Return whether the cache has all of `ids`."""
        return bool((self.cache.slot_of[ids] >= 0).all())

    def pin_all(self, ids: np.ndarray) -> np.ndarray | None:
        """Pin the rows of `ids` and return their slots, or return None if not all are cached."""
        try:
            with self.lock:
                return self.cache.pin_all(ids)
        except IndexError:
            self.manifest.check_ids(ids)
            raise


def _nothing(_: object) -> None:
    pass


@dataclass
class Held:
    """Records that stay in memory until `release`."""

    table: OpenTable
    advance: Advance
    records: Records = field(default_factory=dict)
    pinned: list[np.ndarray] = field(default_factory=list)  # their slots in the cache
    missed: int = 0  # rows that were not cached

    def add(self, ids: np.ndarray, slots: np.ndarray) -> None:
        """Pin the cached rows of `ids` in `slots`. The caller holds the lock of the table."""
        self.table.cache.pin(slots)
        self.pinned.append(slots)
        self.records |= zip(ids.tolist(), self.table.views(slots), strict=True)

    def release(self) -> None:
        for slots in self.pinned:
            self.table.unpin(slots)
        self.pinned = []


class _Sender:
    """Sends records in the order of `tokens`, as far as they have arrived.

    A failure to send does not stop the read, because other requests may wait for it.
    """

    def __init__(self, tokens: list[int], send: Send) -> None:
        self._tokens, self._send, self._sent = tokens, send, 0
        self.failure: Exception | None = None

    def advance(self, records: Records) -> None:
        ready = list[Buffer]()
        for token in islice(self._tokens, self._sent, None):
            record = records.get(token)
            if record is None or isinstance(record, CorruptError):
                break
            ready.append(record)
        self._sent += len(ready)
        if ready and not self.failure:
            try:
                self._send(ready)
            except Exception as error:  # noqa: BLE001 - raised after the read
                self.failure = error


class HotRows:
    """Caches rows of all tables of `source`, with `hot_bytes` for each open table."""

    def __init__(
        self, source: StoreRowSource, hot_bytes: int, idle_seconds: float = 2 * LEASE_SECONDS
    ) -> None:
        self.source, self.hot_bytes, self.idle_seconds = source, hot_bytes, idle_seconds
        self.bad: dict[str, set[int]] = {}  # tokens of rows that could not be read, by table
        self.on_loss: Callable[[], object] = lambda: None  # called when a read of rows fails
        self.open: dict[str, OpenTable] = {}  # by "name@version"
        self._opening = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, "store read")
        self._fillers = ThreadPoolExecutor(_FILLERS, "fill")
        self._closed = threading.Event()
        threading.Thread(target=self._close_idle, name="idle tables", daemon=True).start()

    def close(self) -> None:
        """Stop filling caches."""
        self._closed.set()
        self._fillers.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False)

    def table(self, ref: str) -> OpenTable:
        """Return the table "name@version", which opens on first use.

        Raises NotFoundError if there is no such table, and InvalidArgumentError without a version.
        """
        if not (table := self.open.get(ref)):
            if split_ref(ref)[1] is None:
                raise InvalidArgumentError(f"fetch needs name@version, not {ref!r}")
            manifest = self.source.describe(ref)
            with self._opening:
                if not (table := self.open.get(ref)):
                    table = self.open[ref] = OpenTable(manifest, self.hot_bytes)
                    self._fillers.submit(self._fill, table)
                    by_use = sorted(self.open.copy().values(), key=attrgetter("used"))
                    for oldest in by_use[:-_MOST_OPEN_TABLES]:
                        self.open.pop(oldest.manifest.ref, None)
        table.used = time.monotonic()
        self.source.use(table.manifest)
        return table

    def open_published(self) -> None:
        """Open published tables, so that their caches are filled before the first request."""
        with suppress(TolhouseError):  # later requests report the error
            found = self.source.tables()
            if not found:
                event("the store has no table yet", WARNING, store=self.source.url)
            for ref in [m.ref for m, published in found if published][:_MOST_OPEN_TABLES]:
                self.table(ref)

    def send(self, table: OpenTable, ids: np.ndarray, send: Send) -> int:
        """Pass the records of `ids` [T] to `send`, in order, in at least one part.

        The records are valid during the call of `send`. Missing rows are sent as they arrive.

        Returns:
            The number of distinct rows by part that were not cached.

        Raises:
            IdOutOfRangeError: An id is not below the size of the vocabulary.
            CorruptError: With the tokens of all bad rows. All others are cached then.
        """
        if (slots := table.pin_all(ids)) is not None:
            try:
                send(table.views(slots))
            finally:
                with table.lock:
                    table.cache.use(slots)
                    table.cache.unpin(slots)
            return 0
        step = max(1, _PART_BYTES // table.manifest.record_bytes)
        bad: dict[int, CorruptError] = {}
        missed = 0
        for first in range(0, len(ids), step):
            part = ids[first : first + step]
            sender = _Sender(part.tolist(), send if not bad else _nothing)
            held = self._hold_while_sending(table, part, sender)
            try:
                sender.advance(held.records)
            finally:
                held.release()
            if sender.failure:
                raise sender.failure
            missed += held.missed
            bad |= {i: e for i, e in held.records.items() if isinstance(e, CorruptError)}
        if bad:
            raise CorruptError(str(next(iter(bad.values()))), bad)
        return missed

    def _hold_while_sending(self, table: OpenTable, ids: np.ndarray, sender: _Sender) -> Held:
        """Hold the records of `ids`, and send them as they arrive.

        Another thread reads them, because other requests may wait for the read, and a client may be
        slow.
        """
        if len(ids) * table.manifest.record_bytes <= ARRIVED_BYTES:  # they arrive at once
            return self._hold(table, ids)
        arrivals: SimpleQueue[Records | None] = SimpleQueue()
        run = copy_context().run
        reading = self._readers.submit(run, self._hold, table, ids, arrivals.put)
        reading.add_done_callback(lambda _: arrivals.put(None))
        while (records := arrivals.get()) is not None:
            sender.advance(records)
        return reading.result()

    def _hold(
        self, table: OpenTable, ids: np.ndarray, advance: Advance = _nothing, *, main: bool = False
    ) -> Held:
        """Hold the records of `ids`, and read those that are not cached.

        `advance` is called with the records so far, whenever some have arrived.
        """
        held = Held(table, advance)
        with table.lock:
            slots = table.cache.slots(ids)
            held.add(ids[slots >= 0], slots[slots >= 0])
        try:
            while left := [i for i in dict.fromkeys(ids.tolist()) if i not in held.records]:
                self._add_missing(held, np.array(left, np.uint32), main=main)
        except BaseException:
            held.release()
            raise
        return held

    def _add_missing(self, held: Held, ids: np.ndarray, *, main: bool) -> None:
        """Read the rows of distinct `ids`, and wait for the rows that other threads read.

        Rows of other threads may have been evicted in the meantime.
        """
        table, own = held.table, Read()
        with table.lock:
            slots = table.cache.slot_of[ids]
            held.add(ids[slots >= 0], slots[slots >= 0])
            absent = ids[slots < 0]
            theirs = {table.reading[i] for i in absent.tolist() if i in table.reading}
            mine = np.array([i for i in absent.tolist() if i not in table.reading], np.uint32)
            table.reading |= dict.fromkeys(mine.tolist(), own)
            slots = table.cache.reserve(mine, main=main)
        if len(mine):
            self._read(held, mine, slots, own)
        for read in theirs:
            found = read.result()
            held.records |= {i: found[i] for i in absent.tolist() if i in found}

    def _read(self, held: Held, ids: np.ndarray, slots: np.ndarray, own: Read) -> None:
        """Read `ids` into their reserved `slots`, or into a new array if there is no room."""
        table, room = held.table, slots >= 0
        held.missed += len(ids)
        found: Records = {}
        failure: BaseException | None = None
        try:
            if room.any():
                views = table.views(slots[room])
                found |= self._fetch(held, ids[room], table.cache.slab, slots[room], views)
            if not room.all():
                rest = ids[~room]
                out = np.empty((len(rest), table.manifest.record_bytes), np.uint8)
                views = list(record_views(out))
                bad = self._fetch(held, rest, out, np.arange(len(rest)), views)
                found |= dict(zip(rest.tolist(), views, strict=True)) | bad
        except BaseException as error:
            failure = error
            if isinstance(error, (NotFoundError, CorruptError)):
                self.on_loss()
            raise
        finally:
            read = room & ~np.isin(ids, list(found)) & (failure is None)
            with table.lock:
                table.cache.commit(ids[read], slots[read])
                held.add(ids[read], slots[read])
                table.cache.release(slots[room & ~read])
                for i in ids.tolist():
                    del table.reading[i]
            held.records |= found
            own.set_exception(failure) if failure else own.set_result(found)

    def _fetch(
        self, held: Held, ids: np.ndarray, out: np.ndarray, slots: np.ndarray, views: list[Buffer]
    ) -> dict[int, CorruptError]:
        """Read the records of `ids`, and return the errors of bad rows by token."""
        tokens, manifest = ids.tolist(), held.table.manifest

        def arrived(indices: np.ndarray) -> None:
            held.records |= {tokens[n]: views[n] for n in indices.tolist()}
            held.advance(held.records)

        try:
            self.source.read(manifest, ids, out, slots, arrived)
        except CorruptError as error:
            if not error.token_ids:
                raise
            self.bad.setdefault(manifest.ref, set()).update(error.token_ids)
            self.on_loss()
            return dict.fromkeys(error.token_ids, error)
        return {}

    def _fill(self, table: OpenTable) -> None:
        """Fill the cache with rows of frequent tokens, and of other tokens if there is room.

        The most frequent tokens are read last, so that they are evicted last.
        """
        frequent = table.manifest.frequent
        if not frequent or not table.cache.capacity:
            return
        # Low ids tend to be frequent.
        others = sorted({*range(table.manifest.vocab_size)} - {*frequent})
        ids = np.array([*frequent, *others][: table.cache.capacity][::-1], np.uint32)
        step = max(1, _FILL_BYTES // table.manifest.record_bytes)
        try:
            for start in range(0, len(ids), step):
                if self._closed.is_set():
                    return
                self._hold(table, ids[start : start + step], main=True).release()
        except TolhouseError as error:
            event("hot rows not filled", table=table.manifest.ref, reason=str(error))
            return
        event("hot rows filled", table=table.manifest.ref, rows=len(table.cache))

    def _close_idle(self) -> None:
        """Close versions that are neither used nor published, each of which holds `hot_bytes`."""
        while not self._closed.wait(self.idle_seconds / 4):
            for ref, table in self.open.copy().items():
                if time.monotonic() - table.used < self.idle_seconds:
                    continue
                with suppress(TolhouseError):  # if the store cannot be reached, keep all tables
                    if not stands_for(self.source.store, ref):
                        self.open.pop(ref, None)
                        event("unused table closed", table=ref)
