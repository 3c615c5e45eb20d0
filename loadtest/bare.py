"""gRPC with nothing behind it, to measure against: `python -m loadtest.bare` serves, `bare()` starts that as a process.

`Echo` gives a stream's messages back, `Bytes` answers a number with so many bytes, both without protobuf and with the
channel options of our own services. `Rows` is the naive lookup: one unary answer, a generated message around joined rows.
"""

import asyncio
import queue
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc
import numpy as np
from tolhouse.rpc import _SERVER_OPTIONS, dial, keep_large_blocks
from tolhouse.v1 import lookup_pb2

ROW_BYTES, ROWS = 96 << 10, 2048
_BYTES = bytes(4 << 20)


async def _echo(requests: AsyncIterator[bytes], _: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def _bytes(request: bytes, _: grpc.aio.ServicerContext) -> bytes:
    return _BYTES[: int(request)]


async def _serve() -> None:
    keep_large_blocks()
    rows = [np.random.default_rng(i).bytes(ROW_BYTES) for i in range(ROWS)]

    async def naive(request: lookup_pb2.FetchRequest, _: grpc.aio.ServicerContext) -> lookup_pb2.FetchReply:
        ids = np.frombuffer(request.token_ids, "<u4").tolist()
        return lookup_pb2.FetchReply(records=b"".join(rows[i] for i in ids))

    def handlers() -> dict[str, grpc.RpcMethodHandler]:
        read, write = lookup_pb2.FetchRequest.FromString, lookup_pb2.FetchReply.SerializeToString
        return {
            "Echo": grpc.stream_stream_rpc_method_handler(_echo),
            "Bytes": grpc.unary_unary_rpc_method_handler(_bytes),
            "Rows": grpc.unary_unary_rpc_method_handler(naive, read, write),
        }

    server = grpc.aio.server(options=_SERVER_OPTIONS)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Bare", handlers())])
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


class Bare:
    """A client of it."""

    def __init__(self, target: str) -> None:
        channel = dial(target)
        self.bytes = channel.unary_unary("/Bare/Bytes")
        self._rows = channel.unary_unary("/Bare/Rows", lookup_pb2.FetchRequest.SerializeToString, lookup_pb2.FetchReply.FromString)
        self._outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._stream = channel.stream_stream("/Bare/Echo")(iter(self._outgoing.get, None))

    def echo(self, payload: bytes) -> bytes:
        self._outgoing.put(payload)
        return next(self._stream)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        reply = self._rows(lookup_pb2.FetchRequest(table="bare", token_ids=ids.astype("<u4").tobytes()))
        return np.frombuffer(reply.records, np.uint8).reshape(len(ids), ROW_BYTES)


@contextmanager
def bare() -> Iterator[Bare]:
    """The servers as a process, until the block ends."""
    process = subprocess.Popen([sys.executable, "-m", "loadtest.bare"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield Bare(f"127.0.0.1:{process.stdout.readline().strip()}")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    asyncio.run(_serve())
