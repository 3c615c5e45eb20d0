"""Row overlays: versions that store only changed rows, such as the row of an edited token.

An overlay is published, rolled back and deleted like any other version. Readers take unchanged rows
from its parent. An overlay over an overlay has the parent of the first overlay, and the changed
rows of both. An overlay can also append rows of further token ids to its parent.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from tolhouse.errors import IdOutOfRangeError, InvalidArgumentError
from tolhouse.store.base import Store
from tolhouse.store.registry import refuse_part, resolve
from tolhouse.store.writer import write_table
from tolhouse.table.codecs import codec
from tolhouse.table.manifest import MAX_CHANGED, Manifest, content_id, part_name

_ONE_SHARD: dict[str, Any] = {"num_shards": 1, "shards": ()}
# Fields that an overlay has from the table that it edits, which may itself append rows.
_IDENTITY = "vocab_size", "appended", "model_id", "tokenizer_id", "provenance"
_PLAIN = _ONE_SHARD | {"frequent": (), "ranks": (), "basis": "", "frequent_rows": ""}


def make_overlay(store: Store, over: str, ids: np.ndarray, rows: np.ndarray) -> Manifest:
    """Store a version of the table `over` with other rows [T, N, D] for distinct `ids` [T].

    Raises:
        NotFoundError: The table or its parent is missing.
        InvalidArgumentError: Rows or ids do not fit the table, or it is an auxiliary table.
        IdOutOfRangeError: An id is not below the size of the vocabulary.
    """
    manifest = _editable(store, over)
    distinct, times = np.unique(np.asarray(ids, np.int64), return_counts=True)
    shape = [len(ids), manifest.num_blocks, manifest.width]
    if not len(ids):
        raise InvalidArgumentError("an overlay changes at least one token: give its id")
    if times.max() > 1:
        twice = f"token id {distinct[times.argmax()]} was given more than once"
        raise InvalidArgumentError(f"an overlay changes the row of each token once: {twice}")
    if distinct[0] < 0:
        raise IdOutOfRangeError(f"token id {distinct[0]} is below 0")
    manifest.check_ids(distinct)
    if list(rows.shape) != shape:
        what = f"rows have the shape {list(rows.shape)}; {len(ids)} rows of {manifest.ref}"
        raise InvalidArgumentError(f"{what} have {shape}")
    identity = {name: getattr(manifest, name) for name in _IDENTITY}
    return _overlay(store, manifest, np.asarray(ids, np.uint32), rows, identity)


def append_rows(
    store: Store, over: str, rows: np.ndarray, model_id: str, tokenizer_id: str, source: str
) -> Manifest:
    """Store a version of the table `over` with rows [K, N, D] of K token ids after its last one.

    The version is of the model and the tokenizer that have these ids. `source` is the model's name.

    Raises:
        NotFoundError: The table or its parent is missing.
        InvalidArgumentError: Rows do not fit the table, or it is an auxiliary table.
    """
    manifest = _editable(store, over)
    size = manifest.vocab_size + len(rows)
    identity = {
        "vocab_size": size,
        "appended": manifest.appended + len(rows),
        "model_id": model_id,
        "tokenizer_id": tokenizer_id,
        "provenance": {**manifest.provenance, "source": source},
    }
    ids = np.arange(manifest.vocab_size, size, dtype=np.uint32)
    return _overlay(store, manifest, ids, rows, identity)


def check_count(changed: int) -> None:
    """Raise InvalidArgumentError if an overlay cannot have this number of changed rows."""
    if changed > MAX_CHANGED:
        allowed = f"an overlay may have at most {MAX_CHANGED}: build another table"
        raise InvalidArgumentError(f"{changed} rows are changed; {allowed}")


def _editable(store: Store, over: str) -> Manifest:
    manifest = resolve(store, over)
    refuse_part(store, manifest.ref, "cannot be edited: edit that table")
    return manifest


def _overlay(
    store: Store, manifest: Manifest, ids: np.ndarray, rows: np.ndarray, identity: dict[str, Any]
) -> Manifest:
    """Store an overlay with the changed rows of `manifest` and with `rows` of `ids`."""
    rows = np.ascontiguousarray(rows, np.float32)
    base = store.parent(manifest) if manifest.parent else manifest
    # Rows that only an earlier overlay changed are copied. Encoding them again would change them.
    before = np.setdiff1d(manifest.changed, ids).astype(np.uint32)
    changed = np.concatenate([ids, before])
    check_count(len(changed))
    order, count = np.argsort(changed), len(changed)
    fresh = store.auxiliary(base).encode(ids, rows)
    records = np.concatenate([fresh, store.read_records(manifest, before)])[order]
    changed = changed[order]
    fields = identity | _ONE_SHARD
    overlay = replace(base, parent=base.ref, changed=tuple(changed.tolist()), **fields)
    # A compressed `base` has coarse records, so changed rows are also stored in their own table.
    if base.auxiliary:
        if base.frequent_rows:
            finer = store.manifest(base.frequent_rows).codec_name
        else:
            finer = min(base.codec_name, "int8", key=lambda name: codec(name).relative_error)
        name = part_name(base.name, "edits")
        edits = replace(base, name=name, codec_name=finer, vocab_size=count, **_PLAIN)
        parts = [edits.encode(np.arange(len(ids), dtype=np.uint32), rows)]
        if manifest.edits:
            slots = np.searchsorted(manifest.changed, before).astype(np.uint32)
            parts.append(store.read_records(store.manifest(manifest.edits), slots))
        own = np.arange(count, dtype=np.uint32)
        edits = _write(store, edits, own, np.concatenate(parts)[order])
        overlay = replace(overlay, edits=edits.ref)
    return _write(store, overlay, changed, records)


def _write(store: Store, planned: Manifest, ids: np.ndarray, records: np.ndarray) -> Manifest:
    """Store a table in one shard. The version is the id of its contents."""
    parts = planned.codec_name, planned.blocks, planned.dependencies, ids, records[:, :-8]
    manifest = replace(planned, version=content_id(planned.name, *parts))
    return write_table([store], manifest, lambda _: manifest.add_checksums(ids, records))
