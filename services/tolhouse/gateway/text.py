"""Text to token ids and back: prompts, single tokens, and completions while they arrive."""

import asyncio
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tolhouse.errors import InvalidArgument, PromptTooLong
from tolhouse.gateway.schemas import GenerationRequest
from tolhouse.v1.generation_pb2 import GenerateReply, Logprobs

_LEAST_LOGPROB = -9999.0  # JSON has no infinity
_SHORT = 4096  # characters that are tokenised in the event loop; more go to a thread
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# the characters that stand for bytes in byte-level vocabularies
_BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
_LARGE = 2  # responses that grow with a text are made at a time: bounds their memory


class Vocabulary:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.large = tokenizer, asyncio.Semaphore(_LARGE)
        vocabulary = tokenizer.get_vocab()
        self.longest = max(map(len, vocabulary), default=1)  # characters or bytes of a token
        self.shown = functools.lru_cache(maxsize=len(vocabulary))(self._shown)

    async def ids(self, text: str, most: int | None = None, *, special: bool = False) -> list[int]:
        """Token ids of a text; PromptTooLong if its length alone says that they exceed `most`."""
        if most is not None and len(text) > most * self.longest:
            size = f"the prompt has {len(text)} characters"
            raise PromptTooLong(f"{size}, more than fit the context of {most} tokens: shorten it")
        if re.search("[\ud800-\udfff]", text):
            raise InvalidArgument("the prompt holds half a surrogate pair, which is no character")

        def encode() -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=special).ids

        return await asyncio.to_thread(encode) if len(text) > _SHORT else encode()

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def offsets(self, ids: list[int]) -> list[int]:
        """Where the text of each token begins in that of all."""
        stream = DecodeStream(skip_special_tokens=False)
        lengths = [len(stream.step(self.tokenizer, i) or "") for i in ids]
        return list(itertools.accumulate(lengths[:-1], initial=0)) if ids else []

    def _shown(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text and bytes; a part of a character is "bytes:\\xe4", as OpenAI has it."""
        text, piece = self.text([token_id]), self.tokenizer.id_to_token(token_id) or ""
        match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        if "\ufffd" not in text or not (match or set(piece) <= _BYTES.keys()):
            return text, list(text.encode())
        raw = [int(match[1], 16)] if match else [_BYTES[c] for c in piece]
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


class Detokenizer:
    """The text of one completion, in parts that are final. The stop string that is complete first
    ends it, before the string or, with `include_stop`, after it, however tokens arrive."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), include_stop: bool = False
    ) -> None:
        self.tokenizer, self.include_stop = tokenizer, include_stop
        self.stop = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
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


class ChoiceDetokenizer:
    """A worker's replies to the deltas of one choice."""

    def __init__(self, prompt: list[int], body: GenerationRequest, vocabulary: Vocabulary) -> None:
        self.wants_tokens = body.num_logprobs is not None
        self.echo = vocabulary.text(prompt) if body.echo else ""  # until it is returned
        self.begin = len(self.echo)  # of the answer, in the text
        include_stop = body.include_stop_str_in_output
        self.text = Detokenizer(vocabulary.tokenizer, body.stop or (), include_stop=include_stop)
        self.held: list[Token] = []  # whose text may yet turn out to be a stop string's
        if body.echo and self.wants_tokens:  # later ones come with their log probabilities
            self.prompt = zip(prompt, vocabulary.offsets(prompt), strict=True)
            self.held.append(Token(*next(self.prompt)))

    def push(self, reply: GenerateReply, delta: Delta) -> None:
        """Add to `delta` what a reply completes, which may be nothing."""
        text, ids = self.text, list(reply.token_ids)
        if reply.prompt_logprobs.chosen and self.wants_tokens:
            self.held += _tokens(reply.prompt_logprobs, self.prompt)
        if not (ids or reply.finish_reason):
            return
        delta.text += self.echo + text.push(ids)
        self.echo = ""
        if reply.finish_reason:
            delta.text += text.finish()
        delta.finish_reason = "stop" if text.stopped else reply.finish_reason or None
        if self.wants_tokens:
            offsets = text.offsets[len(text.offsets) - len(ids) :]
            if reply.HasField("end_id"):  # scores of a text count it, though it is not shown
                ids, offsets = [*ids, reply.end_id], [*offsets, text.released]
            places = zip(ids, (self.begin + at for at in offsets), strict=True)
            self.held += _tokens(reply.logprobs, places)
            end = self.begin + text.released
            final = delta.finish_reason and not text.stopped
            count = len(self.held) if final else sum(t.offset < end for t in self.held)
            delta.tokens += self.held[:count]
            self.held = self.held[count:]


def _tokens(packed: Logprobs, places: Iterable[tuple[int, int]]) -> Iterator[Token]:
    """Tokens at `places`, an id and an offset each, as far as `packed` has log probabilities."""
    k = len(packed.top) // max(1, len(packed.chosen))
    top = [(i, max(p, _LEAST_LOGPROB)) for i, p in zip(packed.top_ids, packed.top, strict=True)]
    for n, (p, (i, offset)) in enumerate(zip(packed.chosen, places, strict=False)):
        yield Token(i, offset, max(p, _LEAST_LOGPROB), top[k * n : k * (n + 1)])
