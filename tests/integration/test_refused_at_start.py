"""Unsupported options end a command at start with a one-line error."""

import platform
from pathlib import Path

import pytest
from tolhouse.testing import process

from tests.commands import LOCAL, tolhouse


@pytest.mark.parametrize("option", ["--store", "--refill"])
def test_a_lookup_service_takes_one_store(option: str, tmp_path: Path) -> None:
    """A lookup service refuses two stores before it opens one."""
    both = f"file://{tmp_path}/a,redis://127.0.0.1:9"
    done = tolhouse("lookup", option, both, *LOCAL, code=1)
    hint = "start a lookup service for each store"
    expected = f"error: {option} takes one store, but {both!r} names several: {hint}\n"
    assert ("", expected) == (done.stdout, done.stderr)


@pytest.mark.parametrize(
    "line",
    [
        "worker {checkpoint} --rows {both}",
        "fetch tiny-memory 5 --rows {both}",
        "eval {checkpoint} --table tiny-memory --rows {both}",
        "explain {checkpoint} text --table tiny-memory --rows {both}",
    ],
)
def test_rows_come_from_one_store(line: str, checkpoint: Path, tmp_path: Path) -> None:
    """Commands that read rows refuse two stores."""
    both = f"file://{tmp_path}/a,file://{tmp_path}/b"
    done = tolhouse(line.format(checkpoint=checkpoint, both=both), code=1)
    assert "names several stores; one is allowed here" in done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's instruction sets are x86's")
@pytest.mark.parametrize("command", ["worker", "compile"])
def test_bfloat16_needs_cpu_support(
    command: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU without bfloat16, --dtype bfloat16 is an error, and the default works."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    done = tolhouse(f"{command} {checkpoint} --dtype bfloat16", code=1)
    assert "error: this CPU has no bfloat16: choose --dtype float32\n" == done.stderr
    rows = f"file://{tmp_path}"
    again = tolhouse(f"worker {checkpoint} --rows {rows} --lookup-wait-seconds 0", code=1)
    assert "is not published" in again.stderr


def test_an_unsupported_dtype_is_refused(checkpoint: Path) -> None:
    """A worker refuses float16."""
    done = tolhouse(f"worker {checkpoint} --dtype float16", code=2)
    assert "'--dtype': 'float16' is not one of 'auto', 'float32', 'bfloat16'" in done.stderr


def test_generate_closes_its_client(base: Path) -> None:
    """`tolhouse generate --worker` prints no warning about an open channel."""
    with process("worker", str(base), *LOCAL) as worker:
        done = tolhouse(f"generate {base} def --max-tokens 2 --worker {worker.address}")
    assert ("def", "") == (done.stdout[:3], done.stderr)
