"""One choice of an answer: a worker's replies to pieces of text, with their tokens where log probabilities are wanted."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tolhouse.gateway.schemas import Generation
from tolhouse.gateway.text import TextStream
from tolhouse.gateway.vocabulary import Vocabulary
from tolhouse.v1 import generation_pb2


@dataclass(frozen=True)
class Token:
    """A token and what the model thought of it. The first of a prompt has no logprob."""

    id: int
    offset: int  # of its text in the choice's
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()  # the likeliest in its place, likeliest first


@dataclass
class Piece:
    """More of one choice; the last one has a finish_reason. A token comes with the text that it begins."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    anew: bool = False  # the choice begins anew: what was told of it does not count


class Choice:
    def __init__(
        self, index: int, prompt_ids: list[int], body: Generation, vocabulary: Vocabulary
    ) -> None:
        self.index, self.prompt_ids, self.vocabulary = index, prompt_ids, vocabulary
        self.wants_tokens = body.num_logprobs is not None
        self.echo = vocabulary.text(prompt_ids) if body.echoes else None  # until it is given
        self.begin = len(self.echo or "")  # of the answer, in the text
        self.text = TextStream(
            vocabulary.tokenizer, body.stops, include_stop=body.include_stop_str_in_output
        )
        self.prompt_logprobs: list[Any] = [(None, ())]
        self.held: list[Token] = []  # whose text may yet turn out to be a stop string's

    def take(self, reply: generation_pb2.GenerateReply) -> Piece:
        """What a reply adds, which may be nothing. After a finish_reason there is no more."""
        piece = Piece(self.index)
        self.prompt_logprobs += _logprobs(reply.prompt_logprobs)
        if self.echo is not None and (
            reply.token_ids or reply.finish_reason
        ):  # the whole prompt has been told by now
            piece.text, self.echo = self.echo, None
            if self.wants_tokens:
                told = zip(
                    self.prompt_ids,
                    self.vocabulary.offsets(self.prompt_ids),
                    self.prompt_logprobs,
                    strict=True,
                )
                piece.tokens = [Token(i, offset, *logprobs) for i, offset, logprobs in told]
        piece.text += self.text.push(reply.token_ids)
        if reply.finish_reason:
            piece.text += self.text.finish()
        piece.finish_reason = "stop" if self.text.stopped else reply.finish_reason or None
        if self.wants_tokens:
            self._hold(reply)
            everything = piece.finish_reason and not self.text.stopped
            given = (
                len(self.held)
                if everything
                else sum(token.offset < self.begin + self.text.released for token in self.held)
            )
            piece.tokens += self.held[:given]
            del self.held[:given]
        return piece

    def _hold(self, reply: generation_pb2.GenerateReply) -> None:
        ids, offsets = (
            list(reply.token_ids),
            self.text.offsets[len(self.text.offsets) - len(reply.token_ids) :],
        )
        if reply.HasField("end_id"):  # scores of a text count it, though it is not shown
            ids, offsets = [*ids, reply.end_id], [*offsets, self.text.released]
        told = zip(ids, offsets, _logprobs(reply.logprobs), strict=True)
        self.held += [Token(i, self.begin + offset, *logprobs) for i, offset, logprobs in told]


def _logprobs(packed: generation_pb2.Logprobs) -> list[tuple[float, list[tuple[int, float]]]]:
    """Each token's logprob and the likeliest in its place. JSON knows no infinity: what can't be is -9999, as others have it."""
    if not packed.chosen:
        return []
    k = len(packed.top) // len(packed.chosen)
    top = [(i, max(p, -9999.0)) for i, p in zip(packed.top_ids, packed.top, strict=True)]
    return [(max(p, -9999.0), top[k * n : k * (n + 1)]) for n, p in enumerate(packed.chosen)]
