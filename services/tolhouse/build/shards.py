"""Shards of a model's rows, computed, encoded and written inside a Ray task."""

from functools import lru_cache

import numpy as np

from tolhouse.errors import Corrupt, Mismatch
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.rows import batches
from tolhouse.model.transformer import Transformer
from tolhouse.store.base import Store, open_store
from tolhouse.store.writer import write_shards
from tolhouse.table.manifest import Manifest


def build_shards(
    checkpoint: str,
    manifest: Manifest,
    shards: list[int],
    stores: tuple[str, ...],
    timeout_seconds: float,
) -> list[tuple[str, bool]]:
    """The digest of each shard, now whole in every store, and whether it had to be computed."""
    opened = [_store(url, timeout_seconds) for url in stores]

    def compute(shard: int) -> np.ndarray:
        ids = manifest.shard_ids(shard)
        records = np.empty((len(ids), manifest.record_bytes), np.uint8)
        for part, rows in batches(_model(checkpoint), ids, manifest.has_x0, manifest.layers):
            records[part] = manifest.encode(ids[part], rows)
        return records

    return write_shards(opened, manifest, shards, compute)


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
    stored = manifest.decode(store.read_records(manifest, sample)).astype(np.float32)
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
