"""Tokenizers of checkpoints: their ids fit the model, and what is none is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.model.tokenizer import load_tokenizer, tokenizer_id


def test_ids_have_to_lie_in_the_vocabulary(checkpoint: Path) -> None:
    """As many tokens as the model has are fine, one more is not."""
    size = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab_size()
    assert size == load_tokenizer(checkpoint / "tokenizer.json", size).get_vocab_size()
    with pytest.raises(
        InvalidArgumentError, match=f"{size} tokens, but the model's vocabulary is {size - 1}"
    ):
        load_tokenizer(checkpoint / "tokenizer.json", size - 1)


def test_an_id_above_the_vocabulary_is_refused_however_few_tokens_there_are(tmp_path: Path) -> None:
    """Ids may have gaps: what counts is the largest."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 5000}, unk_token="a")).save(str(path))
    assert [5000] == load_tokenizer(path, 5001).encode("b").ids
    with pytest.raises(InvalidArgumentError, match="vocabulary is 5000"):
        load_tokenizer(path, 5000)


def test_equal_files_have_equal_ids(
    checkpoint: Path, flex_checkpoint: Path, tmp_path: Path
) -> None:
    """The id is that of the bytes: 64 hex digits, and others once a byte differs."""
    data = (checkpoint / "tokenizer.json").read_bytes()
    assert tokenizer_id(checkpoint / "tokenizer.json") == tokenizer_id(
        flex_checkpoint / "tokenizer.json"
    )
    (tmp_path / "other.json").write_bytes(data + b"\n")
    assert tokenizer_id(checkpoint / "tokenizer.json") != tokenizer_id(tmp_path / "other.json")
    assert 64 == len(bytes.fromhex(tokenizer_id(tmp_path / "other.json")).hex())


@given(data=st.data())
def test_a_spoilt_tokenizer_is_refused_or_works(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut anywhere, or replaced by any bytes, it is an InvalidArgumentError that names the file."""
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


def test_a_tokenizer_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    """A missing file, and a folder in its place."""
    for path in (tmp_path / "tokenizer.json", tmp_path):
        with pytest.raises(NotFoundError, match=f"no tokenizer at {path}"):
            load_tokenizer(path)
