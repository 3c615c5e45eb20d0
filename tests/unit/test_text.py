"""Text to token ids and back: prompts, single tokens, and completions as they arrive."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any, SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolhouse.errors import InvalidArgumentError, PromptTooLongError
from tolhouse.gateway.text import Detokenizer, Prompt, Vocabulary
from tolhouse.gateway.turns import list_json, text_json
from tolhouse.model.tokenizer import TokenDecoder, load_tokenizer
from tolhouse.sampling import check_ids

TOKENIZER = load_tokenizer(Path("models/demo-memory/tokenizer.json"))
VOCABULARY = Vocabulary(TOKENIZER)
LLAMA = Path("tests/cases/inputs/01-byte-fallback-500/tokenizer.json")


def ids_of(text: str, most: int | None = None) -> list[int]:
    """Token ids of a text, as the gateway makes them."""
    return asyncio.run(VOCABULARY.encode([text], most, add_special_tokens=True))[0].ids


def detokenizer(*arguments: Any, **options: Any) -> Detokenizer:
    return Detokenizer(TokenDecoder(VOCABULARY.texts), *arguments, **options)


@given(st.text(max_size=60))
def test_tokens_show_their_bytes(text: str) -> None:
    """The tokens' bytes are those of the text, and offsets are where tokens begin."""
    ids = ids_of(text)
    shown = [VOCABULARY.shown(i, first=False) for i in ids]
    assert text.encode() == b"".join(bytes(raw) for _, raw in shown)
    echo = asyncio.run(VOCABULARY.echo(Prompt(ids)))
    assert text == echo.text
    for (token, _), (_, at, _) in zip(shown, echo.places, strict=True):
        assert token.startswith("bytes:") or token == text[at : at + len(token)]


def test_half_a_character_shows_as_bytes() -> None:
    """The form is OpenAI's, and a special token shows its text."""
    first, *_ = ids_of("世")
    assert ("bytes:\\xe4", [0xE4]) == VOCABULARY.shown(first, first=False)
    assert "<|endoftext|>" == VOCABULARY.shown(0, first=True)[0]


def test_long_texts_are_tokenised_alike_or_refused() -> None:
    """Ids are the same in a thread, and a text that can't fit is refused before."""
    text = "import os\n" * 1000
    assert TOKENIZER.encode(text).ids == ids_of(text)
    with pytest.raises(PromptTooLongError, match="10000 characters"):
        ids_of(text, most=10)
    with pytest.raises(InvalidArgumentError, match="surrogate"):
        ids_of("\ud800")


def test_long_work_leaves_the_event_loop_free() -> None:
    """Other tasks run while a long text is tokenised and its ids are written as JSON."""

    async def run() -> tuple[list[int], str, list[int]]:
        ticks, counts = 0, []

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.create_task(tick())
        [(ids, _)] = await VOCABULARY.encode(["a" * 900_000], add_special_tokens=True)
        counts.append(ticks)
        written = await list_json(ids, lambda i: VOCABULARY.shown(i, first=False)[0])
        counts.append(ticks - counts[0])
        ticking.cancel()
        return ids, written, counts

    ids, written, counts = asyncio.run(run())
    assert "a" * 900_000 == "".join(json.loads(written))
    assert all(i == ids[0] for i in ids)
    assert min(counts) > 10


@given(st.lists(st.text(max_size=100), max_size=5))
def test_texts_in_a_batch_have_the_ids_that_each_has_alone(texts: list[str]) -> None:
    """This holds for batches in the event loop and in a thread."""
    for more in ([], ["import os\n" * 500]):
        batch = [*texts, *more]
        expected = [TOKENIZER.encode(text).ids for text in batch]
        prompts = asyncio.run(VOCABULARY.encode(batch, add_special_tokens=True))
        assert expected == [prompt.ids for prompt in prompts]


@given(st.text('"\\ä世\n\x00😀', max_size=50), st.integers(0, 3))
def test_json_in_turns_is_json(text: str, times: int) -> None:
    """Long texts and lists are the same as those of the json module."""
    text *= 10**times
    assert text == json.loads(asyncio.run(text_json(text)))
    assert [*text] == json.loads(asyncio.run(list_json([*text])))


def test_ids_are_checked() -> None:
    """Ids from 0 to the end of the vocabulary are allowed."""
    assert [0, 9] == check_ids([0, 9], 10)
    for bad in (-1, 10, 2**70):
        with pytest.raises(InvalidArgumentError, match="allowed are 0 to 9"):
            check_ids([0, bad], 10)


@given(st.text(min_size=1, max_size=80), st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_text_arrives_whole_whatever_the_pieces(text: str, sizes: list[int]) -> None:
    """The parts add up to the text, and no part has half of a character."""
    ids = TOKENIZER.encode(text).ids
    expected = TOKENIZER.decode(ids)
    stream, pieces, at = detokenizer(), [], 0
    while at < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[at : at + size])[0])
        at += size
    if "\ufffd" not in expected:
        assert not any("\ufffd" in piece for piece in pieces)
    assert expected == "".join(pieces) + stream.finish()


