"""Tables of random records for benchmarks: intact for their tokens, and made as fast as they can be stored."""

import numpy as np
from redis import Redis
from tolhouse import Manifest
from tolhouse.model.config import ModelConfig
from tolhouse.store.base import Store
from tolhouse.table.manifest import content_id
from tolhouse.table.records import record_views

HIDDEN = 2048
_DIFFERENT = 61


def manifest_of(
    name: str, vocabulary: int, row_kib: int, shards: int = 64, frequent: tuple[int, ...] = ()
) -> Manifest:
    """bf16 rows of `row_kib` KiB: layers of 4 KiB. 24 layers, 96 KiB, are the paper's 1B model."""
    blocks = tuple(f"ffn.{layer}" for layer in range(row_kib // 4))
    return Manifest(
        name=name,
        version=content_id(name, "bf16", blocks),
        codec_name="bf16",
        vocab_size=vocabulary,
        blocks=blocks,
        width=HIDDEN,
        num_shards=shards,
        model_id="0" * 64,
        tokenizer_id="0" * 64,
        frequent=frequent,
    )


def alike(
    shape: ModelConfig, codec: str, frequent: tuple[int, ...] = (), model_id: str = "0" * 64
) -> Manifest:
    """A table for a model of this shape, named after its kind, with X0 where its embeddings are untied."""
    blocks = (
        *["x0"] * (not shape.tie_word_embeddings),
        *(f"ffn.{layer}" for layer in range(shape.num_rows)),
    )
    return Manifest(
        name=shape.kind,
        version=content_id(f"{shape.kind} {shape.hidden_size}", codec, blocks),
        codec_name=codec,
        vocab_size=shape.vocab_size,
        blocks=blocks,
        width=shape.hidden_size,
        num_shards=64,
        model_id=model_id,
        tokenizer_id="0" * 64,
        frequent=frequent,
    )


def records_of(manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    """Intact records of random rows, a few dozen of which are everybody's."""
    some = np.arange(_DIFFERENT, dtype=np.uint32) % manifest.vocab_size
    rows = (
        np.random.default_rng(0)
        .normal(0, 0.02, (_DIFFERENT, manifest.num_blocks, manifest.width))
        .astype(np.float32)
    )
    return manifest.add_checksums(ids, manifest.encode(some, rows)[ids % _DIFFERENT])


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
        redis.mset(
            {
                keys[i]: bytes(r)
                for i, r in zip(
                    part.tolist(), record_views(records_of(manifest, part)), strict=True
                )
            }
        )
    return keys
