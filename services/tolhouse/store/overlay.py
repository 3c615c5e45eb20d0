"""Row overlays: a version of a table that stores its changed rows alone, such as those of an edited token or of a domain's words.

It is published, rolled back and deleted like any version, and resolved where rows are read: a row that it has not changed is its
parent's. An overlay over an overlay becomes one over the first one's parent, with the changed rows of both.
"""

from dataclasses import replace

import numpy as np

from tolhouse.errors import IdOutOfRange, InvalidArgument
from tolhouse.store import Store, auxiliary_of, records_of, refuse_part, resolve
from tolhouse.table.codecs import codec
from tolhouse.table.manifest import MAX_CHANGED, Manifest, content_id
from tolhouse.table.records import digest


def make_overlay(store: Store, over: str, ids: np.ndarray, rows: np.ndarray) -> Manifest:
    """Store a version of the table `over`, "name" or "name@version", in which the rows of distinct `ids` [T] are `rows` [T, N, D].

    NotFound: there is no such table, or it is an overlay whose parent is gone. InvalidArgument or IdOutOfRange: rows or ids do not fit it, or
    it is a part of another.
    """
    manifest = resolve(store, over)
    refuse_part(store, manifest.ref, "no table to edit: edit that one")
    ids = np.asarray(ids, np.int64)
    if not len(ids):
        raise InvalidArgument(
            "an overlay changes the row of at least one token, and no id was given"
        )
    distinct, times = np.unique(ids, return_counts=True)
    if (times > 1).any():
        raise InvalidArgument(
            f"an overlay changes the row of each token once: token id {distinct[times > 1][0]} was given more than once"
        )
    if bad := [i for i in ids.tolist() if not 0 <= i < manifest.vocab_size]:
        raise IdOutOfRange(
            f"token id {bad[0]} is outside table {manifest.ref}: allowed are 0 to {manifest.vocab_size - 1}"
        )
    shape = len(ids), manifest.num_blocks, manifest.width
    if rows.shape != shape:
        raise InvalidArgument(
            f"rows have the shape {list(rows.shape)}; "
            f"{len(ids)} rows of {manifest.ref} have {list(shape)}"
        )
    base = store.parent(manifest) if manifest.parent else manifest
    # what an earlier overlay changed, and this one does not, is copied: encoding it again would change it again
    before = np.setdiff1d(manifest.changed, ids).astype(np.uint32)
    if len(ids) + len(before) > MAX_CHANGED:
        raise InvalidArgument(
            f"{len(ids) + len(before)} changed rows are more than an overlay may have, "
            f"{MAX_CHANGED}: build another table"
        )
    order = np.argsort(np.concatenate([ids, before]))
    changed = np.concatenate([ids, before])[order].astype(np.uint32)
    rows = np.ascontiguousarray(rows, np.float32)
    fresh = auxiliary_of(store, base).encode(ids.astype(np.uint32), rows)
    records = np.concatenate([fresh, records_of(store, manifest, before)])[order]
    edits = _write_edits(store, base, manifest, before, rows, order) if base.auxiliary else ""
    overlay = replace(
        base,
        version=content_id("overlay", base.ref, edits, changed, records[:, :-8]),
        parent=base.ref,
        changed=tuple(changed.tolist()),
        edits=edits,
    )
    return _write(store, overlay, changed, records)


def _write_edits(
    store: Store,
    base: Manifest,
    manifest: Manifest,
    before: np.ndarray,
    rows: np.ndarray,
    order: np.ndarray,
) -> str:
    """Store the changed rows of a compressed table, whose own records are too coarse for an edit, as a table of theirs."""
    if base.frequent_rows:
        finer = store.manifest(base.frequent_rows).codec_name
    else:
        finer = min(base.codec_name, "int8", key=lambda name: codec(name).relative_error)
    edits = replace(
        base,
        name=f"{base.name[:58]}.edits",
        codec_name=finer,
        vocab_size=len(order),
        frequent=(),
        ranks=(),
        basis="",
        frequent_rows="",
        num_shards=1,
        shards=(),
    )
    ids = np.arange(len(order), dtype=np.uint32)
    records = edits.encode(ids[: len(rows)], rows)
    if manifest.edits:
        kept = np.searchsorted(manifest.changed, before).astype(np.uint32)
        earlier = records_of(store, store.manifest(manifest.edits), kept)
        records = np.concatenate([records, earlier])
    records = records[order]
    version = content_id("edits", finer, base.blocks, records[:, :-8])
    return _write(store, replace(edits, version=version), ids, records).ref


def _write(store: Store, manifest: Manifest, ids: np.ndarray, records: np.ndarray) -> Manifest:
    manifest = replace(manifest, num_shards=1, shards=())
    manifest.add_checksums(ids, records)
    store.write_shard(manifest, 0, records)
    manifest = replace(manifest, shards=(digest(records),))
    store.commit(manifest)
    return manifest