@given(
    st.text("ab", min_size=1, max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_stop_strings_cut_as_a_naive_search_would(text: str, stops: list[str], data) -> None:
    """The text ends at the stop string that is complete first, however tokens arrive."""
    ends = [(n, n - len(s)) for n in range(len(text) + 1) for s in stops if text[:n].endswith(s)]
    include = data.draw(st.booleans())
    expected = text[: min(ends)[0 if include else 1]] if ends else text
    stream, given_, at = detokenizer(stops, include_stop=include), "", 0
    ids = [TOKENIZER.token_to_id(c) for c in text]
    while at < len(ids) and not stream.stopped:
        size = data.draw(st.integers(1, 6))
        given_ += stream.push(ids[at : at + size])[0]
        assert expected.startswith(given_)
        at += size
    assert (expected, bool(ends)) == (given_ + stream.finish(), stream.stopped)


@given(
    st.text("ab", min_size=1, max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 12),
    st.lists(st.integers(1, 6), min_size=1),
)
def test_a_stop_string_counts_after_min_tokens(
    text: str, stops: list[str], least: int, sizes: list[int]
) -> None:
    """It may begin within the first tokens, but must be complete after them."""
    ids = [TOKENIZER.token_to_id(c) for c in text]  # a token for each character
    ends = [
        (n, n - len(s))
        for n in range(least + 1, len(text) + 1)
        for s in stops
        if text[:n].endswith(s)
    ]
    expected = text[: min(ends)[1]] if ends else text
    stream, found, at, size = detokenizer(stops, min_tokens=least), "", 0, itertools.cycle(sizes)
    while at < len(ids) and not stream.stopped:
        count = next(size)
        found += stream.push(ids[at : at + count])[0]
        at += count
    assert (expected, bool(ends)) == (found + stream.finish(), stream.stopped)


@pytest.mark.parametrize(
    ("stop", "include", "text"),
    [
        ("b<|endoftext|>c", False, "a"),
        ("b<|endoftext|>c", True, "ab<|endoftext|>c"),
        ("<|endoftext|>c", False, "ab"),
        ("<|endoftext|>d", False, "abcd"),
        ("bc", False, "a"),
        ("cd", True, "abcd"),
    ],
)
def test_a_stop_string_may_contain_a_special_token(stop: str, include: bool, text: str) -> None:
    """Although special tokens are left out of the text, in which others are found as before."""
    ids = [TOKENIZER.token_to_id(c) for c in "ab"]
    ids += [0, *(TOKENIZER.token_to_id(c) for c in "cd")]
    decoder = TokenDecoder(VOCABULARY.texts, skip_special_tokens=True)
    special = VOCABULARY.special_in((stop,))
    stream = Detokenizer(decoder, [stop], include_stop=include, special=special)
    found = "".join(stream.push([i])[0] for i in ids if not stream.stopped)
    assert text == found + stream.finish()


def test_a_prompt_shows_what_was_given() -> None:
    """Tokens that the post-processor adds have a place in an echo, but no text."""
    vocabulary = Vocabulary(load_tokenizer(LLAMA))
    [prompt] = asyncio.run(vocabulary.encode(["import os"], add_special_tokens=True))
    assert (1, {0}) == (prompt.ids[0], prompt.added)
    echo = asyncio.run(vocabulary.echo(prompt))
    assert "import os" == echo.text
    names = [vocabulary.shown(p.id, p.first)[0] for p in echo.places]
    assert ("<s>", "import os") == (names[0], "".join(names[1:]))
    assert [0, 0] == [place.offset for place in echo.places[:2]]
    [bare] = asyncio.run(vocabulary.encode(["import os"], add_special_tokens=False))
    assert (prompt.ids[1:], frozenset()) == bare


class Counted(str):
    """A stop string that counts its slices and prefix searches."""

    __slots__ = ()
    seen = 0

    def __getitem__(self, at: SupportsIndex | slice) -> str:
        Counted.seen += 1
        return super().__getitem__(at)

    def startswith(self, *arguments: Any) -> bool:
        Counted.seen += 1
        return super().startswith(*arguments)


def test_the_cost_of_stop_strings_does_not_grow_with_their_length() -> None:
    """Long stop strings cost as much as short ones."""
    ids = TOKENIZER.encode("def foo(self, x):\n    return self.items\n" * 6).ids

    def looks(length: int) -> int:
        Counted.seen = 0
        stops = [Counted("def "[: n % 5] + chr(200 + n) * length) for n in range(32)]
        stream = detokenizer(stops)
        for i in ids:
            stream.push([i])
        return Counted.seen

    assert looks(16) == looks(500)
    assert looks(500) < 32 * len(ids)


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    """A completion that ends within a character ends in U+FFFD, as in the library."""
    ids = TOKENIZER.encode("世").ids[:-1]
    stream = detokenizer()
    assert "" == stream.push(ids)[0]
    assert TOKENIZER.decode(ids) == stream.finish()
