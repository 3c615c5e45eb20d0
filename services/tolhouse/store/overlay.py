"""Row overlays: a version of a table that stores its changed rows alone, such as those of an edited token or of a domain's words.

It is published, rolled back and deleted like any version, and resolved where rows are read: a row that it has not changed is its
parent's. An overlay over an overlay becomes one over the first one's parent, with the changed rows of both.
"""

import hashlib
from dataclasses import replace

import numpy as np

from tolhouse.errors import IdOutOfRange, InvalidArgument
from tolhouse.store import Store, companions, resolve, rows_of
from tolhouse.table.spec import MAX_CHANGED, Manifest, digest


def make_overlay(store: Store, over: str, ids: np.ndarray, rows: np.ndarray) -> Manifest:
    """Store a version of the table `over`, "name" or "name@version", in which the rows of distinct `ids` [T] are `rows` [T, N, D].

    NotFound: there is no such table, or it is an overlay whose parent is gone. InvalidArgument or IdOutOfRange: rows or ids do not fit it.
    """
    manifest = resolve(store, over)
    ids = np.asarray(ids, np.int64)
    if not len(ids) or len(set(ids.tolist())) != len(ids):
        raise InvalidArgument(f"an overlay changes the row of each token once, and of at least one: {len(ids)} ids were given")
    if bad := [i for i in ids.tolist() if not 0 <= i < manifest.vocab_size]:
        raise IdOutOfRange(f"token id {bad[0]} is outside table {manifest.ref}: allowed are 0 to {manifest.vocab_size - 1}")
    shape = len(ids), manifest.num_blocks, manifest.hidden_size
    if rows.shape != shape:
        raise InvalidArgument(f"rows have the shape {list(rows.shape)}; {len(ids)} rows of {manifest.ref} have {list(shape)}")
    if manifest.parent:
        before = np.setdiff1d(manifest.changed, ids)
        rows = np.concatenate([rows, rows_of(store, manifest, before.astype(np.uint32))])
        ids = np.concatenate([ids, before])
        manifest = store.parent(manifest)
    if len(ids) > MAX_CHANGED:
        raise InvalidArgument(f"{len(ids)} changed rows are more than an overlay may have, {MAX_CHANGED}: build a table of its own")
    order = np.argsort(ids)
    changed, rows = ids[order].astype(np.uint32), np.ascontiguousarray(rows[order], np.float32)
    content = hashlib.sha256(f"overlay {manifest.ref} {manifest.codec}".encode() + changed.tobytes() + rows.tobytes())
    overlay = replace(
        manifest,
        version=content.hexdigest()[:16],
        parent=manifest.ref,
        changed=tuple(changed.tolist()),
        num_shards=1,
        shards=(),
    )
    records = companions(store, overlay).encode(changed, rows)
    store.write_shard(overlay, 0, records)
    overlay = replace(overlay, shards=(digest(records),))
    store.commit(overlay)
    return overlay
