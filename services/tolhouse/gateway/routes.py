"""The routes of the API and of the explorer page."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tolhouse import __version__
from tolhouse.config import commit
from tolhouse.errors import RequestCancelledError
from tolhouse.gateway import responses, schemas
from tolhouse.gateway.error_responses import status_and_body
from tolhouse.gateway.explorer.compare import compare
from tolhouse.gateway.explorer.data import Explorer
from tolhouse.gateway.explorer.page import PAGE, POLICY
from tolhouse.gateway.request_handler import RequestHandler
from tolhouse.gateway.router import ServedModel, WorkerRouter
from tolhouse.gateway.schemas import CompletionRequest, GenerationRequest
from tolhouse.gateway.templates import ChatTemplate
from tolhouse.gateway.text import Delta, Prompt, Vocabulary
from tolhouse.gateway.turns import list_json, text_json, to_json
from tolhouse.sampling import IdAsText, check_ids

T = TypeVar("T")
_POLL_SECONDS = 0.1  # the pause between checks that the caller is connected
_Responses = dict[int | str, dict[str, Any]]
_STREAMED: _Responses = {200: {"content": {"text/event-stream": {}}}}
_UNHEALTHY: _Responses = {503: {"description": "No worker is healthy"}}
_METRICS: _Responses = {200: {"content": {CONTENT_TYPE_LATEST: {}}}}


@dataclass(frozen=True)
class Services:
    router: WorkerRouter
    vocabulary: Vocabulary
    template: ChatTemplate
    explorer: Explorer

    async def prompts(self, body: GenerationRequest, context_tokens: int) -> list[Prompt]:
        """Tokenise the prompts of a body. Token ids are used unchanged."""
        if isinstance(body, schemas.ChatRequest):
            texts: list[Any] = [await self.render(body.messages)]
        elif isinstance((texts := body.prompts())[0], list):
            return [Prompt(ids) for ids in texts]
        add = body.add_special_tokens
        return await self.vocabulary.encode(texts, context_tokens, add_special_tokens=add)

    async def render(self, messages: list[schemas.Message], **options: bool) -> str:
        """Return the chat template's text for messages. The template runs in a thread."""
        plain = [message.plain for message in messages]
        return await asyncio.to_thread(self.template.render, plain, **options)

    def handler(
        self, body: GenerationRequest, prompts: list[Prompt], model: ServedModel, request: Request
    ) -> RequestHandler:
        """Return the handler of a request. It adds fields to the request's log line."""
        state = request.state
        # With API keys, the slot limits the concurrent sequences of a key.
        slot = getattr(state, "sequences", None) or nullcontext()
        about = self.router, self.vocabulary, state.request_id, slot
        handler = RequestHandler(body, prompts, model, *about)
        state.about = handler.about
        return handler


async def _services(request: Request) -> Services:
    return request.app.state.services


Gateway = Annotated[Services, Depends(_services)]
routes = APIRouter()


@routes.post("/v1/completions", response_model=responses.Completion, responses=_STREAMED)
async def completions(body: CompletionRequest, request: Request, gateway: Gateway) -> Response:
    """Completes one or more prompts. With `stream`, sends server-sent events."""
    return await _respond(body, request, gateway, responses.Serializer)


@routes.post("/v1/chat/completions", response_model=responses.Chat, responses=_STREAMED)
async def chat(body: schemas.ChatRequest, request: Request, gateway: Gateway) -> Response:
    """Answers messages with the chat template. With `stream`, sends server-sent events."""
    return await _respond(body, request, gateway, responses.ChatSerializer)


async def _respond(
    body: GenerationRequest, request: Request, gateway: Services, form: type[responses.Serializer]
) -> Response:
    request.state.body = body
    model = gateway.router.model(body.model)
    gateway.router.check_room(model.name)  # before any work on prompts
    prompts = await gateway.prompts(body, model.context_tokens)
    handler = gateway.handler(body, prompts, model, request)
    serialize = form(handler).to_json
    if not body.stream:
        choices = await _unless_disconnected(request, handler.complete())
        return _json(await serialize(*choices))
    # The status line follows the first delta, so that an early failure has its own status.
    deltas = handler.deltas()
    first = await _unless_disconnected(request, anext(deltas))

    async def events() -> AsyncIterator[str]:
        try:
            async with aclosing(deltas):
                yield await serialize(first)
                async for delta in deltas:
                    yield await serialize(delta)
            if body.stream_options.include_usage:
                yield await serialize()
        except Exception as error:  # noqa: BLE001 - the status is already sent
            request.state.failed_status, failure = status_and_body(error, request.state)
            yield json.dumps(failure)
        yield "[DONE]"

    lines = (f"data: {data}\n\n" async for data in events())
    return StreamingResponse(lines, 200, {"Cache-Control": "no-cache"}, "text/event-stream")


