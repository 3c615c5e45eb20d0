"""The build: tasks of a few shards each on Ray, a check against the model, the manifest.

A killed job leaves complete shards behind and no manifest; the next one keeps them. A killed task
runs again elsewhere.
"""

import logging
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from tolhouse import errors
from tolhouse.config import set_ray_defaults
from tolhouse.errors import Corrupt, InvalidArgument, Mismatch, Unavailable
from tolhouse.logs import event, split_address
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.sources.memoryllm import MemoryLLM, select_blocks
from tolhouse.store.base import open_store
from tolhouse.store.registry import refuse_another
from tolhouse.store.writer import commit, write_shards
from tolhouse.table.codecs import codec
from tolhouse.table.manifest import Manifest, check_name, content_id
from tolhouse.train.corpus import documents, is_held_out, standard_library

_OBJECT_STORE_BYTES = 80 << 20  # tasks return digests only
_CONNECT_SECONDS = 5
_SAMPLE_CHARS = 4_000_000  # counted, evenly over the documents: a few seconds
_MOST_SHARDS_A_TASK = 8
_RETRIED = [Unavailable, errors.DeadlineExceeded]


def plan(
    checkpoint: Checkpoint,
    name: str,
    codec_name: str,
    num_shards: int,
    frequent: tuple[int, ...] = (),
    embedding: str = "auto",
    absent: Iterable[int] = (),
) -> Manifest:
    """The manifest of the table to build, without its digests; embedding: auto, yes or no."""
    source = MemoryLLM(checkpoint, select_blocks(checkpoint, embedding, absent))
    size = source.vocab_size
    if num_shards > size:
        raise InvalidArgument(f"{num_shards} shards of {size} rows: at most one shard per token")
    return Manifest(
        name=check_name(name or checkpoint.name),
        version=content_id(checkpoint.rows_id(), codec(codec_name).name, source.blocks),
        codec_name=codec_name,
        vocab_size=size,
        blocks=source.blocks,
        width=source.width,
        num_shards=num_shards,
        model_id=checkpoint.model_id(),
        tokenizer_id=checkpoint.tokenizer_id,
        frequent=frequent,
    )


