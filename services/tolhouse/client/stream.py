"""One Fetch stream to one lookup replica, with any number of requests in flight, assembled where the caller wants them.

Copies on the way of a record here: one, from the reply's bytes into the caller's buffer.
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
from tolhouse.table.spec import Manifest
from tolhouse.v1 import lookup_pb2
from tolhouse.v1.lookup_pb2_grpc import LookupStub


@dataclass
class _Request:
    manifest: Manifest
    ids: np.ndarray  # uint32 [T]
    out: np.ndarray  # uint8 [T, record_bytes]
    done: Future = field(default_factory=Future)
    filled: int = 0  # records received

    def take(self, reply: wire.Reply) -> bool:
        """Copy a reply's records into place and verify them; whether the request is over."""
        if reply.error:
            self.done.set_exception(from_status(reply.error.status, reply.error.message))
            return True
        count, odd = divmod(len(reply.records), self.out.shape[1])
        if odd or reply.first != self.filled or self.filled + count > len(self.out):
            self.done.set_exception(Internal("the lookup service answered with records that do not fit the request"))
            return True
        if count:
            part = slice(self.filled, self.filled + count)
            self.out[part] = np.frombuffer(reply.records, np.uint8).reshape(count, self.out.shape[1])
            try:  # here, while the next reply is on its way
                self.manifest.verify(self.ids[part], self.out[part])
            except Corrupt as error:
                self.done.set_exception(error)
                return True
            self.filled += count
        if reply.last and self.filled < len(self.out):
            self.done.set_exception(Internal("the lookup service answered with fewer records than were asked for"))
        elif reply.last:
            self.done.set_result(None)
        return reply.last


class FetchStream:
    """Opens its stream when first used, and again after it broke. Safe to use from several threads."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.channel = dial(target)
        self.stub = LookupStub(self.channel)
        # replies stay bytes: wire.py reads them
        self._fetch = self.channel.stream_stream("/tolhouse.v1.Lookup/Fetch", lookup_pb2.FetchRequest.SerializeToString)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._open: _Call | None = None

    def submit(self, manifest: Manifest, ids: np.ndarray, out: np.ndarray) -> Future:
        """Ask for the records of `ids` (uint32 [T]); they will be in `out`, verified, when the future is done."""
        request = _Request(manifest, ids, out)
        with self._lock:
            if self._open is None or self._open.broken:
                self._open = _Call(self._fetch, self.target)
            self._open.send(next(self._numbers), request)
        return request.done

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
    def __init__(self, fetch: grpc.StreamStreamMultiCallable, target: str) -> None:
        self.target, self.broken = target, False
        self._lock = threading.Lock()
        self._pending: dict[int, _Request] = {}
        self._outgoing: queue.SimpleQueue[lookup_pb2.FetchRequest | None] = queue.SimpleQueue()
        self.call = fetch(iter(self._outgoing.get, None))
        threading.Thread(target=self._receive, name=f"fetch {target}", daemon=True).start()

    def send(self, number: int, request: _Request) -> None:
        with self._lock:
            if self.broken:
                request.done.set_exception(from_status("UNAVAILABLE", f"lookup {self.target}: the stream broke"))
                return
            self._pending[number] = request
        packed = request.ids.astype("<u4", copy=False).tobytes()
        self._outgoing.put(lookup_pb2.FetchRequest(request_id=number, table=request.manifest.ref, token_ids=packed))

    def _receive(self) -> None:
        error: TolhouseError
        try:
            for data in self.call:
                reply = wire.parse(data)
                request = self._pending.get(reply.request_id)
                if request and request.take(reply):
                    with self._lock:
                        del self._pending[reply.request_id]
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
