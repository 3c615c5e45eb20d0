"""Rows that come late: fetched ahead for prompts, and beside the steps of others for sequences that decode."""

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tolhouse import Client
from tolhouse.engine.attention import PagedKVCache
from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.cuda_graphs import GraphRunner
from tolhouse.engine.engine import Engine
from tolhouse.engine.row_providers import NoRows, Rows
from tolhouse.engine.runner import Runner
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.errors import Unavailable
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.sampling import SamplingParams
from tolhouse.testing import Process, build_table, process, tiny_model

CPU = torch.device("cpu")
SLOTS = 24  # of the row cache


@pytest.fixture
def lookup(checkpoint: Path, tmp_path: Path) -> Iterator[Process]:
    build_table(checkpoint, f"file://{tmp_path}")
    with process("lookup", "--store", f"file://{tmp_path}", "--listen", "127.0.0.1:0") as lookup:
        yield lookup


@pytest.fixture
def rows(lookup: Process) -> Iterator[Rows]:
    """What is not cached is late."""
    with Client(lookup.address, timeout_seconds=2) as client:
        (manifest, _), *_ = client.tables()
        rows = Rows(client.rows, manifest, SLOTS * manifest.record_bytes, CPU)
        yield rows
        rows.close()


def engine_of(
    checkpoint: Path, rows: Rows | NoRows, max_step_tokens: int = 64, runner: type[Runner] = Runner
) -> Engine:
    found, cache = open_checkpoint(checkpoint), BlockManager(4096 // BLOCK_TOKENS)
    pages = PagedKVCache(found.config, cache.num_blocks + 1, CPU, torch.float32)
    model = load(found, CPU, torch.float32, not (rows.manifest and rows.manifest.has_x0))
    return Engine(runner(model, pages, rows), rows, cache, 8, 100, max_step_tokens)


def answers(engine: Engine, prompts: list[list[int]], tokens: int = 40) -> list[list[int]]:
    """What sequences that run at once sample, each with a seed of its own; the error where one ends with it."""
    found: list[list] = [[] for _ in prompts]

    def take(mine: list) -> None:
        return lambda output: (
            mine.extend(output.tokens) if not output.error else mine.append(output.error)
        )

    for number, (prompt, mine) in enumerate(zip(prompts, found, strict=True)):
        sampling = SamplingParams(tokens, temperature=1.0, seed=number)
        engine.add(Sequence(len(prompt), list(prompt), sampling, take(mine)))
    engine.read_mail()
    with torch.inference_mode():
        while engine.scheduler.running or engine.scheduler.waiting:
            engine.step()
    return found


def test_who_sits_out_gets_the_same_tokens(checkpoint: Path, rows: Rows) -> None:
    """Where to wait is dear, late sequences miss steps and no token; where a step is dear, nobody sits out."""
    prompts = [[7 * n + 1, 5, 3] for n in range(6)]
    engine = engine_of(checkpoint, rows)
    engine.pace = 1e9
    expected = answers(engine, prompts)
    assert (0, [40] * 6) == (engine.sat_out, [len(tokens) for tokens in expected])
    rows.trip_seconds, engine.pace = 1e9, 0.0
    assert expected == answers(engine, prompts)
    assert engine.sat_out > 10


def test_a_service_that_is_lost_ends_who_sits_out(
    checkpoint: Path, rows: Rows, lookup: Process
) -> None:
    """The fetch beside a step fails, and the sequence is told by the next; those whose rows are cached go on to their end."""
    engine = engine_of(checkpoint, rows)
    rows.trip_seconds = 1e9
    cached = np.arange(SLOTS, dtype=np.uint32)
    rows.stage(cached)
    lookup.popen.send_signal(signal.SIGKILL)
    lookup.popen.wait()
    ended: list[Output] = []
    allowed = {int(i): 100.0 for i in cached}
    engine.add(Sequence(2, [1, 2], SamplingParams(30, logit_bias=allowed), ended.append))
    engine.read_mail()
    with torch.inference_mode():
        engine.step()
        lost = Sequence(1, [3], SamplingParams(30, logit_bias={200: 100.0}), ended.append)
        engine.add(lost)
        engine.read_mail()
        while engine.scheduler.running:
            engine.step()
    failures = [output.error for output in ended if output.error]
    assert [Unavailable] == [type(failure) for failure in failures]
    assert 30 + 1 == sum(len(output.tokens) for output in ended)
    assert engine.sat_out > 0


def test_rows_of_a_prompt_s_next_piece_come_while_the_last_is_computed(
    checkpoint: Path, rows: Rows
) -> None:
    """All but the first piece's are on their way before they are asked for."""
    engine = engine_of(checkpoint, rows, max_step_tokens=8)
    prompt = list(range(100, 132))
    asked: list[list[int]] = []
    prefetch = rows.prefetch
    rows.prefetch = lambda ids: (asked.append(ids.tolist()), prefetch(ids))
    engine.add(Sequence(len(prompt), list(prompt), SamplingParams(1), lambda _: None))
    engine.read_mail()
    with torch.inference_mode():
        for _ in range(4):
            engine.step()
    assert [prompt[8:16], prompt[16:24], prompt[24:]] == asked
    assert 32 == rows.from_remote
    assert 24 == rows.cache.hits


@pytest.mark.parametrize("embedding", ["no", "yes"])
def test_steps_in_recorded_sizes_give_the_same_tokens(embedding: str, tmp_path: Path) -> None:
    """What a GPU replays as graphs, run here as it is: padded to sizes, begun before its rows are there where the worker has X0 itself."""
    path = tiny_model(tmp_path / "m")
    build_table(path, f"file://{tmp_path}", embedding=embedding)
    with (
        process("lookup", "--store", f"file://{tmp_path}", "--listen", "127.0.0.1:0") as lookup,
        Client(lookup.address) as client,
    ):
        (manifest, _), *_ = client.tables()
        found = []
        for runner in (Runner, GraphRunner):
            rows = Rows(client.rows, manifest, SLOTS * manifest.record_bytes, CPU)
            engine = engine_of(path, rows, runner=runner)
            found.append(answers(engine, [[7 * n + 1, 5, 3, *range(9 * n)] for n in range(6)]))
            rows.close()
        assert found[0] == found[1]
        assert {1, 2, 4, 8} >= {sequences for sequences, _ in engine.runner.graphs}
        assert (embedding == "yes") == engine.runner.carried


def test_a_base_model_runs_in_recorded_sizes_too(tmp_path: Path) -> None:
    """It has no rows to wait for; its steps are replayed all the same."""
    path = tiny_model(tmp_path / "m", "base")
    prompts = [[7 * n + 1, 5, 3] for n in range(3)]
    found = []
    for runner in (Runner, GraphRunner):
        engine = engine_of(
            path, NoRows(open_checkpoint(path).config.hidden_size, CPU), runner=runner
        )
        found.append(answers(engine, prompts))
    assert found[0] == found[1]
    replayed = []
    for graph in engine.runner.graphs.values():
        finish = graph.finish
        graph.finish = lambda staged, finish=finish: (replayed.append(1), finish(staged))[1]
    assert found[0] == answers(engine, prompts)
    assert len(replayed) >= 39
