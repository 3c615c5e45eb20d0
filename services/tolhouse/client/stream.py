"""One Fetch stream to one lookup replica, with any number of requests in flight, assembled where the caller wants them.

Copies on the way of a record here: one, from the reply's bytes, or from the replica's hot rows where they can be mapped,
into the caller's buffer. Each record is verified there.
"""

import itertools
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import grpc
import numpy as np

from tolhouse import wire
from tolhouse.errors import Corrupt, Internal, TolhouseError, from_status
from tolhouse.rpc import dial, error_of
from tolhouse.table.shared import Segment
from tolhouse.table.spec import Manifest
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
    segment: int = 0  # the one the service may leave records in
    _filled: int = 0  # records answered
    _torn: list[int] = field(default_factory=list)  # of those, the ones that had left the segment again
    _given_up: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, reply: wire.Reply, segment: Segment | None) -> bool:
        """Put a reply's records into place; whether nothing more is to come."""
        with self._lock:
            if self._given_up:
                return True
            if reply.error:
                self.done.set_exception(from_status(reply.error.status, reply.error.message))
                return True
            count, odd = divmod(len(reply.records), self.manifest.record_bytes)
            part = slice(self._filled, self._filled + count + reply.left)
            misfit = odd or reply.first != part.start or part.stop > len(self.ids) or (count and reply.left)
            if misfit or (reply.left and (segment is None or segment.id != self.segment)):
                self.done.set_exception(Internal("the lookup service answered with records that do not fit the request"))
                return True
            ids, places = self.ids[part], self.places[part]
            if segment and reply.left:
                self._torn += [part.start + n for n in segment.take(ids, self.out, places)]
            elif bad := self.manifest.take(ids, reply.records, range(count), self.out, places):
                self.done.set_exception(Corrupt(f"the row of token {ids[bad[0]]} in table {self.manifest.ref} fails its checksum"))
                return True
            self._filled = part.stop
            if reply.last and self._filled < len(self.ids):
                self.done.set_exception(Internal("the lookup service answered with fewer records than were asked for"))
            elif reply.last and not self._torn:
                self.done.set_result(None)
            return reply.last

    def rest(self) -> bool:
        """Turn into a request for the records that had left the segment before they were read; whether there are any."""
        if self.done.done() or not self._torn:
            return False
        self.ids, self.places = self.ids[self._torn], [self.places[n] for n in self._torn]
        self.segment, self._filled, self._torn = 0, 0, []
        return True

    def give_up(self) -> None:
        """Nothing is written to `out` from now on."""
        with self._lock:
            self._given_up = True


class FetchStream:
    """Opens its stream when first used, and again after it broke. Safe to use from several threads."""

    def __init__(self, target: str, map_hot_rows: bool) -> None:
        self.target, self.map_hot_rows = target, map_hot_rows
        self.channel = dial(target)
        self.stub = LookupStub(self.channel)
        # replies stay bytes: wire.py reads them
        self._fetch = self.channel.stream_stream("/tolhouse.v1.Lookup/Fetch", lookup_pb2.FetchRequest.SerializeToString)
        self._lock = threading.Lock()
        self._open: _Call | None = None

    def take(self, manifest: Manifest, ids: np.ndarray, out: memoryview, places: list[int]) -> list[int] | None:
        """Copy, without a request, what lies in hot rows that can be mapped; indices of those left, None for all of them."""
        call = self._open
        segment = call.segments.get(manifest.ref) if call and not call.broken else None
        return segment.take(ids, out, places) if segment else None

    def submit(self, manifest: Manifest, ids: np.ndarray, out: memoryview, places: list[int]) -> Request:
        """Ask for the records of `ids` (uint32 [T]); they will be in `places` of `out`, verified, when `done` is."""
        request = Request(manifest, ids, out, places)
        with self._lock:
            if self._open is None or self._open.broken:
                self._open = _Call(self._fetch, self.target, self.map_hot_rows)
            call = self._open
        segment = call.segments.get(manifest.ref)
        if segment:
            request.segment = segment.id
        call.send(request)
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
    def __init__(self, fetch: grpc.StreamStreamMultiCallable, target: str, map_hot_rows: bool) -> None:
        self.target, self.map_hot_rows, self.broken = target, map_hot_rows, False
        self.segments: dict[str, Segment] = {}  # the replica's hot rows, by table, where they can be mapped
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._pending: dict[int, Request] = {}
        self._outgoing: queue.SimpleQueue[lookup_pb2.FetchRequest | None] = queue.SimpleQueue()
        self.call = fetch(iter(self._outgoing.get, None))
        threading.Thread(target=self._receive, name=f"fetch {target}", daemon=True).start()

    def send(self, request: Request) -> None:
        number = next(self._numbers)
        with self._lock:
            if self.broken:
                request.done.set_exception(from_status("UNAVAILABLE", f"lookup {self.target}: the stream broke"))
                return
            self._pending[number] = request
        packed = request.ids.astype("<u4", copy=False).tobytes()
        self._outgoing.put(
            lookup_pb2.FetchRequest(request_id=number, table=request.manifest.ref, token_ids=packed, segment=request.segment)
        )

    def _receive(self) -> None:
        error: TolhouseError
        try:
            for data in self.call:
                reply = wire.parse(data)
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
        self.segments.clear()
        self._outgoing.put(None)
        for request in pending.values():
            request.done.set_exception(error)

    def _answer(self, reply: wire.Reply, request: Request) -> None:
        ref = request.manifest.ref
        if reply.segment and self.map_hot_rows:
            told = reply.segment
            segment = Segment.attach(request.manifest, told.capacity, told.id, told.pid, told.fd)
            if segment:
                self.segments[ref] = segment
        if request.take(reply, self.segments.get(ref)):
            with self._lock:
                del self._pending[reply.request_id]
            if request.rest():
                self.send(request)
