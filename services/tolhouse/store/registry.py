"""Operations on versions: commit, list, resolve, publish, roll back, delete.

Each change of the registry is one transaction of the store, which also appends to the log.
Concurrent changes happen one after another.

A version is `building`, then `verified` when its manifest is written, and `published` while its
name stands for it. After its rows have left the store, it is `archived` or `deleted`.
"""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from tolhouse.errors import (
    CorruptError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    TolhouseError,
    UnavailableError,
)
from tolhouse.store.base import LEASE_SECONDS, Alias, Changes, Store
from tolhouse.store.journal import Entry, Event, line
from tolhouse.table.manifest import Manifest, split_ref

State = Literal["building", "verified", "published", "archived", "deleted"]
_BEING_DELETED = "is being deleted: wait, or if that was interrupted, delete it with `force`"


def tables(store: Store) -> Iterator[tuple[Manifest, bool]]:
    """Yield every readable table, and whether it is the published version of its name."""
    return ((manifest, stands_for(store, manifest.ref)) for manifest in _manifests(store))


@dataclass(frozen=True)
class Listed:
    """A version in a store or in its log.

    Attributes:
        ref: The version as "name@version".
        state: Its state.
        manifest: Its manifest, or None without rows in the store.
        last: Its last entry in the log, or None for a version from before the log.
    """

    ref: str
    state: State
    manifest: Manifest | None
    last: Entry | None


def versions(store: Store) -> list[Listed]:
    """Return all versions in the store and in its log, sorted.

    The state of a version in the store follows from its manifest and the alias of its name. For
    other versions, it is that of the log.
    """
    last = {f"{entry['name']}@{entry['version']}": entry for entry in store.log()}
    found = [
        Listed(m.ref, "published" if published else "verified", m, last.get(m.ref))
        for m, published in tables(store)
    ]
    there = {*store.refs(), *(one.ref for one in found)}
    for ref in last.keys() - there:
        event = last[ref]["event"]
        state: State = event if event in ("building", "archived") else "deleted"
        found.append(Listed(ref, state, None, last[ref]))
    return sorted(found, key=attrgetter("ref"))


def own_auxiliary(manifest: Manifest) -> tuple[str, ...]:
    """Return the auxiliary tables that belong to the table itself.

    An overlay shares the others with its parent.
    """
    return tuple(ref for ref in manifest.auxiliary if not manifest.parent or ref == manifest.edits)


def with_own_auxiliary(store: Store, manifest: Manifest) -> list[Manifest]:
    """Return the manifests of the auxiliary tables of `own_auxiliary`, and then the table's own."""
    return [*map(store.manifest, own_auxiliary(manifest)), manifest]


def resolve(store: Store, ref: str) -> Manifest:
    """Read the manifest of "name@version", or of the published version of "name"."""
    name, version = split_ref(ref)
    try:
        if version is None and (alias := store.alias(name)):
            version = alias.version
        if version is None:
            raise NotFoundError(f"table {name!r} is not published in {store.url}")
        return store.manifest(f"{name}@{version}")
    except NotFoundError as error:
        raise NotFoundError(f"{error}; {_tables_here(store)}") from None


def stands_for(store: Store, ref: str) -> bool:
    """Return whether the version is the published version of its name."""
    name, version = split_ref(ref)
    alias = store.alias(name)
    return alias is not None and alias.version == version


def is_new(store: Store, planned: Manifest) -> bool:
    """Return whether the version is not in the store yet, or its name has no published version."""
    with suppress(NotFoundError, CorruptError):
        return store.alias(planned.name) is None or not store.manifest(planned.ref)
    return True


def begin(store: Store, planned: Manifest) -> None:
    """Log that a version is being built, unless it is complete.

    Raises:
        InUseError, UnavailableError: See `refuse_another`.
    """

    def change() -> Changes:
        refuse_another(store, planned)
        with suppress(NotFoundError, CorruptError):
            if store.manifest(planned.ref):
                return {}
        return _logged(store, "building", planned.ref)

    store.update(change)


