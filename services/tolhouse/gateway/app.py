"""The gateway's application and its process."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import ASGIApp

from tolhouse import __version__, tracing
from tolhouse.config import GatewayConfig
from tolhouse.errors import InUse
from tolhouse.gateway.auth import AuthMiddleware
from tolhouse.gateway.connection import serve
from tolhouse.gateway.error_responses import ErrorResponse, add_error_handlers
from tolhouse.gateway.explore import open_memory
from tolhouse.gateway.metrics import WORKERS
from tolhouse.gateway.middleware import MetricsMiddleware, RequestLimitsMiddleware
from tolhouse.gateway.rate_limit import RateLimiter
from tolhouse.gateway.router import WorkerRouter
from tolhouse.gateway.routes import Services, chat, completions, explore, models, tokenization
from tolhouse.gateway.templates import ChatTemplate
from tolhouse.gateway.vocabulary import Vocabulary
from tolhouse.logs import event, ready, split_address
from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer, tokenizer_id
from tolhouse.net.dns import Addresses
from tolhouse.net.server import finish_startup

_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorResponse, "description": "What was wrong, and what is allowed"}
}


def create_app(router: WorkerRouter, tokenizer_file: Path, config: GatewayConfig) -> ASGIApp:
    folder = tokenizer_file.parent
    limiter = RateLimiter(config.rate_limit_store, insecure=config.insecure)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(router.watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await limiter.close()

    app = FastAPI(
        title="Tolhouse",
        version=__version__,
        lifespan=lifespan,
        responses=_ERRORS,
        redirect_slashes=False,
    )
    app.state.services = Services(
        router,
        Vocabulary(load_tokenizer(tokenizer_file)),
        ChatTemplate(folder),
        open_memory(folder, tokenizer_id(tokenizer_file)),
    )
    parts = [part.routes for part in (completions, chat, tokenization, explore, models)]
    for part in parts:
        app.include_router(part)
    add_error_handlers(app)
    WORKERS.set_function(lambda: len(router.healthy()))
    # around the app, not inside: the answer to a defect too has an id and is counted
    keyed = AuthMiddleware(app, config.keys_file, limiter) if config.keys_file else app
    max_body_bytes = int(config.max_body_megabytes * 1e6)
    limited = RequestLimitsMiddleware(keyed, max_body_bytes, config.body_timeout_seconds)
    paths = {route.path for part in parts for route in part.routes if isinstance(route, Route)}
    return MetricsMiddleware(limited, paths)


async def run(checkpoint: str | Path, config: GatewayConfig) -> None:
    """Serve until SIGTERM. `checkpoint` is a folder with a tokenizer.json, or that file."""
    path = Path(checkpoint)
    file = path / TOKENIZER if path.is_dir() else path
    load_tokenizer(file)
    addresses = Addresses(config.workers, config.client_credentials())
    host, port = split_address(config.listen)
    credentials = config.server_credentials()
    tracing.start_tracing("gateway", config.traces, insecure=config.insecure)
    credentials.check(config.listen, "--listen")
    router = WorkerRouter(addresses, tokenizer_id(file), config.poll_seconds)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        reason = f"{error.strerror or error}; choose another --listen"
        raise InUse(f"gateway can't listen on {config.listen}: {reason}") from None
    app = create_app(router, file, config)
    tls = credentials.tls.context() if credentials.tls else None
    finish_startup()
    address = f"{host}:{listener.getsockname()[1]}"
    await serve(app, config, listener, tls, lambda: ready("gateway", address))
    event("stopped", service="gateway")
