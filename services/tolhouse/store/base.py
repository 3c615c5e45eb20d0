"""`Store`, the interface of the file store and the Redis store, and `open_store(url)`.

A store has immutable versions of tables. Each name has an alias, which is its published version.
Several threads may share a store.
"""

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from functools import lru_cache, partial
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, urlsplit

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from tolhouse.errors import (
    CorruptError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from tolhouse.extras import installation_hint
from tolhouse.logs import event, is_loopback, join_address
from tolhouse.store.journal import Entry, Origin, parse
from tolhouse.table.auxiliary import AuxiliaryTables, load_auxiliary
from tolhouse.table.manifest import Manifest, check_name, split_ref

Views = list[memoryview]  # views of records
Arrived = Callable[[np.ndarray], object]  # a function of the indices of records
ARRIVED_BYTES = 1 << 19  # the bytes of records that are reported at a time
LEASE_SECONDS = 30.0  # a version counts as in use for this time after its last use


@dataclass(frozen=True)
class Alias:
    """The published version of a name, and the earlier versions, with the latest last."""

    version: str
    history: tuple[str, ...]

    def to_json(self) -> bytes:
        """Return the alias as JSON."""
        return _ALIAS.dump_json(self)


_ALIAS = TypeAdapter(Alias)
# Cached, because a manifest may be long, and each bad row causes another read.
_parsed = lru_cache(16)(Manifest.from_json)

# The kinds of texts in the registry. Their keys are "name@version", "name@version" and "name".
Kind = Literal["manifest", "deleting", "alias"]
# Texts to write to the registry, or None to remove. A text of the kind "log" is a line to append.
Changes = dict[tuple[Kind | Literal["log"], str], bytes | None]


class Store(ABC):
    """Reads and writes immutable versions. Only aliases change."""

    def __init__(self, url: str) -> None:
        self.url = url  # for messages, without a password
        self.origin = Origin()  # of the changes made through this object
        self._parents: dict[str, Manifest] = {}  # parents of overlays, by ref

    # versions

    @abstractmethod
    def refs(self) -> list[str]:
        """Return the "name@version" of every complete table, sorted."""

    def manifest(self, ref: str) -> Manifest:
        """Read the manifest of "name@version".

        Raises:
            NotFoundError: The version is missing or incomplete.
            CorruptError: The manifest cannot be read.
        """
        split_ref(ref)
        text = self._read_text(ref, "manifest")
        if text is None:
            raise NotFoundError(f"table {ref} is not in {self.url}")
        try:
            manifest = _parsed(text)
        except (InvalidArgumentError, CorruptError) as error:
            raise CorruptError(f"{ref} in {self.url}: {error}") from None
        if manifest.ref != ref:
            raise CorruptError(f"{ref} in {self.url}: the manifest describes table {manifest.ref}")
        return manifest

    def manifest_text(self, manifest: Manifest) -> bytes:
        """Return the text of a manifest in this store, which also has the layout here."""
        return manifest.to_json().encode()

    def conflict(self, planned: Manifest) -> str:
        """Return why the options of the store do not fit a table that it holds, else ""."""
        return ""

    def parent(self, manifest: Manifest) -> Manifest:
        """Return the parent table of an overlay.

        Raises:
            NotFoundError: The parent was deleted.
            CorruptError: It does not fit the overlay.
        """
        ref = manifest.parent
        if ref not in self._parents:
            about = f"table {manifest.ref} is an overlay over {ref}, which"
            try:
                found = self.manifest(ref)
            except NotFoundError:
                raise NotFoundError(f"{about} is not in {self.url} any more") from None
            form = manifest.record_dtype, manifest.vocab_size - manifest.appended
            if found.parent or form != (found.record_dtype, found.vocab_size):
                raise CorruptError(f"{about} has records of another layout in {self.url}")
            self._parents[ref] = found
        return self._parents[ref]

    @abstractmethod
    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        """Store a whole shard durably. It replaces an earlier one."""

    @abstractmethod
    def count(self, manifest: Manifest, shard: int) -> int:
        """Return the number of rows of the shard in the store."""

    @abstractmethod
    def delete_records(self, ref: str) -> None:
        """Remove the records of "name@version", after its manifest was removed."""

    @abstractmethod
    def lease(self, ref: str) -> None:
        """Mark a version as in use for LEASE_SECONDS, or until the process ends."""

    @abstractmethod
    def leased(self, ref: str) -> bool:
        """Return whether a version is marked as in use."""

    def risk(self) -> str:
        """Return a warning if the settings of the store may lose rows, else ""."""
        return ""

    # names

    def alias(self, name: str) -> Alias | None:
        """Return the alias of `name`, or None if it was never published.

        Raises:
            CorruptError: The alias cannot be read.
        """
        text = self._read_text(check_name(name), "alias")
        try:
            return None if text is None else _ALIAS.validate_json(text)
        except ValidationError:
            what = "is malformed; publish a version to write it again"
            raise CorruptError(f"the alias of {name!r} in {self.url} {what}") from None

    @abstractmethod
    def update(self, change: Callable[[], Changes]) -> None:
        """Write the texts that `change` returns, in order, as one transaction.

        No other update happens between the reads of `change` and the last write. `change` may be
        called several times.
        """

    def is_being_deleted(self, ref: str) -> bool:
        """Return whether a deletion of the version is in progress or was interrupted."""
        return self._read_text(ref, "deleting") is not None

    def log(self) -> list[Entry]:
        """Return the log of all names, oldest entry first."""
        return parse(self._read_log())

    def user(self) -> str:
        """Return the user as whom the store has authenticated this process, or ""."""
        return ""

    # rows

    def read_records(
        self,
        manifest: Manifest,
        ids: np.ndarray,
        out: np.ndarray | None = None,
        slots: np.ndarray | None = None,
        arrived: Arrived | None = None,
    ) -> np.ndarray:
        """Read and verify records. The unchanged rows of an overlay come from its parent.

        Args:
            manifest: The table.
            ids: Token ids, uint32 [T].
            out: A contiguous array uint8 [slots, record_bytes]. Default: a new array.
            slots: The row of `out` for each id, [T]. Default: 0, 1, 2 and so on.
            arrived: A function that is called with the indices of records, after some of them are
                in `out` and verified. Records then arrive about in the order of `ids`.

        Returns:
            `out`.

        Raises:
            CorruptError: Records are missing or changed. `token_ids` are their tokens. All other
                records are in `out`.
            NotFoundError: The parent was deleted.
        """
        out = np.empty((len(ids), manifest.record_bytes), np.uint8) if out is None else out
        slots = np.arange(len(ids)) if slots is None else slots
        owned, bad = manifest.owns(ids), list[CorruptError]()
        parts = [(manifest, owned)]
        if not owned.all():
            parts.append((self.parent(manifest), ~owned))
        for table, part in parts:
            try:
                own = arrived and partial(_of_part, arrived, np.flatnonzero(part))
                self._read_own(table, ids[part], out, slots[part], own)
            except CorruptError as error:
                self._reopen(table, np.array(error.token_ids, np.uint32))
                bad.append(error)
        if bad:
            raise CorruptError(str(bad[0]), (i for error in bad for i in error.token_ids))
        return out

    def auxiliary(self, manifest: Manifest) -> AuxiliaryTables:
        """Load the auxiliary tables of a table. Raises NotFoundError or CorruptError."""

        def fetch(ref: str) -> tuple[Manifest, np.ndarray]:
            table = self.manifest(ref)
            return table, self.read_records(table, np.arange(table.vocab_size, dtype=np.uint32))

        return load_auxiliary(manifest, fetch)

    def rows(self, manifest: Manifest, ids: np.ndarray) -> np.ndarray:
        """Read rows float32 [T, N, D] of `ids` uint32 [T]."""
        records = self.read_records(manifest, ids)
        return self.auxiliary(manifest).decode(ids, records).astype(np.float32)

    @abstractmethod
    def close(self) -> None:
        """Close connections and files."""

    def _read_own(
        self,
        manifest: Manifest,
        ids: np.ndarray,
        out: np.ndarray,
        slots: np.ndarray,
        arrived: Arrived | None,
    ) -> None:
        """Do the work of `read_records` for records that the version stores itself."""
        if not len(ids):
            return
        size, flat = manifest.record_bytes, out.data.cast("B")
        step = max(1, ARRIVED_BYTES // size) if arrived else len(ids)
        # By shard and position, for fewer and longer reads.
        places = manifest.positions(ids), manifest.shard_of(ids), np.arange(len(ids)) // step
        order = np.lexsort(places)
        ids = ids[order]
        views = [flat[slot * size : slot * size + size] for slot in slots[order].tolist()]
        bad, intact = dict[int, str](), list[int]()
        with closing(self._fill(manifest, ids, views)) as filled:
            for n, why in enumerate(manifest.reasons(ids, filled), 1):
                if why:
                    bad[int(ids[n - 1])] = why
                elif arrived:
                    intact.append(n - 1)
                if arrived and intact and (n % step == 0 or n == len(ids)):
                    arrived(order[intact])
                    intact = []
        if bad:
            raise manifest.corrupt(bad)

    @abstractmethod
    def _fill(
        self, manifest: Manifest, ids: np.ndarray, views: Views
    ) -> Generator[memoryview | str]:
        """Read the records of `ids`, which are in runs of one shard and of positions, into `views`.

        Yields each view once it is full, or the reason as text if the record is missing.
        """

    @abstractmethod
    def _reopen(self, manifest: Manifest, ids: np.ndarray) -> None:
        """Close outdated files of the shards of `ids`, whose rows are bad."""

    @abstractmethod
    def _read_text(self, ref: str, kind: Kind) -> bytes | None:
        """Read a text of the registry. Returns None if there is none."""

    @abstractmethod
    def _read_log(self) -> list[bytes]:
        """Read the lines of the log."""


def _of_part(arrived: Arrived, part: np.ndarray, indices: np.ndarray) -> None:
    arrived(part[indices])


def open_store(
    url: str,
    timeout_seconds: float = 5.0,
    wait_seconds: float = 0.0,
    origin: Origin | None = None,
) -> Store:
    """Open the store at `url`: file://PATH, or redis://HOST:PORT (rediss:// with TLS).

    The URL may list several nodes of a Redis Cluster, redis://HOST:PORT,HOST:PORT. One node has to
    answer. While the store cannot be reached, the function retries for `wait_seconds`. The log has
    `origin` as the origin of changes.
    """
    store = _open_store(url, timeout_seconds, wait_seconds)
    store.origin = origin or store.origin
    return store


def _open_store(url: str, timeout_seconds: float, wait_seconds: float) -> Store:
    check_url(url)
    if url.startswith("file://"):
        from tolhouse.store.files import FileStore

        return FileStore(url.removeprefix("file://"))
    try:
        from tolhouse.store.redis import RedisStore
    except ModuleNotFoundError as error:
        hint = installation_hint(str(error.name), "store") or str(error)
        raise ModuleNotFoundError(hint, name=error.name) from None

    deadline, reason = time.monotonic() + wait_seconds, ""
    while True:
        try:
            return RedisStore(url, timeout_seconds)
        except (UnavailableError, DeadlineExceededError) as error:
            if time.monotonic() >= deadline:
                raise
            if reason != str(error):
                reason = str(error)
                event("waiting for the store", logging.WARNING, reason=reason)
        time.sleep(0.2)


def check_url(url: str) -> None:
    """Raise InvalidArgumentError unless `url` has the form of one store's URL."""
    if re.search(r",\s*\w+://", url):
        raise InvalidArgumentError(f"{shown(url)!r} names several stores; one is allowed here")
    scheme, _, rest = url.partition("://")
    database = _parts(url)[0].path.strip("/")  # redis-py ignores an invalid database
    is_redis = scheme in ("redis", "rediss") and (database or "0").isdecimal()
    if not rest or not (is_redis or scheme == "file"):
        raise not_understood(url)


def require_private(url: str, *, insecure: bool) -> str:
    """Check and return the URL of a file store, a local Redis, or a Redis with TLS.

    Raises:
        InvalidArgumentError: The Redis is on another machine, and the URL has no TLS or disables
            the check of the certificate.
    """
    parts, options, hosts = _parts(url)
    if parts.scheme not in ("file", "redis", "rediss"):
        raise not_understood(url)
    checks = ("ssl_cert_reqs", "required"), ("ssl_check_hostname", "true")
    checked = all(options.get(name, value).lower() == value for name, value in checks)
    private = parts.scheme == "file" or (parts.scheme == "rediss" and checked)
    if private or insecure or all(is_loopback(join_address(host, 0)) for host in hosts):
        return url
    how = "without a check of its certificate: remove those options"
    how = "in plaintext: give a rediss:// URL" if parts.scheme == "redis" else how
    how = f"{how}, or `insecure` if the network is trusted"
    raise InvalidArgumentError(
        f"Redis at {shown(url)} is on another machine and would be called {how}"
    )


def has_password(url: str) -> bool:
    """Return whether the URL contains a password."""
    parts, options, _ = _parts(url)
    return bool(parts.password) or "password" in options


def not_understood(url: str) -> InvalidArgumentError:
    allowed = "file://PATH, redis://HOST:PORT and rediss://HOST:PORT (IPv6: redis://[::1]:6379)"
    return InvalidArgumentError(f"store {shown(url)!r} is not understood; allowed are {allowed}")


def shown(url: str) -> str:
    """Return the URL of a store for logs and messages, without user, password and options."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"


def _parts(url: str) -> tuple[SplitResult, dict[str, str], list[str]]:
    """Return the parts of the URL, its options, and its hosts without ports."""
    try:
        parts = urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2].split(",")
        if not all(re.fullmatch(r"(\[[^]]+]|[^][:]*)(:[0-9]+)?", host) for host in hosts):
            raise not_understood(url)
        names = [urlsplit(f"//{host}").hostname or "localhost" for host in hosts]
        return parts, dict(parse_qsl(parts.query)), names
    except ValueError:
        raise not_understood(url) from None
