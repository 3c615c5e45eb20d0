"""What every request passes on its way in: it gets an id, its body a limit, and its end a line in the log."""

import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tolhouse.telemetry import event

MAX_ID = 128


class Intake:
    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, taken = time.perf_counter(), 500, 0
        headers = Headers(scope=scope)
        request_id = _id(headers.get("x-request-id", ""))
        scope.setdefault("state", {})["request_id"] = request_id
        announced = headers.get("content-length", "")

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body_bytes or (announced.isdecimal() and int(announced) > self.max_body_bytes):
                raise HTTPException(413, f"the body is too large: at most {self.max_body_bytes} bytes are taken")
            return message

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, limited, marked)
        finally:
            level = logging.WARNING if status >= 500 else logging.DEBUG if scope["method"] == "GET" else logging.INFO
            seconds = round(time.perf_counter() - started, 4)
            event("request", level, request_id=request_id, path=scope["path"], status=status, seconds=seconds)


def _id(given: str) -> str:
    """The caller's own id, if it is one that may stand in a log line and a header."""
    ok = 0 < len(given) <= MAX_ID and given.isascii() and given.isprintable()
    return given if ok else uuid.uuid4().hex
