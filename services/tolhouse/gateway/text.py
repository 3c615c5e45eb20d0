"""Converts text to token ids and back: prompts, single tokens, and completions as they arrive."""

import asyncio
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import Tokenizer

from tolhouse.errors import InvalidArgumentError, PromptTooLongError
from tolhouse.gateway.schemas import GenerationRequest
from tolhouse.gateway.turns import in_turns
from tolhouse.model.tokenizer import TokenDecoder, TokenTexts
from tolhouse.v1.generation_pb2 import GenerateReply, Logprobs

_LEAST_LOGPROB = -9999.0  # JSON has no infinity
_SHORT = 4096  # characters; the event loop tokenises texts up to this length, a thread longer ones
_LONG = 1 << 16  # characters; at most `_LARGE` longer texts are tokenised at the same time
_FIRST_MARK = 0xD800  # the first surrogate
_LARGE = 2  # concurrent large texts and responses, which bounds their memory


class Prompt(NamedTuple):
    """The token ids of a prompt."""

    ids: list[int]
    added: frozenset[int] = frozenset()  # positions of tokens that the post-processor added


class Place(NamedTuple):
    """A token in a text."""

    id: int
    offset: int  # the position of its first character
    first: bool = False  # whether no text precedes it


class Echo(NamedTuple):
    """A prompt that is returned as the beginning of its answers."""

    text: str = ""
    places: Sequence[Place] = ()


class Vocabulary:
    """The tokenizer, with methods that do not block the event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.large = tokenizer, asyncio.Semaphore(_LARGE)
        self.texts = TokenTexts(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.longest = max(map(len, vocabulary), default=1)  # characters or bytes in a token
        self._adds_tokens = tokenizer.num_special_tokens_to_add(is_pair=False) > 0
        self.shown = functools.lru_cache(maxsize=len(vocabulary))(self._shown)
        self.special_in = functools.lru_cache(maxsize=64)(self._special_in)

    async def encode(
        self, texts: list[str], context_tokens: int | None = None, *, add_special_tokens: bool
    ) -> list[Prompt]:
        """Tokenise texts.

        `add_special_tokens` applies the tokenizer's post-processor, which may add a BOS token.
        Raises PromptTooLongError if a text is so long that it must have more than `context_tokens`
        tokens.
        """
        for text in texts:
            if context_tokens is not None and len(text) > context_tokens * self.longest:
                raise PromptTooLongError(
                    f"This model's maximum context length is {context_tokens} tokens. However, "
                    f"your prompt has {len(text)} characters, which are more tokens. Please "
                    "reduce the length of the prompt."
                )
            if re.search("[\ud800-\udfff]", text):
                message = "the prompt has half of a surrogate pair, which is not a character"
                raise InvalidArgumentError(message)
        special = add_special_tokens and self._adds_tokens

        def encode() -> list[Prompt]:  # encoding a batch releases Python's lock
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=special)
            return [
                Prompt(e.ids, _added(e.special_tokens_mask) if special else frozenset())
                for e in found
            ]

        size = sum(map(len, texts))
        if size <= _SHORT:
            return encode()
        async with self.large if size > _LONG else nullcontext():
            return await asyncio.to_thread(encode)

    async def echo(self, prompt: Prompt) -> Echo:
        """Return the text of a prompt, and the places of its tokens.

        Tokens that the post-processor added have places, but no text.
        """
        decoder, at, parts, places = TokenDecoder(self.texts), 0, [], []
        async for n, i in in_turns(enumerate(prompt.ids)):
            if n in prompt.added:
                places.append(Place(i, at))
                continue
            first = not decoder.inside
            parts.append(decoder.push(i))
            places.append(Place(i, at + decoder.earlier, first))
            at += len(parts[-1])
        return Echo("".join(parts) + decoder.finish(), places)

    def _special_in(self, texts: tuple[str, ...]) -> dict[int, str]:
        special = self.texts.special.items()
        return {i: token for token, i in special if any(token in text for text in texts)}

    def _shown(self, token_id: int, first: bool) -> tuple[str, list[int]]:
        text, raw = self.texts.name(token_id, first=first)
        return text, [*raw]


def _added(mask: list[int]) -> frozenset[int]:
    return frozenset(position for position, added in enumerate(mask) if added)


class Detokenizer:
    """The text of one completion, in parts that do not change later.

    The first complete stop string ends the text. The text excludes it unless `include_stop` is set.
    A stop string that is complete within the first `min_tokens` tokens does not count. `special`
    has the texts of special tokens in the stop strings, by id. The decoder omits these texts.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        special: Mapping[int, str] | None = None,
    ) -> None:
        self.decoder, self.include_stop, self.min_tokens = decoder, include_stop, min_tokens
        self.stop = [s for s in stop if s]
        # A surrogate stands for a special token, because no decoded text contains one.
        special = special or {}
        self._marks = {i: chr(_FIRST_MARK + n) for n, i in enumerate(special)}
        self._shown = {ord(self._marks[i]): text for i, text in special.items()}
        for i, text in special.items():
            self.stop += [s.replace(text, self._marks[i]) for s in self.stop if text in s]
        self._by_first: dict[str, list[str]] = {}  # stop strings, by their first character
        for s in self.stop:
            self._by_first.setdefault(s[0], []).append(s)
        self.stopped = False
        self.released = 0  # returned characters
        self._tokens = 0
        self._decoded = 0  # characters of all tokens
        self._protected = 0  # characters and marks of the first `min_tokens` tokens
        self._searched = 0  # characters and marks before `_held`
        self._held = ""  # characters that might be the beginning of a stop string

    def push(self, ids: Sequence[int]) -> tuple[str, list[Place]]:
        """Return the text that these tokens complete, and their places. The text may be empty."""
        parts, places = [], []
        for i in ids:
            first = not self.decoder.inside
            part = self.decoder.push(i)
            parts.append(part + self._marks.get(i, ""))
            places.append(Place(i, self._decoded + self.decoder.earlier, first))
            self._decoded += len(part)
            self._tokens += 1
            if self._tokens <= self.min_tokens:
                self._protected += len(parts[-1])
        return self._release("".join(parts)), places

    def finish(self) -> str:
        """Return the rest of the text. Bytes that did not become a character are U+FFFD."""
        if self.stopped:
            return ""
        rest = self.decoder.finish()
        if self._tokens <= self.min_tokens:
            self._protected += len(rest)
        return self._release(rest, last=True)

    def _release(self, text: str, *, last: bool = False) -> str:
        known, text = len(self._held), self._held + text
        # A stop string ends after the known text, and after the protected text.
        least = max(known, self._protected - self._searched) + 1
        found = ((s, text.find(s, max(0, least - len(s)))) for s in self.stop)
        ends = [(at + len(s), at) for s, at in found if at >= 0]
        if ends:
            self.stopped = True
            end, begin = min(ends)
            stop = text[begin:end].translate(self._shown) if self.include_stop else ""
            self._held, end = "", begin
        else:
            end, stop = len(text) if last else self._begun(text), ""
            self._held = text[end:]
        self._searched += end
        final = text[:end].translate(dict.fromkeys(self._shown)) + stop
        self.released += len(final)
        return final

    def _begun(self, text: str) -> int:
        """Return the position where an incomplete stop string may begin, or the length of `text`.

        The cost of a character does not depend on the lengths of the stop strings.
        """
        for at, first in enumerate(text):
            if known := self._by_first.get(first):
                rest = text[at:]
                if any(len(s) > len(rest) and s.startswith(rest) for s in known):
                    return at
        return len(text)


