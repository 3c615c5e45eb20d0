"""Row sources, which read rows from the place that a URL names. lookup.py calls lookup services.

Every row source returns verified records of the requested version, or raises the same errors.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import numpy as np

from tolhouse.errors import (
    ClosedError,
    CorruptError,
    DeadlineExceededError,
    InvalidArgumentError,
    TolhouseError,
    UnavailableError,
)
from tolhouse.logs import event
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import SCHEME, Addresses, Targets
from tolhouse.store.base import (
    LEASE_SECONDS,
    Arrived,
    Store,
    check_url,
    open_store,
    require_private,
    shown,
)
from tolhouse.store.registry import resolve, stands_for, tables
from tolhouse.table.auxiliary import AuxiliaryTables, load_auxiliary
from tolhouse.table.manifest import Manifest, split_ref
from tolhouse.tracing import Attributes, span

T = TypeVar("T")
Array = np.ndarray


class Newest(dict[str, T]):
    """A dict that keeps the 16 values that were set last.

    A process may use many versions, and a manifest may be large.
    """

    def __setitem__(self, key: str, value: T) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        for old in list(self)[:-16]:
            self.pop(old, None)


class RowSource(ABC):
    """Tables and the records of their rows. Several threads may share a row source."""

    def __init__(self, url: str) -> None:
        self.url = url
        # by "name@version", and by "name" for the version that was published last
        self._manifests: Newest[Manifest] = Newest()
        self._auxiliary: Newest[AuxiliaryTables] = Newest()

    @abstractmethod
    def tables(self) -> list[tuple[Manifest, bool]]:
        """List every table, and whether it is the published version of its name."""

    @abstractmethod
    def pin(self, ref: str) -> None:
        """Protect "name@version" from deletion for 30 seconds. Each fetch does the same."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections and files."""

    @abstractmethod
    def _describe(self, table: str, known: Manifest | None) -> Manifest:
        """Read the manifest, or return `known` if it is still current."""

    @abstractmethod
    def _fetch(self, manifest: Manifest, ids: Array, out: Array, slots: Array) -> None:
        """Read the records of `ids` [T] into rows `slots` [T] of `out`. Checks that ids exist."""

    def describe(self, table: str) -> Manifest:
        """Read the manifest of "name@version", or of the published version of "name".

        Raises:
            NotFoundError: There is no such table.
        """
        has_version, known = split_ref(table)[1] is not None, self._manifests.get(table)
        if known and has_version:
            return known
        found = self._describe(table, known)
        if has_version and found.ref != table:
            raise CorruptError(f"{self.url} describes table {found.ref} instead of {table}")
        self._manifests[table] = self._manifests[found.ref] = found
        return found

    def fetch_records(
        self, manifest: Manifest, ids: Array, out: Array | None = None, slots: Array | None = None
    ) -> Array:
        """Read and verify the records of distinct ids.

        Args:
            manifest: The table.
            ids: Distinct token ids, uint32 [T].
            out: A contiguous array uint8 [slots, record_bytes]. Default: a new array.
            slots: The row of `out` for each id, [T]. Default: 0, 1, 2 and so on.

        Returns:
            `out`. After an error its contents are undefined, and nothing writes to it any more.

        Raises:
            IdOutOfRangeError: An id is not below the size of the vocabulary.
            NotFoundError: The table was deleted.
            UnavailableError: The source cannot be reached.
            DeadlineExceededError: The source did not answer in time.
            CorruptError: If `token_ids` is not empty, their rows are bad and all others are in
                `out`.
                Otherwise no row could be read.
        """
        if out is None:
            out = np.empty((len(ids), manifest.record_bytes), np.uint8)
        if len(ids):
            self._fetch(manifest, ids, out, np.arange(len(ids)) if slots is None else slots)
        return out

    def begin_fetch(
        self, manifest: Manifest, ids: Array, out: Array, slots: Array
    ) -> Callable[[], object]:
        """Begin the work of `fetch_records`, and return a function that finishes it.

        Nothing writes to `out` before the returned function is called.
        """
        return partial(self.fetch_records, manifest, ids, out, slots)

    def auxiliary(self, manifest: Manifest) -> AuxiliaryTables:
        """Load the auxiliary tables of a table."""

        def fetch(ref: str) -> tuple[Manifest, Array]:
            found = self.describe(ref)
            return found, self.fetch_records(found, np.arange(found.vocab_size, dtype=np.uint32))

        if not (found := self._auxiliary.get(manifest.ref)):
            found = self._auxiliary[manifest.ref] = load_auxiliary(manifest, fetch)
        return found


