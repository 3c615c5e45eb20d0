"""The HTTP face of the gateway: its routes."""

import asyncio
import json
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import (
    AbstractAsyncContextManager,
    aclosing,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from pathlib import Path
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from tolhouse import __version__, tracing
from tolhouse.config import GatewayConfig
from tolhouse.errors import Cancelled, InUse, TolhouseError
from tolhouse.gateway import explore, problems
from tolhouse.gateway.chat import Chat, ChatForm
from tolhouse.gateway.completions import Completion, CompletionForm
from tolhouse.gateway.intake import RequestLimitsMiddleware
from tolhouse.gateway.keys import AuthMiddleware
from tolhouse.gateway.metrics import WORKERS, Measured
from tolhouse.gateway.pool import Pool
from tolhouse.gateway.run import Run
from tolhouse.gateway.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ExploreRequest,
    TokenizeRequest,
)
from tolhouse.gateway.server import MAX_HEADER_BYTES, Limits, Server
from tolhouse.gateway.template import ChatTemplate
from tolhouse.gateway.vocabulary import Vocabulary, check_ids
from tolhouse.logs import event, ready, redirect_log, split_address
from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer, tokenizer_id
from tolhouse.net.dns import Addresses
from tolhouse.net.server import finish_startup

T = TypeVar("T")


def create_app(pool: Pool, tokenizer_file: Path, config: GatewayConfig) -> ASGIApp:
    vocabulary = Vocabulary(load_tokenizer(tokenizer_file))
    template = ChatTemplate(tokenizer_file.parent)
    memory, page = (
        explore.open_memory(tokenizer_file.parent, tokenizer_id(tokenizer_file)),
        explore.PAGE.read_text(),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(pool.watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    at_once = asyncio.Semaphore(_AT_ONCE)
    app = FastAPI(
        title="Tolhouse",
        version=__version__,
        lifespan=lifespan,
        responses=_PROBLEMS,
        redirect_slashes=False,
    )
    WORKERS.set_function(lambda: len(pool.healthy()))

    @app.get("/health", responses={503: {"description": "No worker is healthy"}})
    async def health(request: Request) -> JSONResponse:
        """200 while at least one worker is healthy. Which they are is told to callers with a key, where there are keys."""
        ok = bool(pool.healthy())
        body: dict[str, Any] = {"status": "ok" if ok else "unavailable"}
        if getattr(request.state, "trusted", True):
            body["workers"] = {m.channel.target: str(m.trouble or "healthy") for m in pool.members}
        return JSONResponse(body, 200 if ok else 503)

    @app.api_route(
        "/ping", methods=["GET", "POST"], responses={503: {"description": "No worker is healthy"}}
    )
    async def ping() -> JSONResponse:
        """As health, without words."""
        return JSONResponse({}, 200 if pool.healthy() else 503)

    @app.get("/version")
    async def version() -> dict:
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    def card(name: str) -> dict:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "tolhouse",
            "max_model_len": pool.limits(name).context_tokens,
        }

    @app.get("/v1/models")
    async def models() -> dict:
        """The models that healthy workers serve."""
        return {"object": "list", "data": [card(name) for name in pool.models()]}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict:
        return card(pool.check_model(model))

    @app.post("/v1/completions", response_model=Completion, responses=_STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Completes one or more prompts; with `stream`, as server-sent events."""
        name = pool.check_model(body.model)
        pool.check_room(name)
        most = pool.limits(name).context_tokens
        prompts = [await vocabulary.ids(p, most) if isinstance(p, str) else p for p in body.prompts]
        run = Run(body, prompts, name, pool, vocabulary, request.state.request_id, _turn(request))
        return await _answer(request, run, CompletionForm(run))

    @app.post("/v1/chat/completions", response_model=Chat, responses=_STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answers messages, by the checkpoint's chat template; with `stream`, as server-sent events."""
        name = pool.check_model(body.model)
        pool.check_room(name)
        text = template.render([message.plain for message in body.messages])
        ids = await vocabulary.ids(text, pool.limits(name).context_tokens)
        run = Run(body, [ids], name, pool, vocabulary, request.state.request_id, _turn(request))
        return await _answer(request, run, ChatForm(run))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of messages."""
        limits = pool.limits(pool.check_model(body.model))
        text = body.prompt or ""
        if body.messages is not None:
            text = template.render(
                [m.plain for m in body.messages], add_generation_prompt=body.add_generation_prompt
            )

        def answer(ids: list[int]) -> Response:
            strings = [vocabulary.shown(i)[0] for i in ids] if body.return_token_strs else None
            return JSONResponse(
                {
                    "tokens": ids,
                    "count": len(ids),
                    "max_model_len": limits.context_tokens,
                    "token_strs": strings,
                }
            )

        async with at_once:
            return await asyncio.to_thread(
                answer, await vocabulary.ids(text, special=body.add_special_tokens)
            )

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict:
        """The text of token ids."""
        limits = pool.limits(pool.check_model(body.model))
        async with at_once:
            return {
                "prompt": await asyncio.to_thread(
                    vocabulary.text, check_ids(body.tokens, limits.vocab_size)
                )
            }

    @app.get("/explore", response_class=HTMLResponse)
    async def explore_page() -> Response:
        """A page to look into the model's memory and to try what becomes of a completion without parts of it."""
        return HTMLResponse(page)

    @app.post("/explore/tokens")
    async def explore_tokens(body: ExploreRequest) -> Response:
        """Tokens of a text, each with the norms of its rows."""
        layers = max((m.described.row_layers for m in pool.healthy() if m.described), default=0)
        shown = None if explore.why_absent(memory, pool) else memory

        def answer(ids: list[int]) -> Response:
            return JSONResponse(
                {"layers": layers, "tokens": explore.tokens(ids, vocabulary, shown)}
            )

        async with at_once:
            return await asyncio.to_thread(answer, await vocabulary.ids(body.text))

    @app.get("/explore/tokens/{token_id}")
    async def explore_token(token_id: Annotated[int, PathParameter(ge=0, lt=2**32)]) -> dict:
        """What the memory holds for a token: its keys with who shares them, and its neighbours."""
        why = explore.why_absent(memory, pool)
        return explore.token(token_id, vocabulary, None if why else memory, why)

    @app.get("/explore/live")
    async def explore_live() -> dict:
        """Counts of the workers, for rates, and what their table is to the model."""
        return explore.live(pool, memory)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict:
        """Special tokens and the chat template, for clients that have no tokenizer of their own."""
        eos = vocabulary.tokenizer.id_to_token(pool.limits(pool.check_model(None)).eos_token_id)
        return {
            "eos_token": eos,
            "bos_token": None,
            "pad_token": None,
            **template.tokens,
            "chat_template": template.source,
        }

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        known = _BODIES[request.url.path].model_fields if request.url.path in _BODIES else ()
        return JSONResponse(problems.invalid(error.errors(), known), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(
            problems.body_of(str(error.detail), error.status_code),
            error.status_code,
            headers=error.headers,
        )

    @app.exception_handler(TolhouseError)
    async def failed(request: Request, error: TolhouseError) -> JSONResponse:
        status, body = problems.answer_of(error, request.state.request_id)
        return JSONResponse(
            body, status, headers={"Retry-After": "1"} if status in (429, 503) else None
        )

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        status, body = problems.answer_of(error, request.state.request_id)
        return JSONResponse(body, status)

    keyed = AuthMiddleware(app, config.keys_file) if config.keys_file else app
    # around everything: also a refusal, and the answer to a defect, have an id and are counted
    taken_in = RequestLimitsMiddleware(
        keyed, int(config.max_body_megabytes * 1e6), config.body_timeout_seconds
    )
    return Measured(taken_in, {route.path for route in app.routes if isinstance(route, Route)})


_AT_ONCE = 2  # answers in the making that grow with the text: what they hold in memory, and how long others wait, is bounded so
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    "default": {"model": problems.Problem, "description": "What was wrong, and what is allowed"}
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}}
}  # with `stream`
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/explore/tokens": ExploreRequest,
}


