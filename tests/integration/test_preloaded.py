"""Commands of the tests that are forks of one interpreter behave like those of an own one."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from tolhouse.testing import Process, process

from tests.commands import LOCAL, start, tolhouse


def is_fork(running: Process) -> bool:
    return "tests.preloaded" in psutil.Process(running.pid).cmdline()


def test_a_fork_is_a_child_with_its_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service has the test's folder and variables, ends by signals, and is waited for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOLHOUSE_LOOKUP_STORE", "file://tables")
    with process("lookup", *LOCAL) as running:
        assert is_fork(running)
        one = psutil.Process(running.pid)
        assert (os.getpid(), str(tmp_path)) == (one.ppid(), one.cwd())
        assert f"file://{tmp_path}/tables" in running.log.read_text(encoding="utf-8")
        running.popen.terminate()
        assert 0 == running.popen.wait(60)
    with process("lookup", *LOCAL) as running:
        running.popen.kill()
        assert -signal.SIGKILL == running.popen.wait(60)


def test_the_status_of_a_fork_is_that_of_its_command() -> None:
    """Statuses and streams are separate for each of several commands at once."""
    arguments = ("--version", "fetch", "keys remove gone x")
    started = [start(line) for line in arguments]
    ended = [(*popen.communicate(timeout=60), popen.returncode) for popen in started]
    assert [0, 2, 1] == [code for _, _, code in ended]
    assert [True, False, False] == [bool(out) for out, _, _ in ended]
    assert [False, True, True] == [bool(err) for _, err, _ in ended]


def test_another_variable_needs_another_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that packages read when they are imported take effect."""
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    with process("lookup", "--store", "file:///none", *LOCAL) as running:
        assert not is_fork(running)
    assert "tolhouse" in tolhouse("--version").stdout