def _json(content: str) -> Response:
    return Response(content, media_type="application/json")


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`. Cancels it if the caller disconnects."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_POLL_SECONDS))[0]:
            if await request.is_disconnected():
                raise RequestCancelledError("the caller disconnected")
        return task.result()
    finally:
        task.cancel()


@routes.post("/tokenize")
async def tokenize(body: schemas.TokenizeRequest, request: Request, gateway: Gateway) -> Response:
    """Returns the token ids of a text or of messages."""
    request.state.body = body
    model, vocabulary = gateway.router.model(body.model), gateway.vocabulary
    text, add = body.prompt or "", body.add_special_tokens
    if body.messages is not None:
        text = await gateway.render(body.messages, add_generation_prompt=body.add_generation_prompt)
        add = bool(add)  # the template adds the special tokens that the model needs
    [prompt] = await vocabulary.encode([text], add_special_tokens=add is not False)
    ids = prompt.ids
    async with vocabulary.large:
        tokens, strings = await list_json(ids), "null"
        if body.return_token_strs:
            places = (await vocabulary.echo(prompt)).places
            strings = await list_json(places, lambda p: vocabulary.shown(p.id, p.first)[0])
    counts = f'"count":{len(ids)},"max_model_len":{model.context_tokens}'
    return _json(f'{{"tokens":{tokens},{counts},"token_strs":{strings}}}')


@routes.post("/detokenize")
async def detokenize(
    body: schemas.DetokenizeRequest, request: Request, gateway: Gateway
) -> Response:
    """Returns the text of token ids."""
    request.state.body = body
    ids = check_ids(body.tokens, gateway.router.model(body.model).vocab_size)
    async with gateway.vocabulary.large:
        text = await asyncio.to_thread(gateway.vocabulary.texts.text, ids)
        return _json(f'{{"prompt":{await text_json(text)}}}')


@routes.get("/tokenizer_info")
async def tokenizer_info(gateway: Gateway) -> dict:
    """Returns special tokens and the chat template, for clients without a tokenizer."""
    end = gateway.router.model(None).eos_token_id
    eos = gateway.vocabulary.tokenizer.id_to_token(end)
    tokens = {"eos_token": eos, "bos_token": None, "pad_token": None, **gateway.template.tokens}
    return {**tokens, "chat_template": gateway.template.source}


@routes.get("/explore", response_class=HTMLResponse)
async def explorer_page() -> Response:
    """Returns the explorer page, which shows a model's memory and compares completions."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})


@routes.post("/explore/tokens")
async def explore_tokens(body: schemas.ExploreRequest, gateway: Gateway) -> Response:
    """Returns the tokens of a text, each with the norms of its rows."""
    [prompt] = await gateway.vocabulary.encode([body.text], add_special_tokens=True)
    async with gateway.vocabulary.large:
        found = await asyncio.to_thread(gateway.explorer.tokens, prompt.ids)
        tokens = await list_json(found["tokens"])
    return _json(f'{{"layers":{found["layers"]},"tokens":{tokens}}}')


@routes.get("/explore/tokens/{token_id}")
async def explore_token(token_id: IdAsText, gateway: Gateway) -> dict:
    """Returns the memory of a token: norms, strongest keys and nearest tokens."""
    return gateway.explorer.token(token_id)


@routes.post("/explore/compare")
async def explore_compare(
    body: schemas.CompareRequest, request: Request, gateway: Gateway
) -> Response:
    """Returns two greedy completions of a text: with the original rows and with scaled rows."""
    model, vocabulary = gateway.router.model(body.model), gateway.vocabulary
    gateway.router.check_room(model.name)
    [prompt] = await vocabulary.encode([body.text], model.context_tokens, add_special_tokens=True)

    async def complete(one: CompletionRequest) -> Delta:
        handler = gateway.handler(one, [Prompt(ids) for ids in one.prompts()], model, request)
        [delta] = await handler.complete()
        return delta

    compared = compare(body, prompt.ids, model.context_tokens, complete, vocabulary)
    return _json(to_json(await _unless_disconnected(request, compared)))


@routes.get("/explore/live")
async def live(gateway: Gateway) -> dict:
    """Returns the summed counters of the workers, and the rows that are shown and served."""
    return gateway.explorer.live()


@routes.get("/health", responses=_UNHEALTHY)
async def health(request: Request, gateway: Gateway) -> JSONResponse:
    """Returns 200 while a worker is healthy. With API keys, the counts of workers need a key."""
    healthy, known = len(gateway.router.healthy()), len(gateway.router.workers)
    body: dict[str, Any] = {"status": "ok" if healthy else "unavailable"}
    if getattr(request.state, "trusted", True):
        body["workers"] = {"healthy": healthy, "unhealthy": known - healthy}
    return JSONResponse(body, 200 if healthy else 503)


@routes.api_route("/ping", methods=["GET", "POST"], responses=_UNHEALTHY)
async def ping(gateway: Gateway) -> JSONResponse:
    """Returns the status of /health with an empty object."""
    return JSONResponse({}, 200 if gateway.router.healthy() else 503)


@routes.get("/version")
async def version() -> dict:
    return {"version": __version__, "commit": commit()}


@routes.get("/metrics", response_class=Response, responses=_METRICS)
async def metrics() -> Response:
    """Returns metrics in the text format of Prometheus."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@routes.get("/v1/models")
async def models(gateway: Gateway) -> dict:
    """Returns the models that healthy workers serve."""
    cards = [await model(name, gateway) for name in gateway.router.models()]
    return {"object": "list", "data": cards}


@routes.get("/v1/models/{model}")
async def model(model: str, gateway: Gateway) -> dict:
    card = {"id": model, "object": "model", "created": 0, "owned_by": "tolhouse"}
    return {**card, "max_model_len": gateway.router.model(model).context_tokens}
