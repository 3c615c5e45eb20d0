"""Served models, health, version and metrics."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tolhouse import __version__
from tolhouse.gateway.routes import Gateway, Services

routes = APIRouter()
UNHEALTHY: dict[int | str, dict[str, Any]] = {503: {"description": "No worker is healthy"}}


@routes.get("/health", responses=UNHEALTHY)
async def health(request: Request, gateway: Gateway) -> JSONResponse:
    """200 while a worker is healthy. With API keys, only callers with one see the workers."""
    healthy = gateway.router.healthy()
    body: dict[str, Any] = {"status": "ok" if healthy else "unavailable"}
    if getattr(request.state, "trusted", True):
        workers = gateway.router.workers
        body["workers"] = {w.target: str(w.error or "healthy") for w in workers}
    return JSONResponse(body, 200 if healthy else 503)


@routes.api_route("/ping", methods=["GET", "POST"], responses=UNHEALTHY)
async def ping(gateway: Gateway) -> JSONResponse:
    """As health, without words."""
    return JSONResponse({}, 200 if gateway.router.healthy() else 503)


@routes.get("/version")
async def version() -> dict:
    return {"version": __version__}


@routes.get("/metrics", response_class=PlainTextResponse)
async def metrics() -> Response:
    """Metrics in Prometheus' text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@routes.get("/v1/models")
async def models(gateway: Gateway) -> dict:
    """The models that healthy workers serve."""
    data = [_card(gateway, name) for name in gateway.router.models()]
    return {"object": "list", "data": data}


@routes.get("/v1/models/{model}")
async def model(model: str, gateway: Gateway) -> dict:
    return _card(gateway, model)


def _card(gateway: Services, name: str) -> dict[str, Any]:
    model = gateway.router.model(name)
    card = {"id": name, "object": "model", "created": 0, "owned_by": "tolhouse"}
    return {**card, "max_model_len": model.context_tokens}
