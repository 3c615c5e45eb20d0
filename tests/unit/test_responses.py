"""Responses in OpenAI's form, from deltas of choices."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from tolhouse.gateway.responses import ChatSerializer, Serializer
from tolhouse.gateway.text import Place, Token, Vocabulary
from tolhouse.model.tokenizer import load_tokenizer
from tolhouse.v1.generation_pb2 import Logprobs

TOKENIZER = load_tokenizer("tests/cases/inputs/01-byte-fallback-500/tokenizer.json")
HANDLER = SimpleNamespace(vocabulary=Vocabulary(TOKENIZER), body=SimpleNamespace(stream=False))
KEY, BARE, A, BYTE = map(TOKENIZER.token_to_id, ("▁key", "key", "A", "<0x41>"))


def token(chosen: int, *top: int, first: bool = False) -> Token:
    """A token with log probability -1, and the likeliest, with -1/2 for others."""
    scores = [-1.0 if i == chosen else -0.5 for i in top]
    return Token(Place(chosen, 0, first), -1.0, Logprobs(chosen=[-1.0], top_ids=top, top=scores))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (token(KEY, BARE, KEY), {"key": -0.5, " key": -1.0}),
        (token(KEY, BARE), {"key": -0.5, " key": -1.0}),
        (token(KEY, BARE, KEY, first=True), {f"token_id:{BARE}": -0.5, "key": -1.0}),
        (token(A, BYTE, A), {f"token_id:{BYTE}": -0.5, "A": -1.0}),
        (token(BYTE, A), {f"token_id:{A}": -0.5, "A": -1.0}),
    ],
)
def test_tokens_with_one_text_keep_their_values(chosen: Token, expected: dict) -> None:
    """The chosen token has its text as name, and another one with this text has its id."""
    found = json.loads(asyncio.run(Serializer(HANDLER).logprobs([chosen])))
    assert [expected] == found["top_logprobs"]
    assert list(expected) == list(found["top_logprobs"][0])  # likeliest first
    assert -1.0 == found["top_logprobs"][0][found["tokens"][0]] == found["token_logprobs"][0]


def test_a_chat_lists_all_of_them() -> None:
    """Its entries are a list, in which texts may repeat."""
    [entry] = json.loads(asyncio.run(ChatSerializer(HANDLER).logprobs([token(A, BYTE, A)])))[
        "content"
    ]
    assert [("A", -0.5), ("A", -1.0)] == [(t["token"], t["logprob"]) for t in entry["top_logprobs"]]
