"""Text to token ids and back: prompts, single tokens, and completions while they arrive."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolhouse.errors import InvalidArgument, PromptTooLong
from tolhouse.gateway.text import Detokenizer, Vocabulary
from tolhouse.model.tokenizer import load_tokenizer
from tolhouse.sampling import check_ids

TOKENIZER = load_tokenizer(Path("models/demo-memory/tokenizer.json"))
VOCABULARY = Vocabulary(TOKENIZER)


@given(st.text(max_size=60))
def test_tokens_show_their_bytes(text: str) -> None:
    """The bytes of a text's tokens are those of the text; offsets are where tokens begin."""
    ids = asyncio.run(VOCABULARY.ids(text))
    shown = [VOCABULARY.shown(i) for i in ids]
    assert text.encode() == b"".join(bytes(raw) for _, raw in shown)
    for (token, _), at in zip(shown, VOCABULARY.offsets(ids), strict=True):
        assert token.startswith("bytes:") or token == text[at : at + len(token)]


def test_half_a_character_shows_as_bytes() -> None:
    """As in OpenAI's answers; a special token shows as it is written."""
    first, *_ = asyncio.run(VOCABULARY.ids("世"))
    assert ("bytes:\\xe4", [0xE4]) == VOCABULARY.shown(first)
    assert "<|endoftext|>" == VOCABULARY.shown(0)[0]


def test_long_texts_are_tokenised_alike_or_refused() -> None:
    """In a thread or not, the ids are the same; what can't fit is refused before."""
    text = "import os\n" * 1000
    assert TOKENIZER.encode(text).ids == asyncio.run(VOCABULARY.ids(text))
    with pytest.raises(PromptTooLong, match="10000 characters"):
        asyncio.run(VOCABULARY.ids(text, most=10))
    with pytest.raises(InvalidArgument, match="surrogate"):
        asyncio.run(VOCABULARY.ids("\ud800"))


def test_ids_are_checked() -> None:
    """From 0 up to the vocabulary's end."""
    assert [0, 9] == check_ids([0, 9], 10)
    for bad in (-1, 10, 2**70):
        with pytest.raises(InvalidArgument, match="allowed are 0 to 9"):
            check_ids([0, bad], 10)


@given(st.text(min_size=1, max_size=80), st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_text_arrives_whole_whatever_the_pieces(text: str, sizes: list[int]) -> None:
    """Pieces of a text add up to it, and no piece has half a character."""
    ids = TOKENIZER.encode(text).ids
    expected = TOKENIZER.decode(ids)
    stream, pieces, at = Detokenizer(TOKENIZER), [], 0
    while at < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[at : at + size]))
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
    """However tokens arrive, the text ends at the stop string that is complete first."""
    ends = [(n, n - len(s)) for n in range(len(text) + 1) for s in stops if text[:n].endswith(s)]
    include = data.draw(st.booleans())
    expected = text[: min(ends)[0 if include else 1]] if ends else text
    stream, given_, at = Detokenizer(TOKENIZER, stops, include_stop=include), "", 0
    ids = [TOKENIZER.token_to_id(c) for c in text]
    while at < len(ids) and not stream.stopped:
        size = data.draw(st.integers(1, 6))
        given_ += stream.push(ids[at : at + size])
        assert expected.startswith(given_)
        at += size
    assert (expected, bool(ends)) == (given_ + stream.finish(), stream.stopped)


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    """A completion cut in the middle of a character ends in U+FFFD, as the tokenizer has it."""
    ids = TOKENIZER.encode("世").ids[:-1]
    stream = Detokenizer(TOKENIZER)
    assert "" == stream.push(ids)
    assert TOKENIZER.decode(ids) == stream.finish()
