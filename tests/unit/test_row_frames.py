"""The frames of the row transport on connected sockets, with and without TLS."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import numpy as np
import pytest
from tolhouse.certs import ensure_authority, issue
from tolhouse.net.path import bytes_in_flight
from tolhouse.net.row_frames import Caller, send_records

Wrap = Callable[[socket.socket, bool], socket.socket]


@pytest.fixture(scope="module", params=["plain", "TLS"])
def wrap(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wrap:
    """Return a function that encrypts one end of a connection if the test uses TLS."""
    if request.param == "plain":
        return lambda sock, _: sock
    folder = tmp_path_factory.mktemp("certificates")
    authority = ensure_authority(folder)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*issue(folder, "service", ["localhost"]))
    client = ssl.create_default_context(cafile=authority)

    def encrypted(sock: socket.socket, is_server: bool) -> socket.socket:
        if is_server:
            return server.wrap_socket(sock, server_side=True)
        return client.wrap_socket(sock, server_hostname="localhost")

    return encrypted


@contextmanager
def connected(wrap: Wrap, serve: Callable[[socket.socket], None]) -> Iterator[Caller]:
    """Connect a caller to a thread that runs `serve` with the other end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()

    def run() -> None:
        with suppress(OSError), closing(wrap(far, True)) as sock:
            serve(sock)

    thread = threading.Thread(target=run)
    thread.start()
    with closing(wrap(near, False)) as sock:
        yield Caller(sock)
    thread.join()


@pytest.mark.parametrize("sizes", [[3], [16_376], [65_528], [98_312] * 3, [5, 0, 300_000, 7]])
def test_records_arrive_as_they_were_sent(wrap: Wrap, sizes: list[int]) -> None:
    """Records of any size arrive intact, in views of other sizes."""
    records = [np.random.default_rng(n).bytes(size) for n, size in enumerate(sizes)]
    total = sum(sizes)
    with connected(wrap, lambda sock: send_records(sock, records)) as caller:
        end = time.monotonic() + 30
        assert (total, 0) == caller.header(end)
        received = memoryview(bytearray(total))
        caller.fill([received[: total // 3], received[total // 3 :]], end)
        assert b"".join(records) == received


def test_a_slow_peer_cannot_exceed_the_deadline(wrap: Wrap) -> None:
    """A deadline limits the whole reply, also while parts of it keep arriving."""
    closed = threading.Event()

    def drip(sock: socket.socket) -> None:
        while not closed.wait(0.02):
            sock.sendall(b"x")

    with connected(wrap, drip) as caller:
        with pytest.raises(TimeoutError):
            caller.fill([memoryview(bytearray(1 << 20))], time.monotonic() + 0.3)
        closed.set()


def test_few_bytes_are_in_flight_on_a_short_path() -> None:
    """Loopback needs few bytes in flight. The path of a Unix socket is unknown."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as near,
    ):
        far, _ = listening.accept()
        with far:
            near.sendall(b"x")
            assert far.recv(1)
            far.sendall(b"x")
            assert near.recv(1)
            assert 128 << 10 <= bytes_in_flight(far) < float("inf")
    one, other = socket.socketpair()
    with one, other:
        assert float("inf") == bytes_in_flight(one)
