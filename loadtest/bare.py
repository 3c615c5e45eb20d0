"""Minimal gRPC servers that serve as baselines. `python -m loadtest.bare bare|naive` runs one in
the foreground; `server()` starts one as a subprocess.

The bare server uses the options of Tolhouse's services but no protobuf: `Echo` returns each message
of a stream, and `Bytes` returns the requested number of bytes. The naive server is an untuned
lookup service: `Rows` answers with one unary generated message that contains the concatenated rows.
"""

import asyncio
import queue
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import grpc
import numpy as np
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import dial
from tolhouse.net.server import SERVER_OPTIONS
from tolhouse.v1 import lookup_pb2

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


async def _serve_bare() -> None:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    methods = {
        "Echo": grpc.stream_stream_rpc_method_handler(_echo),
        "Bytes": grpc.unary_unary_rpc_method_handler(_bytes),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Bare", methods)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


def _serve_naive() -> None:
    _ROWS.extend(np.random.default_rng(i).bytes(ROW_BYTES) for i in range(ROWS))
    server = grpc.server(ThreadPoolExecutor(4))
    read, write = lookup_pb2.FetchRequest.FromString, lookup_pb2.FetchReply.SerializeToString
    methods = {"Rows": grpc.unary_unary_rpc_method_handler(_naive, read, write)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Naive", methods)])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


class Bare:
    """A client of the bare server."""

    def __init__(self, target: str) -> None:
        channel = dial(target, ClientCredentials())
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


@contextmanager
def server(kind: Literal["bare", "naive"]) -> Iterator[str]:
    """Run a server as a subprocess for the duration of the block and yield its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.bare", kind],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout
    try:
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "naive":
        _serve_naive()
    else:
        asyncio.run(_serve_bare())
