"""The Ray job: retriable tasks of a few shards each, a check against the model, the manifest.

A killed job leaves complete shards behind and no manifest; the next one keeps them. A killed task
runs again elsewhere.
"""

import logging
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

from tolhouse.build.shards import build_shards, verify
from tolhouse.config import set_ray_defaults
from tolhouse.errors import DeadlineExceeded, InvalidArgument, TolhouseError, Unavailable
from tolhouse.logs import event, split_address
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.sources.memoryllm import MemoryLLM, select_blocks
from tolhouse.store.base import open_store
from tolhouse.store.registry import refuse_another
from tolhouse.store.writer import commit
from tolhouse.table.codecs import codec
from tolhouse.table.manifest import Manifest, check_name, content_id

_OBJECT_STORE_BYTES = 80 << 20  # tasks return digests only
_CONNECT_SECONDS = 5
_MOST_SHARDS_A_TASK = 8
_RETRIED = [Unavailable, DeadlineExceeded]


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
    if num_shards > source.vocab_size:
        raise InvalidArgument(
            f"{num_shards} shards for a vocabulary of {source.vocab_size}: "
            "at most one shard per token"
        )
    return Manifest(
        name=check_name(name or checkpoint.name),
        version=content_id(checkpoint.rows_id(), codec(codec_name).name, source.blocks),
        codec_name=codec_name,
        vocab_size=source.vocab_size,
        blocks=source.blocks,
        width=source.width,
        num_shards=num_shards,
        model_id=checkpoint.model_id(),
        tokenizer_id=checkpoint.tokenizer_id,
        frequent=frequent,
    )


def build(
    checkpoint: Checkpoint,
    planned: Manifest,
    stores: tuple[str, ...],
    ray_address: str,
    workers: int,
    verify_rows: int,
    timeout_seconds: float,
) -> Manifest:
    """Build the planned table into every store; its manifest, once verified in all of them."""
    opened = [open_store(url, timeout_seconds) for url in stores]
    for store in opened:
        refuse_another(store, planned)
    path, count, vocabulary = str(checkpoint.path), planned.num_shards, planned.vocab_size
    digests: dict[int, str] = {}
    computed = 0
    with _ray(ray_address) as ray:
        task = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=_RETRIED)
        limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # a task writes a shard while it computes the next: several, but enough tasks for all cores
        step = max(1, min(_MOST_SHARDS_A_TASK, count // (4 * limit)))
        groups = [[*range(i, min(i + step, count))] for i in range(0, count, step)]
        calls = ((path, planned, group, stores, timeout_seconds) for group in groups)
        look: dict[str, Any] = {"unit": "row", "unit_scale": True, "dynamic_ncols": True}
        with tqdm(total=vocabulary, desc=f"build {planned.name}", **look) as bar:
            for number, results in _bounded(ray, task(build_shards), limit, calls):
                for shard, (digest, new) in zip(groups[number], results, strict=True):
                    digests[shard] = digest
                    computed += new
                    bar.update(len(planned.shard_ids(shard)))
        random = np.random.default_rng(int(planned.version, 16))
        sample = random.choice(vocabulary, min(verify_rows, vocabulary), replace=False)
        sample = np.sort(sample).astype(np.uint32)
        for url in stores:
            _get(ray, task(verify).remote(path, planned, url, sample, timeout_seconds))
    manifest = commit(opened, planned, [digests[shard] for shard in range(count)])
    for store in opened:
        store.close()
    event("built", table=manifest.ref, shards_computed=computed, shards_kept=count - computed)
    return manifest


def _bounded(ray: Any, run: Any, limit: int, calls: Iterable[tuple]) -> Iterator[tuple[int, Any]]:
    """(number, result) of every call as it ends, with two tasks pending per slot."""
    pending: dict[Any, int] = {}

    def next_result() -> tuple[int, Any]:
        (done, *_), _ = ray.wait(list(pending), num_returns=1)
        return pending.pop(done), _get(ray, done)

    for number, call in enumerate(calls):
        if len(pending) >= 2 * limit:
            yield next_result()
        pending[run.remote(*call)] = number
    while pending:
        yield next_result()


def _get(ray: Any, reference: Any) -> Any:
    """The result of a task, or its error as the task raised it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TolhouseError):
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
            raise Unavailable(
                f"no Ray cluster at {address}: {error.strerror or error}; "
                "unset RAY_ADDRESS to build on this machine"
            ) from None
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
