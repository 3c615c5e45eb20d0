"""What the file store and the Redis store do alike, and `open_store(url)`, which opens either.

A store keeps immutable versions of tables and, per name, an alias: the version that the name
stands for. Its methods may be called from several threads.
"""

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from functools import lru_cache
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
from tolhouse.table.auxiliary import AuxiliaryTables, load_auxiliary
from tolhouse.table.manifest import Manifest, check_name, split_ref

Views = list[memoryview]  # of records
LEASE_SECONDS = 30.0  # after its last use, a version counts as used for so long


@dataclass(frozen=True)
class Alias:
    """The version a name stands for, and those it stood for before, latest last."""

    version: str
    history: tuple[str, ...]

    def to_json(self) -> bytes:
        return _ALIAS.dump_json(self)


_ALIAS = TypeAdapter(Alias)
_parsed = lru_cache(16)(Manifest.from_json)  # it may be long, and is read again with each bad row

Kind = Literal["manifest", "deleting", "alias"]  # of "name@version" the first two, of "name"
Changes = dict[tuple[Kind, str], bytes | None]  # texts of the registry to write, or to remove


class Store(ABC):
    """Reads and writes are of one immutable version; only an alias ever changes."""

    def __init__(self, url: str) -> None:
        self.url = url  # for messages: without a password
        self._parents: dict[str, Manifest] = {}  # of overlays, by ref

    # versions

    @abstractmethod
    def refs(self) -> list[str]:
        """ "name@version" of every complete table, sorted."""

    def manifest(self, ref: str) -> Manifest:
        """The manifest of "name@version"; NotFoundError if it is not here or not complete,
        CorruptError."""
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

    def parent(self, manifest: Manifest) -> Manifest:
        """The table that an overlay lies over; NotFoundError if it is gone, CorruptError if it
        can't be."""
        ref = manifest.parent
        if ref not in self._parents:
            about = f"table {manifest.ref} is an overlay over {ref}, which"
            try:
                found = self.manifest(ref)
            except NotFoundError:
                raise NotFoundError(f"{about} is not in {self.url} any more") from None
            form, own = ((m.record_dtype, m.vocab_size) for m in (found, manifest))
            if found.parent or form != own:
                raise CorruptError(f"{about} has records of another form in {self.url}")
            self._parents[ref] = found
        return self._parents[ref]

    @abstractmethod
    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        """Store a whole shard, durably, in place of whatever is there."""

    @abstractmethod
    def count(self, manifest: Manifest, shard: int) -> int:
        """Rows that the shard holds; 0 where there is none."""

    @abstractmethod
    def delete_records(self, ref: str) -> None:
        """Remove all that is stored of "name@version", whose manifest is gone already."""

    @abstractmethod
    def lease(self, ref: str) -> None:
        """Note that a version is used now; good for LEASE_SECONDS, or until the process ends."""

    @abstractmethod
    def leased(self, ref: str) -> bool:
        """Whether a version was used lately."""

    def risk(self) -> str:
        """How the store's settings may lose rows, for warnings; "" if they don't."""
        return ""

    # names

    def alias(self, name: str) -> Alias | None:
        """What `name` stands for, if it was ever published; CorruptError if that can't be read."""
        text = self._read_text(check_name(name), "alias")
        try:
            return None if text is None else _ALIAS.validate_json(text)
        except ValidationError:
            what = "is malformed; publish a version to write it anew"
            raise CorruptError(f"the alias of {name!r} in {self.url} {what}") from None

    @abstractmethod
    def update(self, change: Callable[[], Changes]) -> None:
        """Write what `change` returns, in its order and as one: nobody else's update comes between
        what `change` reads and the last of it. `change` may be called several times.
        """

    def is_being_deleted(self, ref: str) -> bool:
        """Whether the records of a version are being removed, or that was cut off."""
        return self._read_text(ref, "deleting") is not None

    # rows

    def read_records(
        self,
        manifest: Manifest,
        ids: np.ndarray,
        out: np.ndarray | None = None,
        slots: np.ndarray | None = None,
    ) -> np.ndarray:
        """Verified records of `ids` uint32 [T], in `slots` of `out`, uint8 [., record_bytes].

        Without them, as a new array. What an overlay has not changed is its parent's. CorruptError,
        with their tokens, if records are missing or altered: all others are in place.
        NotFoundError if
        a parent is gone.
        """
        out = np.empty((len(ids), manifest.record_bytes), np.uint8) if out is None else out
        slots = np.arange(len(ids)) if slots is None else slots
        owned, bad = manifest.owns(ids), list[CorruptError]()
        parts = [(manifest, owned)]
        if not owned.all():
            parts.append((self.parent(manifest), ~owned))
        for table, part in parts:
            try:
                self._read_own(table, ids[part], out, slots[part])
            except CorruptError as error:
                self._reopen(table, np.array(error.token_ids, np.uint32))
                bad.append(error)
        if bad:
            raise CorruptError(str(bad[0]), (i for error in bad for i in error.token_ids))
        return out

    def auxiliary(self, manifest: Manifest) -> AuxiliaryTables:
        """What a table's rows need besides its records; NotFoundError, CorruptError."""

        def fetch(ref: str) -> tuple[Manifest, np.ndarray]:
            table = self.manifest(ref)
            return table, self.read_records(table, np.arange(table.vocab_size, dtype=np.uint32))

        return load_auxiliary(manifest, fetch)

    def rows(self, manifest: Manifest, ids: np.ndarray) -> np.ndarray:
        """Rows float32 [T, N, D] of `ids` uint32 [T]."""
        records = self.read_records(manifest, ids)
        return self.auxiliary(manifest).decode(ids, records).astype(np.float32)

    @abstractmethod
    def close(self) -> None: ...

    def _read_own(
        self, manifest: Manifest, ids: np.ndarray, out: np.ndarray, slots: np.ndarray
    ) -> None:
        """As `read_records`, for `ids` whose records this version stores itself."""
        if not len(ids):
            return
        order = np.lexsort((manifest.positions(ids), manifest.shard_of(ids)))
        ids, size, flat = ids[order], manifest.record_bytes, out.data.cast("B")
        views = [flat[slot * size : slot * size + size] for slot in slots[order].tolist()]
        with closing(self._fill(manifest, ids, views)) as filled:
            manifest.verify(ids, filled)

    @abstractmethod
    def _fill(
        self, manifest: Manifest, ids: np.ndarray, views: Views
    ) -> Generator[memoryview | str]:
        """Read the records of `ids`, in order of shards and positions, into `views`.

        Each view is yielded once it is full; in its place, a text where the record is not there.
        """

    @abstractmethod
    def _reopen(self, manifest: Manifest, ids: np.ndarray) -> None:
        """Give up what is kept open of the shards of `ids` and out of date: rows there are bad."""

    @abstractmethod
    def _read_text(self, ref: str, kind: Kind) -> bytes | None:
        """A text of the registry, if it is there."""


