"""Small tables of random rows for tests of stores and readers."""

import hashlib
import json
from typing import Any

import numpy as np
from tolhouse import Client
from tolhouse.client.lookup import LookupRowSource
from tolhouse.store.base import Store
from tolhouse.store.registry import commit
from tolhouse.table.manifest import Manifest


def manifest_of(name: str = "t", version: int = 0x0123456789ABCDEF, **fields: Any) -> Manifest:
    """A manifest of 50 rows of two blocks of six int8 values in three shards, unless `fields`
    differ."""
    usual = {"codec_name": "int8", "vocab_size": 50, "blocks": ("ffn.0", "ffn.1"), "width": 6}
    usual |= {"num_shards": 3, "model_id": "0" * 64, "tokenizer_id": "1" * 64}
    return Manifest(name=name, version=f"{version:016x}", **{**usual, **fields})


def ids(*of: int) -> np.ndarray:
    return np.array(of, np.uint32)


def records_of(manifest: Manifest, ids: np.ndarray | None = None) -> np.ndarray:
    """Records of `ids`, by default of all tokens. Rows depend on the version."""
    ids = np.arange(manifest.vocab_size, dtype=np.uint32) if ids is None else ids
    shape = manifest.vocab_size, manifest.num_blocks, manifest.width
    rows = np.random.default_rng(int(manifest.version, 16)).standard_normal(shape)
    return manifest.encode(ids, rows[ids].astype(np.float32))


def write(store: Store, manifest: Manifest) -> Manifest:
    """Store a whole table without digests of its shards."""
    for shard in range(manifest.num_shards):
        store.write_shard(manifest, shard, records_of(manifest, manifest.shard_ids(shard)))
    commit(store, manifest)
    return manifest


def read(store: Store, manifest: Manifest, ids: np.ndarray | None = None) -> bytes:
    """The bytes of the records of `ids`, by default of all tokens, as read from the store."""
    ids = np.arange(manifest.vocab_size, dtype=np.uint32) if ids is None else ids
    return store.read_records(manifest, ids).tobytes()


def assert_holds(store: Store, manifest: Manifest, ids: np.ndarray | None = None) -> None:
    """The store returns the records that were written for `ids`, by default for all tokens."""
    assert records_of(manifest, ids).tobytes() == read(store, manifest, ids)


def owners_of(client: Client, table: str, ids: np.ndarray) -> list[str]:
    """The address of the lookup service that a client tries first for each of `ids`."""
    assert isinstance(client.rows, LookupRowSource)
    owners, manifest = [""] * len(ids), client.describe(table)
    for replica, part in client.rows.replicas.divide(manifest, ids, np.arange(len(ids)), 0):
        for n in part.tolist():
            owners[n] = replica.target
    return owners


def digest_of(data: dict[str, Any]) -> str:
    """The digest of a manifest as the documentation defines it."""
    rest = {name: value for name, value in data.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
