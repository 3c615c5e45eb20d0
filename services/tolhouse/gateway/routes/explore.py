"""The explorer page and what it asks for."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import HTMLResponse, JSONResponse

from tolhouse.gateway import explore
from tolhouse.gateway.routes import Gateway
from tolhouse.gateway.schemas import ExploreRequest

routes = APIRouter(prefix="/explore")


@routes.get("", response_class=HTMLResponse)
async def page() -> Response:
    """A page to look into the model's memory, and to complete text without parts of it."""
    return HTMLResponse(explore.page())


@routes.post("/tokens")
async def tokens(body: ExploreRequest, gateway: Gateway) -> Response:
    """Tokens of a text, each with the norms of its rows."""
    layers = max((d.row_layers for d in gateway.router.descriptions()), default=0)
    memory = None if explore.hidden_reason(gateway.memory, gateway.router) else gateway.memory

    def respond(ids: list[int]) -> Response:
        found = explore.tokens(ids, gateway.vocabulary, memory)
        return JSONResponse({"layers": layers, "tokens": found})

    async with gateway.vocabulary.large:
        return await asyncio.to_thread(respond, await gateway.vocabulary.ids(body.text))


@routes.get("/tokens/{token_id}")
async def token(token_id: Annotated[int, Path(ge=0, lt=2**32)], gateway: Gateway) -> dict:
    """What the memory holds for a token: its keys with who shares them, and its neighbours."""
    return explore.token(token_id, gateway.vocabulary, gateway.memory, gateway.router)


@routes.get("/live")
async def live(gateway: Gateway) -> dict:
    """Counts of the workers, for rates, and what their table is to the model."""
    return explore.live(gateway.router, gateway.memory)
