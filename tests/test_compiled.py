"""Decode steps compiled ahead of time: the same hidden states as uncompiled, and a worker that does without where it must."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolhouse.engine.attention import PagedKVCache
from tolhouse.engine.block_manager import BlockManager
from tolhouse.engine.cpu.compiled import Compiled
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.row_providers import NoRows
from tolhouse.engine.runner import Runner
from tolhouse.engine.scheduler import ScheduledChunk as Chunk
from tolhouse.engine.sequence import Sequence
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.config import preset
from tolhouse.sampling import SamplingParams
from tolhouse.testing import tiny_model

CPU = torch.device("cpu")


class RandomRows(NoRows):
    """Rows of a model that has some, the same for the same tokens."""

    def __init__(self, layers: int, hidden_size: int) -> None:
        super().__init__(hidden_size, CPU)
        self.random = torch.randn(
            layers, 256, hidden_size, generator=torch.Generator().manual_seed(1)
        )

    def decode(self, staged: StagedRows) -> torch.Tensor:
        return self.random[:, staged.index].contiguous()


def test_compiled_steps_are_the_uncompiled_ones(tmp_path: Path) -> None:
    """A model with all kinds of parts; one sequence and several, of different lengths; from what is kept on disk, and anew where that is damaged."""
    path = tiny_model(tmp_path / "m", "flex", 3)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    rows = RandomRows(config.num_rows, config.hidden_size)
    compiled, again, anew = (Compiled(config, torch.float32, tmp_path / "cache") for _ in range(3))
    compiled.start()
    assert compiled.wait()
    kept = {file: file.stat().st_mtime_ns for file in compiled.folder.iterdir()}
    again.start()
    assert again.wait()
    assert kept == {file: file.stat().st_mtime_ns for file in again.folder.iterdir()}
    for file in kept:  # as a power cut may leave them: torch would crash on it
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 4] + bytes(len(data) // 4) + data[len(data) // 2 :])
    anew.start()
    assert anew.wait()
    models = [load(checkpoint, CPU, torch.float32) for _ in range(2)]
    anew.attach(models[1])
    for lengths in ([20], [3, 17, 40, 64, 5], [33, 16]):
        hidden = []
        for model in models:
            pages, cache = PagedKVCache(config, 64, CPU, torch.float32), BlockManager(64)
            runner = Runner(model, pages, rows)
            found = [
                Sequence(
                    n, [(7 * i + n) % 256 for i in range(n)], SamplingParams(1), lambda _: None
                )
                for n in lengths
            ]
            for sequence in found:
                assert cache.grow(sequence, len(sequence.ids))
            for step in (
                [Chunk(s, 0, len(s.ids) - 1) for s in found],
                [Chunk(s, len(s.ids) - 1, len(s.ids)) for s in found],
            ):
                ids = torch.tensor([i for c in step for i in c.sequence.ids[c.first : c.last]])
                with torch.inference_mode():
                    out = runner.finish(runner.launch(step), StagedRows(torch.empty(0), ids))
            hidden.append(out)
        torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-4, atol=1e-4)
        assert not torch.equal(hidden[0], torch.zeros_like(hidden[0]))


def test_a_worker_does_not_import_the_compiler(tmp_path: Path) -> None:
    """It would take a third of a small worker's memory."""
    path = tiny_model(tmp_path / "m")
    code = f"""
import sys, torch, tolhouse.worker.run
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.engine.cpu.packed import load
load(open_checkpoint({str(path)!r}), torch.device("cpu"), torch.float32)
print(sorted({{"sympy", "torch._dynamo", "torch._inductor"}} & set(sys.modules)))
"""
    assert (
        "[]\n"
        == subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )


def test_without_a_compiler_the_worker_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning names what is missing; nothing is left behind."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled = Compiled(preset("tiny", "base"), torch.float32, tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        compiled.start()
        assert not compiled.wait()
    assert "g++" in caplog.text
    assert [] == list((tmp_path / "cache").iterdir())


def test_workers_that_share_a_cache_compile_once(tmp_path: Path) -> None:
    """Of two that start together one compiles, and the other waits for what it makes; one that ends does not wait for it."""
    first, second, third = (
        Compiled(preset("tiny", "base"), torch.float32, tmp_path / "cache") for _ in range(3)
    )
    first.start()
    while not first.compiler:
        pass
    second.start()
    third.start()
    third.stop()
    assert not third.ready
    assert first.compiler.poll() is None
    assert [True, True] == [one.wait() for one in (first, second)]
    assert second.compiler is None


def test_a_worker_that_ends_ends_its_compiler(tmp_path: Path) -> None:
    """Even one that has just begun; what was half done is gone."""
    compiled = Compiled(preset("tiny", "base"), torch.float32, tmp_path / "cache")
    compiled.start()
    while not compiled.compiler:
        pass
    compiled.stop()
    assert compiled.compiler.poll() is not None
    assert [] == list((tmp_path / "cache").iterdir())
