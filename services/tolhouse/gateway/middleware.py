"""Middleware for every request: id, metrics, span, log line, size and time limits, CORS."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tolhouse import tracing
from tolhouse.gateway import metrics
from tolhouse.gateway.error_responses import error_response
from tolhouse.logs import event

MAX_HEADER_BYTES = 16 << 10  # the first line and the header of a request
MAX_HEADER_FIELDS = 100
MAX_BODIES = 64  # the number of bodies of the largest size that fit into the memory limit
_ID = re.compile("[ -~]{1,128}")  # a caller's id, if it is valid in a log line and a header
_PROBED = frozenset({"/health", "/ping"})  # not logged, because probes call these each second
_MAX_PATH = 256  # characters of a path in a trace
# In every response, so that a browser does not guess its type, run it, or show it in a frame.
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_CLOSE = {"Connection": "close"}  # the rest of the request is not read
Middleware = Callable[[ASGIApp], ASGIApp]


def cors_middleware(origins: str) -> Middleware:
    """Return middleware that lets web pages of these origins read responses.

    Commas separate `origins`, and "*" stands for all.
    """
    allowed = [origin.strip().rstrip("/") for origin in origins.split(",") if origin.strip()]
    if not allowed:
        return lambda app: app
    return partial(
        CORSMiddleware,
        allow_origins=allowed,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=("X-Request-Id", "Retry-After"),
    )


class MetricsMiddleware:
    """Gives each request an id, and counts, times, traces and logs it.

    The request's state may have `failed_status`, the status of a failed stream, and `key` and
    `about()`, which are more fields of the log line.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self.app, self.paths = app, paths  # metrics name only the paths of routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, method = time.perf_counter(), 500, scope["method"]
        headers, state = Headers(scope=scope), scope.setdefault("state", {})
        given = _ID.fullmatch(headers.get("x-request-id", ""))
        state["request_id"] = request_id = given[0] if given else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own["X-Request-Id"] = request_id
                for name, value in _SAFE.items():
                    own.setdefault(name, value)
            await send(message)

        about = {"http.request.method": method, "tolhouse.request_id": request_id}
        about["url.path"] = scope["path"][:_MAX_PATH]
        parent = tracing.remote(headers.get(tracing.HEADER, ""))
        span = tracing.begin(method, parent, about, root=True)
        with tracing.under([span]):
            # HEAD is handled as GET. The server omits the body.
            inner = {**scope, "method": "GET"} if method == "HEAD" else scope
            try:
                await self.app(inner, receive, send_with_id)
            finally:
                seconds, status = time.perf_counter() - started, state.get("failed_status", status)
                path = inner["route"].path if "route" in inner else scope["path"]
                path = path if path in self.paths else "other"
                metrics.REQUESTS.labels(path, status).inc()
                metrics.SECONDS.labels(path).observe(seconds)
                level = logging.DEBUG if method in ("GET", "HEAD") else logging.INFO
                level = logging.WARNING if status >= 500 else level
                level = logging.DEBUG if path in _PROBED else level
                fields = {"request_id": request_id, "method": method, "path": scope["path"]}
                fields |= {"status": status, "seconds": round(seconds, 4)}
                key = {"key": state["key"]} if "key" in state else {}
                about = state["about"]() if "about" in state else {}
                event("request", level, **fields, **key, **about)
                if path != "other":
                    span.update_name(f"{method} {path}")
                span.set_attribute("http.response.status_code", status)
                tracing.end(span, f"HTTP {status}" if status >= 500 else "")


class RequestLimitsMiddleware:
    """Limits the size of header and body, and the time for a body to arrive.

    `around` is a middleware for all responses, including errors of this middleware.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, body_seconds: float, around: Middleware
    ) -> None:
        self.app, self.max_body_bytes, self.body_seconds = app, max_body_bytes, body_seconds
        self.around = around
        self._too_large = f"the body is too large: at most {max_body_bytes} bytes are allowed"
        self._held = 0  # bytes of the bodies of all running requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, size, until = Headers(scope=scope), 0, 0.0
        length = headers.get("content-length", "0")
        complete = length == "0" and "transfer-encoding" not in headers

        async def limited() -> Message:
            nonlocal size, complete, until
            if complete:  # the next message reports the end of the connection
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

        connection = scope["state"]["connection"]
        connection.request_began()
        try:
            app = self._refusal(scope, headers) or self.app
            await self.around(app)(scope, limited, send)
        finally:
            self._held -= size
            connection.request_ended(complete=complete)

    def _refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        """Return an error response if the header is too large or ambiguous, or None.

        h11 does not count fields, and limits only the bytes that are not parsed yet.
        """
        status, message = 431, ""
        count, length = len(scope["headers"]), headers.get("content-length", "")
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if count > MAX_HEADER_FIELDS:
            message = f"the header has {count} fields; at most {MAX_HEADER_FIELDS} are allowed"
        elif size > MAX_HEADER_BYTES:
            message = f"the header has {size} bytes; at most {MAX_HEADER_BYTES} are allowed"
        elif length and "transfer-encoding" in headers:  # proxies may differ on the end of the body
            message = "Content-Length and Transfer-Encoding exclude each other: send one of them"
            status = 400
        elif length.isdecimal() and int(length) > self.max_body_bytes:
            status, message = 413, self._too_large
        return error_response(message, status, _CLOSE) if message else None
