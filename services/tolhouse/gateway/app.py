"""The HTTP face of the gateway: routes, and errors in OpenAI's form."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from tolhouse import __version__
from tolhouse.config import GatewayConfig
from tolhouse.errors import Cancelled, Internal, InUse, TolhouseError
from tolhouse.gateway.completions import CompletionRun
from tolhouse.gateway.metrics import TOKENS, WORKERS, Measured
from tolhouse.gateway.pool import Pool
from tolhouse.gateway.schema import Completion, CompletionRequest
from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer, tokenizer_id
from tolhouse.telemetry import event, log, ready, split_address

T = TypeVar("T")


def create_app(pool: Pool, tokenizer_file: Path) -> FastAPI:
    tokenizer = load_tokenizer(tokenizer_file)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(pool.watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await pool.close()

    app = FastAPI(title="Tolhouse", version=__version__, lifespan=lifespan)
    app.add_middleware(Measured)
    WORKERS.set_function(lambda: len(pool.healthy()))

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while at least one worker is healthy."""
        workers = {m.channel.target: str(m.trouble or "healthy") for m in pool.members}
        ok = bool(pool.healthy())
        return JSONResponse({"status": "ok" if ok else "unavailable", "workers": workers}, 200 if ok else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict:
        """The models that healthy workers serve."""
        return {"object": "list", "data": [_model(name) for name in pool.models()]}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict:
        return _model(pool.check_model(model))

    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Completes one or more prompts; with `stream`, as server-sent events."""
        run = CompletionRun(body, pool, tokenizer, pool.check_model(body.model))
        if not body.stream:
            completion = await _unless_disconnected(request, run.completion())
            TOKENS.inc(run.completion_tokens)
            return JSONResponse(completion.model_dump())
        # the first piece is awaited before the status line goes out, so that an early failure has its own status
        pieces = run.pieces()
        first = await _unless_disconnected(request, anext(pieces))

        async def events() -> AsyncIterator[str]:
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            try:
                async with aclosing(pieces):
                    yield _event(run.envelope([first]).model_dump_json())
                    async for piece in pieces:
                        yield _event(run.envelope([piece]).model_dump_json())
                if include_usage:
                    yield _event(run.envelope([], run.usage()).model_dump_json())
            except Exception as error:  # noqa: BLE001 - the status line is out: the error goes into the stream
                yield _event(json.dumps(_error(error)[1]))
            finally:
                TOKENS.inc(run.completion_tokens)
            yield _event("[DONE]")

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_body(_explain(error), 400, "invalid_request_error", _place(error)), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(_body(str(error.detail), error.status_code, "invalid_request_error"), error.status_code, headers=error.headers)

    @app.exception_handler(TolhouseError)
    async def failed(_: Request, error: TolhouseError) -> JSONResponse:
        status, body = _error(error)
        return JSONResponse(body, status, headers={"Retry-After": "1"} if status in (429, 503) else None)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        status, body = _error(error)
        return JSONResponse(body, status)

    return app


async def run(checkpoint: str | Path, config: GatewayConfig) -> None:
    """Serve HTTP until told to stop. `checkpoint` is a folder with a tokenizer.json, or that file."""
    path = Path(checkpoint)
    file = path / TOKENIZER if path.is_dir() else path
    load_tokenizer(file)
    targets = [t.strip() for t in config.workers.split(",") if t.strip()]
    for target in targets:
        split_address(target)
    host, port = split_address(config.listen)
    pool = Pool(targets, tokenizer_id(file), config.poll_seconds)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise InUse(f"gateway can't listen on {config.listen}: {error.strerror or error}; choose another --listen") from None
    settings = uvicorn.Config(
        create_app(pool, file), log_config=None, lifespan="on", timeout_graceful_shutdown=max(1, round(config.drain_seconds))
    )
    server = _Server(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready("gateway", f"{host}:{listener.getsockname()[1]}")
    await serving
    event("stopped", service="gateway")


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: uvicorn would raise them again once it has drained, and end the process with an error."""
        yield


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _model(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tolhouse"}


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


def _error(error: Exception) -> tuple[int, dict]:
    """HTTP status and body of an error; a defect of ours is logged whole and told in a line."""
    if not isinstance(error, TolhouseError):
        log.error("internal error", exc_info=error)
        error = Internal("internal error; the gateway's log has the details")
    status = error.http_status
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return status, _body(str(error), status, kinds.get(status, "invalid_request_error" if status < 500 else "server_error"))


def _body(message: str, code: int, kind: str, param: str | None = None) -> dict:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _place(error: RequestValidationError) -> str | None:
    loc = [str(part) for part in error.errors()[0]["loc"][1:2]]
    return loc[0] if loc and not loc[0].isdigit() else None


def _explain(error: RequestValidationError) -> str:
    """What was wrong with a body, and what is allowed."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    place = _place(error)
    if first["type"] == "extra_forbidden" and place:
        return f"unknown parameter {place!r}; known are {', '.join(CompletionRequest.model_fields)}"
    if first["type"] == "missing" and place:
        return f"parameter {place!r} is required"
    if place == "prompt":
        return "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids"
    if not place and first["type"] != "value_error":
        return "the body must be a JSON object, sent with Content-Type: application/json"
    return f"{place}: {first['msg']}" if place else first["msg"].removeprefix("Value error, ")