def _turn(request: Request) -> AbstractAsyncContextManager[None]:
    """What a sequence waits for where there are keys: that fewer than the key's own run at once."""
    return getattr(request.state, "sequences", None) or nullcontext()


async def _answer(request: Request, run: Run, form: CompletionForm | ChatForm) -> Response:
    """The whole answer, or a stream of its pieces."""
    if not run.body.stream:
        return JSONResponse(
            form.whole(await _unless_disconnected(request, run.whole())).model_dump()
        )
    # the first piece is awaited before the status line goes out, so that an early failure has its own status
    pieces = run.pieces()
    first = await _unless_disconnected(request, anext(pieces))

    async def events() -> AsyncIterator[str]:
        try:
            async with aclosing(pieces):
                for chunk in form.chunks(first):
                    yield _event(chunk.model_dump_json())
                async for piece in pieces:
                    for chunk in form.chunks(piece):
                        yield _event(chunk.model_dump_json())
            if run.body.stream_options.include_usage:
                yield _event(form.usage().model_dump_json())
        except Exception as error:  # noqa: BLE001 - the status line is out: the error goes into the stream
            request.state.failed, body = problems.answer_of(error, run.request_id)
            yield _event(json.dumps(body))
        yield _event("[DONE]")

    return StreamingResponse(
        events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def run(checkpoint: str | Path, config: GatewayConfig) -> None:
    """Serve HTTP until told to stop. `checkpoint` is a folder with a tokenizer.json, or that file."""
    path = Path(checkpoint)
    file = path / TOKENIZER if path.is_dir() else path
    load_tokenizer(file)
    addresses, to_workers = Addresses(config.workers), config.client_credentials()
    addresses.check(to_workers)
    host, port = split_address(config.listen)
    credentials = config.server_credentials()
    tracing.start_tracing("gateway", config.traces, insecure=config.insecure)
    credentials.check(config.listen, "--listen")
    pool = Pool(addresses, to_workers, tokenizer_id(file), config.poll_seconds)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise InUse(
            f"gateway can't listen on {config.listen}: {error.strerror or error}; choose another --listen"
        ) from None
    settings = uvicorn.Config(
        create_app(pool, file, config),
        http="h11",
        ws="none",
        log_config=None,
        lifespan="on",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
    )
    limits = Limits(
        config.max_connections, config.header_timeout_seconds, config.body_timeout_seconds
    )
    server = Server(settings, limits, credentials.tls.context() if credentials.tls else None)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    redirect_log(
        "uvicorn", logging.ERROR
    )  # its warnings are of single requests, of which our own log tells
    finish_startup()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready("gateway", f"{host}:{listener.getsockname()[1]}")
    await serving
    event("stopped", service="gateway")


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
