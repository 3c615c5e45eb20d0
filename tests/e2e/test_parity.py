"""Every route of rows gives the same greedy tokens as the model with its own FFNs."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tolhouse import Client, Manifest
from tolhouse.client.row_source import RowSource, open_row_source
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.dequant import CACHED_VALUES
from tolhouse.engine.row_providers import CachedRows
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.testing import Cluster, build_table, local_cluster, process, tiny_model

from tests.engines import greedy_with

TOKENS = 128  # for each prompt; nine prompts and two checkpoints give 2,304
FEWER_TOKENS = 32  # where another test compares more tokens of the same checkpoint
PROMPTS = (
    "import os\nimport sys\n\n\ndef walk(",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self",
    "try:\n    import json\nexcept",
    'def read_file(path):\n    """',
    "for key, value in sorted(",
    "# für später ✓ 世界\nname = '",
    "    def test_roundtrip(self):\n        for proto in range(",
    "def main():\n    parser = argparse.ArgumentParser(",
    "raise ValueError(",
)
Answers = list[list[int]]


def prompt_ids(checkpoint: Checkpoint) -> list[list[int]]:
    tokenizer = checkpoint.tokenizer()
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def in_process(checkpoint: Checkpoint, tokens: int) -> Answers:
    model = checkpoint.model()
    return [list(greedy(model, ids, tokens, ignore_eos=True)) for ids in prompt_ids(checkpoint)]


def with_rows(
    checkpoint: Checkpoint,
    source: RowSource,
    manifest: Manifest,
    tokens: int,
    cache_bytes: int = 0,
    most_values: int = CACHED_VALUES,
) -> Answers:
    """Greedy tokens with fetched rows. Prompts with more values than `most_values` are decoded
    layer by layer."""
    model = checkpoint.model(ffn_m=False, embedding=not manifest.has_x0)
    rows = CachedRows(source, manifest, cache_bytes, torch.device("cpu"))
    with closing(rows):
        answers = [greedy_with(model, rows, ids, tokens) for ids in prompt_ids(checkpoint)]
    counts = rows.counts()
    fetched = counts["from_remote"] + counts["from_file"]
    assert fetched > 0
    if cache_bytes:  # rows were evicted and fetched again
        assert counts["from_cache"] > 0
        assert len(rows.cache) == rows.cache.capacity < fetched
    return answers


def direct(checkpoint: Checkpoint, url: str, ref: str, tokens: int) -> Answers:
    with closing(open_row_source(url)) as source:
        return with_rows(checkpoint, source, source.describe(ref), tokens)


def by_worker(checkpoint: Checkpoint, url: str, ref: str) -> Answers:
    options = ("--rows", url, "--table", ref, "--listen", "127.0.0.1:0")
    with process("worker", str(checkpoint.path), *options) as worker:
        return generate(checkpoint, worker.address, FEWER_TOKENS)


def generate(checkpoint: Checkpoint, worker: str, tokens: int, at_once: int = 1) -> Answers:
    with Client(worker) as client, ThreadPoolExecutor(at_once) as pool:

        def one(ids: list[int]) -> list[int]:
            return list(client.generate(ids, tokens, ignore_eos=True))

        return list(pool.map(one, prompt_ids(checkpoint)))


