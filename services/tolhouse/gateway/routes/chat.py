"""POST /v1/chat/completions."""

from collections.abc import Iterator
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from tolhouse.gateway.detokenizer import Delta, Token
from tolhouse.gateway.request_handler import RequestHandler, Usage
from tolhouse.gateway.routes import Gateway
from tolhouse.gateway.routes.responses import STREAMED, handle, respond
from tolhouse.gateway.schemas import ChatRequest
from tolhouse.gateway.vocabulary import Vocabulary


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class Message(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: Message
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Chat(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int  # Unix time, seconds
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str | None = None  # the table's version


class ChunkChoice(BaseModel):
    index: int
    delta: dict[str, str]
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Chunk(BaseModel):
    """A part of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None  # the table's version


class ChatSerializer:
    def __init__(self, handler: RequestHandler) -> None:
        self.handler = handler
        self.begun: set[int] = set()  # choices whose role has been sent

    def whole(self, deltas: list[Delta]) -> Chat:
        choices = [Choice(message=Message(content=d.text), **self._common(d)) for d in deltas]
        envelope, usage = self.handler.envelope("chatcmpl"), self.handler.usage()
        return Chat(**envelope, choices=choices, usage=usage)

    def chunks(self, delta: Delta) -> Iterator[Chunk]:
        if delta.index not in self.begun:
            self.begun.add(delta.index)
            role = {"role": "assistant", "content": ""}
            yield self._chunk([ChunkChoice(index=delta.index, delta=role)])
        content = {"content": delta.text} if delta.text else {}
        yield self._chunk([ChunkChoice(delta=content, **self._common(delta))])

    def usage(self) -> Chunk:
        return self._chunk([], self.handler.usage())

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> Chunk:
        return Chunk(**self.handler.envelope("chatcmpl"), choices=choices, usage=usage)

    def _common(self, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if self.handler.body.num_logprobs is not None:
            scored = [_logprob(token, self.handler.vocabulary) for token in delta.tokens]
            logprobs = Logprobs(content=scored)
        return {
            "index": delta.index,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }


def _logprob(token: Token, vocabulary: Vocabulary) -> TokenLogprob:
    def fields(token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = vocabulary.shown(token_id)
        return {"token": text, "logprob": logprob, "bytes": raw}

    top = [TopLogprob(**fields(*pair)) for pair in token.top]
    return TokenLogprob(**fields(token.id, token.logprob or 0.0), top_logprobs=top)


routes = APIRouter()


@routes.post("/v1/chat/completions", response_model=Chat, responses=STREAMED)
async def chat(body: ChatRequest, request: Request, gateway: Gateway) -> Response:
    """Answers messages by the checkpoint's chat template; with `stream`, as server-sent events."""
    prompt = gateway.template.render([message.plain for message in body.messages])
    handler = await handle(request, body, [prompt], gateway)
    return await respond(request, handler, ChatSerializer(handler))
