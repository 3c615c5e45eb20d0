"""uvicorn with limits on slow callers, which it has no options for: headers, handshakes, answers that nobody takes, connections."""

import asyncio
import json
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from socket import socket
from typing import Any, NamedTuple

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tolhouse.gateway import metrics, problems
from tolhouse.logs import event

MAX_HEADER_BYTES = 16 << 10  # a request's first line and header
MAX_HEADER_FIELDS = 100


class Limits(NamedTuple):
    connections: int
    header_seconds: float  # for a request's header to arrive, and for a TLS handshake
    body_seconds: (
        float  # for a request's body to arrive, and for a caller to take what waits for it
    )


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, limits: Limits, tls: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self.limits, self.tls = limits, tls

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(1)
        loop = asyncio.get_running_loop()
        patience = self.limits.header_seconds if self.tls else None
        self.servers = [
            await loop.create_server(
                self._connection,
                sock=sock,
                ssl=self.tls,
                ssl_handshake_timeout=patience,
                backlog=self.config.backlog,
            )
            for sock in sockets or []
        ]
        self.started = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would raise them again once it has drained, and end the process with an error."""
        yield

    def _connection(self) -> "Connection":
        return Connection(
            self.limits,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )


class Connection(H11Protocol):
    def __init__(self, limits: Limits, **more: Any) -> None:
        super().__init__(**more)
        self.limits = limits
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._heard = False  # something since the last request

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(
                503,
                f"too many open connections: {self.limits.connections} are allowed, try again later",
            )
        else:
            self._header_timer = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_header_timer()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._heard = True
        super().data_received(data)
        if self._answering:
            self._unset_header_timer()
            self._heard = False
        elif (
            self._header_timer is None
        ):  # the beginning of another request, or the rest of one that was refused
            self._header_timer = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this while it handles h11's error."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(
                431, f"the header is too large: at most {MAX_HEADER_BYTES} bytes are taken"
            )
        else:
            self._refuse(400, f"this is not HTTP: {error or msg}")

    def _too_slow(self) -> None:
        self._header_timer = None
        if self._answering:
            return
        if self._heard and self.conn.our_state is h11.IDLE:
            self._refuse(408, f"the header did not arrive within {self.limits.header_seconds:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer in OpenAI's form, and close."""
        metrics.refused(status)
        event("refused", status=status, reason=message)
        body = json.dumps(problems.body_of(message, status)).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        if status == 503:
            headers.append(("Retry-After", "1"))
        try:
            answer = h11.Response(
                status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()
            )
            for part in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        except h11.LocalProtocolError:  # in the middle of an answer
            pass
        self.transport.close()

    def _unset_header_timer(self) -> None:
        if self._header_timer:
            self._header_timer.cancel()
            self._header_timer = None
