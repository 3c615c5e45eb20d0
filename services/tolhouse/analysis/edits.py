"""Parses edits of token rows: TOKEN=OTHER, TOKEN=FACTOR, or a file of rows."""

import math
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.model.tokenizer import TokenTexts
from tolhouse.store.base import Store
from tolhouse.table.manifest import Manifest

_BAD_ZIP = (zipfile.BadZipFile, zlib.error)
_BAD_ARCHIVE = (OSError, ValueError, LookupError, EOFError, TypeError, *_BAD_ZIP)


def token_id(word: str, tokenizer: Tokenizer | None) -> int:
    """Return the id of a token, given as a number or, with a tokenizer, as a text.

    The text may be in quotes.
    """
    if word.isascii() and word.isdecimal():
        return min(int(word[:20]), 2**63 - 1)
    if tokenizer is None:
        raise InvalidArgumentError(
            f"token {word!r} is not an id: give --checkpoint, for its tokenizer"
        )
    text = word[1:-1] if len(word) > 2 and word[0] == word[-1] and word[0] in "'\"" else word
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if len(ids) != 1:
        texts = TokenTexts(tokenizer)
        words = ((texts.name(i)[0], i) for i in ids[:8])
        parts = ", ".join(f"{word!r} ({i})" for word, i in words)
        raise InvalidArgumentError(f"{text!r} is not one token but {len(ids)}: {parts}")
    return ids[0]


def copy_of(edit: str, tokenizer: Tokenizer | None) -> tuple[int, int]:
    """Return the two ids in TOKEN=OTHER, split at the last `=` with a token on both sides."""
    errors = [InvalidArgumentError(f"--copy {edit!r} is not TOKEN=OTHER")]
    for at in range(len(edit) - 2, 0, -1):
        if edit[at] == "=":
            try:
                return token_id(edit[:at], tokenizer), token_id(edit[at + 1 :], tokenizer)
            except InvalidArgumentError as error:
                errors.append(error)
    raise errors[min(1, len(errors) - 1)]


def scale_of(edit: str, tokenizer: Tokenizer | None) -> tuple[int, float]:
    """Return the id and the number in TOKEN=FACTOR, split at the last `=`."""
    token, _, value = edit.rpartition("=")
    if not token or not value:
        raise InvalidArgumentError(f"--scale {edit!r} is not TOKEN=FACTOR")
    factor = math.nan
    with suppress(ValueError):
        factor = float(value)
    if math.isfinite(factor):
        return token_id(token, tokenizer), factor
    raise InvalidArgumentError(f"{value!r} is not a number to scale a row by")


def read_rows(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the arrays `ids` [T] and `rows` [T, N, D] of a NumPy archive."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            ids, rows = archive["ids"], archive["rows"]
    except FileNotFoundError:
        raise NotFoundError(f"no file {file}") from None
    except _BAD_ARCHIVE as error:
        arrays = "arrays `ids` and `rows`"
        raise InvalidArgumentError(
            f"{file} is not an .npz archive with {arrays}: {error}"
        ) from None
    kinds = ids.dtype.kind in "iu" and rows.dtype.kind == "f"
    if not kinds or (ids.ndim, rows.ndim) != (1, 3) or len(rows) != len(ids):
        arrays = f"{ids.dtype} {list(ids.shape)} and {rows.dtype} {list(rows.shape)}"
        rule = "ids must be a flat list of whole numbers and rows floats [ids, layers, width]"
        raise InvalidArgumentError(f"{file}: {rule}, not {arrays}")
    return ids.astype(np.int64), _finite(rows)


def edited_rows(
    store: Store,
    manifest: Manifest,
    copied: list[tuple[int, int]],
    scaled: list[tuple[int, float]],
    given: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the changed ids [T] and their new rows [T, N, D].

    `copies` are (token, other), `scales` are (token, factor), and `given` are ids with their rows.
    """
    sources = np.array([*(other for _, other in copied), *(i for i, _ in scaled)], np.uint64)
    targets = np.array([i for i, _ in (*copied, *scaled)], np.uint64)
    manifest.check_ids(np.concatenate([sources, targets]))
    parts = [given] if given else []
    if len(sources):
        rows = store.rows(manifest, sources.astype(np.uint32)).astype(np.float64)
        rows[len(copied) :] *= np.array([by for _, by in scaled])[:, None, None]
        if manifest.has_x0:  # an edit does not change the embedding
            x0 = manifest.blocks.index("x0")
            rows[:, x0] = store.rows(manifest, targets.astype(np.uint32))[:, x0]
        rows = _finite(rows)
        if given and given[1].shape[1:] != rows.shape[1:]:
            new, old = (list(array.shape[1:]) for array in (given[1], rows))
            raise InvalidArgumentError(
                f"the given rows are of {new}; those of {manifest.ref} of {old}"
            )
        parts = [(targets.astype(np.int64), rows), *parts]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([rows for _, rows in parts])


def _finite(rows: np.ndarray) -> np.ndarray:
    """Return `rows` as float32.

    Raises InvalidArgumentError if a value is not finite in float32.
    """
    if not (np.abs(rows) <= np.finfo(np.float32).max).all():
        message = "the edited rows hold values that are not finite in 32 bits: give smaller ones"
        raise InvalidArgumentError(message)
    return rows.astype(np.float32)
