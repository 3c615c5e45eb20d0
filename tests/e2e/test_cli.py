"""The `tolhouse` command: help, table management and one-line errors."""

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from tolhouse import config
from tolhouse.cli import main
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.testing import build_table, local_cluster, process

from tests import commands


def tolhouse(*arguments: str | Path, code: int = 0) -> str:
    """Run a command that exits with `code`; return its stdout for 0, and else its stderr."""
    ended = commands.tolhouse("", *arguments, code=code)
    return ended.stderr if code else ended.stdout


def all_commands(group: click.Group, path: str = "") -> dict[str, click.Command]:
    found = {}
    for name, command in group.commands.items():
        own = f"{path}{name} "
        found |= all_commands(command, own) if isinstance(command, click.Group) else {own: command}
    return found


@pytest.mark.parametrize("command", all_commands(main).values(), ids=all_commands(main))
def test_every_command_has_help(command: click.Command) -> None:
    """Each command has a description, and each of its options has a help text."""
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "max_tokens":
            assert parameter.help, parameter.name
            assert "Undefined" not in parameter.help


def test_help_names_the_environment_variables() -> None:
    """The help of an option names its environment variable."""
    shown = tolhouse("worker", "--help")
    for field in config.WorkerConfig.model_fields:
        assert config.variable(config.WorkerConfig, field) in "".join(shown.split())


def test_tables_are_managed_from_the_shell(checkpoint: Path, tmp_path: Path) -> None:
    """`list`, `show`, `publish`, `rollback` and `delete` work on a store of files."""
    url = f"file://{tmp_path}"
    store = ("--store", url)
    assert "" == tolhouse("tables", "list", *store)
    old, new = (
        build_table(checkpoint, url, codec=codec, name="t", publish=False)
        for codec in ("fp32", "int8")
    )
    listed = tolhouse("tables", "list", *store).splitlines()
    assert {f"  {old}", f"  {new}"} == {line[: 2 + len(old)] for line in listed}
    assert "not published" in tolhouse("tables", "show", "t", *store, code=1)
    assert old in tolhouse("publish", old, *store)
    assert new in tolhouse("tables", "publish", new, *store)
    assert "int8" == json.loads(tolhouse("tables", "show", "t", *store))["codec"]
    assert f"* {new}" in tolhouse("tables", "list", *store)
    assert "is published" in tolhouse("tables", "delete", new, *store, code=1)
    assert old in tolhouse("tables", "rollback", "t", *store)
    assert "fp32" == json.loads(tolhouse("tables", "show", "t", *store))["codec"]
    assert "no version before" in tolhouse("tables", "rollback", "t", *store, code=1)
    assert new in tolhouse("tables", "delete", new, *store)
    (line,) = tolhouse("tables", "list", *store).splitlines()
    assert line.startswith(f"* {old}")
    assert old in tolhouse("publish", new, *store, code=1)  # the error lists the available tables
    assert "NAME@VERSION" in tolhouse("publish", "t", *store, code=1).upper()


def test_both_stores_are_managed_at_once(checkpoint: Path, tmp_path: Path, redis_url: str) -> None:
    """With two stores, each command applies to both."""
    both = ("--store", f"file://{tmp_path},{redis_url}")
    ref = build_table(checkpoint, f"file://{tmp_path}", redis_url, name="both", publish=False)
    assert 2 == tolhouse("publish", ref, *both).count("is published")
    assert 2 == tolhouse("tables", "list", *both).count(f"* {ref}")


def norms_of(shown: str) -> list[list[float]]:
    return [[float(n) for n in line.split()[1:]] for line in shown.splitlines()]


def test_rows_and_text_from_the_shell(checkpoint: Path, tmp_path: Path) -> None:
    """fetch shows and saves rows, and generate prints the same text with and without a worker."""
    url = f"file://{tmp_path}/tables"
    ref = build_table(checkpoint, url)
    with local_cluster(checkpoint, url) as cluster:
        out = tmp_path / "rows.npy"
        shown = tolhouse("fetch", ref, "3", "5", "--rows", cluster.lookup, "--out", out)
        rows = np.load(out)
        assert (2, 4, 96) == rows.shape
        norms = norms_of(shown)
        assert np.allclose(np.linalg.norm(rows, axis=-1), norms, atol=1e-3)
        rows = ("--rows", cluster.lookup)
        assert "allowed are" in tolhouse("fetch", ref, "99999", *rows, code=1)
        unknown = f"tiny-memory@{'0' * 16}"
        assert "is not in" in tolhouse("fetch", unknown, "1", *rows, code=1)
        complete, served = ("generate", checkpoint, "def add("), ("--worker", cluster.workers)
        here = tolhouse(*complete, "--max-tokens", "20")
        assert here.startswith("def add(")
        assert here == tolhouse(*complete, "--max-tokens", "20", *served)
        assert "maximum context length" in tolhouse(
            *complete, "--max-tokens", "999", *served, code=1
        )
    assert norms == norms_of(tolhouse("fetch", ref, "3", "5", "--rows", url))
    assert "cannot be reached" in tolhouse(*complete, *served, code=1)
    assert "cannot be reached" in tolhouse("fetch", ref, "1", *rows, code=1)


