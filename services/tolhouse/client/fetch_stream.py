"""The connection to one replica: a channel, and a Fetch stream with concurrent requests.

gRPC copies a record into a reply. The stream copies it once more, to the caller's buffer, and
verifies the copy.
"""

import itertools
import threading
import time
from concurrent.futures import Future
from math import inf
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc

from tolhouse import tracing
from tolhouse.client.row_source import Array
from tolhouse.errors import (
    ClosedError,
    CorruptError,
    InternalError,
    TolhouseError,
    UnavailableError,
    from_status,
)
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.call import check_cancelled, is_cancellable, on_cancel
from tolhouse.net.channel import error_of, reloading_channel
from tolhouse.net.fetch_reply import parse
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import lookup_pb2 as pb


class Request(Future[None]):
    """A request for the records of `ids` (uint32 [T]), which are written to `slots` of `out`.

    `out` is flat.
    """

    def __init__(self, manifest: Manifest, ids: Array, out: memoryview, slots: list[int]) -> None:
        super().__init__()
        self.manifest, self.ids, self.out, self.slots = manifest, ids, out, slots
        self._received, self._given_up, self._lock = 0, False, threading.Lock()

    def receive(self, reply: pb.FetchReply, records: memoryview) -> bool:
        """Copy the records of a reply, and return whether the request has ended."""
        with self._lock:
            if self._given_up or self.done():
                return True
            try:
                if reply.HasField("error"):
                    status, bad = reply.error.status, reply.error.token_ids
                    error = from_status(status, reply.error.message)
                    raise CorruptError(str(error), bad) if bad else error
                count, odd = divmod(len(records), self.manifest.record_bytes)
                first, end = self._received, self._received + count
                missing = len(self.ids) - end
                if odd or reply.first != first or missing < 0 or (reply.last and missing):
                    raise InternalError(
                        "the lookup service sent records that do not fit the request"
                    )
                ids, slots = self.ids[first:end], self.slots[first:end]
                self.manifest.copy_records(ids, records, self.out, slots)
                self._received = end
            except TolhouseError as error:
                self.set_exception(error)
                return True
            if reply.last:
                self.set_result(None)
            return reply.last

    def fail(self, error: TolhouseError) -> None:
        """End the request with an error, unless it has ended."""
        with self._lock:
            if not self.done():
                self.set_exception(error)

    def give_up(self) -> None:
        """Stop writing to `out`."""
        with self._lock:
            self._given_up = True


class _Stream(NamedTuple):
    call: Any
    outgoing: SimpleQueue[pb.FetchRequest | None]
    pending: dict[int, Request]  # by request_id
    replied: list[float]  # one value: the time of the last reply


class Replica:
    """The channel and the stream of one replica. Thread-safe.

    The stream opens on first use, and again after a failure.
    """

    def __init__(self, target: str, credentials: ClientCredentials) -> None:
        self.target, self.credentials = target, credentials
        self.channel = reloading_channel(target, credentials)
        self._lock, self._numbers = threading.Lock(), itertools.count(1)
        self._stream: _Stream | None = None
        self._closed = False

    def open_channel(self) -> grpc.Channel:
        """Return the channel. Raises ClosedError after `close`."""
        if self._closed:
            raise ClosedError(f"the connection to {self.target} is closed")
        return self.channel()

    def call(self, stub: type, method: str, request: Any, timeout_seconds: float) -> Any:
        """Make a unary call, and return the reply."""
        call, metadata = getattr(stub(self.open_channel()), method), self.credentials.metadata()
        try:
            if not is_cancellable():
                return call(request, timeout=timeout_seconds, metadata=metadata)
            future = call.future(request, timeout=timeout_seconds, metadata=metadata)
            on_cancel(future.cancel)
            return future.result()
        except (grpc.RpcError, grpc.FutureCancelledError, ValueError) as error:
            check_cancelled()
            if isinstance(error, grpc.RpcError) and not self._closed:
                raise error_of(error, self.target) from None
            raise ClosedError(f"the connection to {self.target} is closed") from None

    def submit(self, manifest: Manifest, ids: Array, out: memoryview, slots: list[int]) -> Request:
        """Send a request for the records of `ids`, which are written to `slots` of `out`."""
        request, number = Request(manifest, ids, out, slots), next(self._numbers)
        message = pb.FetchRequest(request_id=number, table=manifest.ref)
        message.token_ids = ids.astype("<u4", copy=False).tobytes()
        message.traceparent = tracing.traceparent()
        with self._lock:
            channel = self.open_channel()
            stream = self._stream = self._stream or self._open(channel)
            stream.pending[number] = request
        stream.outgoing.put(message)
        return request

    def reset(self, error: TolhouseError, silent_since: float = inf) -> None:
        """End the stream and fail its requests if no reply was received after `silent_since`."""
        with self._lock:
            if not (stream := self._stream) or stream.replied[0] > silent_since:
                return
            self._stream = None
            requests = list(stream.pending.values())
        for request in requests:
            request.fail(error)
        stream.call.cancel()

    def replied_since(self, moment: float) -> bool:
        """Return whether a reply was received after `moment`, by the monotonic clock."""
        stream = self._stream
        return bool(stream and stream.replied[0] > moment)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.reset(ClosedError(f"the connection to {self.target} is closed"))
        self.channel().close()

    def _open(self, channel: grpc.Channel) -> _Stream:
        outgoing: SimpleQueue[pb.FetchRequest | None] = SimpleQueue()
        # Replies stay bytes, because net/fetch_reply.py parses them.
        write = pb.FetchRequest.SerializeToString
        fetch = channel.stream_stream("/tolhouse.v1.Lookup/Fetch", write)
        call = fetch(iter(outgoing.get, None), metadata=self.credentials.metadata())
        stream = _Stream(call, outgoing, {}, [0.0])
        threading.Thread(target=self._receive, args=(stream,), name="fetch", daemon=True).start()
        return stream

    def _receive(self, stream: _Stream) -> None:
        error: TolhouseError
        try:
            for data in stream.call:
                reply, records = parse(data)
                stream.replied[0] = time.monotonic()
                request = stream.pending.get(reply.request_id)
                if request and request.receive(reply, records):
                    del stream.pending[reply.request_id]
            error = UnavailableError(f"{self.target} closed the stream")
        except grpc.RpcError as failure:
            error = error_of(failure, self.target)
        except Exception as failure:  # noqa: BLE001 - every failure must end the requests
            error = InternalError(f"{self.target}: {failure}")
        with self._lock:
            if self._stream is stream:
                self._stream = None
        stream.outgoing.put(None)
        for request in stream.pending.values():
            request.fail(error)
