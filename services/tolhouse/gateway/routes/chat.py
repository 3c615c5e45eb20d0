"""POST /v1/chat/completions."""

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from tolhouse.gateway.detokenizer import Delta, Token
from tolhouse.gateway.request_handler import RequestHandler, Usage
from tolhouse.gateway.routes import Gateway
from tolhouse.gateway.routes.responses import STREAMED, Envelope, Serializer, respond
from tolhouse.gateway.schemas import ChatRequest


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


class ChunkChoice(BaseModel):
    index: int
    delta: dict[str, str]
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Choice(BaseModel):
    index: int
    message: Message
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Chat(Envelope):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]


class Chunk(Envelope):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]


class ChatSerializer(Serializer):
    prefix = "chatcmpl"

    def __init__(self, handler: RequestHandler) -> None:
        super().__init__(handler)
        self.begun: set[int] = set()  # choices whose role has been sent

    def whole(self, deltas: list[Delta]) -> Chat:
        choices = [Choice(message=Message(content=d.text), **self._common(d)) for d in deltas]
        return Chat(**self.envelope, choices=choices, usage=self.handler.usage())

    def chunk(self, *deltas: Delta, usage: Usage | None = None) -> Chunk:
        choices = []
        for delta in deltas:
            content = {"content": delta.text} if delta.text else {}
            if delta.index not in self.begun:
                content = {"role": "assistant", "content": delta.text}
                self.begun.add(delta.index)
            choices.append(ChunkChoice(delta=content, **self._common(delta)))
        return Chunk(**self.envelope, choices=choices, usage=usage)

    def _common(self, delta: Delta) -> dict[str, Any]:
        content = [self._logprob(token) for token in delta.tokens]
        logprobs = Logprobs(content=content) if self.scored else None
        reason = delta.finish_reason
        return {"index": delta.index, "logprobs": logprobs, "finish_reason": reason}

    def _logprob(self, token: Token) -> TokenLogprob:
        top = [TopLogprob(**self._shown(*pair)) for pair in token.top]
        return TokenLogprob(**self._shown(token.id, token.logprob or 0.0), top_logprobs=top)

    def _shown(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self.vocabulary.shown(token_id)
        return {"token": text, "logprob": logprob, "bytes": raw}


routes = APIRouter()


@routes.post("/v1/chat/completions", response_model=Chat, responses=STREAMED)
async def chat(body: ChatRequest, request: Request, gateway: Gateway) -> Response:
    """Answers messages by the checkpoint's chat template; with `stream`, as server-sent events."""

    def prompts() -> list[str]:
        return [gateway.template.render([message.plain for message in body.messages])]

    return await respond(request, body, prompts, gateway, ChatSerializer)
