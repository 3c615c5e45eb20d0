"""Runs uvicorn with more limits: open connections, slow headers and slow readers."""

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Callable
from http import HTTPStatus

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tolhouse.config import GatewayConfig
from tolhouse.errors import InUseError
from tolhouse.gateway import metrics
from tolhouse.gateway.error_responses import error_response
from tolhouse.gateway.middleware import MAX_HEADER_BYTES
from tolhouse.logs import event, join_address, ready, redirect_log, split_address


class LimitedConnection(asyncio.Protocol):
    """Passes data to uvicorn's protocol, and closes connections that are too slow.

    The state of each request has its connection. RequestLimitsMiddleware reports the beginning and
    the end of a request.
    """

    def __init__(self, config: GatewayConfig, server: uvicorn.Server) -> None:
        self.config, state = config, server.server_state
        self._open, app_state = state.connections, {"connection": self}
        self._http: asyncio.Protocol = H11Protocol(server.config, state, app_state)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._requests = 0  # running requests; a request may begin before the last one has ended
        self._received = False  # whether data has arrived since the last request began
        self._unread = False  # whether the rest of a body is ignored after its response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, most = transport, self.config.max_connections
        if len(self._open) >= most:
            self._http = asyncio.Protocol()  # a protocol that does nothing
            self._refuse(
                503, f"too many open connections: at most {most} are allowed; try again later"
            )
        else:
            self._http.connection_made(transport)
            self._start("header", self.config.header_timeout_seconds, self._too_slow)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._received = True
        try:
            self._http.data_received(data)
        except h11.LocalProtocolError:  # the data is not HTTP, and a response is in progress
            self._transport.close()
        if self._transport.is_closing():
            _count_refusal(400, "the data is not HTTP, or the header is too large")
        elif not (self._requests or "header" in self._timers):
            self._start("header", self.config.header_timeout_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("header")
        self._stop("write")
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        self._http.pause_writing()
        self._start("write", self.config.body_timeout_seconds, self._transport.abort)

    def resume_writing(self) -> None:
        self._http.resume_writing()
        self._stop("write")

    def request_began(self) -> None:
        self._requests += 1
        self._received = self._unread = False
        self._stop("header")

    def request_ended(self, *, complete: bool) -> None:
        """Note the end of a request. `complete` is whether the whole body was read."""
        self._requests -= 1
        self._unread = not complete

    def _start(self, timer: str, seconds: float, action: Callable[[], None]) -> None:
        self._timers[timer] = asyncio.get_running_loop().call_later(seconds, action)

    def _stop(self, timer: str) -> None:
        if handle := self._timers.pop(timer, None):
            handle.cancel()

    def _too_slow(self) -> None:
        if self._received and not self._unread:
            seconds = self.config.header_timeout_seconds
            self._refuse(408, f"the header did not arrive within {seconds:g} s")
        else:
            self._transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Send an error in OpenAI's form, and close the connection."""
        _count_refusal(status, message)
        response = error_response(message, status, {"Connection": "close"})
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
        lines += [b": ".join(header) for header in response.raw_headers]
        self._transport.write(b"\r\n".join([*lines, b"", response.body]))
        self._transport.close()


def _count_refusal(status: int, reason: str) -> None:
    metrics.REQUESTS.labels("other", status).inc()
    event("refused", status=status, reason=reason)


async def _family(host: str, port: int) -> socket.AddressFamily:
    """Return the address family: IPv4 unless the host has only IPv6 addresses."""
    loop, kind = asyncio.get_running_loop(), socket.SOCK_STREAM
    families = {found[0] for found in await loop.getaddrinfo(host, port, type=kind)}
    return socket.AF_INET if socket.AF_INET in families else socket.AF_INET6


async def serve(app: ASGIApp, config: GatewayConfig, tls: ssl.SSLContext | None) -> None:
    """Serve until SIGTERM or SIGINT, and finish the requests in flight."""
    settings = uvicorn.Config(
        app,
        ws="none",
        log_config=None,
        lifespan="off",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
    )
    # Middleware already logs single requests, which are the subject of uvicorn's warnings.
    redirect_log("uvicorn", logging.ERROR)
    server, loop = uvicorn.Server(settings), asyncio.get_running_loop()
    serving = asyncio.create_task(server.serve(sockets=[]))  # the listener is created below
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    host, port = split_address(config.listen)
    try:
        listening = await loop.create_server(
            lambda: LimitedConnection(config, server),
            host,
            port,
            family=await _family(host, port),
            ssl=tls,
            ssl_handshake_timeout=config.header_timeout_seconds if tls else None,
            backlog=settings.backlog,
        )
    except OSError as error:
        reason = f"{error.strerror or error}; choose another --listen"
        raise InUseError(f"gateway can't listen on {config.listen}: {reason}") from None

    def stop() -> None:
        listening.close()
        server.should_exit = True

    # These replace uvicorn's handlers, which raise the signal again after the drain.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    ready("gateway", join_address(host, listening.sockets[0].getsockname()[1]))
    await serving
