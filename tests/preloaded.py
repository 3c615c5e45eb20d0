"""Starts `tolhouse` commands as forks of an interpreter that has imported the large packages.

Importing these packages takes most of the processor time of a command. The forks are processes of
their own and children of the test's process. They differ from `python -m tolhouse.cli` in their
command line in /proc, and they end without finalising the interpreter.
"""

import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "tolhouse.cli"]
# none of these registers metrics, which would appear in the metrics of every service
PACKAGES = (
    *("numpy", "torch", "safetensors.torch", "tokenizers", "grpc.aio", "grpc_health.v1.health"),
    *("redis.asyncio", "fastapi", "uvicorn", "jinja2", "prometheus_client", "tqdm"),
    *("tolhouse.cli", "tolhouse.worker.run", "tolhouse.build.job"),
)
FREE = ("TOLHOUSE_", "PYTEST_")  # variables that are read after the fork
ENVIRONMENT: dict[str, str] = {}  # of the session's start
PR_SET_CHILD_SUBREAPER = 36
MOST_BYTES = 1 << 20


class Interpreter:
    """The interpreter, which starts with the first command."""

    def __init__(self) -> None:
        self.lock, self.libc = threading.Lock(), ctypes.CDLL(None, use_errno=True)
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())]
        self.popen = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            cwd=Path(__file__).parent.parent,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        atexit.register(self.close)

    def fork(self, arguments: Sequence[str], files: list[int]) -> int:
        """Return the process id of a new command with `files` as stdin, stdout and stderr."""
        job = {"arguments": arguments, "environment": dict(os.environ), "folder": str(Path.cwd())}
        with self.lock:
            # the parent of the command ends at once, and this process becomes its parent
            self.libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self.ours, [json.dumps(job).encode()], files)
                return int(self.ours.recv(100))
            finally:
                self.libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def close(self) -> None:
        self.ours.close()
        self.popen.wait()


interpreter: list[Interpreter] = []
starting = threading.Lock()


class Popen(subprocess.Popen):
    """Runs `tolhouse` commands by forks of one interpreter, and other programs as usual.

    Variables that are not in FREE must be those of the session's start, because the packages or
    the interpreter may have read them.
    """

    def _execute_child(self, args: Any, *more: Any) -> None:
        _, _, _, _, folder, environment, _, _, _, *files = more[:15]
        own = {name: value for name, value in os.environ.items() if not name.startswith(FREE)}
        usual = {n: value for n, value in ENVIRONMENT.items() if not n.startswith(FREE)}
        words = [*map(os.fsdecode, args)]
        if words[:3] != COMMAND or folder or environment is not None or own != usual:
            super()._execute_child(args, *more)
            return
        with starting:
            if not interpreter:
                interpreter.append(Interpreter())
        ends = files[0], files[3], files[5]  # of pipes, in the child; -1 stands for the same file
        own_files = [number if end == -1 else end for number, end in enumerate(ends)]
        self.pid = interpreter[0].fork(words[3:], own_files)
        self._child_created = True
        self._close_pipe_fds(*files)


def serve(control: socket.socket) -> list[str]:
    """Fork for each message. Returns the arguments of the command in each fork."""
    while True:
        data, files, _, _ = socket.recv_fds(control, MOST_BYTES, 3)
        if not data:  # the test's process has ended
            os._exit(0)
        reading, writing = os.pipe()
        if between := os.fork():
            os.waitpid(between, 0)
            control.send(os.read(reading, 100))
            for file in (reading, writing, *files):
                os.close(file)
        elif pid := os.fork():
            os.write(writing, str(pid).encode())
            os._exit(0)
        else:
            break
    control.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in (reading, writing, *files):
        os.close(file)
    job = json.loads(data)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        raw = io.FileIO(number, "r" if name == "stdin" else "w", closefd=False)
        buffered = io.BufferedReader(raw) if name == "stdin" else io.BufferedWriter(raw)
        text = io.TextIOWrapper(buffered, encoding=old.encoding, errors=old.errors)
        text.reconfigure(line_buffering=name == "stderr")
        setattr(sys, name, text)
    return job["arguments"]


def end(status: list[int]) -> None:
    """End at once, because the finalisation of the packages takes longer than most commands."""
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])


def run(arguments: list[str], status: list[int]) -> None:
    """Run the command, and store its exit status."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module("tolhouse.cli", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if isinstance(error.code, int | None):  # otherwise a message, which Python prints
            status.append(error.code or 0)
        raise


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, which end this process
    statuses: list[int] = []
    atexit.register(end, statuses)  # the first registered function runs last
    for package in PACKAGES:
        importlib.import_module(package)
    gc.collect()
    gc.freeze()
    run(serve(socket.socket(fileno=int(sys.argv[1]))), statuses)
