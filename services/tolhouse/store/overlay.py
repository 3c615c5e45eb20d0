"""Row overlays: a version of a table that stores its changed rows alone, such as those of an edited token or of a domain's words.

It is published, rolled back and deleted like any version, and resolved where rows are read: a row that it has not changed is its
parent's. An overlay over an overlay becomes one over the first one's parent, with the changed rows of both.
"""

import hashlib
from dataclasses import replace

import numpy as np

from tolhouse.errors import IdOutOfRange, InvalidArgument
from tolhouse.store import Store, companions, records_of, refuse_part, resolve, rows_of
from tolhouse.table.codecs import codec
from tolhouse.table.manifest import MAX_CHANGED, Manifest, digest


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
    shape = len(ids), manifest.num_blocks, manifest.hidden_size
    if rows.shape != shape:
        raise InvalidArgument(
            f"rows have the shape {list(rows.shape)}; {len(ids)} rows of {manifest.ref} have {list(shape)}"
        )
    base = store.parent(manifest) if manifest.parent else manifest
    before = np.setdiff1d(manifest.changed, ids).astype(
        np.uint32
    )  # what an earlier overlay changed, and this one does not
    kept = records_of(store, manifest, before)
    if len(ids) + len(before) > MAX_CHANGED:
        raise InvalidArgument(
            f"{len(ids) + len(before)} changed rows are more than an overlay may have, {MAX_CHANGED}: build another table"
        )
    order = np.argsort(np.concatenate([ids, before]))
    changed = np.concatenate([ids, before])[order].astype(np.uint32)
    rows = np.ascontiguousarray(rows, np.float32)
    # what an earlier overlay changed is taken over as it is: to encode it once more would change it again
    records = np.concatenate([companions(store, base).encode(ids.astype(np.uint32), rows), kept])[
        order
    ]
    edits, finer = (
        _edits(store, base, manifest, before, rows, order) if base.companions else (None, None)
    )
    if edits is not None and finer is not None:
        store.write_shard(edits, 0, finer)
        edits = replace(edits, shards=(digest(finer),))
        store.commit(edits)
    content = hashlib.sha256(
        f"overlay {base.ref} {base.codec} {edits.ref if edits else ''}".encode() + changed.tobytes()
    )
    content.update(records[:, :-8].tobytes())
    overlay = replace(
        base,
        version=content.hexdigest()[:16],
        parent=base.ref,
        changed=tuple(changed.tolist()),
        edits=edits.ref if edits else "",
        num_shards=1,
        shards=(),
    )
    overlay.seal(changed, records)
    store.write_shard(overlay, 0, records)
    overlay = replace(overlay, shards=(digest(records),))
    store.commit(overlay)
    return overlay


def _edits(
    store: Store,
    base: Manifest,
    manifest: Manifest,
    before: np.ndarray,
    rows: np.ndarray,
    order: np.ndarray,
) -> tuple[Manifest, np.ndarray]:
    """The changed rows of a compressed table, whose own records are too coarse for an edit: a table of them, and its sealed records."""
    finer = (
        store.manifest(base.head).codec
        if base.head
        else min(base.codec, "int8", key=lambda name: codec(name).relative_error)
    )
    plain = replace(
        base,
        codec=finer,
        vocab_size=len(order),
        num_shards=1,
        frequent=(),
        ranks=(),
        basis="",
        head="",
        shards=(),
    )
    ids = np.arange(len(order), dtype=np.uint32)
    if manifest.edits:
        kept = records_of(
            store,
            store.manifest(manifest.edits),
            np.searchsorted(manifest.changed, before).astype(np.uint32),
        )
    else:  # nothing was changed yet, or by a version from before there were edits
        kept = plain.encode(before, rows_of(store, manifest, before))
    records = np.concatenate([plain.encode(ids[: len(rows)], rows), kept])[order]
    version = hashlib.sha256(
        f"edits {finer} {base.layers} {base.x0}".encode() + records[:, :-8].tobytes()
    )
    found = replace(plain, name=f"{base.name[:58]}.edits", version=version.hexdigest()[:16])
    return found, found.seal(ids, records)
