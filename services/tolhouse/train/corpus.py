"""Converts the files of a training text to one array of token ids. Contains no models.

The default text is the source of the Python standard library, which every machine has. One document
in 40 is held out, chosen by a hash of its name. An end-of-text token separates documents.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.model.tokenizer import load_tokenizer

END_OF_TEXT = "<|endoftext|>"
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED |= {"lib2to3", "pydoc_data"}
_HELD_OUT_ONE_IN = 40
_PIECE_CHARS = 20_000  # a longer file becomes several documents, so that one file can also be split


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def documents(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each document in a file, or in the text files in a folder."""
    for name, text in whole_files(path):
        for start in range(0, len(text), _PIECE_CHARS):
            yield f"{name}:{start}", text[start : start + _PIECE_CHARS]


def whole_files(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for a file, or for every UTF-8 file in a folder, in order of name."""
    if not path.exists():
        raise NotFoundError(f"no corpus at {path}: give a text file or a folder of them")
    stdlib = path == standard_library()
    single = not path.is_dir()  # a file or a pipe
    below = path.rglob("*.py" if stdlib else "*")
    for file in [path] if single else sorted(p for p in below if p.is_file()):
        if stdlib and SKIPPED & set(file.relative_to(path).parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a binary file in a folder of texts
        yield file.name if single else file.relative_to(path).as_posix(), text


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with at most `vocab_size` tokens. Every text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(path: Path, folder: Path, vocab_size: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (train, held-out) token ids of a corpus, with the tokenizer in `folder`.

    A missing tokenizer is trained first.
    """
    sides: tuple[list[str], list[str]] = [], []
    for name, text in documents(path):
        sides[is_held_out(name)].append(text)
    # If a side is empty, a document of the other side is on both.
    kept, held_out = sides[0] or sides[1][:1], sides[1] or sides[0][-1:]
    file = folder / "tokenizer.json"
    if not file.exists():
        train_tokenizer(kept, vocab_size).save(str(file))
    tokenizer = load_tokenizer(file, vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise InvalidArgumentError(f"{file} has no token {END_OF_TEXT}, which ends a document")
    train, valid = (
        np.array([i for e in tokenizer.encode_batch(texts) for i in (*e.ids, end)], np.int32)
        for texts in (kept, held_out)
    )
    if (size := min(len(train), len(valid))) <= least:
        need = f"{size} tokens on one side; more than {least} are needed"
        raise InvalidArgumentError(f"the corpus at {path} is too small: {need}")
    return train, valid
