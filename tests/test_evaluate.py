"""The text that a model is measured on: a user's as it is, the held-out part as training has it."""

from pathlib import Path

import pytest
from tolhouse.analysis.evaluate import evaluate, read_text
from tolhouse.errors import InvalidArgument
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.train.corpus import END_OF_TEXT, documents, is_held_out, standard_library

LONG = "def name(value):\n    return value + 1\n" * 1000


def test_a_given_text_is_its_own_tokens_alone(checkpoint: Path, tmp_path: Path) -> None:
    """Files are not cut into pieces; an end of text is between two files alone."""
    opened = open_checkpoint(checkpoint)
    tokenizer = opened.tokenizer()
    end = tokenizer.token_to_id(END_OF_TEXT)
    (tmp_path / "a.txt").write_text(LONG)
    assert tokenizer.encode(LONG).ids == read_text(opened, tmp_path / "a.txt").tolist()
    (tmp_path / "b.txt").write_text("import os")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").touch()
    expected = [*tokenizer.encode(LONG).ids, end, *tokenizer.encode("import os").ids]
    assert expected == read_text(opened, tmp_path).tolist()
    assert expected[:7] == read_text(opened, tmp_path, 7).tolist()


def test_the_held_out_part_is_that_of_training(checkpoint: Path) -> None:
    """It is in pieces, each closed by an end of text, as in training."""
    opened = open_checkpoint(checkpoint)
    end = opened.tokenizer().token_to_id(END_OF_TEXT)
    texts = [text for name, text in documents(standard_library()) if is_held_out(name)]
    expected = [
        i for encoding in opened.tokenizer().encode_batch(texts) for i in (*encoding.ids, end)
    ]
    assert expected == read_text(opened, None).tolist()


@pytest.mark.parametrize(
    ("contents", "most_tokens", "expected"),
    [
        (b"x", 0, "gives 1 token; at least 2 are needed"),
        (b"", 0, "gives 0 tokens; at least 2 are needed"),
        (b"\xff\xfe", 0, "text.txt is not UTF-8"),
        (b"import os", 1, "the most tokens must be at least 2"),
    ],
)
def test_a_text_with_nothing_to_predict_is_told(
    checkpoint: Path, tmp_path: Path, contents: bytes, most_tokens: int, expected: str
) -> None:
    (tmp_path / "text.txt").write_bytes(contents)
    with pytest.raises(InvalidArgument, match=expected):
        read_text(open_checkpoint(checkpoint), tmp_path / "text.txt", most_tokens)


def test_a_folder_without_text_is_told(checkpoint: Path, tmp_path: Path) -> None:
    """As a single file is."""
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="holds no text that is UTF-8"):
        read_text(open_checkpoint(checkpoint), tmp_path)


def test_each_token_after_the_first_is_predicted(checkpoint: Path, tmp_path: Path) -> None:
    """Two tokens are one prediction."""
    opened = open_checkpoint(checkpoint)
    (tmp_path / "text.txt").write_text("xy z")
    ids = read_text(opened, tmp_path / "text.txt", 2)
    found = evaluate(opened.model(), ids)
    assert ids[1:].tolist() == found.targets.tolist()
    assert 1 == len(found.losses)
