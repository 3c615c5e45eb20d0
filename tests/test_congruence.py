"""Where rows come from changes nothing: every route gives the greedy tokens of the model with its FFNs in place."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tolhouse import Client, Manifest
from tolhouse.client.row_source import RowSource, open_row_source
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.dequant import CACHED_VALUES
from tolhouse.engine.row_providers import open_rows
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.testing import build_table, local_cluster, tiny_model

TOKENS = 128  # per prompt; nine prompts and two checkpoints make 2,304
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


def in_process(checkpoint: Checkpoint) -> Answers:
    model = checkpoint.model()
    return [list(greedy(model, ids, TOKENS, ignore_eos=True)) for ids in prompt_ids(checkpoint)]


def with_rows(
    checkpoint: Checkpoint,
    source: RowSource,
    manifest: Manifest,
    cache_bytes: int = 0,
    most_values: int = CACHED_VALUES,
) -> Answers:
    """most_values: more are decoded layer by layer."""
    model = checkpoint.model(ffn_m=False, embedding=not manifest.has_x0)
    rows = open_rows(source, manifest, cache_bytes, torch.device("cpu"))
    answers = [
        list(
            greedy(
                model,
                ids,
                TOKENS,
                ignore_eos=True,
                rows=lambda ids_T: rows.decode(rows.stage(ids_T.numpy().astype(np.uint32))),
            )
        )
        for ids in prompt_ids(checkpoint)
    ]
    counts = rows.counts()
    fetched = counts["from_remote"] + counts["from_file"]
    assert fetched > 0
    if cache_bytes:  # rows came and went and came again
        assert counts["from_cache"] > 0
        assert len(rows.cache) == rows.cache.capacity < fetched
    return answers


def store_routes(checkpoint: Checkpoint, url: str, ref: str) -> Answers:
    with closing(open_row_source(url)) as source:
        return with_rows(checkpoint, source, source.describe(ref))


def service_routes(checkpoint: Checkpoint, url: str, ref: str) -> dict[str, Any]:
    """Through the lookup service, with a small row cache, through a worker alone and batched, and as texts from the gateway."""
    prompts = prompt_ids(checkpoint)
    options = ("--table", ref, "--row-cache-megabytes", "0.5")  # less than the working set
    with (
        local_cluster(checkpoint.path, url, lookups=2, worker_options=options) as cluster,
        Client(cluster.lookup) as lookup,
        Client(cluster.workers) as worker,
    ):
        manifest = lookup.describe(ref)

        def generate(ids: list[int]) -> list[int]:
            return list(worker.generate(ids, TOKENS, ignore_eos=True))

        def complete(prompt: str) -> str:
            body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            answer = (
                httpx.post(f"{cluster.url}/completions", json=body, timeout=120)
                .raise_for_status()
                .json()
            )
            assert answer["usage"]["completion_tokens"] == TOKENS
            return answer["choices"][0]["text"]

        with ThreadPoolExecutor(len(prompts)) as pool:
            return {
                "service": with_rows(checkpoint, lookup.rows, manifest),
                "layer by layer": with_rows(checkpoint, lookup.rows, manifest, most_values=0),
                "small row cache": with_rows(
                    checkpoint, lookup.rows, manifest, cache_bytes=20 * manifest.record_bytes
                ),
                "worker, alone": [generate(ids) for ids in prompts],
                "worker, batched": list(pool.map(generate, prompts)),
                "gateway": list(pool.map(complete, PROMPTS)),
            }


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("fp32", "demo-memory"),
        ("fp32", "demo-flex"),
        ("bf16", "demo-memory"),
        ("bf16", "demo-flex"),
        ("int4", "demo-memory"),
    ],
)
@pytest.mark.timeout(600)
def test_every_route_gives_the_same_greedy_tokens(
    name: str, codec: str, tmp_path: Path, redis_url: str, redis_cluster_url: str
) -> None:
    """Files, Redis, Redis Cluster, the service, caches, batches and the gateway agree token for token; in fp32 also with the FFNs in place."""
    checkpoint = open_checkpoint(Path("models") / name)
    files = f"file://{tmp_path}"
    ref = build_table(checkpoint.path, files, redis_url, redis_cluster_url, codec=codec)
    expected = in_process(checkpoint) if codec == "fp32" else store_routes(checkpoint, files, ref)
    assert len(PROMPTS) * TOKENS == sum(map(len, expected))
    routes = {
        url.partition(":")[0] + str(n): store_routes(checkpoint, url, ref)
        for n, url in enumerate((files, redis_url, redis_cluster_url))
    }
    routes |= service_routes(checkpoint, files, ref)
    tokenizer = checkpoint.tokenizer()
    assert [tokenizer.decode(ids) for ids in expected] == routes.pop("gateway")  # it answers text
    for route, answers in routes.items():
        assert expected == answers, route


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
    """Where the table has X0, no route has an input embedding, and all give the same tokens; in fp32 also with everything in place."""
    checkpoint = open_checkpoint(
        tiny_model(tmp_path / f"x0-{kind}", kind, beta, tie_word_embeddings=tied)
    )
    files = f"file://{tmp_path}/tables"
    ref = build_table(checkpoint.path, files, redis_url, codec=codec, embedding="yes")
    expected = in_process(checkpoint) if codec == "fp32" else store_routes(checkpoint, files, ref)
    routes = {"redis": store_routes(checkpoint, redis_url, ref)} | service_routes(
        checkpoint, files, ref
    )
    tokenizer = checkpoint.tokenizer()
    assert [tokenizer.decode(ids) for ids in expected] == routes.pop("gateway")
    for route, answers in routes.items():
        assert expected == answers, route
    worker = load(checkpoint, torch.device("cpu"), torch.float32, embedding=False)
    assert (None, []) == (
        worker.embed_tokens,
        [name for name, _ in worker.named_parameters() if "embed" in name],
    )


def test_rows_matter() -> None:
    """Rows of zeros give other tokens: the congruence of routes is not that of a model that ignores its rows."""
    checkpoint = open_checkpoint("models/demo-memory")
    model, ids = checkpoint.model(), prompt_ids(checkpoint)[0]
    assert list(greedy(model, ids, 16)) != list(
        greedy(model, ids, 16, rows=lambda ids_T: torch.zeros_like(model.rows(ids_T)))
    )
