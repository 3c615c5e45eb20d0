"""The server of the row transport, with one thread per connection. net/row_frames.py has frames.

It answers with the same token, TLS files, limits and drain as the gRPC port.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from prometheus_client import Gauge

from tolhouse.errors import InUseError, InvalidArgumentError
from tolhouse.logs import join_address, log, split_address
from tolhouse.lookup.hot_rows import Send
from tolhouse.net.auth import UNAUTHORIZED, ServerCredentials
from tolhouse.net.path import bytes_in_flight
from tolhouse.net.row_frames import (
    limit_sends,
    prepare,
    read_request,
    send_error,
    send_records,
)
from tolhouse.net.server import MAX_CONNECTIONS
from tolhouse.table.manifest import Buffer
from tolhouse.v1 import lookup_pb2 as pb

CONNECTIONS = Gauge("tolhouse_lookup_row_connections", "Open connections of the row transport")

Answer = Callable[[pb.FetchRequest, Send], pb.Error | None]
_FIRST_SECONDS = 10.0  # time for TLS and the first request
_LARGE_BUFFER = 200_000  # the kernel sizes larger buffers itself
_SEND_SECONDS = 60.0  # the longest wait for a client that does not receive


class DisconnectedError(Exception):
    """Raised when records cannot be sent, because the client has disconnected."""


class RowServer:
    """Serves `answer` at `address`, "HOST:PORT". An empty address starts no server.

    Raises InUseError if it cannot listen, and InvalidArgumentError if `credentials` do not allow
    the address.
    """

    def __init__(self, address: str, credentials: ServerCredentials, answer: Answer) -> None:
        self.address, self.port, self._credentials, self._answer = "", 0, credentials, answer
        self._connections: dict[threading.Thread, socket.socket] = {}
        # The times when connections end that have not sent their first request.
        self._ends: dict[threading.Thread, float] = {}
        self._listener: socket.socket | None = None
        self._stopped = threading.Event()
        if not address:
            return
        credentials.check(address, "--rows-listen")
        host, port = split_address(address)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            reason = error.strerror or error
            raise InUseError(f"--rows-listen {address} fails: {reason}; choose another") from None
        self.port = self._listener.getsockname()[1]
        self.address = join_address(host, self.port)
        threading.Thread(target=self._accept, name="rows", daemon=True).start()
        threading.Thread(target=self._end_late, name="late connections", daemon=True).start()

    def stop(self, seconds: float) -> None:
        """Accept no more connections, and wait for the requests in flight."""
        self._stopped.set()
        if self._listener:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        end = time.monotonic() + seconds
        connections = self._connections.copy()
        for connection in connections.values():  # each thread ends after its request
            with suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RD)
        for thread in filter(threading.Thread.is_alive, connections):
            thread.join(max(0.0, end - time.monotonic()))

    def _accept(self) -> None:
        assert self._listener
        while not self._stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._stopped.is_set():  # for example, too many open files
                    log.warning("a connection cannot be accepted: %s", error.strerror)
                    time.sleep(0.1)
                continue
            if len(self._connections) >= MAX_CONNECTIONS:
                connection.close()
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._connections[thread] = connection
            CONNECTIONS.inc()
            try:
                thread.start()
            except RuntimeError as error:  # the system allows no more threads
                log.warning("a connection cannot be served: %s", error)
                self._forget(thread)
                connection.close()

    def _end_late(self) -> None:
        """End connections whose first request is late, also if it arrives byte by byte."""
        while not self._stopped.wait(1.0):
            for thread, end in self._ends.copy().items():
                if time.monotonic() > end and (connection := self._connections.get(thread)):
                    with suppress(OSError):
                        socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def _serve(self, connection: socket.socket) -> None:
        thread = threading.current_thread()
        self._ends[thread] = time.monotonic() + _FIRST_SECONDS
        try:
            with connection:
                prepare(connection)
                if self._credentials.tls_cert:
                    context = self._credentials.current_context()
                    with context.wrap_socket(
                        connection, server_side=True, do_handshake_on_connect=False
                    ) as encrypted:
                        self._connections[thread] = encrypted  # so that `_end_late` can end it
                        encrypted.do_handshake()
                        self._answer_all(encrypted)
                else:
                    self._answer_all(connection)
        except (OSError, DisconnectedError):
            pass  # clients disconnect, and scanners do not speak TLS
        except Exception:  # noqa: BLE001 - a defect ends the connection, not the service
            log.exception("a connection for rows failed")
        finally:
            self._forget(thread)

    def _forget(self, thread: threading.Thread) -> None:
        del self._connections[thread]
        self._ends.pop(thread, None)
        CONNECTIONS.dec()

    def _answer_all(self, connection: socket.socket) -> None:
        def send(records: list[Buffer]) -> None:
            try:
                send_records(connection, records)
            except OSError as error:
                raise DisconnectedError from error

        limit_sends(connection, _SEND_SECONDS)
        if (size := bytes_in_flight(connection)) < _LARGE_BUFFER:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, int(size))
        with connection.makefile("rb") as file:
            while True:
                try:
                    if (request := read_request(file)) is None:
                        return
                except InvalidArgumentError as error:
                    refusal = pb.Error(status=error.grpc_status, message=str(error))
                    send_error(connection, refusal)
                    return
                if not self._credentials.accepts(request.authorization):
                    send_error(connection, pb.Error(status="UNAUTHENTICATED", message=UNAUTHORIZED))
                    return
                self._ends.pop(threading.current_thread(), None)
                if failure := self._answer(request, send):
                    send_error(connection, failure)
