"""Run a benchmark's servers and its client in separate namespaces.

    python -m loadtest.isolation     prints whether this machine can separate them

A benchmark runs the body of its `main` in `with server_side() as host`, and starts its servers with
`host=host`. The program then starts again as the client, in network, PID, mount and IPC namespaces
of its own. Its servers run in a second set, joined to the first by a veth pair: they share neither
loopback nor Unix sockets, neither /tmp nor /dev/shm with the client. Only /tmp/server is visible on
both sides, for files that a server reads, such as a table. When the client ends, the kernel ends
every process in both sets, and the interfaces disappear with them. The host's network never
changes.

Where namespaces can't be made, servers run beside the client on the loopback interface.
"""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tolhouse.testing import Host

_T = TypeVar("_T")
# the namespaces in /proc/PID/ns, and their flags in sched.h
_NAMESPACES = {"net": 0x40000000, "pid": 0x20000000, "mnt": 0x00020000, "ipc": 0x08000000}
_CLIENT, _SERVER, _SHARED = "10.77.0.1", "10.77.0.2", "/tmp/server"
_IS_CLIENT = "LOADTEST_CLIENT"  # set in the process that runs in the client's namespaces
_TMP = Path("/tmp")


class Separated(Host):
    """The server side of an isolated benchmark."""

    address, folder = _SERVER, _SHARED

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread  # has left the client's namespaces, as do the processes it starts
        self.isolated = True

    def call(self, function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        result = self._thread.submit(function, *arguments, **options).result()
        if isinstance(result, subprocess.Popen):
            self.isolated &= separate(result.pid)
        return result


class Together(Host):
    """Servers on the client's side, where namespaces can't be made."""

    isolated = False


def separate(pid: int) -> bool:
    """Whether a process shares no namespace, /tmp or /dev/shm with this one."""
    own, other = Path("/proc/self"), Path(f"/proc/{pid}")
    try:
        return not any(
            (own / path).samefile(other / path)
            for path in (*(f"ns/{name}" for name in _NAMESPACES), "root/tmp", "root/dev/shm")
        )
    except OSError:  # the process has ended
        return False


@contextmanager
def server_side() -> Iterator[Separated | Together]:
    """The place for the servers of a benchmark; `isolated` says whether it is a separate one.

    The program starts again as the client if it can, so the block may run in another process.
    """
    if os.getpid() == 1 and os.environ.get(_IS_CLIENT):
        with ThreadPoolExecutor(1) as thread:
            _enter_server_side(thread)
            yield Separated(thread)
    else:
        problem = _run_as_client()
        print(f"Not isolated, so the figures do not count: {problem}")
        yield Together()


def _run_as_client() -> str:
    """Run this program in namespaces of its own and exit, or return why that is impossible."""
    with tempfile.TemporaryDirectory(prefix="tolhouse-isolated-") as tmp:
        entered = Path(tmp, "entered")
        script = f"""
            {_private(tmp)}
            mkdir {_SHARED}
            unshare --net ip link add veth0 type veth peer name veth1
            touch /tmp/entered
            cd {shlex.quote(str(Path.cwd()))}
            exec "$@"
        """
        namespaces = ["--net", "--pid", "--mount", "--ipc"]
        if os.geteuid():
            namespaces += ["--user", "--map-root-user"]
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces]
        command += ["--fork", "--kill-child", "--mount-proc", "sh", "-ec", script, "sh"]
        command += [sys.executable, *sys.orig_argv[1:]]
        environment = {**os.environ, "TMPDIR": str(_TMP), _IS_CLIENT: "1"}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            done = subprocess.run(command, env=environment, check=False)
        except FileNotFoundError as error:
            return str(error)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if entered.exists():
            sys.exit(done.returncode)
    return "the commands above failed"


def _enter_server_side(thread: ThreadPoolExecutor) -> None:
    """Move a thread to new namespaces, and start the process that keeps them."""

    def leave() -> None:
        library = ctypes.CDLL(None, use_errno=True)
        if library.unshare(sum(_NAMESPACES.values())):
            raise OSError(ctypes.get_errno(), "unshare failed")

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True)

    thread.submit(leave).result()
    script = f"""
        mount -t proc proc /proc
        mkdir {_SHARED}/server
        mount --bind {_SHARED} {_SHARED}/server
        {_private(_SHARED)}
        echo ready
        exec sleep infinity
    """
    # the first process becomes the init process of the PID namespace
    start = ["sh", "-ec", script]
    holder = thread.submit(subprocess.Popen, start, stdout=subprocess.PIPE).result()
    assert holder.stdout
    if holder.stdout.readline() != b"ready\n":
        raise RuntimeError("the server side could not be set up")
    run(f"ip link add veth0 type veth peer name veth0 netns {holder.pid}")
    for place, address in ((run, _CLIENT), (lambda c: thread.submit(run, c).result(), _SERVER)):
        place(f"ip address add {address}/24 dev veth0")
        place("ip link set veth0 up")


def _private(folder: str) -> str:
    """Shell commands that replace /tmp with a folder on disk and /dev/shm with an empty one.

    What Python and the benchmark read from below /tmp stays visible.
    """
    here = Path.cwd()
    read = [Path(sys.prefix), here, here.parent / "shared", *map(Path, sys.path)]
    kept = sorted(path for path in set(read) if path.is_dir() and _TMP in path.parents)
    lines = []
    for path in kept:
        at = shlex.quote(str(Path(folder, path.relative_to(_TMP))))
        lines += [f"mkdir -p {at}", f"mount --rbind {shlex.quote(str(path))} {at}"]
    lines.append(f"mount --rbind {shlex.quote(folder)} /tmp")
    return "\n".join([*lines, "mount -t tmpfs tmpfs /dev/shm", "ip link set lo up"])


def main() -> None:
    with server_side() as host:
        with host.call(subprocess.Popen, ["cat"], stdin=subprocess.PIPE):
            print(json.dumps({"isolated": host.isolated}))


if __name__ == "__main__":
    main()
