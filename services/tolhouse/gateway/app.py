"""The gateway's application and its process."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route

from tolhouse import __version__, tracing
from tolhouse.config import GatewayConfig
from tolhouse.gateway.auth import AuthMiddleware
from tolhouse.gateway.connection import serve
from tolhouse.gateway.error_responses import ErrorResponse, add_error_handlers
from tolhouse.gateway.explorer.data import Explorer
from tolhouse.gateway.metrics import WORKERS
from tolhouse.gateway.middleware import (
    MetricsMiddleware,
    RequestLimitsMiddleware,
    cors_middleware,
)
from tolhouse.gateway.rate_limit import RateLimiter
from tolhouse.gateway.router import WorkerRouter
from tolhouse.gateway.routes import Services, routes
from tolhouse.gateway.templates import ChatTemplate
from tolhouse.gateway.text import Vocabulary
from tolhouse.logs import event
from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer, tokenizer_id
from tolhouse.net.channel import Addresses
from tolhouse.net.server import finish_startup


async def run(checkpoint: str | Path, config: GatewayConfig) -> None:
    """Serve until SIGTERM. `checkpoint` is a folder with a tokenizer.json, or that file."""
    path = Path(checkpoint)
    file = path / TOKENIZER if path.is_dir() else path
    vocabulary = Vocabulary(load_tokenizer(file))
    addresses = Addresses(config.workers, config.client_credentials())
    credentials = config.server_credentials()
    credentials.check(config.listen, "--listen")
    tracing.start_tracing("gateway", config.traces, insecure=config.insecure)
    router = WorkerRouter(addresses, tokenizer_id(file), config.poll_seconds)
    limiter = RateLimiter(config.rate_limit_store, insecure=config.insecure)
    error = {"model": ErrorResponse, "description": "The reason, and what is allowed"}
    # Disabled, because FastAPI's documentation pages load scripts from other hosts.
    pages: dict[str, Any] = {"docs_url": None, "redoc_url": None}
    app = FastAPI(title="Tolhouse", version=__version__, responses={"default": error}, **pages)
    app.router.redirect_slashes = False
    explorer = Explorer(file.parent, router, vocabulary)
    app.state.services = Services(router, vocabulary, ChatTemplate(file.parent), explorer)
    app.include_router(routes)
    add_error_handlers(app)
    WORKERS.set_function(lambda: len(router.healthy()))
    # Around the app, so that responses to internal errors are also counted and have an id.
    keyed = AuthMiddleware(app, config.keys_file, limiter) if config.keys_file else app
    max_body_bytes = int(config.max_body_megabytes * 1e6)
    cors = cors_middleware(config.cors_origins)
    limited = RequestLimitsMiddleware(keyed, max_body_bytes, config.body_timeout_seconds, cors)
    outer = MetricsMiddleware(limited, {r.path for r in routes.routes if isinstance(r, Route)})
    finish_startup()
    watching = asyncio.create_task(router.watch())
    await serve(outer, config, credentials.for_http())
    watching.cancel()
    await asyncio.gather(watching, limiter.close(), return_exceptions=True)
    event("stopped", service="gateway")
