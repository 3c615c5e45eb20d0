"""Tables into stores: whole shards are kept, the manifest comes last.

While the records of one shard are computed, the shard before is digested and written: two shards
are in memory, no more.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from tolhouse.errors import Corrupt
from tolhouse.store.base import Store
from tolhouse.table.manifest import Manifest
from tolhouse.table.records import digest

RecordsOf = Callable[[int], np.ndarray]  # the records of a shard, in the order of its ids


def write_table(stores: Sequence[Store], manifest: Manifest, records_of: RecordsOf) -> Manifest:
    """Write a table into every store; its manifest with the digests of its shards."""
    written = write_shards(stores, manifest, range(manifest.num_shards), records_of)
    return commit(stores, manifest, [shard_digest for shard_digest, _ in written])


def write_shards(
    stores: Sequence[Store], manifest: Manifest, shards: Iterable[int], records_of: RecordsOf
) -> list[tuple[str, bool]]:
    """The digest of each shard, now whole in every store, and whether it had to be computed."""
    written: list[tuple[Future[str], bool]] = []
    with ThreadPoolExecutor(1) as background:
        for shard in shards:
            found = [shard_digest(store, manifest, shard) for store in stores]
            whole = next(filter(None, found), None)
            lacking = [s for s, d in zip(stores, found, strict=True) if not d or d != whole]
            if lacking and whole:
                source = stores[found.index(whole)]
                records = source.read_records(manifest, manifest.shard_ids(shard))
            elif lacking:
                records = records_of(shard)
            else:
                records = np.empty(0, np.uint8)
            if written:
                written[-1][0].result()
            future = background.submit(_write, manifest, shard, records, lacking, whole)
            written.append((future, not whole))
        return [(future.result(), computed) for future, computed in written]


def commit(stores: Sequence[Store], manifest: Manifest, digests: Sequence[str]) -> Manifest:
    """Write the manifest of a table whose shards are all written."""
    manifest = replace(manifest, shards=tuple(digests))
    for store in stores:
        store.commit(manifest)
    return manifest


def shard_digest(store: Store, manifest: Manifest, shard: int) -> str | None:
    """The digest of a shard whose records are all there and intact; None if it must be written."""
    ids = manifest.shard_ids(shard)
    if store.count(manifest, shard) != len(ids):
        return None
    try:
        return digest(store.read_records(manifest, ids))
    except Corrupt:
        return None


def _write(
    manifest: Manifest,
    shard: int,
    records: np.ndarray,
    stores: Sequence[Store],
    known_digest: str | None,
) -> str:
    for store in stores:
        store.write_shard(manifest, shard, records)
    return known_digest or digest(records)
