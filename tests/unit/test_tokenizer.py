"""Tokenizers of checkpoints: files that are refused, and text from token ids."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.model.tokenizer import TokenDecoder, TokenTexts, load_tokenizer, tokenizer_id

CASES = Path(__file__).parents[1] / "cases" / "inputs"
LLAMA = load_tokenizer(CASES / "01-byte-fallback-500" / "tokenizer.json")
UNIGRAM = load_tokenizer(CASES / "01-byte-fallback-500" / "unigram" / "tokenizer.json")
WORDS = "a b ▁ ▁the ▁▁ low</w> er </w> ##ing ##s un . ▁. <pad> | é 世 don 't \ufffd"
BYTES = "<0x0A> <0x20> <0x41> <0xE4> <0xB8> <0x96> <0xFF>"
_SPACE = decoders.Replace("▁", " ")
CHAINS = {
    "none": None,
    "WordPiece": decoders.WordPiece(),
    "BPEDecoder": decoders.BPEDecoder(),
    "CTC": decoders.CTC(),
    "Metaspace": decoders.Metaspace(),
    "Metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "Strip each": decoders.Sequence([_SPACE, decoders.Strip(" ", 1, 0)]),
    "Strip two": decoders.Sequence([_SPACE, decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "Gemma": decoders.Sequence([_SPACE, decoders.ByteFallback(), decoders.Fuse()]),
    "Replace, ByteLevel": decoders.Sequence([decoders.Replace("▁", "Ġ"), decoders.ByteLevel()]),
}


def with_decoder(decoder: Any) -> Tokenizer:
    words = ["", *WORDS.split(), *BYTES.split()]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


TOKENIZERS = {name: with_decoder(decoder) for name, decoder in CHAINS.items()}
TOKENIZERS |= {"Llama": LLAMA, "Unigram": UNIGRAM}
TOKENIZERS["ByteLevel"] = load_tokenizer("models/demo-memory/tokenizer.json")
TEXTS = {name: TokenTexts(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def bytes_are_characters(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether each run of byte tokens is UTF-8, so that the library shows the same text."""
    if "ByteFallback" not in repr(tokenizer.decoder):
        return True
    runs = b""
    for i in (*ids, 0):
        match = re.fullmatch("<0x(..)>", tokenizer.id_to_token(i))
        if match:
            runs += bytes.fromhex(match[1])
        elif "\ufffd" in runs.decode(errors="replace"):
            return False
        else:
            runs = b""
    return True


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_tokens_one_by_one_give_the_library_s_text(name: str, data: st.DataObject) -> None:
    """This holds for every chain of decoders, and after a prompt they continue its text."""
    tokenizer, texts = TOKENIZERS[name], TEXTS[name]
    size = tokenizer.get_vocab_size()
    pieces = (tokenizer.token_to_id(piece) for piece in BYTES.split())
    common = [i for i in pieces if i is not None] or [0]
    ids = data.draw(st.lists(st.integers(0, size - 1) | st.sampled_from(common), max_size=12))
    skip = data.draw(st.booleans())
    shown = [i for i in ids if not (skip and i in texts.special_ids)]
    if bytes_are_characters(tokenizer, shown):
        decoder = TokenDecoder(texts, skip_special_tokens=skip)
        text = "".join(map(decoder.push, ids)) + decoder.finish()
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text
    at = data.draw(st.integers(0, len(ids)))
    both = [i for i in ids if i not in texts.special_ids]
    before, whole = tokenizer.decode(ids[:at]), tokenizer.decode(ids)
    if bytes_are_characters(tokenizer, both) and "\ufffd" not in before:
        assert whole == before + texts.continuation(ids[:at], ids[at:])


