"""Deltas of choices in OpenAI's form: as one response, or as the chunks of a stream."""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from tolhouse.gateway.request_handler import RequestHandler
from tolhouse.gateway.text import Delta, Token

T = TypeVar("T")


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Message(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel, Generic[T]):
    index: int
    logprobs: T | None
    finish_reason: str | None


class CompletionChoice(Choice[CompletionLogprobs]):
    text: str


class ChatChoice(Choice[ChatLogprobs]):
    message: Message


class ChunkChoice(Choice[ChatLogprobs]):
    delta: dict[str, str]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Envelope(BaseModel, Generic[T]):
    id: str
    created: int  # Unix time, seconds
    model: str
    choices: list[T]
    usage: Usage | None
    system_fingerprint: str | None  # the table's version


class Completion(Envelope[CompletionChoice]):
    object: Literal["text_completion"] = "text_completion"


class Chat(Envelope[ChatChoice]):
    object: Literal["chat.completion"] = "chat.completion"


class Chunk(Envelope[ChunkChoice]):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Serializer:
    """A request's deltas in the form of /v1/completions."""

    prefix = "cmpl"  # of ids
    whole: type[BaseModel] = Completion
    chunk: type[BaseModel] = Completion

    def __init__(self, handler: RequestHandler) -> None:
        self.handler, self.shown = handler, handler.vocabulary.shown
        self.stream = handler.body.stream
        self.begun: set[int] = set()  # choices whose role has been sent

    def to_json(self, *deltas: Delta) -> str:
        """A chunk, or the whole response; usage is in this, and in a chunk without choices."""
        handler, usage = self.handler, None
        if not (self.stream and deltas):
            p, n = sum(map(len, handler.prompts)), handler.completion_tokens
            usage = {"prompt_tokens": p, "completion_tokens": n, "total_tokens": p + n}
        scored = handler.body.num_logprobs is not None
        choices = []
        for delta in deltas:
            scores = self.logprobs(delta.tokens) if scored else None
            item = {"index": delta.index, "finish_reason": delta.finish_reason, "logprobs": scores}
            choices.append({**item, **self.content(delta)})
        fields = {"created": handler.created, "model": handler.model.name, "usage": usage}
        fields |= {"id": f"{self.prefix}-{handler.request_id}", "choices": choices}
        kind = self.chunk if self.stream else self.whole
        return kind(**fields, system_fingerprint=handler.table).model_dump_json()

    def content(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        tops: list[dict[str, float | None] | None] = []
        for token in tokens:
            found: dict[str, float | None] = {}  # the likeliest of several with one text
            for i, logprob in (*token.top, (token.id, token.logprob)):
                found.setdefault(self.shown(i)[0], logprob)
            tops.append(None if token.logprob is None else found)
        return {
            "tokens": [self.shown(token.id)[0] for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }


class ChatSerializer(Serializer):
    """A request's deltas in the form of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", Chat, Chunk

    def content(self, delta: Delta) -> dict[str, Any]:
        if not self.stream:
            return {"message": {"content": delta.text}}
        role = {} if delta.index in self.begun else {"role": "assistant"}
        self.begun.add(delta.index)
        return {"delta": {**role, "content": delta.text}}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        def scored(i: int, logprob: float | None) -> dict[str, Any]:
            text, raw = self.shown(i)
            return {"token": text, "logprob": logprob, "bytes": raw}

        tops = [[scored(*pair) for pair in token.top] for token in tokens]
        own = [scored(token.id, token.logprob) for token in tokens]
        return {"content": [{**o, "top_logprobs": t} for o, t in zip(own, tops, strict=True)]}