def open_store(url: str, timeout_seconds: float = 5.0, wait_seconds: float = 0.0) -> Store:
    """The store at `url`: file://PATH, or redis://HOST:PORT (rediss:// with TLS).

    Several nodes of a Redis Cluster may be named, redis://HOST:PORT,HOST:PORT; one has to answer.
    `wait_seconds`: for so long it may be unreachable.
    """
    check_url(url)
    if url.startswith("file://"):
        from tolhouse.store.files import FileStore

        return FileStore(url.removeprefix("file://"))
    try:
        from tolhouse.store.redis import RedisStore
    except ModuleNotFoundError as error:
        hint = installation_hint(str(error.name), "store") or str(error)
        raise ModuleNotFoundError(hint, name=error.name) from None

    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return RedisStore(url, timeout_seconds)
        except (UnavailableError, DeadlineExceededError) as error:
            if time.monotonic() >= deadline:
                raise
            event("waiting for the store", logging.WARNING, reason=str(error))
        time.sleep(1.0)


def check_url(url: str) -> None:
    """Raise InvalidArgumentError unless `url` has the form of one store's URL."""
    if re.search(r",\s*\w+://", url):
        raise InvalidArgumentError(f"{shown(url)!r} names several stores; one is allowed here")
    scheme, _, rest = url.partition("://")
    database = _parts(url)[0].path.strip("/")  # redis-py ignores one that it can't read
    is_redis = scheme in ("redis", "rediss") and (database or "0").isdecimal()
    if not rest or not (is_redis or scheme == "file"):
        raise not_understood(url)


def require_private(url: str, *, insecure: bool) -> str:
    """The URL; InvalidArgumentError for a Redis on another machine without TLS or certificate
    checks."""
    parts, options, hosts = _parts(url)
    if parts.scheme not in ("file", "redis", "rediss"):
        raise not_understood(url)
    checks = ("ssl_cert_reqs", "required"), ("ssl_check_hostname", "true")
    checked = all(options.get(name, value).lower() == value for name, value in checks)
    private = parts.scheme == "file" or (parts.scheme == "rediss" and checked)
    if private or insecure or all(is_loopback(join_address(host, 0)) for host in hosts):
        return url
    how = "without a check of its certificate: leave those options out"
    how = "in plaintext: give a rediss:// URL" if parts.scheme == "redis" else how
    how = f"{how}, or `insecure` if the network is trusted"
    raise InvalidArgumentError(
        f"Redis at {shown(url)} is another machine and would be called {how}"
    )


def has_password(url: str) -> bool:
    """Whether the URL itself holds a password."""
    parts, options, _ = _parts(url)
    return bool(parts.password) or "password" in options


def not_understood(url: str) -> InvalidArgumentError:
    allowed = "file://PATH, redis://HOST:PORT and rediss://HOST:PORT (IPv6: redis://[::1]:6379)"
    return InvalidArgumentError(f"store {shown(url)!r} is not understood; allowed are {allowed}")


def shown(url: str) -> str:
    """A store's URL for logs and messages: without user, password and options."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"


def _parts(url: str) -> tuple[SplitResult, dict[str, str], list[str]]:
    """The URL taken apart, its options, and its hosts without ports."""
    try:
        parts = urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2].split(",")
        if not all(re.fullmatch(r"(\[[^]]+]|[^][:]*)(:[0-9]+)?", host) for host in hosts):
            raise not_understood(url)
        names = [urlsplit(f"//{host}").hostname or "localhost" for host in hosts]
        return parts, dict(parse_qsl(parts.query)), names
    except ValueError:
        raise not_understood(url) from None
