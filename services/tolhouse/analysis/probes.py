"""Rows as a probe wants them: of a table, through a codec, scaled by α, or without those of some layers (PAPER section 5)."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tolhouse.analysis.evaluate import RowsOf
from tolhouse.errors import InvalidArgument, Mismatch
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.rows import batches
from tolhouse.sampling import SamplingParams
from tolhouse.store.base import open_store
from tolhouse.store.registry import resolve
from tolhouse.table.codecs import codec
from tolhouse.train.corpus import END_OF_TEXT, documents, is_held_out, standard_library, whole_files


def read_text(checkpoint: Checkpoint, path: Path | None, most_tokens: int = 0) -> np.ndarray:
    """Token ids int64 [T] of a text file or a folder of them, or by default of the standard library's held-out part; the first `most_tokens`.

    A text that is given is read whole, with an end of text between two files alone: no token is predicted that is not its own. The held-out
    part is that of training, in pieces with an end after each. NotFound, or InvalidArgument where there is nothing to predict.
    """
    if most_tokens == 1:
        raise InvalidArgument(
            "the most tokens must be at least 2, one to predict the other from, or 0 for all"
        )
    tokenizer = checkpoint.tokenizer()
    end = tokenizer.token_to_id(END_OF_TEXT)
    ends = [] if end is None else [end]
    if path is None:
        texts = [text for name, text in documents(standard_library()) if is_held_out(name)]
    else:
        found = list(whole_files(path))
        if not found:
            wrong = (
                "holds no text that is UTF-8" if path.is_dir() else "is not UTF-8, or can't be read"
            )
            raise InvalidArgument(f"{path} {wrong}: give a text file or a folder of them")
        texts = [text for _, text in found if text]
    ids = [i for encoding in tokenizer.encode_batch(texts) for i in (*encoding.ids, *ends)]
    if path is not None and ends:
        ids = ids[:-1]
    ids = ids[: most_tokens or None]
    if len(ids) < 2:
        raise InvalidArgument(
            f"{path or 'the text'} gives {len(ids)} token{'s' * (len(ids) != 1)}; at least 2 are needed, one to predict the other from"
        )
    return np.array(ids, np.int64)


def model_rows(
    checkpoint: Checkpoint, x0: bool = False, layers: tuple[int, ...] | None = None
) -> np.ndarray:
    """Rows float32 [V, N, D] that the model computes, of all layers or of `layers`; X0 in front if `x0`."""
    ids = np.arange(checkpoint.config.vocab_size, dtype=np.uint32)
    return np.concatenate([rows for _, rows in batches(checkpoint.model(), ids, x0, layers)])


def table_rows(checkpoint: Checkpoint, store_url: str, table: str) -> np.ndarray:
    """Rows float32 [V, N, D] of a table of this checkpoint, X0 in front if it carries it, zero where it lacks a layer's.

    Mismatch if it is of another checkpoint, or no table of rows for tokens.
    """
    store = open_store(store_url)
    manifest = resolve(store, table)
    if manifest.model_id != checkpoint.model_id():
        raise Mismatch(
            f"table {manifest.ref} was built from model {manifest.model_id[:12]}, but checkpoint {checkpoint.name} is {checkpoint.model_id()[:12]}"
        )
    config = checkpoint.config
    if (manifest.vocab_size, manifest.width) != (
        config.vocab_size,
        config.hidden_size,
    ) or manifest.layers[-1] >= config.num_rows:
        raise Mismatch(
            f"table {manifest.ref} does not hold a row for each token of {checkpoint.name}: is it a part of a compressed one?"
        )
    found = store.rows(manifest, np.arange(manifest.vocab_size, dtype=np.uint32))
    rows = np.zeros((len(found), manifest.has_x0 + config.num_rows, config.hidden_size), np.float32)
    rows[:, [*range(manifest.has_x0), *(manifest.has_x0 + layer for layer in manifest.layers)]] = (
        found
    )
    return rows


def through(name: str, rows: np.ndarray) -> np.ndarray:
    """What a codec makes of rows."""
    return codec(name).decode(codec(name).encode(rows)).astype(np.float32)


def probed(rows: np.ndarray, alpha: float = 1.0, absent: Iterable[int] = (), x0: int = 0) -> RowsOf:
    """`rows` [V, N, D] times `alpha`, those of `absent` layers zero; the first `x0` are X0, which no probe changes.

    InvalidArgument for a layer that there is not, or a factor that requests may not have either.
    """
    count = rows.shape[1] - x0
    SamplingParams(row_scale=alpha)  # has the same bounds
    if bad := [layer for layer in absent if not 0 <= layer < count]:
        raise InvalidArgument(
            f"there is no layer {bad[0]} to leave out: this model has {f'0 to {count - 1}' if count > 1 else 'one row for all layers'}"
        )
    scale = torch.full((x0 + count, 1, 1), float(alpha))
    scale[:x0] = 1
    scale[[x0 + layer for layer in absent]] = 0
    rows_NVD = torch.from_numpy(np.ascontiguousarray(rows.swapaxes(0, 1))) * scale

    def of(ids_T: Tensor) -> Tensor:
        return rows_NVD[:, ids_T]

    return of
