"""Prometheus metrics of a process that has no other HTTP server."""

import socket
import ssl
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import MetricsHandler

from tolhouse.errors import InUse
from tolhouse.logs import split_address
from tolhouse.net.auth import ServerCredentials


def serve_metrics(address: str, credentials: ServerCredentials) -> str:
    """Serve metrics at http://address/metrics, or https where `credentials` have TLS.

    Returns the address with its real port.
    """
    credentials.check(address, "--metrics-listen")
    host, port = split_address(address)
    try:
        server = _Server(host, port, credentials.tls.context() if credentials.tls else None)
    except OSError as error:
        reason = error.strerror or error
        raise InUse(
            f"metrics can't listen on {address}: {reason}; choose another --metrics-listen"
        ) from None
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return f"{host}:{server.server_port}"


class _Handler(MetricsHandler):
    timeout = 10.0  # that a connection may say nothing


class _Server(ThreadingHTTPServer):
    """Handshakes take place in the connection's thread; in prometheus_client's, all others wait."""

    daemon_threads = True

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        if context:
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that fails is of no interest."""
