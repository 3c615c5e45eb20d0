"""Builds a table: Ray tasks of a few shards each, a check against the model, and the manifest.

A killed job leaves complete shards and no manifest, and the next job keeps these shards. Ray runs a
killed task again on another node.
"""

import logging
import os
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from operator import ne
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from tolhouse import errors
from tolhouse.config import ray_token, set_ray_defaults
from tolhouse.errors import (
    CorruptError,
    InternalError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from tolhouse.logs import event, join_address, split_address
from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer
from tolhouse.sources.base import SourceModel, open_source
from tolhouse.store import registry
from tolhouse.store.base import Store, open_store
from tolhouse.store.journal import Origin
from tolhouse.store.writer import commit, shard_count, shard_digest, write_shards
from tolhouse.table.codecs import codec
from tolhouse.table.manifest import MAX_FREQUENT, Manifest, check_name, content_id
from tolhouse.train.corpus import documents, is_held_out, standard_library

_OBJECT_STORE_BYTES = 80 << 20  # small, because tasks return only digests
_CONNECT_SECONDS = 10
_START_TRIES = 3
_LOOK_SECONDS = 1.0  # the pause between checks for new nodes of the cluster
_SAMPLE_CHARS = 4_000_000  # counted in a few seconds, evenly over all documents
_MOST_SHARDS_A_TASK = 8
_RETRIED = [UnavailableError, errors.DeadlineExceededError]


def plan(
    source: SourceModel,
    name: str,
    codec_name: str,
    num_shards: int,
    frequent: tuple[int, ...] = (),
) -> Manifest:
    """Return the manifest of the table to build, without digests.

    `num_shards` 0 is the result of `shard_count`.
    """
    size = source.vocab_size
    if num_shards > size:
        raise InvalidArgumentError(
            f"{num_shards} shards of {size} rows: at most one shard per token"
        )
    planned = Manifest(
        name=check_name(name or source.name),
        version=content_id(source.rows_id(), codec(codec_name).name, source.blocks),
        codec_name=codec_name,
        vocab_size=size,
        blocks=source.blocks,
        width=source.width,
        num_shards=num_shards or 1,
        model_id=source.model_id(),
        tokenizer_id=source.tokenizer_id,
        frequent=frequent,
        provenance={"source": source.name},
    )
    return replace(planned, num_shards=num_shards or shard_count(size, planned.record_bytes))


def count_tokens(tokenizer: Tokenizer, corpus: str, vocab_size: int) -> Counter[int]:
    """Count tokens in a sample of a text file or a folder of text files.

    By default the text is that of the standard library, on which tokenizers are trained by default.
    The counts only decide which rows are cached first, so they need not be exact.
    """
    path = Path(corpus) if corpus else standard_library()
    named = list(documents(path))
    texts = [text for name, text in named if not is_held_out(name)] or [text for _, text in named]
    if not texts:
        raise InvalidArgumentError(f"--corpus {path} holds no text (UTF-8)")
    step = max(1, -(-sum(map(len, texts)) // _SAMPLE_CHARS))
    encodings = tokenizer.encode_batch(texts[::step])
    counts = Counter(i for encoding in encodings for i in encoding.ids if i < vocab_size)
    event("counted tokens", corpus=str(path), tokens=counts.total(), distinct=len(counts))
    return counts


def with_frequent(checkpoint: str | Path, planned: Manifest, corpus: str) -> Manifest:
    """Return the planned table with the frequent tokens that `count_tokens` finds.

    A table of a model without a tokenizer has no frequent tokens.
    """
    if not planned.tokenizer_id:
        return planned
    tokenizer = load_tokenizer(Path(checkpoint) / TOKENIZER)
    counts = count_tokens(tokenizer, corpus, planned.vocab_size)
    frequent = sorted(counts, key=lambda i: (-counts[i], i))[:MAX_FREQUENT]
    return with_corpus(replace(planned, frequent=tuple(frequent)), corpus)


def with_corpus(planned: Manifest, corpus: str) -> Manifest:
    """Return the planned table with the name of the text that `count_tokens` counts."""
    default = f"standard library of Python {sys.version.partition(' ')[0]}"
    text = Path(corpus).resolve().name if corpus else default
    return replace(planned, provenance={**planned.provenance, "corpus": text})


def build_shards(
    checkpoint: str, manifest: Manifest, shards: list[int], stores: tuple[str, ...], timeout: float
) -> list[tuple[str, bool]]:
    """Write shards to every store. Return their digests and whether each was computed."""
    opened = [_store(url, timeout) for url in stores]

    def source() -> SourceModel:  # loaded only if a shard must be computed
        return source_of(checkpoint, manifest.model_id, manifest.blocks)

    return write_shards(opened, manifest, shards, lambda s: _records(source(), manifest, s))


def _records(source: SourceModel, manifest: Manifest, shard: int) -> np.ndarray:
    ids = manifest.shard_ids(shard)
    records = np.empty((len(ids), manifest.record_bytes), np.uint8)
    for part, rows in source.batches(ids):
        records[part] = manifest.encode(ids[part], rows)
    return records


def verify(checkpoint: str, manifest: Manifest, url: str, ids: np.ndarray, timeout: float) -> None:
    """Compare the rows of `ids` in a store with the rows of the model. See `verify_source`."""
    source = source_of(checkpoint, manifest.model_id, manifest.blocks)
    verify_source(source, manifest, _store(url, timeout), ids)


def verify_source(source: SourceModel, manifest: Manifest, store: Store, ids: np.ndarray) -> None:
    """Compare the rows of `ids` in a store with the rows of the source.

    Raises CorruptError unless the store has a row for each token, and MismatchError if a row
    differs.
    """
    codec = manifest.codec
    counted = sum(store.count(manifest, shard) for shard in range(manifest.num_shards))
    if counted != manifest.num_records:
        raise CorruptError(
            f"{store.url} holds {counted} of {manifest.num_records} rows of {manifest.ref}"
        )
    stored = store.rows(manifest, ids)
    fresh = source.rows(ids)
    # On another machine the order of additions may differ, and with it the last bits of float32.
    largest = np.abs(fresh).max(axis=-1, keepdims=True)
    allowed = (codec.relative_error + 1e-5) * largest + codec.step + 1e-12
    wrong = np.flatnonzero((np.abs(stored - fresh) > allowed).any(axis=(1, 2)))
    if len(wrong):
        row = f"the row of token {ids[wrong[0]]} of {manifest.ref}"
        raise MismatchError(f"{store.url}: {row} is not what the model computes")


_store = lru_cache(maxsize=4)(open_store)


@lru_cache(maxsize=1)
def source_of(checkpoint: str, model_id: str, blocks: tuple[str, ...]) -> SourceModel:
    """Return the source model of a checkpoint, loaded once per process.

    Raises MismatchError if the checkpoint has changed.
    """
    source = open_source(checkpoint, blocks)
    if source.model_id() != model_id:
        raise MismatchError(f"checkpoint {checkpoint} is not the one that this build began with")
    return source


def with_stored_shards(planned: Manifest, stores: Sequence[Store]) -> Manifest:
    """Return the planned table with the number of shards of the same table in a store, if any."""
    for store in stores:
        with suppress(NotFoundError, CorruptError):
            planned = replace(planned, num_shards=store.manifest(planned.ref).num_shards)
    return planned


def find_whole(stores: Sequence[Store], planned: Manifest) -> Manifest | None:
    """Return the manifest of the planned table if every store has the complete table, else None.

    A plan without frequent tokens matches a table with any.
    """
    found = set[Manifest]()
    for store in stores:
        registry.refuse_another(store, planned)
        try:
            manifest = store.manifest(planned.ref)
        except (NotFoundError, CorruptError):
            return None
        frequent = planned.frequent or manifest.frequent
        kept = {name: getattr(manifest, name) for name in ("shards", "provenance", "extra")}
        wanted = replace(planned, frequent=frequent, **kept)
        digests = (shard_digest(store, manifest, shard) for shard in range(manifest.num_shards))
        if manifest != wanted or any(map(ne, manifest.shards, digests)):
            return None
        found.add(manifest)
    if len(found) != 1:
        return None
    event("the table is complete", table=planned.ref)
    return found.pop()


def build(
    checkpoint: str | Path,
    planned: Manifest,
    stores: tuple[str, ...],
    ray_address: str,
    ray_wait_seconds: float,
    workers: int,
    verify_rows: int,
    timeout: float,
    origin: Origin | None = None,
) -> Manifest:
    """Build the planned table into every store, verify it, and return its manifest."""
    opened = [open_store(url, timeout, origin=origin) for url in stores]
    for store in opened:
        registry.begin(store, planned)
    path = str(Path(checkpoint).resolve())  # Ray's processes have other working directories
    count, vocabulary = planned.num_shards, planned.vocab_size
    digests, computed = [""] * count, 0
    pending: dict[Any, list[int]] = {}  # the shards of each running task
    look = {"desc": f"build {planned.name}", "unit": "row", "unit_scale": True, "disable": None}
    with (
        _ray(ray_address, ray_wait_seconds) as ray,
        tqdm(total=vocabulary, dynamic_ncols=True, **look) as bar,
    ):
        remote = ray.remote(num_cpus=1, max_retries=3, retry_exceptions=_RETRIED)
        task, verify_task = remote(build_shards), remote(verify)
        left = list(range(count))
        while left or pending:
            limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            # A task with several shards writes one while it computes the next.
            step = max(1, min(_MOST_SHARDS_A_TASK, len(left) // (4 * limit)))
            while left and len(pending) < 2 * limit:
                group, left = left[:step], left[step:]
                pending[task.remote(path, planned, group, stores, timeout)] = group
            finished, _ = ray.wait(list(pending), timeout=_LOOK_SECONDS)
            for done in finished:
                for shard, (digest, new) in zip(pending.pop(done), _get(ray, done), strict=True):
                    digests[shard] = digest
                    computed += new
                    bar.update(len(planned.shard_ids(shard)))
        sample = _sample(planned, verify_rows)
        for url in stores:
            _get(ray, verify_task.remote(path, planned, url, sample, timeout))
    manifest = commit(opened, planned, digests)
    for store in opened:
        store.close()
    event("built", table=manifest.ref, shards_computed=computed, shards_kept=count - computed)
    return manifest


def copy(
    source: SourceModel, planned: Manifest, stores: Sequence[Store], verified: int
) -> Manifest:
    """Write the planned table in this process, verify it, and return its manifest.

    Complete shards are kept, as by `build`. This is for sources that read rows and compute none.
    """
    for store in stores:
        registry.begin(store, planned)
    look = {"desc": f"import {planned.name}", "unit": "shard", "disable": None}
    shards = tqdm(range(planned.num_shards), dynamic_ncols=True, **look)
    written = write_shards(stores, planned, shards, lambda s: _records(source, planned, s))
    for store in stores:
        verify_source(source, planned, store, _sample(planned, verified))
    manifest = commit(stores, planned, [digest for digest, _ in written])
    computed = sum(new for _, new in written)
    kept = planned.num_shards - computed
    event("imported", table=manifest.ref, shards_copied=computed, shards_kept=kept)
    return manifest


def _sample(planned: Manifest, count: int) -> np.ndarray:
    """Return the ids of `count` random rows, or of all rows if there are fewer."""
    random, size = np.random.default_rng(int(planned.version, 16)), planned.vocab_size
    return np.sort(random.choice(size, min(count, size), replace=False)).astype(np.uint32)


def _get(ray: Any, reference: Any) -> Any:
    """Return the result of a task, or raise the error of the task."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, errors.TolhouseError):
            raise type(cause)(str(cause)) from None
        kind = UnavailableError if isinstance(cause, OSError) else InternalError
        raise kind(f"a build task failed: {type(cause).__name__}: {_line(cause)}") from None
    except ray.exceptions.RayError as error:
        raise UnavailableError(f"the Ray cluster lost a task for good: {_line(error)}") from None


@contextmanager
def _ray(address: str, wait_seconds: float) -> Iterator[Any]:
    """Connect Ray to a cluster for the block.

    Errors of Ray become UnavailableError, and its messages go to stderr.
    """
    if ":" in address:
        _check_cluster(address)
    set_ray_defaults(local=address == "local")
    with _stdout_to_stderr():
        import ray
        import ray.exceptions

        if ray.is_initialized():  # the calling program has connected Ray
            yield ray
            return
        try:
            _start(ray, address)
            if address != "local":
                _wait_for_core(ray, address, wait_seconds)
            yield ray
        except Exception as error:
            if not _raised_by_ray(error):
                raise
            raise UnavailableError(f"the Ray cluster failed: {_line(error)}") from None
        finally:
            ray.shutdown()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect stdout of this process and its children to stderr.

    Ray writes messages to stdout, also from C++, but scripts read the table's name from stdout.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _raised_by_ray(error: BaseException) -> bool:
    """Return whether code of Ray raised an error of any class."""
    frames = list(traceback.walk_tb(error.__traceback__))
    names = str(frames[-1][0].f_globals.get("__name__")), type(error).__module__
    return any(name.partition(".")[0] == "ray" for name in names)


def _line(error: BaseException) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _check_cluster(address: str) -> None:
    """Check that a cluster answers at HOST:PORT and accepts the token.

    Raises UnavailableError or UnauthenticatedError.

    Ray itself retries for half a minute and reports neither problem.
    """
    host, port = split_address(address.removeprefix("ray://"))
    hint = "unset RAY_ADDRESS to build on this machine"
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        reason = f"{error.strerror or error}; {hint}"
        raise UnavailableError(f"no Ray cluster at {address}: {reason}") from None
    metadata = [("authorization", f"Bearer {token}")] if (token := ray_token()) else []
    target, options = join_address(host, port), [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(target, options) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            call(b"", timeout=_CONNECT_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                reason = f"no answer within {_CONNECT_SECONDS} s; {hint}"
                raise UnavailableError(f"no Ray cluster at {address}: {reason}") from None
            # Ignore other errors, because the address may use TLS or the protocol of Ray's client.
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                return
            wanted = "another token" if token else "a token"
            hint = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            raise UnauthenticatedError(
                f"the Ray cluster at {address} wants {wanted}: {hint}"
            ) from None


def _start(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one on this machine.

    Raises UnavailableError with Ray's reason if that fails.
    """
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    local, problem = address == "local", f"no Ray cluster at {address!r}"
    if local:
        problem = "Ray did not start on this machine"
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    for tries_left in reversed(range(_START_TRIES if local else 1)):
        try:
            ray.init(address=address, **options)
        except Exception as error:  # noqa: BLE001 - Ray raises this class if a node starts slowly
            ray.shutdown()
            reason = f"{problem}: {_line(error)}"
            if not tries_left:
                raise UnavailableError(reason) from None
            event("trying again", logging.WARNING, reason=reason)
        else:
            return


def _wait_for_core(ray: Any, address: str, seconds: float) -> None:
    """Wait for a free core of the cluster.

    Raises UnavailableError after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while ray.available_resources().get("CPU", 0) < 1:
        if time.monotonic() >= deadline:
            cores = f"none of the {ray.cluster_resources().get('CPU', 0):g} cores"
            hint = f"waited {seconds:g} s; --ray-wait-seconds says how long"
            raise UnavailableError(f"{cores} of the Ray cluster at {address} is free ({hint})")
        time.sleep(0.2)
