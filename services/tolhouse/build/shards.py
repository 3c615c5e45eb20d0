"""One shard: compute its rows, encode, write, or take it from a store that has it already. Runs inside a Ray task.

Rows are computed in batches of one fixed size, the last one padded, by one thread: the bytes of a shard depend
neither on the machine's cores nor on how often the build was interrupted.
"""

from functools import lru_cache

import numpy as np
import torch

from tolhouse.errors import Corrupt, Mismatch
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.transformer import Transformer
from tolhouse.store import Store, open_store, shard_digest
from tolhouse.table.spec import Manifest, digest

BATCH_TOKENS = 128


def build_shard(checkpoint: str, manifest: Manifest, shard: int, stores: tuple[str, ...], timeout_seconds: float) -> tuple[str, bool]:
    """The digest of the shard, now whole in every store, and whether it had to be computed."""
    opened = [_store(url, timeout_seconds) for url in stores]
    digests = [shard_digest(store, manifest, shard) for store in opened]
    complete = next((d for d in digests if d), None)
    ids = manifest.shard_ids(shard)
    if complete is None:
        records = manifest.encode(ids, compute_rows(_model(checkpoint), ids))
        complete, computed = digest(records), True
    else:
        computed = False
        if digests.count(complete) == len(digests):
            return complete, computed
        records = np.empty((len(ids), manifest.record_bytes), np.uint8)
        opened[digests.index(complete)].read(manifest, ids, records)
    for store, found in zip(opened, digests, strict=True):
        if found != complete:
            store.write_shard(manifest, shard, records)
    return complete, computed


@torch.inference_mode()
def compute_rows(model: Transformer, ids: np.ndarray) -> np.ndarray:
    """float32 rows [T, N, D] of `ids`."""
    rows = np.empty((len(ids), model.config.num_row_layers, model.config.hidden_size), np.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start in range(0, len(ids), BATCH_TOKENS):
            part = ids[start : start + BATCH_TOKENS].astype(np.int64)
            padded = np.zeros(BATCH_TOKENS, np.int64)
            padded[: len(part)] = part
            rows_NTD = model.rows(torch.from_numpy(padded))
            rows[start : start + len(part)] = rows_NTD[:, : len(part)].transpose(0, 1).numpy()
    finally:
        torch.set_num_threads(threads)
    return rows


def verify(checkpoint: str, manifest: Manifest, url: str, sample: np.ndarray, timeout_seconds: float) -> None:
    """Corrupt unless the store counts a row per token, and those of `sample` are what the model computes now."""
    store = _store(url, timeout_seconds)
    counted = sum(store.count(manifest, shard) for shard in range(manifest.num_shards))
    if counted != manifest.vocab_size:
        raise Corrupt(f"{url} holds {counted} rows of {manifest.ref} instead of {manifest.vocab_size}")
    records = np.empty((len(sample), manifest.record_bytes), np.uint8)
    store.read(manifest, sample, records)
    stored = manifest.decode(records).astype(np.float32)
    fresh = compute_rows(_model(checkpoint), sample)
    # a row computed elsewhere, in another order of additions, differs by a few units in the last place of float32
    allowed = (manifest.codec_.relative_error + 1e-5) * np.abs(fresh).max(axis=-1, keepdims=True) + manifest.codec_.step + 1e-12
    wrong = np.flatnonzero((np.abs(stored - fresh) > allowed).any(axis=(1, 2)))
    if len(wrong):
        raise Mismatch(f"{url}: the row of token {sample[wrong[0]]} of {manifest.ref} is not what the model computes")


@lru_cache(maxsize=1)
def _model(checkpoint: str) -> Transformer:
    return open_checkpoint(checkpoint).model()


@lru_cache(maxsize=4)
def _store(url: str, timeout_seconds: float) -> Store:
    return open_store(url, timeout_seconds)
