"""One replica: its channel, and a Fetch stream with any number of requests in flight.

A record is copied twice: by gRPC out of the socket into the reply, and from there into the caller's
buffer, where it is verified.
"""

import itertools
import queue
import threading
from concurrent.futures import Future
from typing import Any

import grpc
import numpy as np

from tolhouse import tracing
from tolhouse.errors import Internal, TolhouseError, Unavailable, from_status
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import error_of, reloading_channel
from tolhouse.net.fetch_reply import parse
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import lookup_pb2 as pb

Array = np.ndarray


class Request:
    """Verified records of `ids` (uint32 [T]) on their way to `slots` of `out`, which is flat."""

    def __init__(self, manifest: Manifest, ids: Array, out: memoryview, slots: list[int]) -> None:
        self.manifest, self.ids, self.out, self.slots = manifest, ids, out, slots
        self.done: Future[None] = Future()
        self._received, self._given_up = 0, False
        self._lock = threading.Lock()

    def receive(self, reply: pb.FetchReply, records: memoryview) -> bool:
        """Copy the records of a reply; whether the request has ended."""
        with self._lock:
            if self._given_up:
                return True
            try:
                self._copy(reply, records)
            except TolhouseError as error:
                self.done.set_exception(error)
                return True
            if reply.last:
                self.done.set_result(None)
            return reply.last

    def _copy(self, reply: pb.FetchReply, records: memoryview) -> None:
        if reply.HasField("error"):
            raise from_status(reply.error.status, reply.error.message)
        count, odd = divmod(len(records), self.manifest.record_bytes)
        first, end = self._received, self._received + count
        missing = len(self.ids) - end
        if odd or reply.first != first or missing < 0 or (reply.last and missing):
            raise Internal("the lookup service answered with records that do not fit the request")
        ids, slots = self.ids[first:end], self.slots[first:end]
        self.manifest.copy_records(ids, records, self.out, slots)
        self._received = end

    def give_up(self) -> None:
        """Write nothing to `out` from now on."""
        with self._lock:
            self._given_up = True


class Replica:
    """Opens its stream when first used, and again after it broke. Thread-safe."""

    def __init__(self, target: str, credentials: ClientCredentials) -> None:
        self.target, self.credentials = target, credentials
        self._channel = reloading_channel(target, credentials)
        self._lock = threading.Lock()
        self._open: _Call | None = None

    @property
    def channel(self) -> grpc.Channel:
        return self._channel()

    def call(self, stub: type, method: str, request: Any, timeout_seconds: float) -> Any:
        """Make a unary call."""
        call = getattr(stub(self.channel), method)
        try:
            return call(request, timeout=timeout_seconds, metadata=self.credentials.metadata())
        except grpc.RpcError as error:
            raise error_of(error, self.target) from None
        except ValueError:
            raise Unavailable(f"the channel to {self.target} is closed") from None

    def submit(self, manifest: Manifest, ids: Array, out: memoryview, slots: list[int]) -> Request:
        request = Request(manifest, ids, out, slots)
        with self._lock:
            if self._open is None or self._open.broken:
                self._open = _Call(self)
            self._open.send(request)
        return request

    def reset(self) -> None:
        """Give the stream up, with all requests in flight: the peer does not answer."""
        with self._lock:
            if self._open:
                self._open.call.cancel()
                self._open = None

    def close(self) -> None:
        self.reset()
        self.channel.close()


class _Call:
    """One stream, from its beginning until it breaks."""

    def __init__(self, replica: Replica) -> None:
        self.target, self.broken = replica.target, False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._pending: dict[int, Request] = {}
        self._outgoing: queue.SimpleQueue[pb.FetchRequest | None] = queue.SimpleQueue()
        # replies stay bytes: net/fetch_reply.py reads them
        fetch = replica.channel.stream_stream(
            "/tolhouse.v1.Lookup/Fetch", pb.FetchRequest.SerializeToString
        )
        requests = iter(self._outgoing.get, None)
        self.call = fetch(requests, metadata=replica.credentials.metadata())
        threading.Thread(target=self._receive, name=f"fetch {self.target}", daemon=True).start()

    def send(self, request: Request) -> None:
        number = next(self._numbers)
        with self._lock:
            if self.broken:
                request.done.set_exception(Unavailable(f"{self.target}: the stream broke"))
                return
            self._pending[number] = request
        message = pb.FetchRequest(request_id=number, table=request.manifest.ref)
        message.token_ids = request.ids.astype("<u4", copy=False).tobytes()
        message.traceparent = tracing.traceparent()
        self._outgoing.put(message)

    def _receive(self) -> None:
        error: TolhouseError
        try:
            for data in self.call:
                reply, records = parse(data)
                request = self._pending.get(reply.request_id)
                if request and request.receive(reply, records):
                    with self._lock:
                        del self._pending[reply.request_id]
            error = Unavailable(f"{self.target} closed the stream")
        except grpc.RpcError as failure:
            error = error_of(failure, self.target)
        except Exception as failure:  # noqa: BLE001 - requests must end, whatever went wrong here
            error = Internal(f"{self.target}: {failure}")
        with self._lock:
            self.broken = True
            pending, self._pending = self._pending, {}
        self._outgoing.put(None)
        for request in pending.values():
            request.done.set_exception(error)
