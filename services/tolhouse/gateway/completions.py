"""OpenAI's form of completions: /v1/completions."""

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel

from tolhouse.gateway.choice import Piece, Token
from tolhouse.gateway.run import Run, Usage
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
    """The answer, and each piece of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int  # Unix time, seconds
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    system_fingerprint: str | None = None  # the table's version


class CompletionForm:
    def __init__(self, run: Run) -> None:
        self.run = run

    def whole(self, pieces: list[Piece]) -> Completion:
        return self._completion(pieces, self.run.usage())

    def chunks(self, piece: Piece) -> Iterator[Completion]:
        yield self._completion([piece])

    def usage(self) -> Completion:
        return self._completion([], self.run.usage())

    def _completion(self, pieces: list[Piece], usage: Usage | None = None) -> Completion:
        run = self.run
        choices = [
            Choice(
                index=piece.index,
                text=piece.text,
                logprobs=None
                if run.body.num_logprobs is None
                else _logprobs(piece.tokens, run.vocabulary),
                finish_reason=piece.finish_reason,
            )
            for piece in pieces
        ]
        return Completion(
            id=f"cmpl-{run.request_id}",
            created=run.created,
            model=run.model,
            choices=choices,
            usage=usage,
            system_fingerprint=run.table,
        )


def _logprobs(tokens: list[Token], vocabulary: Vocabulary) -> Logprobs:
    def texts(token: Token) -> dict[str, float] | None:
        """The likeliest and the token itself, by their texts; of several with one text, the likeliest."""
        if token.logprob is None:
            return None
        by_text: dict[str, float] = {}
        for i, logprob in (*token.top, (token.id, token.logprob)):
            by_text.setdefault(vocabulary.shown(i)[0], logprob)
        return by_text

    return Logprobs(
        tokens=[vocabulary.shown(token.id)[0] for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[texts(token) for token in tokens],
        text_offset=[token.offset for token in tokens],
    )
