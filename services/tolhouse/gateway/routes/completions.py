"""POST /v1/completions."""

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from tolhouse.gateway.detokenizer import Delta, Token
from tolhouse.gateway.request_handler import Usage
from tolhouse.gateway.routes import Gateway
from tolhouse.gateway.routes.responses import STREAMED, Envelope, Serializer, respond
from tolhouse.gateway.schemas import CompletionRequest


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


class Completion(Envelope):
    object: Literal["text_completion"] = "text_completion"
    choices: list[Choice]


class CompletionSerializer(Serializer):
    prefix = "cmpl"

    def whole(self, deltas: list[Delta]) -> Completion:
        return self.chunk(*deltas, usage=self.handler.usage())

    def chunk(self, *deltas: Delta, usage: Usage | None = None) -> Completion:
        choices = [
            Choice(
                index=delta.index,
                text=delta.text,
                logprobs=self._logprobs(delta.tokens) if self.scored else None,
                finish_reason=delta.finish_reason,
            )
            for delta in deltas
        ]
        return Completion(**self.envelope, choices=choices, usage=usage)

    def _logprobs(self, tokens: list[Token]) -> Logprobs:
        return Logprobs(
            tokens=[self.vocabulary.shown(token.id)[0] for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[self._by_text(token) for token in tokens],
            text_offset=[token.offset for token in tokens],
        )

    def _by_text(self, token: Token) -> dict[str, float] | None:
        """The likeliest and the token itself; of several with one text, the likeliest."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for i, logprob in (*token.top, (token.id, token.logprob)):
            found.setdefault(self.vocabulary.shown(i)[0], logprob)
        return found


routes = APIRouter()


@routes.post("/v1/completions", response_model=Completion, responses=STREAMED)
async def completions(body: CompletionRequest, request: Request, gateway: Gateway) -> Response:
    """Completes one or more prompts; with `stream`, as server-sent events."""
    return await respond(request, body, lambda: body.prompts, gateway, CompletionSerializer)