def commit(store: Store, manifest: Manifest, event: Event = "verified", **more: Any) -> None:
    """Write the manifest, which completes the table. All shards must be in the store.

    The log has `event` with the fields `more`.

    Raises:
        CorruptError: Rows are missing.
        NotFoundError: A table on which it depends is missing.
        UnavailableError: The version is being deleted.
        InUseError: The version is in the store with other shards, or from another model.
    """

    def change() -> Changes:
        refuse_another(store, manifest)
        for ref in manifest.dependencies:
            store.manifest(ref)
        stored = sum(store.count(manifest, shard) for shard in range(manifest.num_shards))
        if stored != manifest.num_records:
            rows = f"{stored} of {manifest.num_records} rows of {manifest.ref}"
            raise CorruptError(f"{store.url} holds {rows}: build it again")
        text = store.manifest_text(manifest)
        return {**_logged(store, event, manifest.ref, **more), ("manifest", manifest.ref): text}

    store.update(change)


def publish(store: Store, ref: str) -> Manifest:
    """Publish a version under its name. Publishing it again changes nothing."""
    name, version = _version_of(store, ref, "publish")

    def change() -> Changes:
        _servable(store, ref)
        refuse_part(store, ref, "cannot be published")
        old: Alias | None = None
        with suppress(CorruptError):
            old = store.alias(name)
        if old and old.version == version:
            return {}
        new = Alias(version, (*old.history, old.version) if old else ())
        before = old.version if old else ""
        return {
            **_logged(store, "published", ref, before=before),
            ("alias", name): new.to_json(),
        }

    store.update(change)
    return store.manifest(ref)


def rollback(store: Store, name: str) -> Manifest:
    """Publish the previous version of a name again."""
    now: list[Manifest] = []

    def change() -> Changes:
        old = store.alias(name) or Alias(resolve(store, name).version, ())  # raises NotFoundError
        if not old.history:
            before = f"no version before {old.version} to go back to"
            raise InvalidArgumentError(f"table {name!r} has {before}")
        now[:] = [_servable(store, f"{name}@{old.history[-1]}")]
        return {
            **_logged(store, "published", now[0].ref, before=old.version, rollback=True),
            ("alias", name): Alias(old.history[-1], old.history[:-1]).to_json(),
        }

    store.update(change)
    return now[0]


def delete(
    store: Store, ref: str, force: bool = False, event: Event = "deleted", **more: Any
) -> None:
    """Remove a version that is neither published nor in use, also from the history of its name.

    Auxiliary tables are also removed, unless other tables need them. The manifest need not be
    readable, and may have an earlier format. `force` also removes a version in use, whose readers
    then get errors, completes an interrupted deletion, and removes the shards of a version that is
    being built. The log has `event` with the fields `more`.
    """
    name, version = _version_of(store, ref, "delete")
    removed: list[str] = []

    def change() -> Changes:
        removed[:] = [ref, *_removable(store, ref, force)]
        changes = _logged(store, event, ref, **more)
        for part in removed[1:]:
            changes |= _logged(store, event, part, of=ref)
        changes |= {("deleting", gone): b"" for gone in removed}
        alias = store.alias(name)
        if alias and version in alias.history:
            # Merge equal neighbours, so that a rollback leads to another version.
            remaining = (v for v in (*alias.history, alias.version) if v != version)
            *history, now = (v for v, _ in itertools.groupby(remaining))
            changes["alias", name] = Alias(now, tuple(history)).to_json()
        return {**changes, **{("manifest", gone): None for gone in removed}}

    store.update(change)
    remove(store, removed)


def complete_archive(store: Store, ref: str, refs: list[str], **more: Any) -> None:
    """Complete an interrupted archive of a version, whose manifest is not in the store any more.

    `refs` are the versions that are still being deleted with it. Entries that the log lacks are
    appended. That of `ref` has the fields `more`.
    """

    def change() -> Changes:
        last = {f"{entry['name']}@{entry['version']}": entry["event"] for entry in store.log()}
        changes: Changes = {}
        for one in refs:
            if last.get(one) != "archived":
                fields = more if one == ref else {"of": ref}
                changes |= _logged(store, "archived", one, **fields)
        return changes

    store.update(change)
    remove(store, refs)


def remove(store: Store, refs: list[str]) -> None:
    """Remove the rows of versions whose deletion has begun, which completes it."""
    for ref in refs:
        store.delete_records(ref)
    store.update(lambda: {("deleting", ref): None for ref in refs})


def refuse_in_use(store: Store, ref: str) -> None:
    """Raise InUseError or NotFoundError if `delete` would refuse to remove a version."""
    _version_of(store, ref, "archive")
    _removable(store, ref, force=False)


