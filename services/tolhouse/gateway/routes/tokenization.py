"""Text to token ids and back."""

import asyncio

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from tolhouse.gateway.routes import Gateway
from tolhouse.gateway.schemas import DetokenizeRequest, TokenizeRequest
from tolhouse.gateway.vocabulary import check_ids

routes = APIRouter()


@routes.post("/tokenize")
async def tokenize(body: TokenizeRequest, gateway: Gateway) -> Response:
    """Token ids of a text, or of messages."""
    model, vocabulary = gateway.router.model(body.model), gateway.vocabulary
    text = body.prompt or ""
    if body.messages is not None:
        messages = [m.plain for m in body.messages]
        generates = body.add_generation_prompt
        text = gateway.template.render(messages, add_generation_prompt=generates)

    def respond(ids: list[int]) -> Response:
        strings = [vocabulary.shown(i)[0] for i in ids] if body.return_token_strs else None
        counts = {"count": len(ids), "max_model_len": model.context_tokens}
        return JSONResponse({"tokens": ids, **counts, "token_strs": strings})

    async with vocabulary.large:
        ids = await vocabulary.ids(text, special=body.add_special_tokens)
        return await asyncio.to_thread(respond, ids)


@routes.post("/detokenize")
async def detokenize(body: DetokenizeRequest, gateway: Gateway) -> dict:
    """The text of token ids."""
    ids = check_ids(body.tokens, gateway.router.model(body.model).vocab_size)
    async with gateway.vocabulary.large:
        return {"prompt": await asyncio.to_thread(gateway.vocabulary.text, ids)}


@routes.get("/tokenizer_info")
async def tokenizer_info(gateway: Gateway) -> dict:
    """Special tokens and the chat template, for clients that have no tokenizer of their own."""
    end = gateway.router.model(None).eos_token_id
    eos = gateway.vocabulary.tokenizer.id_to_token(end)
    tokens = {"eos_token": eos, "bos_token": None, "pad_token": None, **gateway.template.tokens}
    return {**tokens, "chat_template": gateway.template.source}
