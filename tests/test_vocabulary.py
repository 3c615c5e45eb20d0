"""Text to token ids and back, of prompts and of single tokens."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolhouse.errors import InvalidArgument, PromptTooLong
from tolhouse.gateway.vocabulary import Vocabulary, check_ids
from tolhouse.model.tokenizer import load_tokenizer

VOCABULARY = Vocabulary(load_tokenizer(Path("models/demo-memory/tokenizer.json")))


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
    assert VOCABULARY.tokenizer.encode(text).ids == asyncio.run(VOCABULARY.ids(text))
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
