"""Generation requests to responses: whole, or streamed as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import aclosing, nullcontext
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from tolhouse.errors import Cancelled
from tolhouse.gateway.detokenizer import Delta
from tolhouse.gateway.error_responses import error_body, status_and_message
from tolhouse.gateway.request_handler import RequestHandler
from tolhouse.gateway.routes import Services
from tolhouse.gateway.schemas import Generation

T = TypeVar("T")
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class Serializer(Protocol):
    """A handler's deltas in the form of one route."""

    def whole(self, deltas: list[Delta]) -> BaseModel: ...
    def chunks(self, delta: Delta) -> Iterable[BaseModel]: ...
    def usage(self) -> BaseModel: ...


async def handle(
    request: Request, body: Generation, prompts: list[Any], gateway: Services
) -> RequestHandler:
    """The handler of a request, whose prompts are texts or token ids."""
    model = gateway.router.model(body.model)
    gateway.router.check_room(model.name)
    ids = [
        await gateway.vocabulary.ids(p, model.context_tokens) if isinstance(p, str) else p
        for p in prompts
    ]
    # with API keys, fewer of a key's sequences run at once than its own limit
    slot = getattr(request.state, "sequences", None) or nullcontext()
    request_id = request.state.request_id
    return RequestHandler(body, ids, model, gateway.router, gateway.vocabulary, request_id, slot)


async def respond(request: Request, handler: RequestHandler, serializer: Serializer) -> Response:
    if not handler.body.stream:
        complete = await _unless_disconnected(request, handler.complete())
        return JSONResponse(serializer.whole(complete).model_dump())
    # the first delta comes before the status line, so that an early failure has its own status
    deltas = handler.deltas()
    first = await _unless_disconnected(request, anext(deltas))

    async def events() -> AsyncIterator[str]:
        try:
            async with aclosing(deltas):
                for chunk in serializer.chunks(first):
                    yield _event(chunk.model_dump_json())
                async for delta in deltas:
                    for chunk in serializer.chunks(delta):
                        yield _event(chunk.model_dump_json())
            if handler.body.stream_options.include_usage:
                yield _event(serializer.usage().model_dump_json())
        except Exception as error:  # noqa: BLE001 - the status line is out: into the stream with it
            status, message = status_and_message(error, handler.request_id)
            request.state.failed_status = status
            yield _event(json.dumps(error_body(message, status)))
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
