"""Minimal servers that serve as baselines. `python -m loadtest.bare bare|naive|tcp|unix HOST` runs
one in the foreground; `server()` starts one as a subprocess.

The bare server uses gRPC with the options of Tolhouse's services but no protobuf: `Echo` returns
each message of a stream, and `Bytes` returns the requested number of bytes. The naive server is an
untuned lookup service: `Rows` answers with one unary generated message that contains the
concatenated rows. The TCP server is a loop over one socket, which sends rows of any size with
`sendmsg` from where they lie. The Unix server does the same over a Unix socket, whose path replaces
HOST.
"""

import asyncio
import queue
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import grpc
import numpy as np
from tolhouse.net.channel import dial
from tolhouse.net.server import SERVER_OPTIONS
from tolhouse.testing import Host
from tolhouse.v1 import lookup_pb2

from loadtest.tables import TRUSTED

ROW_BYTES, ROWS = 96 << 10, 2048
_BYTES = bytes(4 << 20)
_ROWS: list[bytes] = []


async def _echo(
    requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext
) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def _bytes(request: bytes, _: grpc.aio.ServicerContext) -> bytes:
    return _BYTES[: int(request)]


def _naive(request: lookup_pb2.FetchRequest, _: grpc.ServicerContext) -> lookup_pb2.FetchReply:
    ids = np.frombuffer(request.token_ids, "<u4").tolist()
    return lookup_pb2.FetchReply(records=b"".join(_ROWS[i] for i in ids))


async def _serve_bare(host: str) -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    methods = {
        "Echo": grpc.stream_stream_rpc_method_handler(_echo),
        "Bytes": grpc.unary_unary_rpc_method_handler(_bytes),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Bare", methods)])
    print(server.add_insecure_port(f"{host}:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


def _serve_naive(host: str) -> None:
    _ROWS.extend(np.random.default_rng(i).bytes(ROW_BYTES) for i in range(ROWS))
    server = grpc.server(ThreadPoolExecutor(4))
    read, write = lookup_pb2.FetchRequest.FromString, lookup_pb2.FetchReply.SerializeToString
    methods = {"Rows": grpc.unary_unary_rpc_method_handler(_naive, read, write)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Naive", methods)])
    print(server.add_insecure_port(f"{host}:0"), flush=True)
    server.start()
    server.wait_for_termination()


def _serve_tcp(host: str) -> None:
    with socket.create_server((host, 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        peer, _ = listening.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _serve_rows(peer)


def _serve_unix(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print(path, flush=True)
        peer, _ = listening.accept()
    _serve_rows(peer)


def _serve_rows(peer: socket.socket) -> None:
    slab = memoryview(np.random.default_rng(0).bytes(ROW_BYTES * ROWS))
    while head := peer.recv(8, socket.MSG_WAITALL):
        count, size = np.frombuffer(head, "<u4").tolist()
        ids = np.frombuffer(peer.recv(4 * count, socket.MSG_WAITALL), "<u4").tolist()
        rows = [slab[i * size : (i + 1) * size] for i in ids]
        assert peer.sendmsg(rows) == count * size  # it blocks until all bytes are sent


class Bare:
    """A client of the bare server."""

    def __init__(self, target: str) -> None:
        channel = dial(target, TRUSTED)
        self.bytes = channel.unary_unary("/Bare/Bytes")
        self._outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._stream = channel.stream_stream("/Bare/Echo")(iter(self._outgoing.get, None))

    def echo(self, payload: bytes) -> bytes:
        self._outgoing.put(payload)
        return next(self._stream)


class Naive:
    """A client of the naive server."""

    def __init__(self, target: str) -> None:
        read, write = lookup_pb2.FetchReply.FromString, lookup_pb2.FetchRequest.SerializeToString
        self._rows = grpc.insecure_channel(target).unary_unary("/Naive/Rows", write, read)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        reply = self._rows(
            lookup_pb2.FetchRequest(table="naive", token_ids=ids.astype("<u4").tobytes())
        )
        return np.frombuffer(reply.records, np.uint8).reshape(len(ids), ROW_BYTES)


class Socket:
    """A client of the TCP or the Unix server, which receives rows into an array that it keeps."""

    def __init__(self, target: str) -> None:
        if target.startswith("/"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(target)
        else:
            host, _, port = target.rpartition(":")
            self._socket = socket.create_connection((host, int(port)))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rows = np.zeros(64 * ROW_BYTES, np.uint8)

    def close(self) -> None:
        self._socket.close()

    def rows(self, ids: np.ndarray, row_bytes: int = ROW_BYTES) -> np.ndarray:
        """Fetch rows [len(ids), row_bytes], valid until the next call."""
        request = np.array([len(ids), row_bytes, *ids.tolist()], "<u4")
        self._socket.sendall(request.data)
        rows = self._rows[: len(ids) * row_bytes]
        view = rows.data
        while view:
            view = view[self._socket.recv_into(view, 0, socket.MSG_WAITALL) :]
        return rows.reshape(len(ids), row_bytes)


@contextmanager
def server(kind: Literal["bare", "naive", "tcp", "unix"], host: Host) -> Iterator[str]:
    """Run a server as a subprocess for the duration of the block and yield its address."""
    folder = tempfile.TemporaryDirectory(prefix="tolhouse-", dir=host.folder)
    place = f"{folder.name}/socket" if kind == "unix" else host.address
    command = [sys.executable, "-m", "loadtest.bare", kind, place]
    pipe = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with folder, host.call(subprocess.Popen, command, **pipe) as process:
        try:
            assert process.stdout
            found = process.stdout.readline().strip()
            yield found if kind == "unix" else f"{host.address}:{found}"
        finally:
            process.kill()


if __name__ == "__main__":
    _, kind, place = sys.argv
    if kind == "bare":
        asyncio.run(_serve_bare(place))
    else:
        {"naive": _serve_naive, "tcp": _serve_tcp, "unix": _serve_unix}[kind](place)