def count_tokens(tokenizer: Tokenizer, corpus: str, vocab_size: int) -> Counter[int]:
    """How often a text file, or a folder of them, has each token, in a sample.

    By default it is the text that tokenizers are trained on, the standard library's sources. For
    another tokenizer the list is less good, never wrong: it only says what to cache first.
    """
    path = Path(corpus) if corpus else standard_library()
    named = list(documents(path))
    texts = [text for name, text in named if not is_held_out(name)] or [text for _, text in named]
    if not texts:
        raise InvalidArgument(f"--corpus {path} holds no text (UTF-8)")
    step = max(1, -(-sum(map(len, texts)) // _SAMPLE_CHARS))
    encodings = tokenizer.encode_batch(texts[::step])
    counts = Counter(i for encoding in encodings for i in encoding.ids if i < vocab_size)
    event("counted tokens", corpus=str(path), tokens=counts.total(), distinct=len(counts))
    return counts


def build_shards(
    checkpoint: str, manifest: Manifest, shards: list[int], stores: tuple[str, ...], timeout: float
) -> list[tuple[str, bool]]:
    """The digest of each shard, now in every store, and whether it had to be computed."""

    def compute(shard: int) -> np.ndarray:
        ids = manifest.shard_ids(shard)
        records = np.empty((len(ids), manifest.record_bytes), np.uint8)
        for part, rows in source_of(checkpoint, manifest.model_id, manifest.blocks).batches(ids):
            records[part] = manifest.encode(ids[part], rows)
        return records

    return write_shards([_store(url, timeout) for url in stores], manifest, shards, compute)


def verify(checkpoint: str, manifest: Manifest, url: str, ids: np.ndarray, timeout: float) -> None:
    """Corrupt unless the store has a row per token, Mismatch unless `ids` have the model's."""
    store, codec = _store(url, timeout), manifest.codec
    counted = sum(store.count(manifest, shard) for shard in range(manifest.num_shards))
    if counted != manifest.num_records:
        raise Corrupt(f"{url} holds {counted} of {manifest.num_records} rows of {manifest.ref}")
    stored = store.rows(manifest, ids)
    fresh = source_of(checkpoint, manifest.model_id, manifest.blocks).rows(ids)
    # computed elsewhere, in another order of additions, a row differs in the last bits of float32
    largest = np.abs(fresh).max(axis=-1, keepdims=True)
    allowed = (codec.relative_error + 1e-5) * largest + codec.step + 1e-12
    wrong = np.flatnonzero((np.abs(stored - fresh) > allowed).any(axis=(1, 2)))
    if len(wrong):
        row = f"the row of token {ids[wrong[0]]} of {manifest.ref}"
        raise Mismatch(f"{url}: {row} is not what the model computes")


_store = lru_cache(maxsize=4)(open_store)


@lru_cache(maxsize=1)
def source_of(checkpoint: str, model_id: str, blocks: tuple[str, ...]) -> MemoryLLM:
    """The source model of a checkpoint, loaded once per process; Mismatch if it is another now."""
    opened = open_checkpoint(checkpoint)
    if opened.model_id() != model_id:
        raise Mismatch(f"checkpoint {checkpoint} is not the one that this build began with")
    return MemoryLLM(opened, blocks)


def build(
    checkpoint: Checkpoint,
    planned: Manifest,
    stores: tuple[str, ...],
    ray_address: str,
    workers: int,
    verify_rows: int,
    timeout: float,
) -> Manifest:
    """Build the planned table into every store; its manifest, once verified in all of them."""
    opened = [open_store(url, timeout) for url in stores]
    for store in opened:
        refuse_another(store, planned)
    path, count, vocabulary = str(checkpoint.path), planned.num_shards, planned.vocab_size
    digests, computed = [""] * count, 0
    pending: dict[Any, list[int]] = {}  # shards of running tasks
    look = {"desc": f"build {planned.name}", "unit": "row", "unit_scale": True}
    with _ray(ray_address) as ray, tqdm(total=vocabulary, dynamic_ncols=True, **look) as bar:
        remote = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=_RETRIED)
        limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # a task writes a shard while it computes the next: several, but enough tasks for all cores
        step = max(1, min(_MOST_SHARDS_A_TASK, count // (4 * limit)))
        groups = [[*range(i, min(i + step, count))] for i in range(0, count, step)]
        task, verify_task = remote(build_shards), remote(verify)
        while groups or pending:
            while groups and len(pending) < 2 * limit:
                group = groups.pop(0)
                pending[task.remote(path, planned, group, stores, timeout)] = group
            (done,), _ = ray.wait(list(pending))
            for shard, (digest, new) in zip(pending.pop(done), _get(ray, done), strict=True):
                digests[shard] = digest
                computed += new
                bar.update(len(planned.shard_ids(shard)))
        random = np.random.default_rng(int(planned.version, 16))
        sample = random.choice(vocabulary, min(verify_rows, vocabulary), replace=False)
        sample = np.sort(sample).astype(np.uint32)
        for url in stores:
            _get(ray, verify_task.remote(path, planned, url, sample, timeout))
    manifest = commit(opened, planned, digests)
    for store in opened:
        store.close()
    event("built", table=manifest.ref, shards_computed=computed, shards_kept=count - computed)
    return manifest


def _get(ray: Any, reference: Any) -> Any:
    """The result of a task, or its error as the task raised it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, errors.TolhouseError):
            raise type(error.cause)(str(error.cause)) from None
        raise
    except ray.exceptions.RayError as error:
        raise Unavailable(f"the Ray cluster lost a task for good: {error}") from None


@contextmanager
def _ray(address: str) -> Iterator[Any]:
    if ":" in address:  # Ray itself would try for minutes
        try:
            place = split_address(address.removeprefix("ray://"))
            socket.create_connection(place, timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            hint = "unset RAY_ADDRESS to build on this machine"
            reason = f"{error.strerror or error}; {hint}"
            raise Unavailable(f"no Ray cluster at {address}: {reason}") from None
    set_ray_defaults()
    import ray
    import ray.exceptions

    if ray.is_initialized():  # by the program that calls
        yield ray
        return
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Unavailable(f"no Ray cluster at {address!r}: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()
