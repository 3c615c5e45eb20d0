"""What every request passes: an id, metrics, a span and a log line; limits of header and body."""

import asyncio
import logging
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tolhouse import tracing
from tolhouse.gateway import metrics
from tolhouse.gateway.error_responses import error_response
from tolhouse.logs import event

MAX_HEADER_BYTES = 16 << 10  # a request's first line and header
MAX_HEADER_FIELDS = 100
MAX_BODIES = 64  # of the largest size: what all requests together may have in memory
_MAX_ID = 128
_MAX_PATH = 256  # characters of a path in a trace
_CLOSE = {"Connection": "close"}  # the rest of the request is not read


class MetricsMiddleware:
    """Gives each request an id; counts, times, traces and logs its end.

    Metrics are by `paths`, the app's routes: other paths are the caller's invention. A stream that
    fails after its status line sets `failed_status`, and counts as that.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self.app, self.paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, method = time.perf_counter(), 500, scope["method"]
        headers, state = Headers(scope=scope), scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(headers.get("x-request-id", ""))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        about = {
            "http.request.method": method,
            "url.path": scope["path"][:_MAX_PATH],
            "tolhouse.request_id": request_id,
        }
        parent = tracing.remote(headers.get(tracing.HEADER, ""))
        span = tracing.begin(method, parent, about, root=True)
        with tracing.under([span]):
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                seconds, status = time.perf_counter() - started, state.get("failed_status", status)
                path = scope["route"].path if "route" in scope else scope["path"]
                path = path if path in self.paths else "other"
                metrics.REQUESTS.labels(path, status).inc()
                metrics.SECONDS.labels(path).observe(seconds)
                quiet = logging.DEBUG if method == "GET" else logging.INFO
                event(
                    "request",
                    logging.WARNING if status >= 500 else quiet,
                    request_id=request_id,
                    path=scope["path"],
                    status=status,
                    seconds=round(seconds, 4),
                    **({"key": state["key"]} if "key" in state else {}),
                )
                if path != "other":
                    span.update_name(f"{method} {path}")
                span.set_attribute("http.response.status_code", status)
                tracing.end(span, f"HTTP {status}" if status >= 500 else "")


class RequestLimitsMiddleware:
    """Bounds the size of header and body, and the time that a body may take to arrive."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_seconds: float) -> None:
        self.app, self.max_body_bytes, self.body_seconds = app, max_body_bytes, body_seconds
        self._held = 0  # bytes of the bodies of all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size, complete, until = 0, not _has_body(scope), 0.0

        async def limited() -> Message:
            nonlocal size, complete, until
            if complete:  # what comes now is that the caller has gone
                return await receive()
            until = until or asyncio.get_running_loop().time() + self.body_seconds
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                late = f"the body did not arrive within {self.body_seconds:g} s"
                raise HTTPException(408, late, _CLOSE) from None
            part, complete = len(message.get("body", b"")), not message.get("more_body")
            size += part
            self._held += part
            if size > self.max_body_bytes:
                raise HTTPException(413, self._too_large, _CLOSE)
            if self._held > MAX_BODIES * self.max_body_bytes:
                raise HTTPException(503, "too many large requests: try again later", _CLOSE)
            return message

        connection = scope.get("state", {}).get("connection")
        if connection:
            connection.request_began()
        try:
            status, message = self._excess(scope)
            if status:
                await error_response(message, status, _CLOSE)(scope, limited, send)
            else:
                await self.app(scope, limited, send)
        finally:
            self._held -= size
            if connection:
                connection.request_ended(complete=complete)

    @property
    def _too_large(self) -> str:
        return f"the body is too large: at most {self.max_body_bytes} bytes are taken"

    def _excess(self, scope: Scope) -> tuple[int, str]:
        """The status and message of a refusal. h11 counts no fields, and bytes of parts alone."""
        headers, count = Headers(scope=scope), len(scope["headers"])
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        length = headers.get("content-length", "")
        if count > MAX_HEADER_FIELDS:
            return 431, f"the header has {count} fields; at most {MAX_HEADER_FIELDS} are taken"
        if size > MAX_HEADER_BYTES:
            return 431, f"the header has {size} bytes; at most {MAX_HEADER_BYTES} are taken"
        if length and "transfer-encoding" in headers:  # a proxy may see another end of the body
            return 400, "Content-Length and Transfer-Encoding are both given: send one of them"
        if length.isdecimal() and int(length) > self.max_body_bytes:
            return 413, self._too_large
        return 0, ""


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _request_id(given: str) -> str:
    """The caller's own id, if it may stand in a log line and a header."""
    ok = 0 < len(given) <= _MAX_ID and given.isascii() and given.isprintable()
    return given if ok else uuid.uuid4().hex
