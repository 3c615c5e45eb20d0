"""Writes tables to stores. Complete shards are kept, and the manifest is written last.

While a shard is computed, the previous shard is digested and written. At most two shards are in
memory.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import xxhash

from tolhouse import __version__
from tolhouse.errors import CorruptError
from tolhouse.store import registry
from tolhouse.store.base import Store
from tolhouse.table.manifest import MAX_SHARDS, Manifest

_SHARD_BYTES = 128_000_000  # slots of Redis that are much larger are slow to move
_LEAST_SHARDS = 64  # for the cores of a build and the nodes of a Cluster
RecordsOf = Callable[[int], np.ndarray]  # the records of a shard, in the order of its ids


def shard_count(num_records: int, record_bytes: int, least: int = _LEAST_SHARDS) -> int:
    """Return the default number of shards: at least `least`, with at most 128 MB in a shard.

    There are at most as many shards as records, and at most `MAX_SHARDS`.
    """
    most = _SHARD_BYTES // record_bytes  # records of a shard
    return min(num_records, MAX_SHARDS, max(least, -(-num_records // most)))


def write_table(stores: Sequence[Store], manifest: Manifest, records_of: RecordsOf) -> Manifest:
    """Write a table to every store, and return its manifest with the digests of its shards."""
    written = write_shards(stores, manifest, range(manifest.num_shards), records_of)
    return commit(stores, manifest, [shard_digest for shard_digest, _ in written])


def write_shards(
    stores: Sequence[Store], manifest: Manifest, shards: Iterable[int], records_of: RecordsOf
) -> list[tuple[str, bool]]:
    """Complete shards in every store. Returns their digests, and whether each was computed."""
    written: list[tuple[Future[str], bool]] = []

    def write(shard: int, records: np.ndarray, lacking: list[Store], known: str | None) -> str:
        for store in lacking:
            store.write_shard(manifest, shard, records)
        return known or digest(records)

    with ThreadPoolExecutor(1) as background:
        for shard in shards:
            found = [shard_digest(store, manifest, shard) for store in stores]
            known = next(filter(None, found), None)
            lacking = [s for s, d in zip(stores, found, strict=True) if not d or d != known]
            records = np.empty(0, np.uint8)
            if lacking and known:
                ids = manifest.shard_ids(shard)
                records = stores[found.index(known)].read_records(manifest, ids)
            elif lacking:
                records = records_of(shard)
            if written:
                written[-1][0].result()
            written.append((background.submit(write, shard, records, lacking, known), not known))
        return [(future.result(), computed) for future, computed in written]


def commit(stores: Sequence[Store], manifest: Manifest, digests: Sequence[str]) -> Manifest:
    """Write the manifest of a table after all its shards."""
    provenance = {**manifest.provenance, "builder": f"tolhouse {__version__}"}
    manifest = replace(manifest, shards=tuple(digests), provenance=provenance)
    for store in stores:
        registry.commit(store, manifest)
    return manifest


def shard_digest(store: Store, manifest: Manifest, shard: int) -> str | None:
    """Return the digest of a complete and intact shard, or None if it must be written."""
    ids = manifest.shard_ids(shard)
    with suppress(CorruptError):
        if store.count(manifest, shard) == len(ids):
            return digest(store.read_records(manifest, ids))
    return None


def digest(records: np.ndarray) -> str:
    """Return the digest of a shard's records for a manifest: XXH3-128, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(records).data)
