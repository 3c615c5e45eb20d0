"""What every request passes on its way in: it gets an id, its header and body get limits, and its end a line in the log."""

import asyncio
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tolhouse import tracing
from tolhouse.gateway import problems
from tolhouse.gateway.server import MAX_HEADER_BYTES, MAX_HEADER_FIELDS
from tolhouse.logs import event

MAX_ID = 128
MAX_PATH = 256  # characters of one that a trace shows
MOST_BODIES = 64  # of the largest size: what all callers together may have in memory


class RequestLimitsMiddleware:
    def __init__(self, app: ASGIApp, max_body_bytes: int, body_seconds: float) -> None:
        self.app, self.max_body_bytes, self.body_seconds = app, max_body_bytes, body_seconds
        self._held = 0  # bytes of bodies of requests in flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, taken, whole, until = time.perf_counter(), 500, 0, False, 0.0
        headers = Headers(scope=scope)
        request_id = _id(headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        announced = headers.get("content-length", "")
        too_large = HTTPException(
            413, f"the body is too large: at most {self.max_body_bytes} bytes are taken", _CLOSE
        )

        async def limited() -> Message:
            nonlocal taken, whole, until
            if whole:  # what comes now is that the caller went away
                return await receive()
            if announced.isdecimal() and int(announced) > self.max_body_bytes:
                raise too_large
            until = until or asyncio.get_running_loop().time() + self.body_seconds
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the body did not arrive within {self.body_seconds:g} s", _CLOSE
                ) from None
            size, whole = len(message.get("body", b"")), not message.get("more_body")
            taken += size
            self._held += size
            if taken > self.max_body_bytes:
                raise too_large
            if self._held > MOST_BODIES * self.max_body_bytes:
                raise HTTPException(
                    503,
                    "too many large requests are in flight: try again later",
                    {"Retry-After": "1", **_CLOSE},
                )
            return message

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        about = {
            "http.request.method": scope["method"],
            "url.path": scope["path"][:MAX_PATH],
            "tolhouse.request_id": request_id,
        }
        parent = tracing.remote(headers.get(tracing.HEADER, ""))
        trace = tracing.begin(scope["method"], parent, about, tracing.SERVER, root=True)
        try:
            excess = _excess(scope)
            if excess:
                await JSONResponse(problems.body_of(excess, 431), 431, _CLOSE)(
                    scope, limited, marked
                )
            elif (
                "content-length" in headers and "transfer-encoding" in headers
            ):  # two proxies may see two ends of it
                message = (
                    "the header has both Content-Length and Transfer-Encoding: send one of them"
                )
                await JSONResponse(problems.body_of(message, 400), 400, _CLOSE)(
                    scope, limited, marked
                )
            else:
                with tracing.under([trace]):
                    await self.app(scope, limited, marked)
        finally:
            self._held -= taken
            status = scope["state"].get(
                "failed", status
            )  # of a stream whose status line was out when it failed
            if "route" in scope:
                trace.update_name(f"{scope['method']} {scope['route'].path}")
            trace.set_attribute("http.response.status_code", status)
            tracing.end(trace, f"HTTP {status}" if status >= 500 else "")
            level = (
                logging.WARNING
                if status >= 500
                else logging.DEBUG
                if scope["method"] == "GET"
                else logging.INFO
            )
            seconds = round(time.perf_counter() - started, 4)
            key = {"key": scope["state"]["key"]} if "key" in scope["state"] else {}
            with tracing.under([trace]):
                event(
                    "request",
                    level,
                    request_id=request_id,
                    path=scope["path"],
                    status=status,
                    seconds=seconds,
                    **key,
                )


_CLOSE = {"Connection": "close"}  # what the caller still sends is not read


def _excess(scope: Scope) -> str | None:
    """What is too much about a header: h11 looks at its size only when it comes in several pieces, and counts no fields."""
    if len(scope["headers"]) > MAX_HEADER_FIELDS:
        return (
            f"the header has {len(scope['headers'])} fields; at most {MAX_HEADER_FIELDS} are taken"
        )
    size = (
        len(scope["raw_path"])
        + len(scope["query_string"])
        + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    )
    return (
        f"the header has {size} bytes; at most {MAX_HEADER_BYTES} are taken"
        if size > MAX_HEADER_BYTES
        else None
    )


def _id(given: str) -> str:
    """The caller's own id, if it is one that may stand in a log line and a header."""
    ok = 0 < len(given) <= MAX_ID and given.isascii() and given.isprintable()
    return given if ok else uuid.uuid4().hex