@pytest.mark.parametrize("tokenizer", [LLAMA, UNIGRAM], ids=["BPE", "Unigram"])
@pytest.mark.parametrize(
    ("pieces", "parts"),
    [
        ("<0x0A> <0xE4> A", ["\n", "", "\ufffdA"]),
        ("<0x0A> <0xE4> <0xBD> A", ["\n", "", "", "\ufffd\ufffdA"]),
        ("<0x0A> <0xE4> <0xBD> <0xA0> A", ["\n", "", "", "你", "A"]),
        ("<0xE4> <0xE4> <0x41>", ["", "\ufffd", "\ufffdA"]),
        ("<0xFF> <0xC3> <0xA9>", ["\ufffd", "", "é"]),
        ("A <0xF0> <0x9F>", ["A", "", "", "\ufffd\ufffd"]),
    ],
)
def test_an_invalid_byte_shows_as_one_character(
    tokenizer: Tokenizer, pieces: str, parts: list[str]
) -> None:
    """Each invalid byte is U+FFFD, and neither the text before nor after it changes."""
    ids = [tokenizer.token_to_id(piece) for piece in pieces.split()]
    decoder = TokenDecoder(TokenTexts(tokenizer))
    found = [decoder.push(i) for i in ids]
    rest = decoder.finish()
    assert parts == [*found, rest][: len(parts)]
    assert "".join(parts) == "".join(found) + rest == TokenTexts(tokenizer).text(ids)


def test_a_character_that_the_prompt_begins_is_completed() -> None:
    """Otherwise its bytes are part of the prompt's text and not of the answer's."""
    texts = TEXTS["Llama"]
    first, second, third, a = map(LLAMA.token_to_id, ("<0xE4>", "<0xBD>", "<0xA0>", "A"))
    assert "你A" == texts.continuation([a, first], [second, third, a])
    assert "A" == texts.continuation([a, first, second], [a])
    level = TEXTS["ByteLevel"]
    *begun, last = TOKENIZERS["ByteLevel"].encode("世").ids
    [a] = TOKENIZERS["ByteLevel"].encode("A").ids
    assert ("世", "A") == (level.continuation(begun, [last]), level.continuation(begun, [a]))


class CountingTexts(TokenTexts):
    """Counts the tokens that the library decodes."""

    decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize("name", ["Llama", "Unigram", "ByteLevel", "Replace, ByteLevel"])
def test_the_cost_of_a_token_does_not_grow(name: str) -> None:
    """Bytes that never become a character do not make the library decode a growing list."""
    tokenizer, piece = TOKENIZERS[name], "<0xE4>"
    i = tokenizer.token_to_id(piece) or tokenizer.encode("世").ids[0]
    if name == "Replace, ByteLevel":
        i = tokenizer.token_to_id("é")
    texts = CountingTexts(tokenizer)
    decoder = TokenDecoder(texts)
    text = "".join(decoder.push(i) for _ in range(3000)) + decoder.finish()
    assert 3000 == text.count("\ufffd")
    assert texts.decoded < 200 * 3000


def test_tokens_have_names_with_their_leading_space() -> None:
    """`▁key` and `key` differ; at the beginning of a text the space is stripped."""
    key, bare = LLAMA.token_to_id("▁key"), LLAMA.token_to_id("key")
    names = [TEXTS["Llama"].name(i)[0] for i in (key, bare)]
    assert [" key", "key"] == names
    assert ("key", b"key") == TEXTS["Llama"].name(key, first=True)
    assert ("bytes:\\xe4", b"\xe4") == TEXTS["Llama"].name(LLAMA.token_to_id("<0xE4>"))
    assert ("\n", b"\n") == TEXTS["Llama"].name(LLAMA.token_to_id("<0x0A>"))
    ing = TOKENIZERS["WordPiece"].token_to_id("##ing")
    assert "ing" == TEXTS["WordPiece"].name(ing)[0]


def saved(folder: Path, change: Any, mark: bytes = b"") -> Path:
    """The demo's tokenizer with a change of its JSON, and a byte order mark in front."""
    data = json.loads(Path("models/demo-memory/tokenizer.json").read_bytes())
    change(data)
    path = folder / "tokenizer.json"
    path.write_bytes(mark + json.dumps(data).encode())
    return path


