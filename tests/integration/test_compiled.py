"""Decode steps that are compiled ahead of time give the same hidden states as uncompiled ones."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tolhouse.engine.cpu.compiled import CompiledDecode
from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.engine import Engine
from tolhouse.engine.row_providers import NoRows
from tolhouse.engine.scheduler import ScheduledChunk
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.testing import tiny_model, wait_until

from tests.engines import CPU, Request, engine_of

COMPILES = pytest.mark.timeout(900)  # compiling takes one or two minutes of processor time


class RandomRows(NoRows):
    """Rows of a model with a token memory, fixed by the token."""

    def __init__(self, layers: int, hidden_size: int) -> None:
        super().__init__(hidden_size, CPU)
        generator = torch.Generator().manual_seed(1)
        self.random = torch.randn(layers, 256, hidden_size, generator=generator)

    def decode(self, staged: StagedRows) -> torch.Tensor:
        return self.random[:, staged.index].contiguous()


def compiled_for(checkpoint: Checkpoint, cache: Path) -> CompiledDecode:
    compiled = CompiledDecode(checkpoint, torch.float32, cache)
    compiled.start()
    return compiled


def times(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.iterdir()}


@COMPILES
def test_compiled_steps_equal_uncompiled_ones(tmp_path: Path) -> None:
    """Compiled steps equal uncompiled ones for one and several sequences, with heads, biases and
    norms as in Qwen and with channels chosen by moc; a sequence has the same bits alone and in a
    batch; of two workers that start together one compiles; compiled code is cached on disk and
    replaced if damaged."""
    shape = {"num_key_value_heads": 2, "head_dim": 16, "qkv_bias": True, "qk_norm": True}
    moc = {"ffn_c": "moc", "ffn_share": 0.3}  # 29 channels, which eight does not divide
    path = tiny_model(tmp_path / "m", "flex", 3, **shape, **moc, o_bias=True)
    checkpoint, cache = open_checkpoint(path), tmp_path / "cache"
    first, second = (compiled_for(checkpoint, cache) for _ in range(2))
    assert first.wait()
    kept = times(first.folder)
    assert second.wait()
    assert (kept, [first.folder]) == (times(first.folder), list(cache.iterdir()))
    again = compiled_for(checkpoint, cache)
    assert again.wait()
    assert (None, kept) == (again.compiler, times(first.folder))
    for file in kept:  # as after a power failure; torch would crash on such a file
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 4] + bytes(len(data) // 4) + data[len(data) // 2 :])
    compiled = compiled_for(checkpoint, cache)
    assert compiled.wait()
    rows = RandomRows(checkpoint.config.num_rows, checkpoint.config.hidden_size)
    engines = [engine_of(path, rows) for _ in range(2)]
    check_equal(compiled, *engines)
    # prompts in the same step are not compiled and do not change the bits
    for lengths in ([20], [3, 17]):
        beside = decoded(engines[1], lengths, prompts=[30, 7])
        assert torch.equal(decoded(engines[1], lengths), beside[: len(lengths)])
    check_alone(engines[1])


@COMPILES
def test_both_kinds_of_blocks_of_a_converted_model_are_compiled(tmp_path: Path) -> None:
    """Converted layers, which have a bias and a row, and the dense ones have code of their own."""
    path = tiny_model(tmp_path / "m", "flex", 1, flex_layers=(1, 3))
    config = open_checkpoint(path).config
    compiled = compiled_for(open_checkpoint(path), tmp_path / "cache")
    assert compiled.wait()
    files = {file.name for file in compiled.folder.glob("*.pt2")}
    assert {"alone-0.pt2", "alone-1.pt2", "several-0.pt2", "several-1.pt2"} == files
    rows = RowsOfLayers(config.num_rows, config.hidden_size, config.flex_layers)
    check_equal(compiled, *(engine_of(path, rows) for _ in range(2)))


@COMPILES
def test_compiled_code_reads_the_chosen_blocks(tmp_path: Path) -> None:
    """Compiled steps of avgk equal uncompiled ones, and a sequence has the same bits alone and in a
    batch."""
    form = {"ffn_c": "avgk", "ffn_blocks": 12, "ffn_share": 0.25}
    path = tiny_model(tmp_path / "m", "flex", 3, **form)
    compiled = compiled_for(open_checkpoint(path), tmp_path / "cache")
    assert compiled.wait()
    rows = RandomRows(open_checkpoint(path).config.num_rows, 96)
    plain, faster = (engine_of(path, rows) for _ in range(2))
    check_equal(compiled, plain, faster)
    check_alone(faster)


class RowsOfLayers(RandomRows):
    """Random rows of some layers alone, as the table of a converted model has them."""

    def __init__(self, layers: int, hidden_size: int, present: Sequence[int]) -> None:
        super().__init__(layers, hidden_size)
        self.present = present

    def decode(self, staged: StagedRows) -> list[torch.Tensor | None]:
        rows = super().decode(staged)
        return [row if layer in self.present else None for layer, row in enumerate(rows)]


def check_equal(compiled: CompiledDecode, plain: Engine, faster: Engine) -> None:
    """Check the hidden states of two engines, of which the second gets the compiled code."""
    compiled.attach(faster.runner.model)
    for lengths in ([20], [3, 17, 40, 64, 5], [33, 16]):
        hidden = [decoded(engine, lengths) for engine in (plain, faster)]
        torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-4, atol=1e-4)
        assert hidden[0].any()


def check_alone(engine: Engine) -> None:
    """Check that sequences have the same bits alone and in a batch."""
    lengths = 20, 5, 33
    alone = torch.cat([decoded(engine, [length]) for length in lengths])
    assert torch.equal(alone, decoded(engine, list(lengths)))


@torch.inference_mode()
def decoded(engine, lengths: list[int], prompts: Sequence[int] = ()) -> torch.Tensor:
    """Hidden states of the last tokens of sequences of these lengths, after the other tokens.

    The last tokens are decoded in one step with `prompts`.
    """
    every = [*lengths, *prompts]
    found = [Request([(7 * i + n) % 256 for i in range(n)], 1).sequence for n in every]
    assert all(engine.cache.grow(sequence, len(sequence.ids)) for sequence in found)
    found, others = found[: len(lengths)], found[len(lengths) :]
    for sequence in found:
        sequence.prompt_tokens -= 1
    for first, last in ((0, -1), (-1, 0)):
        step = [ScheduledChunk(s, first % len(s.ids), len(s.ids) + last) for s in found]
        step += [ScheduledChunk(s, 0, len(s.ids)) for s in others if first]
        ids = torch.tensor([i for c in step for i in c.sequence.ids[c.first : c.last]])
        runner = engine.runner
        out = runner.finish(runner.launch(step), StagedRows(torch.empty(0), ids, ids))
    return out


def test_a_worker_does_not_import_the_compiler(checkpoint: Path) -> None:
    """A worker does not import the compiler, which would use a third of a small worker's memory."""
    code = f"""
import sys, torch, tolhouse.worker.run
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.engine.cpu.packed import load
load(open_checkpoint({str(checkpoint)!r}), torch.device("cpu"), torch.float32)
print(sorted({{"sympy", "torch._dynamo", "torch._inductor"}} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout
    assert "[]\n" == output


def test_a_missing_compiler_is_a_warning(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a C++ compiler a warning names it, and no file is left behind."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert not compiled_for(open_checkpoint(base), tmp_path).wait()
    assert "g++" in caplog.text
    assert [] == list(tmp_path.iterdir())


def test_an_unwritable_cache_folder_is_named(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The warning about an unwritable folder names the folder and the option."""
    with caplog.at_level(logging.WARNING):
        assert not compiled_for(open_checkpoint(base), Path("/proc/cache")).wait()
    assert "/proc" in caplog.text
    assert "--compile-cache" in caplog.text
    assert "g++" not in caplog.text


def test_a_missing_home_folder_is_named(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A user without a home folder learns the option that names another one."""
    caplog.set_level(logging.WARNING, "tolhouse")
    assert not compiled_for(open_checkpoint(base), Path("~no-such-user/cache")).wait()
    [message] = [record.getMessage() for record in caplog.records]
    assert "there is no home folder; choose a writable folder with --compile-cache" in message


@pytest.mark.parametrize("begun", [False, True])
def test_stopping_a_worker_stops_its_compiler(begun: bool, base: Path, tmp_path: Path) -> None:
    """Stopping a worker before or during compilation stops the compiler and leaves no unfinished
    file. The compiler has a lower priority in the worker's own session."""
    compiled = compiled_for(open_checkpoint(base), tmp_path)
    if begun:
        wait_until(lambda: list(tmp_path.glob("compiling-*")), seconds=180)
        compiler = compiled.compiler.pid
        lower = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
        assert lower <= os.getpriority(os.PRIO_PROCESS, compiler)
        assert os.getsid(0) == os.getsid(compiler)
    wait_until(lambda: compiled.compiler)
    compiled.stop()
    assert compiled.compiler.poll() is not None
    assert [] == list(tmp_path.iterdir())