def test_x0_is_shown_in_the_shell(checkpoint: Path, tmp_path: Path) -> None:
    """`tables list` shows whether a table has x0, and `fetch` shows its norm first."""
    url = f"file://{tmp_path}"
    ref = build_table(checkpoint, url, embedding="yes")
    assert " 4 layers + X0 " in tolhouse("tables", "list", "--store", url)
    _, *norms = tolhouse("fetch", ref, "3", "--lookup", url).split()
    x0 = open_checkpoint(checkpoint).model().embed_tokens.weight[3]
    assert 5 == len(norms)
    assert f"{float(x0.norm()):.3f}" == norms[0]


def test_memory_is_explained_in_the_shell(checkpoint: Path) -> None:
    """explain prints text, or JSON with the given counts for each token."""
    counts = ("--keys", "2", "--neighbours", "3")
    found = json.loads(tolhouse("explain", checkpoint, "def add", "--json", *counts))
    assert {2} == {len(keys) for entry in found for keys in entry["keys"]}
    assert {3} == {len(entry["nearest"]) for entry in found}
    assert "nearest" in tolhouse("explain", checkpoint, "def add")
    assert "empty" in tolhouse("explain", checkpoint, "", code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("frobnicate",), 2, "No such command"),
        (("build",), 2, "Missing argument"),
        (("train", "huge", "--out", "x"), 1, "one of tiny, small"),
        (("train", "tiny", "--kind", "flex", "--out", "x"), 1, "beta is 1, 2 or 3"),
        (("train", "tiny", "--ffn-c", "swiglu", "--out", "x"), 1, "is for kind flex"),
        (("train", "tiny", "--kind", "base", "--ffn-m", "moc"), 1, "a base model has none"),
        (
            ("train", "tiny", "--ffn-m", "moc", "--ffn-share", "1.5"),
            1,
            "--ffn-share (TOLHOUSE_TRAIN_FFN_SHARE): Input should be less than or equal to 1",
        ),
        (("tables", "list", "--store", "nowhere"), 1, "not understood"),
        (("tables", "list", "--store", ""), 1, "no store given"),
        (("fetch", "a b", "1"), 1, "not allowed"),
        (("generate", "nothing", "x"), 1, "no tokenizer"),
        (("serve", "--checkpoint", "nothing"), 1, "no checkpoint"),
        (("demo", "--checkpoint", "nothing"), 1, "no checkpoint"),
    ],
)
def test_a_failed_command_is_a_one_line_error(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch
) -> None:
    """A failed command exits with a code and a message, and leaves no file."""
    monkeypatch.chdir(tmp_path)
    assert message in tolhouse(*arguments, code=code)
    assert [] == [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_environment_is_read_strictly(tmp_path: Path, monkeypatch) -> None:
    """An unknown variable is an error, and known variables configure a process."""
    monkeypatch.setenv("TOLHOUSE_LOOKUP_STORE", f"file://{tmp_path}")
    monkeypatch.setenv("TOLHOUSE_LOOKUP_LISTEN", "127.0.0.1:0")
    with process("lookup") as running:
        assert f"file://{tmp_path}" in running.log.read_text(encoding="utf-8")
    monkeypatch.setenv("TOLHOUSE_LOOKUP_STORES", "x")
    assert "did you mean TOLHOUSE_LOOKUP_STORE?" in tolhouse("lookup", code=1)


_INTERRUPTED_DESTRUCTOR = """
import os, signal, time
from tolhouse.cli import main

class Thing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)

@main.command()
def wait():
    Thing()
    time.sleep(100)

main(["wait"])
"""


def test_an_interrupt_in_a_destructor_ends_the_command() -> None:
    """Python drops an exception in a destructor, but Ctrl-C still ends the command."""
    command = [sys.executable, "-c", _INTERRUPTED_DESTRUCTOR]
    done = subprocess.run(command, capture_output=True, timeout=90, check=False)
    assert (1, b"") == (done.returncode, done.stdout)
    assert b"Traceback" not in done.stderr
