"""One replica of a service: its gRPC channel, and requests for rows over its row port or gRPC."""

import time
from logging import WARNING
from typing import Any, Protocol

import grpc

from tolhouse import tracing
from tolhouse.client.row_connections import RowConnection, RowConnections, error_from
from tolhouse.client.row_source import Array
from tolhouse.errors import (
    ClosedError,
    InternalError,
    TolhouseError,
    UnavailableError,
)
from tolhouse.logs import event, is_loopback
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.call import check_cancelled, is_cancellable, on_cancel
from tolhouse.net.channel import error_of, reloading_channel
from tolhouse.net.row_frames import pack_request
from tolhouse.table.destination import Destination
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import lookup_pb2 as pb
from tolhouse.v1.lookup_pb2_grpc import LookupStub

_DESCRIBE_SECONDS = 1.0
_BLOCKED_SECONDS = 30.0  # the time to use gRPC after the row port could not be reached


class Request(Protocol):
    """A request for records, which has been sent."""

    def receive(self, end: float) -> None:
        """Receive and verify the records. Raises TimeoutError at the monotonic time `end`."""

    def cancel(self, error: TolhouseError) -> None:
        """Let `receive` raise this error. Any thread may call this."""

    def abandon(self) -> None:
        """Release the connection of a request that is not received."""

    def fileno(self) -> int:
        """Return the socket that the reply comes from, or -1 if it cannot be waited for."""


class Replica:
    """The connections to one replica. Thread-safe."""

    def __init__(self, target: str, credentials: ClientCredentials) -> None:
        self.target, self.credentials = target, credentials
        self.channel = reloading_channel(target, credentials)
        self.connections = RowConnections(target, credentials)
        self.replied_at = 0.0  # the time of the last reply to a request for rows
        self._rows_port: int | None = None  # None: not known yet; 0: there is none
        self._blocked_until = 0.0
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

    def submit(
        self, manifest: Manifest, ids: Array, out: Array, slots: Array, end: float
    ) -> Request:
        """Send a request for the records of `ids` [T], which go to `slots` [T] of `out`.

        Nothing writes to `out` except `receive`. Errors are raised there.
        """
        message = pb.FetchRequest(table=manifest.ref, traceparent=tracing.traceparent())
        message.token_ids = ids.astype("<u4", copy=False).tobytes()
        place = manifest, ids, out, slots
        try:
            if connection := self._connect(manifest.ref, end):
                return _RowRequest(self, connection, message, place, end)
            return _GrpcRequest(self, message, place, end)
        except TolhouseError as error:
            return _FailedRequest(error)

    def _connect(self, ref: str, end: float) -> RowConnection | None:
        """Return a connection to the row port, or None if rows have to be fetched over gRPC.

        Raises UnavailableError if the replica cannot be reached at all.
        """
        if self.credentials.proxy and not is_loopback(self.target):
            return None
        if self._blocked_until and time.monotonic() < self._blocked_until:
            return None
        ports = self._rows_port, None  # the replica may have restarted with another port
        for known in ports:
            port = self._ask_port(ref) if known is None else known
            if not port:
                return None
            try:
                return self.connections.take(port, end)
            except OSError as error:
                reason = str(error)
        news = "the row port cannot be reached: rows come over gRPC"
        event(news, WARNING, peer=self.target, reason=reason)
        self._blocked_until = time.monotonic() + _BLOCKED_SECONDS
        return None

    def close(self) -> None:
        """Close all connections. Calls in flight raise ClosedError."""
        self._closed = True
        self.connections.close()
        self.channel().close()

    def _ask_port(self, ref: str) -> int:
        request = pb.DescribeRequest(table=ref, known=ref)
        reply = self.call(LookupStub, "Describe", request, _DESCRIBE_SECONDS)
        self._rows_port = reply.rows_port
        return reply.rows_port


_Place = tuple[Manifest, Array, Array, Array]  # the parameters of Destination


class _RowRequest:
    """A request over the row port."""

    def __init__(
        self,
        replica: Replica,
        connection: RowConnection,
        message: pb.FetchRequest,
        place: _Place,
        end: float,
    ) -> None:
        self._replica, self._connection, self._place = replica, connection, place
        self._cancelled: TolhouseError | None = None
        self._received = False
        self._instead: Request | None = None  # the same request over another connection
        message.authorization = replica.credentials.authorization()
        self._is_sent = connection.send(pack_request(message), end)
        self._destination = Destination(*place)  # while the replica works

    def receive(self, end: float) -> None:
        connection, connections = self._connection, self._replica.connections
        try:
            if not self._is_sent:
                raise ConnectionError("the connection was closed")
            connection.receive_rows(self._destination, end)
        except BaseException as error:
            connections.drop(connection)
            if self._cancelled:
                raise self._cancelled from None
            if isinstance(error, TolhouseError | TimeoutError) or not isinstance(error, OSError):
                raise
            connections.drop_idle()
            if not connection.is_reused:
                what = f"{self._replica.target} closed the connection ({error})"
                raise UnavailableError(what) from None
        else:
            self._received, self._replica.replied_at = True, time.monotonic()
            connections.give_back(connection)
            return
        # The replica has closed idle connections.
        self._instead = self._replica.submit(*self._place, end)
        if self._cancelled:
            self._instead.cancel(self._cancelled)
        self._instead.receive(end)

    def abandon(self) -> None:
        if not self._received:
            self._replica.connections.drop(self._connection)

    def cancel(self, error: TolhouseError) -> None:
        self._cancelled = error
        self._connection.shut_down()
        if self._instead:
            self._instead.cancel(error)

    def fileno(self) -> int:
        return self._connection.sock.fileno()


class _GrpcRequest:
    """A request over gRPC, for a replica whose row port cannot be used."""

    def __init__(
        self, replica: Replica, message: pb.FetchRequest, place: _Place, end: float
    ) -> None:
        self._replica, self._destination = replica, Destination(*place)
        self._cancelled: TolhouseError | None = None
        self._call = LookupStub(replica.open_channel()).Fetch(
            iter([message]),
            timeout=max(0.0, end - time.monotonic()),
            metadata=replica.credentials.metadata(),
        )

    def receive(self, end: float) -> None:
        destination, done = self._destination, 0
        size = destination.manifest.record_bytes
        try:
            for reply in self._call:
                self._replica.replied_at = time.monotonic()
                if reply.HasField("error"):
                    raise error_from(reply.error)
                records, (count, odd) = memoryview(reply.records), divmod(len(reply.records), size)
                if odd or reply.first != done or done + count > len(destination):
                    break
                for view in destination.views(done, done + count):
                    view[:], records = records[: len(view)], records[len(view) :]
                destination.verify(done, done + count)
                done += count
                if reply.last and done == len(destination):
                    return
        except grpc.RpcError as error:
            if self._cancelled:
                raise self._cancelled from None
            raise error_of(error, self._replica.target) from None
        finally:
            self._call.cancel()
        raise InternalError("the lookup service sent records that do not fit the request")

    def cancel(self, error: TolhouseError) -> None:
        self._cancelled = error
        self._call.cancel()

    def abandon(self) -> None:
        self._call.cancel()

    def fileno(self) -> int:
        return -1


class _FailedRequest:
    """A request that could not be sent."""

    def __init__(self, error: TolhouseError) -> None:
        self._error = error

    def receive(self, end: float) -> None:
        raise self._error

    def cancel(self, error: TolhouseError) -> None:
        pass

    def abandon(self) -> None:
        pass

    def fileno(self) -> int:
        return -1
