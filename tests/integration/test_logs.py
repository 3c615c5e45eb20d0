"""Logs: input of callers can't forge log lines, on a terminal or in JSON."""

import json
import os
import pty
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tolhouse.logs import printable
from tolhouse.testing import end, free_port, process, wait_until

from tests.commands import LOCAL, tolhouse

LOGGING = """
import sys, logging
from tolhouse.logs import event, log, start_logging
start_logging()
for line in sys.stdin.read().split("|"):
    event(line, path=line)
    try:
        raise ValueError(line)
    except ValueError:
        log.exception("failed")
"""


def written(reader: int) -> list[str]:
    """The lines that were written to a pipe or terminal whose other end is closed."""
    data = b""
    with suppress(OSError):  # the end of a terminal raises OSError
        while piece := os.read(reader, 65_536):
            data += piece
    os.close(reader)
    return data.decode().replace("\r\n", "\n").split("\n")[:-1]


def logged(text: str, *, terminal: bool) -> list[str]:
    """The lines that a process logs about `text`, on a terminal or into a pipe."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    popen = subprocess.Popen(
        [sys.executable, "-c", LOGGING],
        stdin=subprocess.PIPE,
        stderr=writer,
        text=True,
        encoding="utf-8",
    )
    os.close(writer)
    popen.communicate(text)
    return written(reader)


FORGED = "/x\n12:00:00 info    ready\r\x1b[2K\x1b]0;title\x07\u202egnp.exe\u2028\x9b31m"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_can_not_be_forged(terminal: bool) -> None:
    """Line breaks, escape sequences and direction marks are escaped in messages and exceptions."""
    lines = logged(FORGED, terminal=terminal)
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("12:00:00") for line in lines)
    if not terminal:
        first, second = map(json.loads, lines)
        assert (FORGED, FORGED) == (first["message"], first["path"])
        assert FORGED in second["exception"]


def test_ambiguous_values_are_quoted() -> None:
    """Values with spaces or equals signs are quoted, and others are not."""
    lines = logged("/a|/b status=200", terminal=True)
    assert lines[0].endswith("/a path=/a")
    assert any(line.endswith('path="/b status=200"') for line in lines)


@given(st.text())
@example("ä 世 🙂")
def test_only_unprintable_characters_are_escaped(text: str) -> None:
    """Printable text is logged without changes."""
    assert printable(text).isprintable()
    assert not text.isprintable() or text == printable(text)


def test_a_request_path_can_not_control_the_terminal(checkpoint: Path) -> None:
    """The path of a request is escaped in the log of a gateway on a terminal."""
    reader, writer = pty.openpty()
    command = [sys.executable, "-m", "tolhouse.cli", "gateway", str(checkpoint)]
    popen = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=writer
    )
    os.close(writer)
    try:
        address = json.loads(popen.stdout.readline())["address"]
        httpx.post(f"http://{address}/{quote(FORGED)}")
    finally:
        end(popen)
        popen.stdout.close()
    lines = written(reader)
    assert any("ready\\r\\u001b[2K" in line for line in lines)
    assert all(line.isprintable() for line in lines)


def test_probes_leave_no_log_lines(checkpoint: Path, store: str) -> None:
    """HTTP and TCP probes of any port leave no log lines, and readiness is reported on stdout
    only."""
    nowhere = f"127.0.0.1:{free_port()}"
    with (
        process("lookup", "--store", store, *LOCAL) as lookup,
        process("gateway", str(checkpoint), *LOCAL, "--workers", nowhere) as gateway,
    ):
        wait_until(lambda: "worker is down" in gateway.log.read_text(encoding="utf-8"))
        before = [one.log.read_text(encoding="utf-8") for one in (lookup, gateway)]
        for _ in range(3):
            for method in ("GET", "HEAD"):
                answer = httpx.request(method, f"http://{gateway.address}/health")
                assert 503 == answer.status_code
            for address in (gateway.address, lookup.address, lookup.ready["metrics"]):
                host, port = address.split(":")
                for lingers in (struct.pack("ii", 0, 0), struct.pack("ii", 1, 0)):
                    with socket.create_connection((host, int(port))) as probe:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingers)
        httpx.get(f"http://{lookup.ready['metrics']}/metrics")
        httpx.get(f"http://{gateway.address}/version")
        assert before == [one.log.read_text(encoding="utf-8") for one in (lookup, gateway)]
        assert not any('"ready"' in text for text in before)


def test_progress_is_for_terminals(checkpoint: Path, tmp_path: Path) -> None:
    """Progress bars are not written to a file or a pipe."""
    options = f"--store file://{tmp_path} --size-ratio 4"
    output = tolhouse(f"compress {checkpoint} {options}").stderr
    output += tolhouse(f"eval {checkpoint} --most-tokens 64").stderr
    assert not any(sign in output for sign in ("\r", "%|", "it/s"))
