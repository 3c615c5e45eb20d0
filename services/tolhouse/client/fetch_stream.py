"""One Fetch stream to one lookup replica, with any number of requests in flight, assembled where the caller wants them.

Copies of a record here: gRPC's, out of the socket and into the reply's bytes, and one of ours from there into the caller's
buffer, where it is verified.
"""

import itertools
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import grpc
import numpy as np

from tolhouse import tracing
from tolhouse.errors import Corrupt, Internal, TolhouseError, from_status
from tolhouse.net import fetch_reply
from tolhouse.net.auth import ClientCredentials, Metadata
from tolhouse.net.channel import ReloadingChannel, dial, error_of
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import lookup_pb2
from tolhouse.v1.lookup_pb2_grpc import LookupStub


@dataclass
class Request:
    """Records on their way to `places` of `out`."""

    manifest: Manifest
    ids: np.ndarray  # uint32 [T]
    out: memoryview  # of records, flat
    places: list[int]
    done: Future = field(default_factory=Future)
    _filled: int = 0  # records that are there
    _given_up: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, reply: fetch_reply.Reply) -> bool:
        """Put a reply's records into place, verified; whether nothing more is to come."""
        with self._lock:
            if self._given_up:
                return True
            if reply.error:
                self.done.set_exception(from_status(reply.error.status, reply.error.message))
                return True
            count, odd = divmod(len(reply.records), self.manifest.record_bytes)
            part = slice(self._filled, self._filled + count)
            if odd or reply.first != part.start or part.stop > len(self.ids):
                self.done.set_exception(
                    Internal("the lookup service answered with records that do not fit the request")
                )
                return True
            ids = self.ids[part]
            if bad := self.manifest.copy_records(
                ids, reply.records, range(count), self.out, self.places[part]
            ):
                self.done.set_exception(
                    Corrupt(
                        f"the row of token {ids[bad[0]]} in table {self.manifest.ref} fails its checksum"
                    )
                )
                return True
            self._filled = part.stop
            if reply.last and self._filled < len(self.ids):
                self.done.set_exception(
                    Internal("the lookup service answered with fewer records than were asked for")
                )
            elif reply.last:
                self.done.set_result(None)
            return reply.last

    def give_up(self) -> None:
        """Nothing is written to `out` from now on."""
        with self._lock:
            self._given_up = True


class _Dialled(NamedTuple):
    channel: grpc.Channel
    stub: LookupStub
    fetch: grpc.StreamStreamMultiCallable


class FetchStream:
    """Opens its stream when first used, and again after it broke. Safe to use from several threads."""

    def __init__(self, target: str, credentials: ClientCredentials) -> None:
        self.target, self.credentials = target, credentials
        self._line = ReloadingChannel(credentials, self._dial)
        self._lock = threading.Lock()
        self._open: _Call | None = None

    @property
    def channel(self) -> grpc.Channel:
        return self._line.current.channel

    @property
    def stub(self) -> LookupStub:
        return self._line.current.stub

    def _dial(self) -> _Dialled:
        channel = dial(self.target, self.credentials)
        # replies stay bytes: fetch_reply.py reads them
        fetch = channel.stream_stream(
            "/tolhouse.v1.Lookup/Fetch", lookup_pb2.FetchRequest.SerializeToString
        )
        return _Dialled(channel, LookupStub(channel), fetch)

    def submit(
        self, manifest: Manifest, ids: np.ndarray, out: memoryview, places: list[int]
    ) -> Request:
        """Ask for the records of `ids` (uint32 [T]); they will be in `places` of `out`, verified, when `done` is."""
        request = Request(manifest, ids, out, places)
        with self._lock:
            if self._open is None or self._open.broken:
                self._open = _Call(
                    self._line.current.fetch,
                    self.credentials.metadata(),
                    self.target,
                )
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
    def __init__(
        self,
        fetch: grpc.StreamStreamMultiCallable,
        metadata: Metadata | None,
        target: str,
    ) -> None:
        self.target, self.broken = target, False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._pending: dict[int, Request] = {}
        self._outgoing: queue.SimpleQueue[lookup_pb2.FetchRequest | None] = queue.SimpleQueue()
        self.call = fetch(iter(self._outgoing.get, None), metadata=metadata)
        threading.Thread(target=self._receive, name=f"fetch {target}", daemon=True).start()

    def send(self, request: Request) -> None:
        number = next(self._numbers)
        with self._lock:
            if self.broken:
                request.done.set_exception(
                    from_status("UNAVAILABLE", f"lookup {self.target}: the stream broke")
                )
                return
            self._pending[number] = request
        packed = request.ids.astype("<u4", copy=False).tobytes()
        asked = lookup_pb2.FetchRequest(
            request_id=number,
            table=request.manifest.ref,
            token_ids=packed,
            traceparent=tracing.traceparent(),
        )
        self._outgoing.put(asked)

    def _receive(self) -> None:
        error: TolhouseError
        try:
            for data in self.call:
                reply = fetch_reply.parse(data)
                request = self._pending.get(reply.request_id)
                if request:
                    self._answer(reply, request)
            error = from_status("UNAVAILABLE", f"lookup {self.target} closed the stream")
        except grpc.RpcError as failure:
            error = error_of(failure, f"lookup {self.target}")
        except Exception as failure:  # noqa: BLE001 - requests must end, whatever went wrong here
            error = Internal(f"lookup {self.target}: {failure}")
        with self._lock:
            self.broken = True
            pending, self._pending = self._pending, {}
        self._outgoing.put(None)
        for request in pending.values():
            request.done.set_exception(error)

    def _answer(self, reply: fetch_reply.Reply, request: Request) -> None:
        if request.take(reply):
            with self._lock:
                del self._pending[reply.request_id]
