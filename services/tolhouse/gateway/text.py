"""Text to token ids and back: prompts, single tokens, and completions while they arrive."""

import asyncio
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from tolhouse.errors import InvalidArgumentError, PromptTooLongError
from tolhouse.gateway.schemas import GenerationRequest
from tolhouse.gateway.turns import in_turns
from tolhouse.v1.generation_pb2 import GenerateReply, Logprobs

_LEAST_LOGPROB = -9999.0  # JSON has no infinity
_SHORT = 4096  # characters that are tokenised in the event loop; more go to a thread
_LONG = 1 << 16  # characters from which on texts are tokenised by so many threads as `_LARGE` says
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# the characters that stand for bytes in byte-level vocabularies
_BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
_LARGE = 2  # responses that grow with a text are made at a time: bounds their memory


class Vocabulary:
    """The tokenizer, for calls from the event loop: long work is done elsewhere or in turns."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.large = tokenizer, asyncio.Semaphore(_LARGE)
        vocabulary = tokenizer.get_vocab()
        self.longest = max(map(len, vocabulary), default=1)  # characters or bytes of a token
        self.shown = functools.lru_cache(maxsize=len(vocabulary))(self._shown)

    async def ids(
        self, texts: list[str], most: int | None = None, *, special: bool = False
    ) -> list[list[int]]:
        """Token ids of texts; PromptTooLongError if a length alone says that they exceed `most`."""
        for text in texts:
            if most is not None and len(text) > most * self.longest:
                length = f"the prompt has {len(text)} characters"
                message = f"{length}, more than fit the context of {most} tokens: shorten it"
                raise PromptTooLongError(message)
            if re.search("[\ud800-\udfff]", text):
                message = "the prompt holds half a surrogate pair, which is no character"
                raise InvalidArgumentError(message)

        def encode() -> list[list[int]]:  # of a batch, without Python's lock
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=special)
            return [one.ids for one in found]

        size = sum(map(len, texts))
        if size <= _SHORT:
            return encode()
        async with self.large if size > _LONG else nullcontext():
            return await asyncio.to_thread(encode)

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode_batch([ids], skip_special_tokens=False)[0]

    async def echo(self, ids: list[int]) -> "Echo":
        """The text of a prompt, and where that of each of its tokens begins."""
        stream, at, offsets = DecodeStream(skip_special_tokens=False), 0, []
        async for i in in_turns(ids):
            offsets.append(at)
            at += len(stream.step(self.tokenizer, i) or "")
        return Echo(await asyncio.to_thread(self.text, ids), list(zip(ids, offsets, strict=True)))

    def _shown(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text and bytes; a part of a character is "bytes:\\xe4", as OpenAI has it."""
        text, piece = self.text([token_id]), self.tokenizer.id_to_token(token_id) or ""
        match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        if "\ufffd" not in text or not (match or set(piece) <= _BYTES.keys()):
            return text, list(text.encode())
        raw = [int(match[1], 16)] if match else [_BYTES[c] for c in piece]
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


class Echo(NamedTuple):
    """A prompt as a part of its answers."""

    text: str = ""
    places: Sequence[tuple[int, int]] = ()  # of each token, its id and its text's offset


class Detokenizer:
    """The text of one completion, in parts that are final. The stop string that is complete first
    ends it, before the string or, with `include_stop`, after it, however tokens arrive."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), include_stop: bool = False
    ) -> None:
        self.tokenizer, self.include_stop = tokenizer, include_stop
        self.stop = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
        self._by_first: dict[str, list[str]] = {}  # stop strings, by their first character
        for s in self.stop:
            self._by_first.setdefault(s[0], []).append(s)
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
        known, text = len(self._held), self._held + text
        found = ((s, text.find(s, max(0, known - len(s) + 1))) for s in self.stop)
        ends = [(at + len(s), at) for s, at in found if at >= 0]
        if ends:
            self.stopped = True
            end = min(ends)[0 if self.include_stop else 1]
            self._held = ""
        else:
            end = len(text) if last else self._begun(text)
            self._held = text[end:]
        self.released += end
        return text[:end]

    def _begun(self, text: str) -> int:
        """Where a stop string may have begun, up to the end of `text`; its length if nowhere.

        Characters before are released: each is looked at until it begins none, whatever the
        lengths of the stop strings.
        """
        for at, first in enumerate(text):
            if known := self._by_first.get(first):
                rest = text[at:]
                if any(s.startswith(rest) for s in known):
                    return at
        return len(text)


class Token(NamedTuple):
    """A token and its log probability, which the first of a prompt has not."""

    id: int
    offset: int  # of its text in the choice's
    logprob: float | None = None
    packed: Logprobs = Logprobs()
    place: int = 0  # in `packed`

    def top(self) -> list[tuple[int, float]]:
        """The likeliest tokens in its place, likeliest first."""
        k = len(self.packed.top) // max(1, len(self.packed.chosen))
        here = slice(k * self.place, k * (self.place + 1))
        scores = (max(p, _LEAST_LOGPROB) for p in self.packed.top[here])
        return list(zip(self.packed.top_ids[here], scores, strict=True))


@dataclass
class Delta:
    """More of one choice; the last has a finish_reason. A token comes with the text it begins."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class ChoiceDetokenizer:
    """A worker's replies to the deltas of one choice."""

    def __init__(self, echo: Echo, body: GenerationRequest, tokenizer: Tokenizer) -> None:
        self.wants_tokens = body.num_logprobs is not None
        self.echo = echo.text  # until it is returned
        self.begin = len(self.echo)  # of the answer, in the text
        include_stop = body.include_stop_str_in_output
        self.text = Detokenizer(tokenizer, body.stop or (), include_stop=include_stop)
        self.held: list[Token] = []  # whose text may yet turn out to be a stop string's
        self.prompt = iter(echo.places)
        if self.wants_tokens:  # later ones come with their log probabilities
            self.held += [Token(*place) for place in itertools.islice(self.prompt, 1)]

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
    for n, (p, (i, offset)) in enumerate(zip(packed.chosen, places, strict=False)):
        yield Token(i, offset, max(p, _LEAST_LOGPROB), packed, n)
