"""Rows that the plug-in for vLLM stages for a step, also while the row source is down."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tolhouse import Client
from tolhouse.build.compress import Scheme, compress
from tolhouse.build.job import plan
from tolhouse.client.row_source import open_row_source
from tolhouse.config import VLLMConfig
from tolhouse.engine.row_providers import RecomputedRows
from tolhouse.errors import MismatchError, NotFoundError, TolhouseError
from tolhouse.integrations.vllm.options import AdditionalConfig, parse
from tolhouse.integrations.vllm.staging import (
    NoFallback,
    RowStage,
    choose_fallback,
    open_rows,
)
from tolhouse.integrations.vllm.whole_table import WholeTable
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.sources.memoryllm import MemoryLLM, select_blocks
from tolhouse.store.base import open_store
from tolhouse.store.overlay import make_overlay
from tolhouse.testing import Process, process

MOST_TOKENS = 16
CPU = torch.device("cpu")


@pytest.fixture
def lookup(store: str) -> Iterator[Process]:
    with process("lookup", "--store", store, "--listen", "127.0.0.1:0") as running:
        yield running


def staged(
    checkpoint: Path,
    lookup: Process,
    fallback: str,
    *,
    whole_steps: bool = False,
    row_memory: str = "cache",
    wait: float = 60,
) -> RowStage:
    """Return the stage of a rank. A row cache has 16 rows."""
    options = {"rows": lookup.address, "fallback": fallback, "row_cache_megabytes": 0}
    options |= {"row_memory": row_memory, "lookup_wait_seconds": wait}
    parsed = parse({"tolhouse": options})
    config = AdditionalConfig(parsed, checkpoint.name, (), {})
    recompute = partial(RecomputedRows, open_checkpoint(checkpoint))
    rows = open_rows(config, recompute, MOST_TOKENS, CPU, torch.float32)
    return RowStage(rows, MOST_TOKENS, whole_steps=whole_steps)


def starts_at(*tokens: int) -> Callable[[], np.ndarray]:
    """Return a function that returns where the requests of a step begin, and the end."""
    return lambda: np.array(tokens)


@pytest.mark.parametrize("row_memory", ["cache", "host", "device"])
def test_rows_of_a_step_are_those_of_the_table(
    checkpoint: Path, store: str, lookup: Process, row_memory: str
) -> None:
    """Rows have the values of the table, and ids outside of the vocabulary stand for token 0."""
    stage = staged(checkpoint, lookup, "none", row_memory=row_memory)
    address = stage.rows.data_ptr()
    for ids in ([5, 200, 5, 17], [-1, 100_000, 3], [*range(100, 116)]):
        rows, failed = stage.fill(torch.tensor(ids), starts_at(0, len(ids)))
        known = [i if 0 <= i < stage.vocab_size else 0 for i in ids]
        with Client(store) as client:
            assert np.array_equal(client.fetch(checkpoint.name, known), rows.numpy())
        assert not failed.any()
        assert rows.data_ptr() == address


@pytest.mark.parametrize("whole_steps", [False, True])
def test_only_requests_without_rows_are_marked(
    checkpoint: Path, lookup: Process, whole_steps: bool
) -> None:
    """While the source is down, cached rows are staged and lost ones are zero. Tokens of the
    requests that lack a row are marked, or those of the whole step."""
    stage = staged(checkpoint, lookup, "none", whole_steps=whole_steps)
    known = torch.tensor([5, 200, 17])
    expected = stage.fill(known, starts_at(0, 3))[0].clone()
    lookup.popen.kill()
    lookup.popen.wait()
    # two requests with cached rows around one with two lost rows
    step, starts = torch.tensor([5, 200, 301, 17, 302, 17]), starts_at(0, 2, 5, 6)
    for _ in range(2):
        rows, failed = stage.fill(step, starts)
        assert torch.equal(expected[[0, 1, 2, 2]], rows[[0, 1, 3, 5]])
        assert not rows[[2, 4]].any()
        marks = [True] * 6 if whole_steps else [False, False, True, True, True, False]
        assert marks == failed.isnan()[:, 0].tolist()
    assert not stage.fill(known, starts_at(0, 3))[1].any()
    # a step that is no work of requests, as when vLLM measures memory
    assert stage.fill(step, lambda: None)[1].isnan().all()


@pytest.mark.parametrize("second", [False, True])
def test_a_fallback_delivers_lost_rows(
    checkpoint: Path, store: str, lookup: Process, second: bool
) -> None:
    """Rows of the fallback have the values of the table."""
    stage = staged(checkpoint, lookup, store if second else "auto")
    lookup.popen.kill()
    lookup.popen.wait()
    ids = [301, 5, 302, 301]
    rows, failed = stage.fill(torch.tensor(ids), starts_at(0, 4))
    with Client(store) as client:
        assert np.array_equal(client.fetch(checkpoint.name, ids), rows.numpy())
    assert not failed.any()


def test_a_fallback_that_cannot_work_is_refused(checkpoint: Path, store: str) -> None:
    """A second source without the version is refused, and so is recomputation of an overlay, which
    `auto` leaves out."""
    recompute = partial(RecomputedRows, open_checkpoint(checkpoint))
    with closing(Client(store)) as client:
        manifest = client.describe(checkpoint.name)
    overlay = replace(manifest, parent=manifest.ref, changed=(1,), num_shards=1, shards=())
    message = "^fallback .recompute. cannot compute the rows of overlay"
    with pytest.raises(NotFoundError, match=manifest.ref):
        choose_fallback(VLLMConfig(fallback="file:///absent"), recompute, manifest)
    with pytest.raises(MismatchError, match=message):
        choose_fallback(VLLMConfig(fallback="recompute"), recompute, overlay)
    assert isinstance(choose_fallback(VLLMConfig(fallback="auto"), recompute, overlay), NoFallback)


@pytest.mark.parametrize("row_memory", ["host", "device"])
def test_a_table_in_memory_needs_its_source_only_at_start(
    checkpoint: Path, store: str, lookup: Process, row_memory: str
) -> None:
    """All rows are there after the source has gone. Without a source, the start fails."""
    stage = staged(checkpoint, lookup, "none", row_memory=row_memory)
    lookup.popen.kill()
    lookup.popen.wait()
    ids = [301, 5, 302, 301]
    rows, failed = stage.fill(torch.tensor(ids, dtype=torch.int32), starts_at(0, 4))
    with Client(store) as client:
        assert np.array_equal(client.fetch(checkpoint.name, ids), rows.numpy())
    assert not failed.any()
    with pytest.raises(TolhouseError):
        staged(checkpoint, lookup, "none", row_memory=row_memory, wait=0)


@pytest.mark.parametrize("described", [False, True])
def test_a_table_is_read_into_memory_once_its_source_is_back(
    checkpoint: Path, store: str, lookup: Process, described: bool
) -> None:
    """A lookup that is down when a rank opens or reads the table may come back late."""
    with closing(open_row_source(lookup.address)) as source:
        manifest = source.describe(checkpoint.name)
        lookup.popen.kill()
        lookup.popen.wait()
        none = NoFallback(manifest)
        with ThreadPoolExecutor() as pool:
            if described:
                start = pool.submit(
                    WholeTable, source, manifest, "host", CPU, torch.float32, none, 60
                )
            else:
                start = pool.submit(staged, checkpoint, lookup, "none", row_memory="host")
            with process("lookup", "--store", store, "--listen", lookup.address):
                made = start.result()
    stage = RowStage(made, MOST_TOKENS) if isinstance(made, WholeTable) else made
    rows, _ = stage.fill(torch.tensor([5, 301]), starts_at(0, 2))
    with Client(store) as client:
        assert np.array_equal(client.fetch(checkpoint.name, [5, 301]), rows.numpy())


def test_edits_of_a_compressed_table_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    """An overlay over a low-rank table with frequent rows gives the rows of its store."""
    url, opened = f"file://{tmp_path}", open_checkpoint(checkpoint)
    store, scheme = open_store(url), Scheme("int8", rank=0.25, frequent=16, frequent_codec="fp32")
    source = MemoryLLM(opened, select_blocks(opened, "auto", ()))
    counts = {i: 1000 // (1 + i) for i in range(300)}
    made = compress(plan(source, opened.name, "bf16", 4), source.rows(), counts, scheme)
    base = made.store(store)
    edited = np.array([3, 300])
    manifest = make_overlay(store, base.ref, edited, 2 * store.rows(base, edited.astype(np.uint32)))
    config = AdditionalConfig(
        parse({"tolhouse": {"rows": url, "fallback": "none", "row_memory": "host"}}),
        manifest.ref,
        (),
        {},
    )
    rows = open_rows(config, partial(RecomputedRows, opened), MOST_TOKENS, CPU, torch.float32)
    ids = np.array([0, 3, 5, 300, 301, 3], np.uint32)
    got, _ = RowStage(rows, MOST_TOKENS).fill(torch.from_numpy(ids.astype(np.int32)), starts_at())
    np.testing.assert_allclose(store.rows(manifest, ids), got.numpy(), rtol=1e-5, atol=1e-6)
