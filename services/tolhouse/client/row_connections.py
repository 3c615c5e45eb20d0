"""Connections to the row port of one replica, each used by one call at a time.

The thread of the call sends the request and receives the records directly into their destination.
"""

import socket
import ssl
import threading
import time
import weakref
from contextlib import suppress

from google.protobuf.message import DecodeError

from tolhouse.errors import (
    ClosedError,
    CorruptError,
    InternalError,
    TolhouseError,
    from_status,
)
from tolhouse.logs import split_address
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.row_frames import Caller, prepare
from tolhouse.table.destination import Destination
from tolhouse.v1 import lookup_pb2 as pb

_CONNECT_SECONDS = 1.0  # as for gRPC
_MOST_ERROR_BYTES = 4 << 20


class RowConnection:
    """A connection, which carries one request and its reply at a time."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        self.sock, self.context, self._caller = sock, context, Caller(sock)
        self.is_reused = False
        # Clients need not be closed, and the address of a replica may disappear.
        weakref.finalize(self, sock.close).atexit = False

    def send(self, request: bytes, end: float) -> bool:
        """Send a request, and return whether the connection is still open."""
        try:
            self._caller.send(request, end)
        except OSError:
            return False
        return True

    def receive_rows(self, destination: Destination, end: float) -> None:
        """Receive the records of a destination, and verify them.

        Raises:
            TimeoutError: The reply is not complete at the monotonic time `end`.
            OSError: The connection has failed.
            TolhouseError: The request has failed, or a record is damaged.
        """
        size, done, total = destination.manifest.record_bytes, 0, len(destination)
        while True:
            records_bytes, error_bytes = self._caller.header(end)
            self.is_reused = False  # the peer answers
            count, odd = divmod(records_bytes, size)
            if odd or done + count > total or error_bytes > _MOST_ERROR_BYTES:
                raise InternalError("the lookup service sent records that do not fit the request")
            if error_bytes:
                raise self._receive_error(error_bytes, end)
            if count:
                self._caller.fill(destination.views(done, done + count), end)
                destination.verify(done, done + count)
                done += count
            elif total:
                raise InternalError("the lookup service sent no records")
            if done == total:
                return

    def shut_down(self) -> None:
        """End the connection, also while another thread receives."""
        with suppress(OSError):  # it is not connected any more
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def _receive_error(self, size: int, end: float) -> TolhouseError:
        data = memoryview(bytearray(size))
        self._caller.fill([data], end)
        try:
            return error_from(pb.Error.FromString(bytes(data)))
        except DecodeError:
            return InternalError("the lookup service sent a malformed error")


def error_from(error: pb.Error) -> TolhouseError:
    """Return the error of Tolhouse for the error of a request."""
    ours = from_status(error.status, error.message)
    return CorruptError(str(ours), error.token_ids) if error.token_ids else ours


class RowConnections:
    """The connections to one replica. Thread-safe."""

    def __init__(self, target: str, credentials: ClientCredentials) -> None:
        self.target, self._credentials = target, credentials
        self._host, _ = split_address(target)
        self._lock = threading.Lock()
        self._idle: list[RowConnection] = []  # with the most recently used last
        self._used = set[RowConnection]()
        self._closed = False

    def take(self, port: int, end: float) -> RowConnection:
        """Return an idle connection, or a new one to `port`.

        Raises:
            OSError: The port cannot be reached.
            ClosedError: After `close`.
        """
        context = self._credentials.current_context()
        with self._lock:
            self._check_open()
            while self._idle:
                connection = self._idle.pop()
                if connection.context is context:
                    connection.is_reused = True
                    self._used.add(connection)
                    return connection
                connection.sock.close()  # the TLS files have changed
        connection = self._connect(port, context, end)
        with self._lock:
            self._used.add(connection)
        if self._closed:
            self.drop(connection)
        self._check_open()
        return connection

    def give_back(self, connection: RowConnection) -> None:
        """Keep a connection, whose reply is complete, for the next call."""
        with self._lock:
            self._used.discard(connection)
            if not self._closed:
                self._idle.append(connection)
                return
        connection.sock.close()

    def drop(self, connection: RowConnection) -> None:
        """Close a connection, whose reply is not complete."""
        with self._lock:
            self._used.discard(connection)
        connection.sock.close()

    def drop_idle(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.sock.close()

    def close(self) -> None:
        """Close all connections. Calls in flight raise ClosedError."""
        with self._lock:
            self._closed = True
            for connection in list(self._used):
                connection.shut_down()
        self.drop_idle()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the connection to {self.target} is closed")

    def _connect(self, port: int, context: ssl.SSLContext | None, end: float) -> RowConnection:
        seconds = min(_CONNECT_SECONDS, max(0.001, end - time.monotonic()))
        sock = socket.create_connection((self._host, port), seconds)
        try:
            prepare(sock)
            if context:
                name = self._credentials.tls_name or self._host
                sock = context.wrap_socket(sock, server_hostname=name)
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return RowConnection(sock, context)