def complete(cluster: Cluster, tokens: int, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{cluster.url}/completions", json=body, timeout=120).raise_for_status()
    assert tokens == answer.json()["usage"]["completion_tokens"]
    return answer.json()["choices"][0]["text"]


def service_routes(checkpoint: Checkpoint, url: str, ref: str, tokens: int) -> dict[str, Any]:
    """Answers with rows from lookup services: in this process, from workers, and as text from the
    gateway. Variants of a route give fewer tokens, which another route computes too."""
    options = ("--table", ref, "--row-cache-megabytes", "0.5")  # less than the working set
    with (
        local_cluster(checkpoint.path, url, lookups=2, worker_options=options) as cluster,
        closing(open_row_source(cluster.lookup)) as source,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        manifest = source.describe(ref)
        small = 20 * manifest.record_bytes
        return {
            "lookup": with_rows(checkpoint, source, manifest, tokens),
            "layer by layer": with_rows(checkpoint, source, manifest, FEWER_TOKENS, most_values=0),
            "small row cache": with_rows(
                checkpoint, source, manifest, FEWER_TOKENS, cache_bytes=small
            ),
            "worker": generate(checkpoint, cluster.workers, FEWER_TOKENS),
            "worker, batched": generate(checkpoint, cluster.workers, tokens, len(PROMPTS)),
            "gateway": list(pool.map(partial(complete, cluster, tokens), PROMPTS)),
        }


def check_routes(
    checkpoint: Checkpoint, codec: str, tokens: int, *urls: str, **options: str
) -> None:
    """Build a table in all stores of `urls` and compare the tokens of every route."""
    ref = build_table(checkpoint.path, *urls, codec=codec, **options)
    exact = codec == "fp32"
    expected = in_process(checkpoint, tokens) if exact else direct(checkpoint, urls[0], ref, tokens)
    assert len(PROMPTS) * tokens == sum(map(len, expected))
    routes = {url: direct(checkpoint, url, ref, FEWER_TOKENS) for url in urls}
    routes |= service_routes(checkpoint, urls[0], ref, tokens)
    tokenizer = checkpoint.tokenizer()
    # the gateway returns text
    assert [tokenizer.decode(ids) for ids in expected] == routes.pop("gateway")
    for route, answers in routes.items():
        compared = [ids[: len(own)] for ids, own in zip(expected, answers, strict=True)]
        assert FEWER_TOKENS <= min(map(len, answers))
        assert compared == answers, route


@pytest.mark.parametrize(
    ("codec", "name", "tokens"),
    [
        ("fp32", "demo-memory", TOKENS),
        ("fp32", "demo-flex", TOKENS),
        ("bf16", "demo-memory", FEWER_TOKENS),
        ("int4", "demo-memory", FEWER_TOKENS),
    ],
)
@pytest.mark.timeout(600)
def test_every_route_gives_the_same_greedy_tokens(
    name: str, codec: str, tokens: int, tmp_path: Path, redis_url: str, redis_cluster_url: str
) -> None:
    """Stores, services, caches, batches and the gateway give the same tokens, in fp32 also those of
    the model's own FFNs."""
    checkpoint = open_checkpoint(Path("models") / name)
    check_routes(checkpoint, codec, tokens, f"file://{tmp_path}", redis_url, redis_cluster_url)


def test_a_worker_reads_files_and_redis_directly(
    tmp_path: Path, redis_url: str, redis_cluster_url: str
) -> None:
    """A worker without a lookup service gives the same tokens."""
    checkpoint = open_checkpoint("models/demo-memory")
    urls = (f"file://{tmp_path}", redis_url, redis_cluster_url)
    ref = build_table(checkpoint.path, *urls)
    expected = in_process(checkpoint, FEWER_TOKENS)
    for url in urls:
        assert expected == by_worker(checkpoint, url, ref), url


@pytest.mark.parametrize(
    ("kind", "beta", "tied", "codec"),
    [
        ("memory", 0, False, "fp32"),
        ("flex", 3, False, "fp32"),
        ("memory", 0, False, "int8"),
        ("flex", 1, True, "fp32"),
    ],
)
def test_every_route_carries_x0(
    kind: str, beta: int, tied: bool, codec: str, tmp_path: Path, redis_url: str
) -> None:
    """With X0 in the table, no route loads an input embedding, and all give the same tokens."""
    path = tiny_model(tmp_path / f"x0-{kind}", kind, beta, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(path)
    urls = (f"file://{tmp_path}/tables", redis_url)
    check_routes(checkpoint, codec, FEWER_TOKENS, *urls, embedding="yes")
    worker = load(checkpoint, torch.device("cpu"), torch.float32, embedding=False)
    assert worker.embed_tokens is None
    assert [] == [name for name, _ in worker.named_parameters() if "embed" in name]


def test_rows_affect_the_tokens() -> None:
    """Rows of zeros give other tokens, so that parity can't come from a model that ignores its
    rows."""
    checkpoint = open_checkpoint("models/demo-memory")
    model, ids = checkpoint.model(), prompt_ids(checkpoint)[0]
    zeros = greedy(model, ids, 16, rows=lambda ids_T: torch.zeros_like(model.rows(ids_T)))
    assert list(greedy(model, ids, 16)) != list(zeros)
