"""Shards of a source model's rows, computed, encoded and written inside a Ray task."""

from functools import lru_cache

import numpy as np

from tolhouse.errors import Corrupt, Mismatch
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.sources.memoryllm import MemoryLLM
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
    """The digest of each shard, now in every store, and whether it had to be computed."""

    def compute(shard: int) -> np.ndarray:
        ids = manifest.shard_ids(shard)
        records = np.empty((len(ids), manifest.record_bytes), np.uint8)
        for part, rows in source_of(checkpoint, manifest.blocks).batches(ids):
            records[part] = manifest.encode(ids[part], rows)
        return records

    opened = [_store(url, timeout_seconds) for url in stores]
    return write_shards(opened, manifest, shards, compute)


def verify(
    checkpoint: str, manifest: Manifest, url: str, sample: np.ndarray, timeout_seconds: float
) -> None:
    """Corrupt unless the store has a row per token, Mismatch unless `sample`'s are the model's."""
    store, codec = _store(url, timeout_seconds), manifest.codec
    counted = sum(store.count(manifest, shard) for shard in range(manifest.num_shards))
    if counted != manifest.num_records:
        rows = f"{counted} rows of {manifest.ref}"
        raise Corrupt(f"{url} holds {rows} instead of {manifest.num_records}")
    stored = manifest.decode(store.read_records(manifest, sample)).astype(np.float32)
    fresh = source_of(checkpoint, manifest.blocks).rows(sample)
    # computed elsewhere, in another order of additions, a row differs in the last bits of float32
    largest = np.abs(fresh).max(axis=-1, keepdims=True)
    allowed = (codec.relative_error + 1e-5) * largest + codec.step + 1e-12
    wrong = np.flatnonzero((np.abs(stored - fresh) > allowed).any(axis=(1, 2)))
    if len(wrong):
        row = f"the row of token {sample[wrong[0]]} of {manifest.ref}"
        raise Mismatch(f"{url}: {row} is not what the model computes")


@lru_cache(maxsize=1)
def source_of(checkpoint: str, blocks: tuple[str, ...]) -> MemoryLLM:
    """The source model of a checkpoint, loaded once per process."""
    return MemoryLLM(open_checkpoint(checkpoint), blocks)


@lru_cache(maxsize=4)
def _store(url: str, timeout_seconds: float) -> Store:
    return open_store(url, timeout_seconds)
