"""POST /v1/completions."""

from collections.abc import Iterator
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from tolhouse.gateway.detokenizer import Delta, Token
from tolhouse.gateway.request_handler import RequestHandler, Usage
from tolhouse.gateway.routes import Gateway
from tolhouse.gateway.routes.responses import STREAMED, handle, respond
from tolhouse.gateway.schemas import CompletionRequest
from tolhouse.gateway.vocabulary import Vocabulary


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    """The answer, and each chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int  # Unix time, seconds
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    system_fingerprint: str | None = None  # the table's version


class CompletionSerializer:
    def __init__(self, handler: RequestHandler) -> None:
        self.handler = handler

    def whole(self, deltas: list[Delta]) -> Completion:
        return self._completion(deltas, self.handler.usage())

    def chunks(self, delta: Delta) -> Iterator[Completion]:
        yield self._completion([delta])

    def usage(self) -> Completion:
        return self._completion([], self.handler.usage())

    def _completion(self, deltas: list[Delta], usage: Usage | None = None) -> Completion:
        scored = self.handler.body.num_logprobs is not None
        choices = [
            Choice(
                index=delta.index,
                text=delta.text,
                logprobs=_logprobs(delta.tokens, self.handler.vocabulary) if scored else None,
                finish_reason=delta.finish_reason,
            )
            for delta in deltas
        ]
        return Completion(**self.handler.envelope("cmpl"), choices=choices, usage=usage)


def _logprobs(tokens: list[Token], vocabulary: Vocabulary) -> Logprobs:
    def by_text(token: Token) -> dict[str, float] | None:
        """The likeliest and the token itself; of several with one text, the likeliest."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for i, logprob in (*token.top, (token.id, token.logprob)):
            found.setdefault(vocabulary.shown(i)[0], logprob)
        return found

    return Logprobs(
        tokens=[vocabulary.shown(token.id)[0] for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[by_text(token) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )


routes = APIRouter()


@routes.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def completions(body: CompletionRequest, request: Request, gateway: Gateway) -> Response:
    """Completes one or more prompts; with `stream`, as server-sent events."""
    handler = await handle(request, body, body.prompts, gateway)
    return await respond(request, handler, CompletionSerializer(handler))
