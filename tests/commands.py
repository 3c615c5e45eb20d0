"""Run `tolhouse …` as a subprocess."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import httpx
from tolhouse.testing import Process, open_url, wait_until

from tests import preloaded

# each request has a connection of its own; httpx.get() would load the TLS certificates each time
HTTP = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
LOCAL = ("--listen", "127.0.0.1:0")  # a free port on the loopback interface


def start(line: str, *more: str | bytes | int | Path) -> subprocess.Popen:
    """Start the command `line` with additional arguments."""
    words = [word if isinstance(word, bytes) else str(word) for word in more]
    command = [sys.executable, "-m", "tolhouse.cli", *shlex.split(line), *words]
    pipe = subprocess.PIPE
    return preloaded.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")


def tolhouse(
    line: str, *more: str | bytes | int | Path, code: int = 0
) -> subprocess.CompletedProcess:
    """Run a command to its end, and require this exit status and no traceback."""
    popen = start(line, *more)
    out, err = popen.communicate(timeout=240)
    assert code == popen.returncode, err
    assert "Traceback" not in err
    return subprocess.CompletedProcess(popen.args, code, out, err)


def metrics(running: Process) -> str:
    """The text of a process's Prometheus metrics."""
    with open_url(f"http://{running.ready['metrics']}/metrics", 10) as answer:
        return answer.read().decode()


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process. SIGSTOP has stopped all of its threads when this returns.

    On a busy machine a thread can otherwise still answer a request that is sent later.
    """
    os.kill(pid, number)
    if number == signal.SIGSTOP:
        tasks = Path(f"/proc/{pid}/task")
        wait_until(
            lambda: all(
                ") T " in (task / "stat").read_text(encoding="ascii", errors="replace")
                for task in tasks.iterdir()
            )
        )
