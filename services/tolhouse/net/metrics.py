"""Prometheus metrics of a process without an HTTP server of its own, from threads, with limits on who waits for what."""

import socket
import ssl
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import MetricsHandler

from tolhouse.errors import InUse
from tolhouse.logs import split_address
from tolhouse.net.auth import ServerCredentials

MAX_CONNECTIONS = 32  # more are closed
MOST_SECONDS = 10.0  # for all of a request, from the TLS handshake to the last byte of its answer


def serve_metrics(address: str, credentials: ServerCredentials) -> str:
    """Serve metrics at http://address/metrics, or https where `guard` has TLS; returns the address with its real port."""
    credentials.check(address, "--metrics-listen")
    host, port = split_address(address)
    try:
        server = _Server(host, port, credentials.tls.context() if credentials.tls else None)
    except OSError as error:
        raise InUse(
            f"metrics can't listen on {address}: {error.strerror or error}; choose another --metrics-listen"
        ) from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return f"{host}:{server.server_port}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._context, self._free = context, threading.Semaphore(MAX_CONNECTIONS)
        super().__init__((host, port), MetricsHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In a thread of the request's own, so that nobody waits for another's handshake."""

        def end() -> None:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(MOST_SECONDS, end)
        timer.start()
        try:
            if self._context:
                request = self._context.wrap_socket(
                    request, server_side=True, do_handshake_on_connect=False
                )
                request.do_handshake()
            super().process_request_thread(request, client_address)
        except OSError:  # a handshake that failed
            self.shutdown_request(request)
        finally:
            timer.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller who went away, or was too slow, is no news."""
