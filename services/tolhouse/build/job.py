"""The Ray job: retriable tasks of a few shards each, then a check against the model, then the manifest.

A killed job leaves whole shards behind and no manifest; the next one keeps them. A killed task runs again elsewhere.
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
    """The manifest of the table to build, without its digests. `frequent`: see frequency.py; `embedding`: see config.py."""
    config = checkpoint.config
    if not config.num_rows:
        raise InvalidArgument(
            f"checkpoint {checkpoint.path} is of kind {config.kind}: it has no context-free FFNs to build a table from"
        )
    if num_shards > config.vocab_size:
        raise InvalidArgument(
            f"{num_shards} shards for a vocabulary of {config.vocab_size}: at most one shard per token"
        )
    if bad := [layer for layer in absent if not 0 <= layer < config.num_rows]:
        raise InvalidArgument(
            f"there is no layer {bad[0]} to leave out: rows are of layers 0 to {config.num_rows - 1}"
        )
    layers = tuple(layer for layer in range(config.num_rows) if layer not in set(absent))
    if not layers:
        raise InvalidArgument("all layers are left out: at least one must stay")
    x0 = embedding == "yes" or (embedding == "auto" and not config.tie_word_embeddings)
    blocks = (*["x0"] * x0, *(f"ffn.{layer}" for layer in layers))
    return Manifest(
        name=check_name(name or checkpoint.name),
        version=content_id(checkpoint.rows_id(), codec(codec_name).name, blocks),
        codec_name=codec_name,
        vocab_size=config.vocab_size,
        blocks=blocks,
        width=config.hidden_size,
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
    """Build the planned table into every store; returns its manifest once it is whole and verified in all of them."""
    opened = [open_store(url, timeout_seconds) for url in stores]
    for store in opened:
        refuse_another(store, planned)
    path = str(checkpoint.path)
    with _ray(ray_address) as ray:
        task = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=_RETRIED)
        digests: dict[int, str] = {}
        computed = 0
        with tqdm(
            total=planned.vocab_size,
            unit="row",
            unit_scale=True,
            desc=f"build {planned.name}",
            dynamic_ncols=True,
        ) as bar:
            limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            # a task writes one shard while it computes the next, so it wants several; enough tasks to end together
            step = max(1, min(_MOST_SHARDS_A_TASK, planned.num_shards // (4 * limit)))
            groups = [
                list(range(first, min(first + step, planned.num_shards)))
                for first in range(0, planned.num_shards, step)
            ]
            calls = ((path, planned, group, stores, timeout_seconds) for group in groups)
            for number, results in _bounded(ray, task(build_shards), limit, calls):
                for shard, (digest, new) in zip(groups[number], results, strict=True):
                    digests[shard] = digest
                    computed += new
                    bar.update(len(planned.shard_ids(shard)))
        sample = np.sort(
            np.random.default_rng(int(planned.version, 16)).choice(
                planned.vocab_size, min(verify_rows, planned.vocab_size), replace=False
            )
        ).astype(np.uint32)
        for url in stores:
            _get(ray, task(verify).remote(path, planned, url, sample, timeout_seconds))
    manifest = commit(opened, planned, [digests[shard] for shard in range(planned.num_shards)])
    for store in opened:
        store.close()
    event(
        "built",
        table=manifest.ref,
        shards_computed=computed,
        shards_kept=manifest.num_shards - computed,
    )
    return manifest


def _bounded(ray: Any, run: Any, limit: int, calls: Iterable[tuple]) -> Iterator[tuple[int, Any]]:
    """(number, result) of every call as it ends, with a task in hand and one in reserve per slot."""
    pending: dict[Any, int] = {}
    for number, call in enumerate(calls):
        if len(pending) >= 2 * limit:
            yield _next(ray, pending)
        pending[run.remote(*call)] = number
    while pending:
        yield _next(ray, pending)


def _next(ray: Any, pending: dict[Any, int]) -> tuple[int, Any]:
    (done, *_), _ = ray.wait(list(pending), num_returns=1)
    return pending.pop(done), _get(ray, done)


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
        host, port = split_address(address.removeprefix("ray://"))
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise Unavailable(
                f"no Ray cluster at {address}: {error.strerror or error}; unset RAY_ADDRESS to build on this machine"
            ) from None
    set_ray_defaults()
    import ray
    import ray.exceptions

    if ray.is_initialized():  # by the program that calls
        yield ray
        return

    local: dict[str, Any] = (
        {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        if address == "local"
        else {}
    )
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Unavailable(f"no Ray cluster at {address!r}: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()
