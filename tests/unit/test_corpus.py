"""The training corpus: complete text, a stable split, and a matching tokenizer."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tolhouse.errors import InvalidArgumentError
from tolhouse.train.corpus import (
    END_OF_TEXT,
    documents,
    is_held_out,
    prepare,
    standard_library,
    train_tokenizer,
    whole_files,
)

WORDS = [f"def name_{n}(value):\n    return value + {n}\n" for n in range(3000)]
TOKENIZER = train_tokenizer(["".join(WORDS[:50])], 300)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A single file of several documents."""
    path = tmp_path / "text.txt"
    path.write_text("".join(WORDS), encoding="utf-8")
    return path


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    """A byte-level tokenizer encodes all characters, and its ids are below its size."""
    ids = TOKENIZER.encode(text).ids
    assert text == TOKENIZER.decode(ids, skip_special_tokens=False)
    assert all(i < TOKENIZER.get_vocab_size() <= 300 for i in ids)


def test_a_file_is_divided_into_documents_without_loss(text: Path) -> None:
    """A file is divided into documents of 20,000 characters, named by their offsets, that join to
    the whole file."""
    names, pieces = zip(*documents(text), strict=True)
    assert text.read_text(encoding="utf-8") == "".join(pieces)
    assert [
        f"text.txt:{start}" for start in range(0, len(text.read_text(encoding="utf-8")), 20_000)
    ] == list(names)
    assert [("text.txt", text.read_text(encoding="utf-8"))] == list(whole_files(text))


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    """The order is that of names, independent of the file system; text in any alphabet and at any
    depth is read, and binary files are not."""
    for name in ("b.txt", "a/z.txt", "a/b.py", "ä.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"für {name} ✓", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "empty.txt").touch()
    assert [
        (f"{name}:0", f"für {name} ✓") for name in ("a/b.py", "a/z.txt", "b.txt", "ä.md")
    ] == list(documents(tmp_path))
    assert ["a/b.py", "a/z.txt", "b.txt", "empty.txt", "ä.md"] == [
        name for name, _ in whole_files(tmp_path)
    ]


def test_the_default_corpus_excludes_tests() -> None:
    """The default corpus is Python's own source, without tests and other packages."""
    paths = [Path(name.rpartition(":")[0]) for name, _ in documents(standard_library())]
    assert {Path("argparse.py"), Path("json/decoder.py")} <= set(paths)
    assert {".py"} == {path.suffix for path in paths}
    assert not {"test", "tests", "site-packages"} & {part for path in paths for part in path.parts}


def test_each_part_has_its_documents_and_end_of_text_tokens(text: Path, tmp_path: Path) -> None:
    """The ids of both parts decode to their documents, each followed by the end-of-text token."""
    sides = prepare(text, tmp_path, 300, 10)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert 0 == tokenizer.token_to_id(END_OF_TEXT)
    for ids, held_out in zip(sides, (False, True), strict=True):
        expected = [piece for name, piece in documents(text) if held_out == is_held_out(name)] or [
            list(documents(text))[-1][1]
        ]
        ends = np.flatnonzero(ids == 0)
        assert len(ids) - 1 == ends[-1]
        starts = [0, *(ends[:-1] + 1)]
        assert expected == [
            tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)
        ]


def test_one_document_in_forty_is_held_out_by_name() -> None:
    """About one document in forty is held out, depending only on its name."""
    held_out = [name for n in range(20_000) if is_held_out(name := f"file{n}.py:0")]
    assert 400 < len(held_out) < 650
    assert all(map(is_held_out, held_out))


def test_a_single_document_is_enough(tmp_path: Path) -> None:
    """If one part would be empty, the only document is used for both."""
    chance = (f"{n}.txt" for n in itertools.count())
    names = [
        next(name for name in chance if is_held_out(f"{name}:0") == held_out)
        for held_out in (False, True)
    ]
    for name in names:
        (tmp_path / name).write_text("".join(WORDS[:200]), encoding="utf-8")
        train, valid = prepare(tmp_path / name, tmp_path, 300, 10)
        assert train.tolist() == valid.tolist()


def test_an_existing_tokenizer_is_used(text: Path, tmp_path: Path) -> None:
    """An existing tokenizer in the folder encodes the text and is not changed."""
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    before = (tmp_path / "tokenizer.json").read_bytes()
    train, _ = prepare(text, tmp_path, 4096, 10)
    assert before == (tmp_path / "tokenizer.json").read_bytes()
    assert train.max() < 300


@pytest.mark.parametrize("tokenizer", ["malformed", "too large", "without an end of text"])
def test_an_unsuitable_tokenizer_is_refused(text: Path, tmp_path: Path, tokenizer: str) -> None:
    """An unsuitable tokenizer in the folder is refused before training begins."""
    path = tmp_path / "tokenizer.json"
    match tokenizer:
        case "malformed":
            path.write_text("{", encoding="utf-8")
        case "too large":
            TOKENIZER.save(str(path))
        case _:
            Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(InvalidArgumentError, match=r"tokenizer\.json"):
        prepare(text, tmp_path, TOKENIZER.get_vocab_size() - 1, 10)
