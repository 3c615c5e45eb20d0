"""Benchmarks run their servers in namespaces of their own, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from tolhouse.testing import Host, wait_until

from loadtest.bare import ROW_BYTES, Socket, server

# waits for a line, or its end, while the servers run
PROGRAM = """
import json, socket, sys, tempfile
from contextlib import nullcontext
from pathlib import Path
from redis import Redis
from tolhouse.testing import process, redis_cluster, redis_server
from loadtest.isolation import server_side

masters = int(sys.argv[1])
with (
    server_side() as host,
    redis_server(host=host) as url,
    redis_cluster(masters, host=host) if masters else nullcontext([]) as nodes,
):
    lookup = "lookup", "--store", url, "--listen", f"{host.address}:0", "--insecure"
    with process(*lookup, host=host) as service, Redis.from_url(url) as redis:
        root = Path(f"/proc/{service.pid}/root")
        port = int(service.address.rpartition(":")[2])
        with tempfile.NamedTemporaryFile(dir="/tmp") as file, socket.socket() as loopback:
            seen = {
                "ping": redis.ping(),
                "nodes": sum(Redis.from_url(node.url).ping() for node in nodes),
                "isolated": host.isolated,
                "service on loopback": loopback.connect_ex(("127.0.0.1", port)) == 0,
                "file of the client": (root / file.name[1:]).exists(),
                "entries of /dev/shm": len(list(root.joinpath("dev/shm").iterdir())),
            }
        print(json.dumps(seen), flush=True)
        sys.stdin.readline()
"""


def start(masters: int, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(masters)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, encoding="utf-8", env=os.environ | environment)


def interfaces() -> set[Path]:
    return set(Path("/sys/class/net").iterdir())


def running(marker: str) -> list[int]:
    """The processes with `marker` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def isolation() -> None:
    command = [sys.executable, "-m", "loadtest.isolation"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    if not json.loads(done.stdout.splitlines()[-1])["isolated"]:
        pytest.skip(f"this machine can't make namespaces: {done.stdout}{done.stderr}")


@pytest.mark.usefixtures("isolation")
def test_servers_are_reached_by_tcp_alone(tmp_path: Path) -> None:
    """Redis, a Cluster and a service run apart from the client, which reaches them by TCP."""
    before, marker = interfaces(), "marker-of-an-isolated-program"
    with start(2, TMPDIR=str(tmp_path), MARKER=marker) as program:
        assert program.stdout
        assert program.stdin
        expected = {"ping": True, "nodes": 2, "isolated": True}
        expected |= {"service on loopback": False, "file of the client": False}
        assert expected | {"entries of /dev/shm": 0} == json.loads(program.stdout.readline())
        program.stdin.write("\n")
    assert 0 == program.returncode
    assert [] == running(marker)
    assert [] == list(tmp_path.iterdir())
    assert before == interfaces()


@pytest.mark.usefixtures("isolation")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_killed_benchmark(number: signal.Signals, tmp_path: Path) -> None:
    """A benchmark that is interrupted or killed leaves neither processes nor interfaces."""
    before, marker = interfaces(), f"marker-of-a-killed-program-{number}"
    with start(0, TMPDIR=str(tmp_path), MARKER=marker) as program:
        assert program.stdout
        assert program.stdout.readline()
        assert len(running(marker)) >= 4
        program.send_signal(number)
    wait_until(lambda: not running(marker), "the end of all processes")
    assert before == interfaces()
    assert number == signal.SIGKILL or [] == list(tmp_path.iterdir())


def test_without_namespaces_servers_run_on_loopback(tmp_path: Path) -> None:
    """Where namespaces can't be made, the same program runs, and says that it is not isolated."""
    (tmp_path / "unshare").write_bytes(b"#!/bin/sh\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with start(0, TMPDIR=str(tmp_path), PATH=path) as program:
        output, _ = program.communicate("\n")
    assert 0 == program.returncode
    warning, result = output.splitlines()
    assert "do not count" in warning
    assert not json.loads(result)["isolated"]
    assert json.loads(result)["ping"]


def test_the_bare_socket_loop_sends_the_rows_of_the_ids() -> None:
    """The baseline of a bare socket loop answers with the rows of the ids, in their order."""
    rows = np.frombuffer(np.random.default_rng(0).bytes(3 * ROW_BYTES), np.uint8)
    with server("tcp", Host()) as address, closing(Socket(address)) as client:
        received = client.rows(np.array([2, 0]), ROW_BYTES)
    assert np.array_equal(rows.reshape(3, ROW_BYTES)[[2, 0]], received)