class StoreRowSource(RowSource):
    """Reads a store in this process, and holds a lease on each version that it reads."""

    def __init__(self, url: str, open_store: Callable[[], Store]) -> None:
        super().__init__(url)
        self._open_store = open_store
        self._store: Store | None = None
        self._opening, self._closed = threading.Lock(), False
        self._leased: Newest[float] = Newest()  # the last renewal of each version's lease
        with suppress(UnavailableError, DeadlineExceededError):  # the store may start later
            _ = self.store

    @property
    def store(self) -> Store:
        """The store, which opens on first use. Raises ClosedError after `close`."""
        if self._closed:
            raise ClosedError(f"{self.url} is closed")
        if self._store is None:
            with self._opening:
                self._store = self._store or self._open_store()
        return self._store

    def tables(self) -> list[tuple[Manifest, bool]]:
        return list(tables(self.store))

    def pin(self, ref: str) -> None:
        self.store.lease(self.describe(ref).ref)

    def close(self) -> None:
        self._closed = True
        if self._store:
            self._store.close()

    def use(self, manifest: Manifest) -> None:
        """Renew a version's lease in the background if that is due."""
        now = time.monotonic()
        if now - self._leased.get(manifest.ref, -LEASE_SECONDS) > LEASE_SECONDS / 3:
            self._leased[manifest.ref] = now
            # A daemon thread: a store that hangs must not keep the process from exiting.
            threading.Thread(
                target=self._lease, args=(manifest.ref,), name="lease", daemon=True
            ).start()

    def _lease(self, ref: str) -> None:
        try:
            self.store.lease(ref)
        except ClosedError:
            return
        except TolhouseError as error:
            event("a lease cannot be renewed", logging.WARNING, table=ref, reason=str(error))

    def _describe(self, table: str, known: Manifest | None) -> Manifest:
        return known if known and stands_for(self.store, known.ref) else resolve(self.store, table)

    def _fetch(self, manifest: Manifest, ids: Array, out: Array, slots: Array) -> None:
        manifest.check_ids(ids)
        self.read(manifest, ids, out, slots)

    def read(
        self,
        manifest: Manifest,
        ids: Array,
        out: Array,
        slots: Array,
        arrived: Arrived | None = None,
    ) -> None:
        """Read records into `slots` of `out`. `Store.read_records` has the arguments and errors."""
        self.use(manifest)
        ref, count = manifest.ref, len(ids)
        current = self._manifests.get(ref, manifest)
        about: Attributes = {
            "server.address": self.url,
            "tolhouse.table": ref,
            "tolhouse.rows": count,
        }
        with span("store read", about):
            try:
                self.store.read_records(current, ids, out, slots, arrived)
            except CorruptError:
                fresh = self.store.manifest(ref)
                if fresh.num_shards == current.num_shards:
                    raise
                self._manifests[ref] = fresh  # the table was built again with other shards
                self.store.read_records(fresh, ids, out, slots, arrived)


def open_row_source(
    url: Targets, timeout: float = 10.0, credentials: ClientCredentials | None = None
) -> RowSource:
    """Open the row source at `url`. A list of addresses is a list of lookup replicas.

    The source need not be reachable yet. Services on other machines need `credentials` with TLS,
    and a Redis on another machine needs a rediss:// URL. `timeout` is in seconds.
    """
    credentials = credentials or ClientCredentials()
    if isinstance(url, str) and _is_store(url):
        check_target(url, credentials)
        return StoreRowSource(shown(url), partial(open_store, url, timeout))
    from tolhouse.client.lookup import LookupRowSource

    return LookupRowSource(url, timeout, credentials)


def check_target(url: Targets, credentials: ClientCredentials) -> None:
    """Raise InvalidArgumentError if `url` is not allowed. Makes no connection."""
    if not isinstance(url, str) or not _is_store(url):
        Addresses(url, credentials)
        return
    if url.partition("://")[0] not in ("file", "redis", "rediss"):
        allowed = "file://, redis://, rediss://, dns:/// and HOST:PORT"
        raise InvalidArgumentError(f"{shown(url)!r} is not an address; allowed are {allowed}")
    check_url(url)
    require_private(url, insecure=credentials.insecure)


def _is_store(url: str) -> bool:
    return "://" in url and not url.startswith(SCHEME)