def test_truncation_and_padding_are_reset(tmp_path: Path) -> None:
    """A file that was saved after training encodes whole texts. A byte order mark is ignored."""

    def change(data: dict) -> None:
        data["truncation"] = {
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        data["padding"] = {
            "strategy": {"Fixed": 12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        }

    path = saved(tmp_path, change, b"\xef\xbb\xbf")
    plain, loaded = TOKENIZERS["ByteLevel"], load_tokenizer(path)
    for text in ("hi", "import os\n" * 20):
        assert plain.encode(text).ids == loaded.encode(text).ids
        assert plain.encode(text).ids == loaded.encode_batch_fast([text])[0].ids


@pytest.mark.parametrize(
    ("content", "token_id", "message"),
    [
        ("[PAD]", 9000, "loads it with id 8192"),  # a gap
        ("[PAD]", 5, "loads it with id 8192"),  # the id of another token
        ("<|endoftext|>", 8192, "loads it with id 0"),  # a token that is there already
        ("", 8192, "leaves it out"),
    ],
)
def test_an_added_token_keeps_its_id_or_is_refused(
    tmp_path: Path, content: str, token_id: int, message: str
) -> None:
    """The library renumbers some without an error. Ours names the token and both ids."""

    def change(data: dict) -> None:
        data["added_tokens"].append(data["added_tokens"][0] | {"content": content, "id": token_id})

    with pytest.raises(InvalidArgumentError, match=message) as found:
        load_tokenizer(saved(tmp_path, change))
    assert f"token {content!r} the id {token_id}," in str(found.value)


def test_an_added_token_may_follow_the_vocabulary(tmp_path: Path) -> None:
    """Its id counts against the model's vocabulary."""

    def change(data: dict) -> None:
        added = data["added_tokens"]
        added.append(added[0] | {"content": "[PAD]", "id": 8192})

    path = saved(tmp_path, change)
    assert 8192 == load_tokenizer(path, 8193).token_to_id("[PAD]")
    with pytest.raises(InvalidArgumentError, match=r"8193 tokens, .* vocabulary is 8192"):
        load_tokenizer(path, 8192)


def test_two_tokens_with_one_id_are_refused(tmp_path: Path) -> None:
    """The error names both tokens."""
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 0}, "unk_token": "a"}
    data = {"version": "1.0", "added_tokens": [], "model": model}
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="'a' and 'b' the same id 0"):
        load_tokenizer(path)


def test_ids_have_to_lie_in_the_vocabulary(checkpoint: Path) -> None:
    """A tokenizer may have as many tokens as the model, and not more."""
    size = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab_size()
    assert size == load_tokenizer(checkpoint / "tokenizer.json", size).get_vocab_size()
    with pytest.raises(
        InvalidArgumentError, match=f"{size} tokens, but the model's vocabulary is {size - 1}"
    ):
        load_tokenizer(checkpoint / "tokenizer.json", size - 1)


def test_an_id_above_the_vocabulary_is_refused_however_few_tokens_there_are(tmp_path: Path) -> None:
    """Ids may have gaps; the largest must be below the vocabulary size."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 5000}, unk_token="a")).save(str(path))
    assert [5000] == load_tokenizer(path, 5001).encode("b").ids
    with pytest.raises(InvalidArgumentError, match="vocabulary is 5000"):
        load_tokenizer(path, 5000)


def test_equal_files_have_equal_ids(
    checkpoint: Path, flex_checkpoint: Path, tmp_path: Path
) -> None:
    """The id has 64 hex digits and depends on each byte."""
    data = (checkpoint / "tokenizer.json").read_bytes()
    assert tokenizer_id(checkpoint / "tokenizer.json") == tokenizer_id(
        flex_checkpoint / "tokenizer.json"
    )
    (tmp_path / "other.json").write_bytes(data + b"\n")
    assert tokenizer_id(checkpoint / "tokenizer.json") != tokenizer_id(tmp_path / "other.json")
    assert 64 == len(bytes.fromhex(tokenizer_id(tmp_path / "other.json")).hex())


@given(data=st.data())
def test_a_damaged_tokenizer_is_refused(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A truncated or random file raises an InvalidArgumentError that names the file."""
    whole = (checkpoint / "tokenizer.json").read_bytes()
    path = tmp_path_factory.mktemp("spoilt") / "tokenizer.json"
    path.write_bytes(
        data.draw(
            st.one_of(
                st.binary(max_size=50),
                st.integers(0, len(whole) - 3).map(lambda size: whole[:size]),
            )
        )
    )
    with pytest.raises(InvalidArgumentError, match=f"{path} is not a tokenizer.json"):
        load_tokenizer(path)


def test_a_missing_tokenizer_is_not_found(tmp_path: Path) -> None:
    """A missing file and a folder in its place raise NotFoundError."""
    for path in (tmp_path / "tokenizer.json", tmp_path):
        with pytest.raises(NotFoundError, match=f"no tokenizer at {path}"):
            load_tokenizer(path)