class Token(NamedTuple):
    """A token and its log probability. The first token of a prompt has none."""

    place: Place
    logprob: float | None = None
    packed: Logprobs = Logprobs()
    position: int = 0  # in `packed`

    def top(self) -> list[tuple[int, float]]:
        """Return the likeliest tokens at its position, likeliest first."""
        k = len(self.packed.top) // max(1, len(self.packed.chosen))
        here = slice(k * self.position, k * (self.position + 1))
        scores = (max(p, _LEAST_LOGPROB) for p in self.packed.top[here])
        return list(zip(self.packed.top_ids[here], scores, strict=True))


@dataclass
class Delta:
    """The next part of one choice. The last part has a finish_reason.

    A token is in the part that has the beginning of its text.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    completion_tokens: int = 0  # tokens of all choices of the request so far


class ChoiceDetokenizer:
    """Converts a worker's replies to the deltas of one choice."""

    def __init__(
        self, prompt: Prompt, echo: Echo, body: GenerationRequest, vocabulary: Vocabulary
    ) -> None:
        self.wants_tokens = body.num_logprobs is not None
        self.echo = echo.text  # empty after it is returned
        self.begin = len(self.echo)  # the position of the answer in the text
        texts, skip = vocabulary.texts, body.skip_special_tokens
        decoder = TokenDecoder(texts, prompt.ids, skip_special_tokens=skip)
        include, least = body.include_stop_str_in_output, body.min_tokens
        stop = body.stop_strings
        special = vocabulary.special_in(tuple(stop)) if skip else {}
        self.text = Detokenizer(
            decoder, stop, include_stop=include, min_tokens=least, special=special
        )
        # The end tokens that are shown, with their texts.
        ends = special.items() if skip else ((i, s) for s, i in texts.special.items())
        self.shown_ends = {i: s for i, s in ends if include and (s in stop or not skip)}
        self.held: list[Token] = []  # tokens whose text may belong to a stop string
        self.prompt = iter(echo.places)
        if self.wants_tokens:  # later tokens are added with their log probabilities
            self.held += [Token(place) for place in itertools.islice(self.prompt, 1)]

    def push(self, reply: GenerateReply, delta: Delta) -> None:
        """Add the text and the tokens that a reply completes to `delta`."""
        text = self.text
        if reply.prompt_logprobs.chosen and self.wants_tokens:
            self.held += _tokens(reply.prompt_logprobs, self.prompt)
        if not (reply.token_ids or reply.finish_reason):
            return
        part, places = text.push(reply.token_ids)
        delta.text += self.echo + part
        self.echo = ""
        if reply.finish_reason:
            delta.text += text.finish()
        delta.finish_reason = "stop" if text.stopped else reply.finish_reason or None
        if reply.HasField("end_id"):  # scores include it, although its text may not be shown
            places.append(Place(reply.end_id, text.released))
            if not text.stopped:
                delta.text += self.shown_ends.get(reply.end_id, "")
        if self.wants_tokens:
            moved = (place._replace(offset=self.begin + place.offset) for place in places)
            self.held += _tokens(reply.logprobs, moved)
            end = self.begin + text.released
            final = delta.finish_reason and not text.stopped
            count = len(self.held) if final else sum(t.place.offset < end for t in self.held)
            delta.tokens += self.held[:count]
            self.held = self.held[count:]


def _tokens(packed: Logprobs, places: Iterable[Place]) -> Iterator[Token]:
    """Yield tokens at `places`, as far as `packed` has log probabilities."""
    for n, (p, place) in enumerate(zip(packed.chosen, places, strict=False)):
        yield Token(place, max(p, _LEAST_LOGPROB), packed, n)
