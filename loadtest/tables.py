"""Tables of random records for benchmarks: intact for their tokens, and made as fast as they can be stored."""

import numpy as np
import xxhash
from redis import Redis
from tolhouse import Manifest
from tolhouse.store import Store
from tolhouse.table.spec import content_id, split

HIDDEN = 2048


def manifest_of(name: str, vocabulary: int, row_kib: int, shards: int = 64, frequent: tuple[int, ...] = ()) -> Manifest:
    """bf16 rows of `row_kib` KiB: layers of 4 KiB. 24 layers, 96 KiB, are the paper's 1B model."""
    layers = tuple(range(row_kib // 4))
    return Manifest(
        name=name,
        version=content_id(name, "bf16", layers),
        codec="bf16",
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        layers=layers,
        num_shards=shards,
        model_id="0" * 64,
        tokenizer_id="0" * 64,
        frequent=frequent,
    )


def records_of(manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    """Random bytes with the right checksums, the same ones each time."""
    size = manifest.record_bytes
    records = np.empty((len(ids), size), np.uint8)
    noise = np.random.default_rng(0).bytes(2 * size)
    for i, seed, record in zip(ids.tolist(), manifest.seeds(ids), split(records), strict=True):
        start = i * 7919 % size
        record[:-8] = noise[start : start + size - 8]
        record[-8:] = xxhash.xxh3_64_intdigest(record[:-8], seed).to_bytes(8, "little")
    return records


def load(store: Store, manifest: Manifest) -> None:
    """Store the whole table."""
    for shard in range(manifest.num_shards):
        store.write_shard(manifest, shard, records_of(manifest, manifest.shard_ids(shard)))
    store.commit(manifest)


def load_plain(redis: Redis, manifest: Manifest, ids: np.ndarray) -> dict[int, str]:
    """The records of `ids` as plain strings, for MGET; their keys."""
    keys = {i: f"{manifest.name}:{i}" for i in ids.tolist()}
    for start in range(0, len(ids), 64):
        part = ids[start : start + 64]
        redis.mset({keys[i]: bytes(r) for i, r in zip(part.tolist(), split(records_of(manifest, part)), strict=True)})
    return keys
