"""uvicorn behind limits that it has no options for: slow headers and readers, open connections."""

import asyncio
import json
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
from tolhouse.gateway import metrics
from tolhouse.gateway.error_responses import error_body
from tolhouse.gateway.middleware import MAX_HEADER_BYTES
from tolhouse.logs import event, redirect_log


class LimitedConnection(asyncio.Protocol):
    """Passes everything to uvicorn's protocol, and closes the connection of a slow caller.

    The request limits middleware finds it as `connection` in a request's state, and reports when
    a request begins and ends.
    """

    def __init__(self, config: GatewayConfig, server: uvicorn.Server) -> None:
        self.config, self._open = config, server.server_state.connections
        self._http: asyncio.Protocol = H11Protocol(
            config=server.config,
            server_state=server.server_state,
            app_state={**server.lifespan.state, "connection": self},
        )
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._requests = 0  # a next one may begin before the last has ended
        self._received = False  # something since the last request began
        self._unread = False  # the rest of a body whose request was answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, most = transport, self.config.max_connections
        if len(self._open) >= most:
            self._http = asyncio.Protocol()  # which does nothing
            self._refuse(503, f"too many open connections: {most} are allowed, try again later")
        else:
            self._http.connection_made(transport)
            self._header_timer = self._later(self.config.header_timeout_seconds, self._too_slow)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._received = True
        try:
            self._http.data_received(data)
        except h11.LocalProtocolError:  # not HTTP, in the middle of an answer
            self._transport.close()
        if self._transport.is_closing():
            _count_refusal(400, "this is not HTTP, or its header is too large")
        elif not self._requests and not self._header_timer:
            self._header_timer = self._later(self.config.header_timeout_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer:
                timer.cancel()
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        self._http.pause_writing()
        self._write_timer = self._later(self.config.body_timeout_seconds, self._transport.abort)

    def resume_writing(self) -> None:
        self._http.resume_writing()
        if self._write_timer:
            self._write_timer.cancel()

    def request_began(self) -> None:
        self._requests += 1
        self._received = self._unread = False
        if self._header_timer:
            self._header_timer.cancel()
            self._header_timer = None

    def request_ended(self, *, complete: bool) -> None:
        """complete: the body was read to its end."""
        self._requests -= 1
        self._unread = not complete

    def _later(self, seconds: float, action: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, action)

    def _too_slow(self) -> None:
        if self._received and not self._unread:
            seconds = self.config.header_timeout_seconds
            self._refuse(408, f"the header did not arrive within {seconds:g} s")
        else:
            self._transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer in OpenAI's form, and close."""
        _count_refusal(status, message)
        body = json.dumps(error_body(message, status)).encode()
        retry = "Retry-After: 1\r\n" * (status == 503)
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n{retry}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        self._transport.close()


def _count_refusal(status: int, reason: str) -> None:
    metrics.REQUESTS.labels("other", status).inc()
    event("refused", status=status, reason=reason)


async def serve(
    app: ASGIApp,
    config: GatewayConfig,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    on_ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what has begun."""
    settings = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_config=None,
        lifespan="on",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
    )
    redirect_log("uvicorn", logging.ERROR)  # its warnings are of single requests, as our own log's
    server = uvicorn.Server(settings)
    serving = asyncio.create_task(server.serve(sockets=[]))  # the listener is here
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(
            lambda: LimitedConnection(config, server),
            sock=listener,
            ssl=tls,
            ssl_handshake_timeout=config.header_timeout_seconds if tls else None,
            backlog=settings.backlog,
        )

        def stop() -> None:
            listening.close()
            server.should_exit = True

        # after uvicorn's own, which would end the process by the signal once it has drained
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        on_ready()
    await serving
