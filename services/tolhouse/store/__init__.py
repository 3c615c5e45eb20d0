"""Where tables live: `open_store(url)` gives the file store or the Redis store, and there is no third.

Both keep immutable versions of tables and, per name, an alias: the version that the name stands for.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from tolhouse.errors import (
    Corrupt,
    DeadlineExceeded,
    InUse,
    InvalidArgument,
    NotFound,
    TolhouseError,
    Unavailable,
)
from tolhouse.logs import event
from tolhouse.net.tls import is_loopback
from tolhouse.table.auxiliary import AuxiliaryTables, load_auxiliary
from tolhouse.table.manifest import Manifest, check_name, split_ref
from tolhouse.table.records import Buffer, digest

_WAIT_SECONDS = 1.0  # between two tries to reach a store
LEASE_SECONDS = 30.0  # after its last use, a version counts as used for so long


@dataclass(frozen=True)
class Alias:
    """The version a name stands for, and those it stood for before, latest last."""

    version: str
    history: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Alias":
        """The alias in `text`; Corrupt where it is malformed."""
        try:
            data = json.loads(text)
            alias = cls(data["version"], tuple(data["history"]))
            ok = all(isinstance(version, str) for version in (alias.version, *alias.history))
        except (ValueError, KeyError, TypeError, RecursionError):
            ok = False
        if not ok:
            raise Corrupt("is malformed; publish a version to write it anew")
        return alias


class Store(Protocol):
    """What both stores do. Reads and writes are of one immutable version; only an alias ever changes."""

    url: str
    _parents: dict[str, Manifest]  # of overlays, by "name@version": they never change

    def refs(self) -> list[str]:
        """ "name@version" of every complete table, sorted."""

    def manifest(self, ref: str) -> Manifest:
        """The manifest of "name@version"; NotFound if that table is not here, or not complete."""

    def own_records(
        self, manifest: Manifest, ids: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[Buffer]]]:
        """The verified records of `ids`, which the version has itself, shard by shard as they come: places in `ids`, and the records, uncopied.

        Corrupt if one is missing or altered.
        """
        ...

    def records(
        self, manifest: Manifest, ids: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[Buffer]]]:
        """The same of any `ids`: what an overlay has not changed is its parent's. NotFound if that one is gone."""
        if not manifest.parent:
            yield from self.own_records(manifest, ids)
            return
        owned = manifest.owns(ids)
        for table, mine in (
            (manifest, np.flatnonzero(owned)),
            (self.parent(manifest), np.flatnonzero(~owned)),
        ):
            if len(mine):
                for places, records in self.own_records(table, ids[mine]):
                    yield mine[places], records

    def parent(self, manifest: Manifest) -> Manifest:
        """The table that an overlay lies over; NotFound if it is gone, Corrupt if it can't be that."""
        if manifest.parent not in self._parents:
            try:
                found = self.manifest(manifest.parent)
            except NotFound:
                raise NotFound(
                    f"table {manifest.ref} is an overlay over {manifest.parent}, which is not in {self.url} any more"
                ) from None
            if (
                found.parent
                or found.record_dtype != manifest.record_dtype
                or found.vocab_size != manifest.vocab_size
            ):
                raise Corrupt(
                    f"table {manifest.ref} in {self.url} can't be an overlay over {manifest.parent}: their records differ in form"
                )
            self._parents[manifest.parent] = found
        return self._parents[manifest.parent]

    def read(self, manifest: Manifest, ids: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` [T, record_bytes] with the records of `ids`."""
        for places, records in self.records(manifest, ids):
            for place, record in zip(places.tolist(), records, strict=True):
                out[place] = np.frombuffer(record, np.uint8)

    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        """Store a whole shard, durably, in place of whatever is there."""

    def count(self, manifest: Manifest, shard: int) -> int:
        """Rows that the shard holds; 0 where there is none."""

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, last of all: from now on the table is there."""

    def delete(self, manifest: Manifest) -> None:
        """Remove a version; its manifest goes first."""

    def alias(self, name: str) -> Alias | None:
        """What `name` stands for, if it was ever published; Corrupt if that can't be read."""

    def set_alias(self, name: str, alias: Alias | None) -> None:
        """Make `name` stand for another version, or for none."""

    def lease(self, manifest: Manifest) -> None:
        """Note that someone uses this version now; good for LEASE_SECONDS."""

    def leased(self, manifest: Manifest) -> bool:
        """Whether someone does."""
        ...

    def close(self) -> None: ...


def open_store(url: str, timeout_seconds: float = 5.0) -> Store:
    """The store at `url`: file://PATH, or redis://HOST:PORT (rediss:// with TLS), standalone or a node of a Cluster.

    Of a Cluster several nodes may be named, redis://HOST:PORT,HOST:PORT: the first that answers tells of the others.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "file" and rest:
        from tolhouse.store.files import FileStore

        return FileStore(rest)
    if separator and scheme in ("redis", "rediss") and rest:
        from tolhouse.store.redis import RedisStore

        database = urlsplit(url).path.strip("/")  # redis-py passes over one that it can't read
        if database and not database.isdecimal():
            raise not_understood(url)
        return RedisStore(url, timeout_seconds)
    raise not_understood(url)


def wait_for_store(url: str, timeout_seconds: float, wait_seconds: float) -> Store:
    """The store at `url`; where it can't be reached yet, as while everything starts, it is tried again for so long."""
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return open_store(url, timeout_seconds)
        except (Unavailable, DeadlineExceeded) as error:
            if time.monotonic() > deadline:
                raise
            event("waiting for the store", logging.WARNING, reason=str(error))
        time.sleep(_WAIT_SECONDS)


def require_private(url: str, *, insecure: bool) -> str:
    """The URL, unless it is of a Redis of another machine without TLS, or without a check of whom it talks to: InvalidArgument."""
    try:
        parts = urlsplit(url)
        options, plain = dict(parse_qsl(parts.query)), parts.scheme == "redis"
        hosts = [
            urlsplit(f"//{host}").hostname or "localhost"
            for host in parts.netloc.rpartition("@")[2].split(",")
        ]
        far = parts.scheme.startswith("redis") and not all(
            is_loopback(f"{host}:0") for host in hosts
        )
    except ValueError:
        raise not_understood(url) from None
    unchecked = (
        options.get("ssl_cert_reqs", "required") != "required"
        or options.get("ssl_check_hostname", "true").lower() != "true"
    )
    if far and not insecure and (plain or unchecked):
        how = (
            "in plaintext: give a rediss:// URL"
            if plain
            else "without a check of its certificate: leave those options out"
        )
        raise InvalidArgument(
            f"Redis at {shown(url)} is another machine and would be called {how}, or --insecure where the network is trusted"
        )
    return url


def has_password(url: str) -> bool:
    """Whether the URL itself holds a password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return bool(parts.password) or "password" in dict(parse_qsl(parts.query))


def not_understood(url: str) -> InvalidArgument:
    return InvalidArgument(
        f"store {shown(url)!r} is not understood; allowed are file://PATH, redis://HOST:PORT and rediss://HOST:PORT"
    )


def shown(url: str) -> str:
    """A store's URL for logs and messages: without user, password and options."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2].partition('?')[0]}"


def resolve(store: Store, ref: str) -> Manifest:
    """The manifest of "name@version", or of the published version of "name"."""
    name, version = split_ref(ref)
    if version is None:
        alias = store.alias(name)
        if alias is None:
            raise NotFound(f"table {name!r} is not published in {store.url}; {known(store)}")
        version = alias.version
    try:
        return store.manifest(f"{name}@{version}")
    except NotFound as error:
        raise NotFound(f"{error}; {known(store)}") from None


def known(store: Store) -> str:
    refs = store.refs()
    more = f" and {len(refs) - 8} more" if len(refs) > 8 else ""
    return (
        f"tables here: {', '.join(refs[:8])}{more}"
        if refs
        else "there are no tables here yet: `tolhouse build` makes them"
    )


def publish(store: Store, ref: str) -> Manifest:
    """Make the name stand for this version; publishing what is published changes nothing."""
    name, version = split_ref(ref)
    if version is None:
        raise InvalidArgument(f"publish needs name@version, not {ref!r}; {known(store)}")
    manifest = resolve(store, ref)
    refuse_part(store, ref, "no table to serve")
    if manifest.parent:
        store.parent(manifest)  # one without it has no rows to serve
    try:
        old = store.alias(name)
    except Corrupt:
        old = None
    if old is None or old.version != version:
        store.set_alias(name, Alias(version, (*old.history, old.version) if old else ()))
    return manifest


def refuse_part(store: Store, ref: str, what: str) -> None:
    """InvalidArgument, with `what` it is not, if the version is a part of another."""
    if of := [m.ref for m in _complete(store) if ref in m.auxiliary]:
        raise InvalidArgument(f"{ref} is a part of {', '.join(of)} and {what}")


def is_new(store: Store, planned: Manifest) -> bool:
    """Whether the version is not in the store yet, or nothing is published under its name."""
    try:
        return store.alias(planned.name) is None or not store.manifest(planned.ref)
    except (NotFound, Corrupt):
        return True


def stands_for(store: Store, ref: str) -> bool:
    """Whether the name of "name@version" stands for that version."""
    name, version = split_ref(ref)
    alias = store.alias(name)
    return alias is not None and alias.version == version


def refuse_another(store: Store, planned: Manifest) -> None:
    """InUse if the version that is to be written is there already, cut into other shards or of another model."""
    try:
        there = store.manifest(planned.ref)
    except (NotFound, Corrupt):
        return
    if (there.num_shards, there.model_id, there.tokenizer_id) != (
        planned.num_shards,
        planned.model_id,
        planned.tokenizer_id,
    ):
        raise InUse(
            f"{planned.ref} is in {store.url} already, with {there.num_shards} shards and built from model {there.model_id[:12]}: "
            f"build with --shards {there.num_shards}, under another --name, or delete it first"
        )


def rollback(store: Store, name: str) -> Manifest:
    """Make the name stand for the version before the present one."""
    old = store.alias(check_name(name))
    if old is None:
        raise NotFound(f"table {name!r} is not published in {store.url}; {known(store)}")
    if not old.history:
        raise InvalidArgument(f"table {name!r} has no version before {old.version} to go back to")
    manifest = resolve(store, f"{name}@{old.history[-1]}")
    if manifest.parent:
        store.parent(manifest)
    store.set_alias(name, Alias(old.history[-1], old.history[:-1]))
    return manifest


def delete(store: Store, ref: str, force: bool = False) -> Manifest:
    """Remove a version that its name does not stand for and that nobody uses, and forget it in the name's history.

    force: also one that is in use; who uses it gets errors.
    """
    name, version = split_ref(ref)
    if version is None:
        raise InvalidArgument(f"delete needs name@version, not {ref!r}; {known(store)}")
    manifest = resolve(store, ref)
    alias = store.alias(name)
    if alias and alias.version == version:
        raise InUse(
            f"{ref} is published: publish or roll back to another version before deleting it"
        )
    others = [m for m, _ in tables(store) if m.ref != ref]
    if above := [m.ref for m in others if ref in m.dependencies]:
        raise InUse(f"{ref} is a part of {', '.join(above)}: delete that first")
    if not force and store.leased(manifest):
        raise InUse(
            f"{ref} is in use: its rows were asked for within the last {LEASE_SECONDS:g} s; wait until nobody does, or use --force"
        )
    if alias and version in alias.history:
        # what remains on either side of it may be one version: going back has to lead to another
        *history, now = (
            v
            for v, _ in itertools.groupby(
                v for v in (*alias.history, alias.version) if v != version
            )
        )
        store.set_alias(name, Alias(now, tuple(history)))
    store.delete(manifest)
    for part in manifest.auxiliary:
        if not any(part in m.dependencies for m in others):
            with contextlib.suppress(NotFound):
                store.delete(store.manifest(part))
    return manifest


def auxiliary_of(store: Store, manifest: Manifest) -> AuxiliaryTables:
    """What a table's rows need besides its records; NotFound, Corrupt."""

    def read(ref: str) -> tuple[Manifest, np.ndarray]:
        found = store.manifest(ref)
        return found, records_of(store, found, np.arange(found.vocab_size, dtype=np.uint32))

    return load_auxiliary(manifest, read)


def records_of(store: Store, manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    """Verified records uint8 [T, record_bytes] of `ids` uint32 [T]; Corrupt, NotFound."""
    records = np.empty((len(ids), manifest.record_bytes), np.uint8)
    store.read(manifest, ids, records)
    return records


def rows_of(store: Store, manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    """Rows float32 [T, N, D] of `ids` [T], as the table has them."""
    return (
        auxiliary_of(store, manifest)
        .decode(ids, records_of(store, manifest, ids))
        .astype(np.float32)
    )


def shard_digest(store: Store, manifest: Manifest, shard: int) -> str | None:
    """The digest of a shard all of whose records are there and verified; None if it has to be written (again)."""
    ids = manifest.shard_ids(shard)
    if store.count(manifest, shard) != len(ids):
        return None
    try:
        return digest(records_of(store, manifest, ids))
    except Corrupt:
        return None


def by_shard(manifest: Manifest, ids: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Each shard that `ids` touch, and the places of its ids."""
    places: dict[int, list[int]] = {}
    for place, shard in enumerate(manifest.shard_of(ids).tolist()):
        places.setdefault(shard, []).append(place)
    return [(shard, np.array(its)) for shard, its in sorted(places.items())]


def tables(store: Store) -> Iterator[tuple[Manifest, bool]]:
    """Every complete table, and whether its name stands for it."""
    for manifest in _complete(store):
        yield manifest, stands_for(store, manifest.ref)


def _complete(store: Store) -> Iterator[Manifest]:
    for ref in store.refs():
        try:
            manifest = store.manifest(ref)
        except TolhouseError:
            continue  # deleted meanwhile, or malformed: `resolve` says which
        yield manifest
