"""Tables of random records with valid checksums for benchmarks, written as fast as the store
allows."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis
from tolhouse import Manifest
from tolhouse.client.row_source import RowSource, open_row_source
from tolhouse.model.config import ModelConfig
from tolhouse.net.auth import ClientCredentials
from tolhouse.store.base import Store, open_store
from tolhouse.store.registry import commit, publish
from tolhouse.table.manifest import content_id
from tolhouse.testing import Host, Process, process, wait_until

_DIFFERENT = 61
HERE = Host()
TRUSTED = ClientCredentials(insecure=True)  # only a benchmark uses its network


def manifest_of(
    name: str,
    vocabulary: int,
    row_kib: int,
    shards: int = 64,
    frequent: tuple[int, ...] = (),
    codec: str = "bf16",
) -> Manifest:
    """A manifest of rows of `row_kib` KiB in bf16, with 4 KiB per layer. The paper's 1B model has
    24 layers."""
    blocks = tuple(f"ffn.{layer}" for layer in range(row_kib // 4))
    return _manifest(name, codec, vocabulary, blocks, 2048, num_shards=shards, frequent=frequent)


def alike(
    shape: ModelConfig, codec: str, frequent: tuple[int, ...] = (), model_id: str = "0" * 64
) -> Manifest:
    """A manifest for a model of this shape, named after its kind, with X0 if embeddings are
    untied."""
    x0 = ["x0"] * (not shape.tie_word_embeddings)
    blocks = (*x0, *(f"ffn.{layer}" for layer in range(shape.num_rows)))
    more = {"frequent": frequent, "model_id": model_id}
    return _manifest(shape.kind, codec, shape.vocab_size, blocks, shape.hidden_size, **more)


def _manifest(
    name: str, codec: str, vocabulary: int, blocks: tuple[str, ...], width: int, **more: Any
) -> Manifest:
    defaults: dict[str, Any] = {"model_id": "0" * 64, "tokenizer_id": "0" * 64, "num_shards": 64}
    return Manifest(
        name=name,
        version=content_id(name, width, codec, blocks),
        codec_name=codec,
        vocab_size=vocabulary,
        blocks=blocks,
        width=width,
        **(defaults | more),
    )


def records_of(manifest: Manifest, ids: np.ndarray) -> np.ndarray:
    """Valid records of random rows. Tokens share a few dozen distinct rows."""
    some = np.arange(_DIFFERENT, dtype=np.uint32) % manifest.vocab_size
    shape = _DIFFERENT, manifest.num_blocks, manifest.width
    rows = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    return manifest.add_checksums(ids, manifest.encode(some, rows)[ids % _DIFFERENT])


def load(store: Store, manifest: Manifest) -> None:
    """Store a whole table."""
    for shard in range(manifest.num_shards):
        store.write_shard(manifest, shard, records_of(manifest, manifest.shard_ids(shard)))
    commit(store, manifest)


@contextmanager
def service(
    url: str,
    hot_megabytes: float,
    *more: str,
    filled: bool = False,
    host: Host = HERE,
    python: tuple[str, ...] = (sys.executable,),
) -> Iterator[Process]:
    """Run a lookup service with `more` options. With `filled`, wait until it holds the frequent
    tokens' rows of its published table. `python` is the command of the interpreter."""
    options = "--listen", f"{host.address}:0", "--insecure", "--hot-megabytes", f"{hot_megabytes:g}"
    arguments = "lookup", "--store", url, *options, *more
    with process(*arguments, python=python, host=host) as running:
        if filled:
            log, done = running.log, "hot rows filled"
            wait_until(lambda: done in log.read_text(encoding="utf-8"), "filling", 600)
        yield running


@contextmanager
def served(
    folder: Path, manifest: Manifest, hot_megabytes: float, host: Host = HERE
) -> Iterator[dict[str, RowSource]]:
    """Row sources of a table: "remote" is a lookup service over TCP, and "file" reads its files.

    The service and this process must see `folder`.
    """
    url = f"file://{folder}"
    with closing(open_store(url)) as store:
        load(store, manifest)
        publish(store, manifest.ref)
    with (
        service(url, hot_megabytes, filled=True, host=host) as lookup,
        closing(open_row_source(lookup.address, credentials=TRUSTED)) as remote,
        closing(open_row_source(url)) as file,
    ):
        yield {"remote": remote, "file": file}


def load_plain(redis: Redis, manifest: Manifest, ids: np.ndarray) -> dict[int, str]:
    """Store random bytes of the size of a record under a plain key for each id, and return the
    keys."""
    keys, random = {i: f"{manifest.name}:{i}" for i in ids.tolist()}, np.random.default_rng(0)
    for part in np.array_split(ids, len(ids) // 64 + 1):
        redis.mset({keys[i]: random.bytes(manifest.record_bytes) for i in part.tolist()})
    return keys