def _removable(store: Store, ref: str, force: bool) -> list[str]:
    """Return the auxiliary tables to remove with a version. Raises InUseError if it is in use."""
    name, version = split_ref(ref)
    auxiliary: tuple[str, ...] = ()
    with suppress(CorruptError):
        auxiliary = _to_delete(store, ref, force)
    alias = store.alias(name)
    if alias and alias.version == version:
        raise InUseError(f"{ref} is published: publish or roll back to another version first")
    others = [m for m in _manifests(store) if m.ref != ref]
    if above := [m.ref for m in others if ref in m.dependencies]:
        raise InUseError(f"{ref} is a part of {', '.join(above)}: archive or delete that first")
    if not force and store.leased(ref):
        read = f"its rows were read within the last {LEASE_SECONDS:g} s"
        raise InUseError(f"{ref} is in use: {read}: wait until no reader uses it")
    needed = {part for m in others for part in m.dependencies}
    return [part for part in auxiliary if part not in needed and not stands_for(store, part)]


def refuse_part(store: Store, ref: str, what: str) -> None:
    """Raise InvalidArgumentError if the version is an auxiliary table. `what` ends the message."""
    if of := [m.ref for m in _manifests(store) if ref in m.auxiliary]:
        raise InvalidArgumentError(f"{ref} is a part of {', '.join(of)} and {what}")


def refuse_another(store: Store, planned: Manifest) -> None:
    """Check that a version to write is not in the store in another form.

    Raises:
        InUseError: It is there with other shards, or from another model.
        UnavailableError: It is being deleted.
    """
    if store.is_being_deleted(planned.ref):
        raise UnavailableError(f"{planned.ref} in {store.url} {_BEING_DELETED}")
    there, identity = planned, attrgetter("num_shards", "model_id", "tokenizer_id")
    with suppress(NotFoundError, CorruptError):
        there = store.manifest(planned.ref)
    if identity(there) != identity(planned):
        shards = f"{there.num_shards} shards and built from model {there.model_id[:12]}"
        hint = f"use `shards`={there.num_shards} or another `name`, or delete it first"
        raise InUseError(f"{planned.ref} is in {store.url} already, with {shards}: {hint}")
    if conflict := store.conflict(planned):
        raise InUseError(f"{planned.ref} is in {store.url} already, {conflict}, or delete it first")


def _to_delete(store: Store, ref: str, force: bool) -> tuple[str, ...]:
    """Return the auxiliary tables of a version. With `force`, it may be partly deleted."""
    try:
        return resolve(store, ref).auxiliary
    except NotFoundError:
        is_building = any(one.ref == ref and one.state == "building" for one in versions(store))
        if not (is_building or store.is_being_deleted(ref)):
            raise
        if not force:
            why = "is being built, or was: use `force` to delete its rows"
            what = why if is_building else _BEING_DELETED
            raise NotFoundError(f"{ref} in {store.url} {what}") from None
        return ()


def _logged(store: Store, event: Event, ref: str, **more: Any) -> Changes:
    return {("log", ref): line(event, ref, store.origin, user=store.user(), **more)}


def _manifests(store: Store) -> Iterator[Manifest]:
    for ref in store.refs():
        # A version may be deleted by now, or malformed. `resolve` reports the reason.
        with suppress(TolhouseError):
            yield store.manifest(ref)


def _version_of(store: Store, ref: str, work: str) -> tuple[str, str]:
    name, version = split_ref(ref)
    if version is None:
        raise InvalidArgumentError(f"{work} needs name@version, not {ref!r}; {_tables_here(store)}")
    return name, version


def _servable(store: Store, ref: str) -> Manifest:
    """Read the manifest of a version. Raises NotFoundError if it or its parent is missing."""
    manifest = resolve(store, ref)
    if manifest.parent:
        store.parent(manifest)
    return manifest


def _tables_here(store: Store) -> str:
    refs = store.refs()
    more = f" and {len(refs) - 8} more" if len(refs) > 8 else ""
    risk = f"; {risk}" if (risk := store.risk()) else ""
    if not refs:
        return f"there are no tables here yet; `tolhouse build` makes them{risk}"
    return f"tables here: {', '.join(refs[:8])}{more}{risk}"
