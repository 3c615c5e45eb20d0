"""The row transport: frames over TCP beside gRPC, with the same token, TLS and drain."""

import socket
import ssl
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
from tolhouse import Client, errors
from tolhouse.certs import ensure_authority, issue
from tolhouse.testing import (
    Process,
    build_table,
    free_port,
    open_url,
    process,
    redis_server,
    wait_until,
)
from tolhouse.v1 import lookup_pb2

from tests.chaos.proxy import Link
from tests.commands import LOCAL

IDS = [5, 3, 300, 5, 0]
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the store URL and name@version of a table in files."""
    url = f"file://{tmp_path_factory.mktemp('tables')}"
    return url, build_table(checkpoint, url, shards=5)


@pytest.fixture(scope="module")
def service(files: tuple[str, str]) -> Iterator[Process]:
    with process("lookup", "--store", files[0], *LOCAL) as running:
        yield running


@pytest.fixture(scope="module")
def expected(files: tuple[str, str]) -> bytes:
    """The bytes of the rows of IDS, read from the files."""
    with Client(files[0]) as client:
        return client.fetch(files[1], IDS).tobytes()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    ensure_authority(folder)
    issue(folder, "service", ["localhost", "127.0.0.1"])
    return folder


def connections(running: Process, tls: ssl.SSLContext | None = None) -> int:
    """The number of open connections of the row transport."""
    url = f"http{'s' * bool(tls)}://{running.ready['metrics']}/metrics"
    with open_url(url, 10, tls) as answer:
        text = answer.read().decode()
    return int(float(text.split("\ntolhouse_lookup_row_connections ")[1].split()[0]))


def request(table: str, *ids: int, **fields: str) -> bytes:
    """A request as docs/row-transport.md specifies it."""
    packed = np.array(ids, "<u4").tobytes()
    data = lookup_pb2.FetchRequest(table=table, token_ids=packed, **fields).SerializeToString()
    return struct.pack("<I", len(data)) + data


def connect(running: Process) -> socket.socket:
    host, _, port = running.ready["rows"].rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def drip(sock: socket.socket, data: bytes) -> None:
    """Send `data` byte by byte."""
    for byte in data:
        sock.sendall(bytes([byte]))
        time.sleep(0.05)


def reply(file: "socket.SocketIO", size: int) -> bytes | lookup_pb2.Error:
    """The records of a reply of `size` bytes, or its error."""
    records = b""
    while True:
        length, error = struct.unpack("<II", file.read(8))
        records += file.read(length)
        if error:
            return lookup_pb2.Error.FromString(file.read(error))
        if len(records) == size:
            return records


def test_a_client_uses_the_row_transport(service: Process, files: tuple, expected: bytes) -> None:
    """A client fetches rows over a connection to the row port, which it keeps."""
    before = connections(service)
    with Client(service.address) as client:
        for _ in range(3):
            assert expected == client.fetch(files[1], IDS).tobytes()
        assert before + 1 == connections(service)
    wait_until(lambda: connections(service) == before)


def test_requests_on_a_connection_are_answered_in_order(service: Process, files: tuple) -> None:
    """A plain socket gets records for each of several requests, and an error for a bad one."""
    url, ref = files
    with Client(url) as client:
        manifest = client.describe(ref)
        records = client.rows.fetch_records(manifest, np.arange(40, dtype=np.uint32))
    size = manifest.record_bytes
    with connect(service) as sock, sock.makefile("rb") as file:
        sock.sendall(request(ref, 7, 30, 7) + request(ref) + request(ref, 10**6) + request(ref, 2))
        assert records[[7, 30, 7]].tobytes() == reply(file, 3 * size)
        assert b"" == reply(file, 0)
        assert "OUT_OF_RANGE" == reply(file, size).status
        assert records[2].tobytes() == reply(file, size)
        sock.sendall(request("t@0123456789abcdef", 1))
        assert "NOT_FOUND" == reply(file, size).status


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<I", 2**31) + b"x", "at most 278528 are allowed"),
        (b"GET / HTTP/1.1\r\n\r\n", "at most 278528 are allowed"),
        (struct.pack("<I", 4) + b"\xff\xff\xff\xff", "not a FetchRequest"),
    ],
)
def test_a_malformed_request_ends_the_connection(
    service: Process, data: bytes, message: str
) -> None:
    """The last frame has an error that says what is allowed."""
    with connect(service) as sock, sock.makefile("rb") as file:
        sock.sendall(data)
        failure = reply(file, 1)
        assert "INVALID_ARGUMENT" == failure.status
        assert message in failure.message
        sock.shutdown(socket.SHUT_WR)
        assert b"" == file.read()


def test_a_late_first_request_ends_the_connection(
    service: Process, files: tuple, expected: bytes
) -> None:
    """A first request that arrives byte by byte ends its connection, and disturbs no other."""
    with connect(service) as slow, Client(service.address) as client:
        with pytest.raises(OSError, match=r"reset|pipe"):
            drip(slow, request(files[1], *range(2000)))
        assert expected == client.fetch(files[1], IDS).tobytes()


def test_a_token_is_required(files: tuple, expected: bytes, tmp_path: Path) -> None:
    """The row transport accepts the tokens of the gRPC port, and reads the file again."""
    url, ref = files
    file = tmp_path / "token"
    file.write_text(TOKEN, encoding="utf-8")
    options = ("--store", url, "--token-file", str(file))
    with process("lookup", *options, *LOCAL) as running:
        for given in ({}, {"authorization": "Bearer another-token-of-the-tests"}):
            with connect(running) as sock, sock.makefile("rb") as stream:
                sock.sendall(request(ref, 1, **given))
                assert "UNAUTHENTICATED" == reply(stream, 1).status
                assert b"" == stream.read()
        with Client(running.address, token_file=file) as client:
            assert expected == client.fetch(ref, IDS).tobytes()
            file.write_text("another-token-of-the-tests", encoding="utf-8")
            with Client(running.address, token=TOKEN) as other:
                with pytest.raises(errors.UnauthenticatedError):
                    other.fetch(ref, IDS)
            assert expected == client.fetch(ref, IDS).tobytes()
            assert 1 == connections(running)


def test_tls_is_that_of_the_grpc_port(files: tuple, expected: bytes, certificates: Path) -> None:
    """With TLS and client certificates, rows come over the row transport, which refuses others."""
    url, ref = files
    own = {"tls_cert": certificates / "service.pem", "tls_key": certificates / "service.key"}
    ca = certificates / "ca.pem"
    options = [f"--{name.replace('_', '-')}={path}" for name, path in own.items()]
    options += ["--tls-client-ca", str(ca)]
    with process("lookup", "--store", url, *options, *LOCAL) as running:
        with Client(running.address, tls_ca=ca, **own) as client:
            assert expected == client.fetch(ref, IDS).tobytes()
            assert expected == client.fetch(ref, IDS).tobytes()
            context = ssl.create_default_context(cafile=ca)
            context.load_cert_chain(*own.values())
            assert 1 == connections(running, context)
        with connect(running) as sock, suppress(ConnectionError):
            sock.sendall(request(ref, 1))
            assert len(sock.recv(100)) < 20  # at most an alert of TLS
        with Client(running.address, tls_ca=ca) as client:
            with pytest.raises(errors.UnavailableError):
                client.fetch(ref, IDS)


def test_rows_come_over_grpc_if_there_is_no_row_port(files: tuple, expected: bytes) -> None:
    """Without a row port, or with one that is blocked, a client fetches over gRPC."""
    url, ref = files
    for options in (["--rows-listen", "none"], ["--rows-advertised-port", str(free_port())]):
        with process("lookup", "--store", url, *options, *LOCAL) as running:
            with Client(running.address) as client:
                for _ in range(2):
                    assert expected == client.fetch(ref, IDS).tobytes()
                with pytest.raises(errors.NotFoundError):
                    client.fetch("nothing@0123456789abcdef", IDS)
            assert 0 == connections(running)


def test_a_restarted_service_may_have_another_row_port(files: tuple, expected: bytes) -> None:
    """A client finds the new row port after a restart at the same address."""
    url, ref = files
    address = f"127.0.0.1:{free_port()}"
    options = ("lookup", "--store", url, "--listen", address)
    with ExitStack() as stack:
        first = stack.enter_context(process(*options))
        client = Client(address)
        assert expected == client.fetch(ref, IDS).tobytes()
        stack.close()
        with process(*options) as second, client:
            assert first.ready["rows"] != second.ready["rows"]
            assert expected == client.fetch(ref, IDS).tobytes()
            assert 1 == connections(second)


def test_slow_requests_do_not_delay_others(checkpoint: Path) -> None:
    """Requests for cached rows are answered while others wait for the store; closing the client
    ends all of them."""
    with redis_server() as url, Link(url.removeprefix("redis://")) as link, ExitStack() as stack:
        ref = build_table(checkpoint, url, shards=4)
        running = stack.enter_context(
            process("lookup", "--store", f"redis://{link.address}", *LOCAL)
        )
        client = stack.enter_context(Client(running.address))
        hot = client.fetch(ref, range(20)).tobytes()
        link.delay(60)
        pool = stack.enter_context(ThreadPoolExecutor(4))
        waiting = [pool.submit(client.fetch, ref, [token]) for token in range(100, 104)]
        for _ in range(20):
            assert hot == client.fetch(ref, range(20)).tobytes()
        assert not any(call.done() for call in waiting)
        client.close()
        for call in waiting:
            with pytest.raises((errors.ClosedError, errors.DeadlineExceededError)):
                call.result()
