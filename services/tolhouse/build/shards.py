"""Shards: compute their rows, encode, write, or take them from a store that has them already. Runs inside a Ray task.

While the rows of one shard are computed, the one before is digested and written: two shards are in memory, no more.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from tolhouse.errors import Corrupt, Mismatch
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.rows import batches
from tolhouse.model.transformer import Transformer
from tolhouse.store import Store, open_store, shard_digest
from tolhouse.table.manifest import Manifest
from tolhouse.table.records import digest


def build_shards(
    checkpoint: str,
    manifest: Manifest,
    shards: list[int],
    stores: tuple[str, ...],
    timeout_seconds: float,
) -> list[tuple[str, bool]]:
    """The digest of each shard, now whole in every store, and whether it had to be computed."""
    opened = [_store(url, timeout_seconds) for url in stores]
    written: list[tuple[Future[str], bool]] = []
    with ThreadPoolExecutor(1) as background:
        for shard in shards:
            found = [shard_digest(store, manifest, shard) for store in opened]
            whole = next((d for d in found if d), None)
            lacking = [
                store for store, its in zip(opened, found, strict=True) if not its or its != whole
            ]
            records = np.empty(
                (len(manifest.shard_ids(shard)) if lacking else 0, manifest.record_bytes), np.uint8
            )
            if lacking and whole:
                opened[found.index(whole)].read(manifest, manifest.shard_ids(shard), records)
            elif lacking:
                _compute(checkpoint, manifest, shard, records)
            if written:
                written[-1][0].result()
            written.append(
                (background.submit(_write, manifest, shard, records, lacking, whole), not whole)
            )
        return [(future.result(), new) for future, new in written]


def _compute(checkpoint: str, manifest: Manifest, shard: int, records: np.ndarray) -> None:
    ids = manifest.shard_ids(shard)
    for part, rows in batches(_model(checkpoint), ids, manifest.has_x0, manifest.layers):
        records[part] = manifest.encode(ids[part], rows)


def _write(
    manifest: Manifest, shard: int, records: np.ndarray, lacking: list[Store], whole: str | None
) -> str:
    for store in lacking:
        store.write_shard(manifest, shard, records)
    return whole or digest(records)


def compute_rows(checkpoint: str, manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    """float32 rows [T, N, D] of `ids`, as the table has them."""
    return np.concatenate(
        [rows for _, rows in batches(_model(checkpoint), ids, manifest.has_x0, manifest.layers)]
    )


def verify(
    checkpoint: str, manifest: Manifest, url: str, sample: np.ndarray, timeout_seconds: float
) -> None:
    """Corrupt unless the store counts a row per token, and those of `sample` are what the model computes now."""
    store = _store(url, timeout_seconds)
    counted = sum(store.count(manifest, shard) for shard in range(manifest.num_shards))
    if counted != manifest.num_records:
        raise Corrupt(
            f"{url} holds {counted} rows of {manifest.ref} instead of {manifest.num_records}"
        )
    records = np.empty((len(sample), manifest.record_bytes), np.uint8)
    store.read(manifest, sample, records)
    stored = manifest.decode(records).astype(np.float32)
    fresh = compute_rows(checkpoint, manifest, sample)
    # a row computed elsewhere, in another order of additions, differs by a few units in the last place of float32
    allowed = (
        (manifest.codec.relative_error + 1e-5) * np.abs(fresh).max(axis=-1, keepdims=True)
        + manifest.codec.step
        + 1e-12
    )
    wrong = np.flatnonzero((np.abs(stored - fresh) > allowed).any(axis=(1, 2)))
    if len(wrong):
        raise Mismatch(
            f"{url}: the row of token {sample[wrong[0]]} of {manifest.ref} is not what the model computes"
        )


@lru_cache(maxsize=1)
def _model(checkpoint: str) -> Transformer:
    return open_checkpoint(checkpoint).model()


@lru_cache(maxsize=4)
def _store(url: str, timeout_seconds: float) -> Store:
    return open_store(url, timeout_seconds)
