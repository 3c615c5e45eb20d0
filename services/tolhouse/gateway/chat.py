"""OpenAI's form of chats: /v1/chat/completions."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel

from tolhouse.gateway.choice import Piece, Token
from tolhouse.gateway.run import Run, Usage
from tolhouse.gateway.vocabulary import Vocabulary


class Likely(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class Told(Likely):
    top_logprobs: list[Likely]


class Logprobs(BaseModel):
    content: list[Told]
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
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None  # the table's version


class ChatForm:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.id = f"chatcmpl-{run.request_id}"
        self.begun: set[int] = set()  # choices whose role has been told

    def whole(self, pieces: list[Piece]) -> Chat:
        run = self.run
        choices = [
            Choice(
                index=p.index,
                message=Message(content=p.text),
                logprobs=self._logprobs(p),
                finish_reason=p.finish_reason,
            )
            for p in pieces
        ]
        return Chat(
            id=self.id,
            created=run.created,
            model=run.model,
            choices=choices,
            usage=run.usage(),
            system_fingerprint=run.table,
        )

    def chunks(self, piece: Piece) -> Iterator[Chunk]:
        if piece.index not in self.begun:
            self.begun.add(piece.index)
            yield self._chunk(
                [ChunkChoice(index=piece.index, delta={"role": "assistant", "content": ""})]
            )
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self._logprobs(piece) if piece.tokens else None
        yield self._chunk(
            [
                ChunkChoice(
                    index=piece.index,
                    delta=delta,
                    logprobs=logprobs,
                    finish_reason=piece.finish_reason,
                )
            ]
        )

    def usage(self) -> Chunk:
        return self._chunk([], self.run.usage())

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> Chunk:
        run = self.run
        return Chunk(
            id=self.id,
            created=run.created,
            model=run.model,
            choices=choices,
            usage=usage,
            system_fingerprint=run.table,
        )

    def _logprobs(self, piece: Piece) -> Logprobs | None:
        if self.run.body.num_logprobs is None:
            return None
        return Logprobs(content=[_told(token, self.run.vocabulary) for token in piece.tokens])


def _told(token: Token, vocabulary: Vocabulary) -> Told:
    def likely(token_id: int, logprob: float) -> Likely:
        text, raw = vocabulary.shown(token_id)
        return Likely(token=text, logprob=logprob, bytes=raw)

    mine = likely(token.id, token.logprob or 0.0)
    return Told(**mine.model_dump(), top_logprobs=[likely(*pair) for pair in token.top])
