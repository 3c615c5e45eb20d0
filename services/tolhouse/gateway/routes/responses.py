"""Generation requests to responses: whole, or streamed as server-sent events."""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, nullcontext
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from tolhouse.errors import Cancelled
from tolhouse.gateway.detokenizer import Delta
from tolhouse.gateway.error_responses import error_body, status_and_message
from tolhouse.gateway.request_handler import RequestHandler, Usage
from tolhouse.gateway.routes import Services
from tolhouse.gateway.schemas import Generation

T = TypeVar("T")
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class Envelope(BaseModel):
    """What every response, and every chunk of a streamed one, has."""

    id: str
    created: int  # Unix time, seconds
    model: str
    usage: Usage | None = None
    system_fingerprint: str | None = None  # the table's version


class Serializer(ABC):
    """A handler's deltas in the form of one route."""

    prefix: str  # of ids

    def __init__(self, handler: RequestHandler) -> None:
        self.handler, self.vocabulary = handler, handler.vocabulary
        self.scored = handler.body.num_logprobs is not None

    @abstractmethod
    def whole(self, deltas: list[Delta]) -> BaseModel: ...

    @abstractmethod
    def chunk(self, *deltas: Delta, usage: Usage | None = None) -> BaseModel: ...

    @property
    def envelope(self) -> dict[str, Any]:
        handler = self.handler
        return {
            "id": f"{self.prefix}-{handler.request_id}",
            "created": handler.created,
            "model": handler.model.name,
            "system_fingerprint": handler.table,
        }


async def respond(
    request: Request,
    body: Generation,
    prompts: Callable[[], list[Any]],
    gateway: Services,
    serializer_of: type[Serializer],
) -> Response:
    """The response to a request whose prompts, texts or token ids, are made if there is room."""
    model = gateway.router.model(body.model)
    gateway.router.check_room(model.name)
    ids = [
        await gateway.vocabulary.ids(p, model.context_tokens) if isinstance(p, str) else p
        for p in prompts()
    ]
    # with API keys, fewer of a key's sequences run at once than its own limit
    slot = getattr(request.state, "sequences", None) or nullcontext()
    request_id = request.state.request_id
    handler = RequestHandler(body, ids, model, gateway.router, gateway.vocabulary, request_id, slot)
    serializer = serializer_of(handler)
    if not body.stream:
        complete = await _unless_disconnected(request, handler.complete())
        return JSONResponse(serializer.whole(complete).model_dump())
    # the first delta comes before the status line, so that an early failure has its own status
    deltas = handler.deltas()
    first = await _unless_disconnected(request, anext(deltas))

    async def events() -> AsyncIterator[str]:
        try:
            async with aclosing(deltas):
                yield _event(serializer.chunk(first).model_dump_json())
                async for delta in deltas:
                    yield _event(serializer.chunk(delta).model_dump_json())
            if body.stream_options.include_usage:
                yield _event(serializer.chunk(usage=handler.usage()).model_dump_json())
        except Exception as error:  # noqa: BLE001 - the status line is out: into the stream with it
            request.state.failed_status, message = status_and_message(error, request_id)
            yield _event(json.dumps(error_body(message, request.state.failed_status)))
        yield _event("[DONE]")

    headers = {"Cache-Control": "no-cache"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _event(data: str) -> str:
    return f"data: {data}\n\n"


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the caller goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the caller went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
