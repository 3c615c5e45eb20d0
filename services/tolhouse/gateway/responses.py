"""Responses in OpenAI's form, whole or as the chunks of a stream.

The models only describe responses in the API's schema. The JSON is written without them, in short
steps that do not block the event loop.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from tolhouse.gateway.request_handler import RequestHandler
from tolhouse.gateway.text import Delta, Token
from tolhouse.gateway.turns import ITEMS, list_json, to_json

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
    system_fingerprint: str | None  # the version of the table


class Completion(Envelope[CompletionChoice]):
    object: Literal["text_completion"] = "text_completion"


class Chat(Envelope[ChatChoice]):
    object: Literal["chat.completion"] = "chat.completion"


class Serializer:
    """A request's deltas in the form of /v1/completions."""

    prefix = "cmpl"  # the prefix of ids
    kinds = "text_completion", "text_completion"  # the `object` of a response and of a chunk

    def __init__(self, handler: RequestHandler) -> None:
        self.handler, self.shown = handler, handler.vocabulary.shown
        self.stream = handler.body.stream
        self.begun: set[int] = set()  # choices whose role has been sent

    async def to_json(self, *deltas: Delta) -> str:
        """Return a chunk, or the whole response.

        A chunk without choices has the usage of the request.
        """
        handler, usage, options = self.handler, None, self.handler.body.stream_options
        chunk = self.stream and deltas
        if not chunk or (options.include_usage and options.continuous_usage_stats):
            n = deltas[0].completion_tokens if chunk else handler.completion_tokens
            p = handler.prompt_tokens
            usage = {"prompt_tokens": p, "completion_tokens": n, "total_tokens": p + n}
        fields: dict[str, Any] = {"id": f"{self.prefix}-{handler.request_id}"}
        fields |= {"object": self.kinds[self.stream], "system_fingerprint": handler.table}
        fields |= {"created": handler.created, "model": handler.model.name, "usage": usage}
        choices = ",".join([await self._choice(delta) for delta in deltas])
        return f'{to_json(fields)[:-1]},"choices":[{choices}]}}'

    async def _choice(self, delta: Delta) -> str:
        fields: dict[str, Any] = {"index": delta.index, "finish_reason": delta.finish_reason}
        fields |= self.content(delta)
        scores, large = "null", self.handler.vocabulary.large
        if self.handler.body.num_logprobs is not None:
            async with large if len(delta.tokens) > ITEMS else nullcontext():
                scores = await self.logprobs(delta.tokens)
        return f'{to_json(fields)[:-1]},"logprobs":{scores}}}'

    def content(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    async def logprobs(self, tokens: list[Token]) -> str:
        """Return the log probabilities of tokens as JSON."""

        def likeliest(token: Token) -> dict[str, float] | None:
            if token.logprob is None:
                return None
            own, _, first = token.place
            name, rest = self.shown(own, first)[0], dict(token.top())
            rest.pop(own, None)
            found = {name: token.logprob}
            # If two tokens have the same text, the second is named by its id.
            for i, logprob in rest.items():
                text = self.shown(i, first)[0]
                found[f"token_id:{i}" if text in found else text] = logprob
            return dict(sorted(found.items(), key=lambda item: -item[1]))

        columns: dict[str, Callable[[Token], Any]] = {
            "tokens": lambda token: self.shown(token.place.id, token.place.first)[0],
            "token_logprobs": lambda token: token.logprob,
            "top_logprobs": likeliest,
            "text_offset": lambda token: token.place.offset,
        }
        lists = [f'"{n}":{await list_json(tokens, made)}' for n, made in columns.items()]
        return f"{{{','.join(lists)}}}"


class ChatSerializer(Serializer):
    """A request's deltas in the form of /v1/chat/completions."""

    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def content(self, delta: Delta) -> dict[str, Any]:
        if not self.stream:
            return {"message": {"role": "assistant", "content": delta.text, "refusal": None}}
        role = {} if delta.index in self.begun else {"role": "assistant"}
        self.begun.add(delta.index)
        return {"delta": {**role, "content": delta.text}}

    async def logprobs(self, tokens: list[Token]) -> str:
        def scored(i: int, logprob: float | None, first: bool) -> dict[str, Any]:
            text, raw = self.shown(i, first)
            return {"token": text, "logprob": logprob, "bytes": raw}

        def entry(token: Token) -> dict[str, Any]:
            own, _, first = token.place
            tops = [scored(*pair, first) for pair in token.top()]
            return {**scored(own, token.logprob, first), "top_logprobs": tops}

        return f'{{"content":{await list_json(tokens, entry)},"refusal":null}}'
