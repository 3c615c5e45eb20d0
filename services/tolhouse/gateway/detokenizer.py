"""Token ids to text while they arrive: no broken UTF-8, stop strings, log probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tolhouse.gateway.schemas import Generation
from tolhouse.gateway.vocabulary import Vocabulary
from tolhouse.v1.generation_pb2 import GenerateReply, Logprobs

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Detokenizer:
    """The text of one completion, in parts that are final; `stopped` after a stop string.

    The stop string that is complete first ends the text, before it or, with `include_stop`, after
    it: that does not depend on how tokens arrive.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, include_stop: bool = False
    ) -> None:
        self.tokenizer, self.stop, self.include_stop = tokenizer, stop, include_stop
        self.stopped = False
        self.ids: list[int] = []
        self.offsets: list[int] = []  # where the text of each token begins
        self.released = 0  # characters returned
        self._stream = DecodeStream(skip_special_tokens=True)
        self._decoded = 0  # characters decoded
        self._held = ""  # characters that might be the beginning of a stop string

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete, which may be empty."""
        text = ""
        for i in ids:
            self.ids.append(i)
            self.offsets.append(self._decoded + len(text))
            text += self._stream.step(self.tokenizer, i) or ""
        self._decoded += len(text)
        return self._release(text)

    def finish(self) -> str:
        """The rest of the text; bytes that never became a character show as U+FFFD."""
        if self.stopped:
            return ""
        return self._release(self.tokenizer.decode(self.ids)[self._decoded :], last=True)

    def _release(self, text: str, last: bool = False) -> str:
        text = self._held + text
        ends = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped = True
            end = min(ends)[0 if self.include_stop else 1]
            self._held = ""
        else:
            begun = (n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n]))
            end = len(text) - (0 if last else max(begun, default=0))
            self._held = text[end:]
        self.released += end
        return text[:end]


class Token(NamedTuple):
    """A token and its log probability, which the first of a prompt has not."""

    id: int
    offset: int  # of its text in the choice's
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()  # likeliest tokens in its place, likeliest first


@dataclass
class Delta:
    """More of one choice; the last has a finish_reason. A token comes with the text it begins."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    restarted: bool = False  # the choice begins anew: earlier deltas do not count


class ChoiceDetokenizer:
    """A worker's replies to the deltas of one choice."""

    def __init__(
        self, index: int, prompt_ids: list[int], body: Generation, vocabulary: Vocabulary
    ) -> None:
        self.index, self.prompt_ids, self.vocabulary = index, prompt_ids, vocabulary
        self.wants_tokens = body.num_logprobs is not None
        self.echo = vocabulary.text(prompt_ids) if body.echo else None  # until it is returned
        self.begin = len(self.echo or "")  # of the answer, in the text
        include_stop = body.include_stop_str_in_output
        self.text = Detokenizer(vocabulary.tokenizer, body.stops, include_stop=include_stop)
        self.prompt_logprobs: list[Any] = [(None, ())]
        self.held: list[Token] = []  # whose text may yet turn out to be a stop string's

    def push(self, reply: GenerateReply) -> Delta:
        """What a reply adds, which may be nothing."""
        delta = Delta(self.index)
        self.prompt_logprobs += _unpack(reply.prompt_logprobs)
        if self.echo is not None and (reply.token_ids or reply.finish_reason):
            delta.text, self.echo = self.echo, None
            if self.wants_tokens:
                offsets = self.vocabulary.offsets(self.prompt_ids)
                delta.tokens = _tokens(self.prompt_ids, offsets, self.prompt_logprobs)
        delta.text += self.text.push(reply.token_ids)
        if reply.finish_reason:
            delta.text += self.text.finish()
        delta.finish_reason = "stop" if self.text.stopped else reply.finish_reason or None
        if self.wants_tokens:
            self._hold(reply)
            end = self.begin + self.text.released
            final = delta.finish_reason and not self.text.stopped
            count = len(self.held) if final else sum(t.offset < end for t in self.held)
            delta.tokens += self.held[:count]
            del self.held[:count]
        return delta

    def _hold(self, reply: GenerateReply) -> None:
        ids = list(reply.token_ids)
        offsets = self.text.offsets[len(self.text.offsets) - len(ids) :]
        if reply.HasField("end_id"):  # scores of a text count it, though it is not shown
            ids, offsets = [*ids, reply.end_id], [*offsets, self.text.released]
        offsets = [self.begin + offset for offset in offsets]
        self.held += _tokens(ids, offsets, _unpack(reply.logprobs))


def _tokens(ids: list[int], offsets: list[int], logprobs: list[Any]) -> list[Token]:
    return [Token(i, at, *p) for i, at, p in zip(ids, offsets, logprobs, strict=True)]


def _unpack(packed: Logprobs) -> list[tuple[float, list[tuple[int, float]]]]:
    """The log probability of each token, and the likeliest tokens in its place."""
    if not packed.chosen:
        return []
    k = len(packed.top) // len(packed.chosen)
    top = [(i, max(p, _LEAST_LOGPROB)) for i, p in zip(packed.top_ids, packed.top, strict=True)]
    return [(max(p, _LEAST_LOGPROB), top[k * n : k * (n + 1)]) for n, p in enumerate(packed.chosen)]
