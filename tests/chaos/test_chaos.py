"""The checks of `make chaos` find each kind of violation, links behave as documented, and one fault
is run for real."""

import dataclasses
import itertools
import signal
import socket
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from tolhouse.errors import UnavailableError
from tolhouse.testing import build_table

from tests.chaos.faults import lasting, streams
from tests.chaos.files import overwritten
from tests.chaos.history import Seen, rate, recovery_seconds, violations
from tests.chaos.proxy import Link
from tests.chaos.system import (
    CHECKPOINT,
    DEADLINE_SECONDS,
    Load,
    System,
    asking,
    right_answers,
    wait_until,
)

ANSWERS = {"t@1": ["the first text", "other"], "t@2": ["the second text", "other"]}
TIMES = {"began": 1.0, "ended": 2.0}
GOOD = Seen(0, True, **TIMES, pieces=["the first", " text"], finishes=1, dones=1, version="t@1")


def found(**changes) -> list[str]:
    return violations([dataclasses.replace(GOOD, **changes)], ANSWERS, 5.0)


def test_correct_histories_have_no_violations() -> None:
    """Answers of either version, text that both versions share, and errors with or without a
    correct beginning are accepted."""
    assert [] == found()
    assert [] == found(pieces=["the second text"], version="t@2")
    assert [] == found(prompt=1, pieces=["other"], version="t@2")
    assert [] == found(pieces=[], finishes=0, dones=0, error="no")
    assert [] == found(pieces=["the f"], finishes=0, dones=1, error="the worker is gone")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pieces": ["the second text"]}, "another version's text"),
        ({"pieces": ["the first", " second text"]}, "wrong or mixed"),
        ({"pieces": ["nonsense"]}, "a wrong text"),
        ({"pieces": ["the first"]}, "wrong"),  # a missing token
        ({"pieces": ["the first", " text", " text"]}, "wrong"),  # a repeated token
        ({"finishes": 2}, "ended 2 times"),
        ({"finishes": 0}, "ended 0 times"),
        ({"dones": 0}, "0 times completely"),
        ({"error": "no"}, "ended twice"),
        ({"finishes": 0, "error": "no", "pieces": ["the sec", "x"]}, "began wrongly"),
        ({"ended": 9.0}, "more than its deadline"),
    ],
)
def test_each_kind_of_violation_is_found(changes: dict, what: str) -> None:
    """A history with one violation yields exactly that violation."""
    texts = found(**changes)
    assert 1 == len(texts)
    assert what in texts[0]


def test_rates_and_recovery_count_complete_answers_only() -> None:
    """Rates and recovery times count complete answers; errors do not contribute."""
    seen = [dataclasses.replace(GOOD, ended=at / 10) for at in range(200) if not 100 <= at < 120]
    bad = dataclasses.replace(GOOD, ended=11.0, pieces=[], error="no")
    assert 10 == rate([*seen, bad], 0, 10)
    assert 0 == rate([*seen, bad], 10, 12)
    assert 1.5 <= recovery_seconds([*seen, bad], 10, 20, 10) <= 2
    assert recovery_seconds([bad], 10, 20, 10) is None
    assert streams(seen[0])
    assert not streams(bad)


def test_a_link_forwards_delays_and_cuts_connections() -> None:
    """A link delivers bytes in order, delayed or not; a cut closes existing and new connections
    until the repair."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        link = stack.enter_context(Link(f"127.0.0.1:{server.getsockname()[1]}"))
        host, port = link.address.split(":")

        def connected() -> tuple[socket.socket, socket.socket]:
            client = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
            return client, stack.enter_context(server.accept()[0])

        client, served = connected()
        client.sendall(b"one")
        assert b"one" == served.recv(9)
        link.delay(0.5)
        client.sendall(b"two")
        served.settimeout(0.1)
        with pytest.raises(TimeoutError):
            served.recv(9)
        link.mend()
        client.sendall(b"three")  # must not overtake the delayed bytes
        served.settimeout(5)
        assert b"twothree" == served.recv(3, socket.MSG_WAITALL) + served.recv(
            5, socket.MSG_WAITALL
        )
        link.cut()
        assert b"" == _received(client)
        again = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        assert b"" == _received(again)
        link.mend()
        client, served = connected()
        served.sendall(b"back")
        assert b"back" == client.recv(9)


def test_a_fault_lasts_as_long_as_its_context(tmp_path: Path) -> None:
    """A file's contents differ from injection to repair, and the file itself stays the same."""
    path = tmp_path / "file"
    path.write_bytes(b"as it was")
    number = path.stat().st_ino
    fault = lasting("overwritten", partial(overwritten, {path: b"other"}), flips=False)
    fault.inject()
    assert b"other" == path.read_bytes()
    fault.mend()
    assert (b"as it was", number) == (path.read_bytes(), path.stat().st_ino)


def test_a_client_beside_the_load_records_errors_until_it_is_answered() -> None:
    """Each error of the client is recorded, and nothing is reported once the client is answered."""
    found, errors = (
        list[str](),
        itertools.chain([UnavailableError("no")] * 2, itertools.repeat(None)),
    )

    def ask() -> None:
        if error := next(errors):
            raise error

    with asking(ask, found) as seen:
        assert wait_until(lambda: len(seen) > 2)
    assert [] == found
    assert ["no", "no", ""] == [error for error, _ in seen[:3]]


def _received(client: socket.socket) -> bytes:
    try:
        return client.recv(9)
    except ConnectionError:
        return b""


def test_a_stopped_lookup_replica_fails_no_request(tmp_path) -> None:
    """No request fails while a lookup replica is stopped, with the harness of `make chaos` over
    files."""
    url = f"file://{tmp_path}"
    ref = build_table(CHECKPOINT, url, name="chaos", codec="int8", shards=16)
    with ExitStack() as stack:
        system = System(stack, url, "chaos")
        load = Load(system.gateway.address)
        load.start()
        time.sleep(1)
        system.lookups[0].signal(signal.SIGSTOP)
        time.sleep(4)
        system.lookups[0].signal(signal.SIGCONT)
        load.stop()
    assert len(load.history) > 10
    assert [] == violations(load.history, right_answers(url, [ref]), DEADLINE_SECONDS)
    assert [] == [seen.error for seen in load.history if seen.failed]
