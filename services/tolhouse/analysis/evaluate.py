"""The inputs of an evaluation: a text and rows.

Rows may come from a table, pass through a codec, be scaled or be left out.

Absent layers and scaled rows are the probes of the paper (section 5). `model/losses.py` computes
the losses.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tolhouse.client.client import Client
from tolhouse.errors import InvalidArgumentError, MismatchError
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.losses import RowsOf
from tolhouse.net.auth import ClientCredentials
from tolhouse.sampling import SamplingParams
from tolhouse.table.codecs import codec
from tolhouse.train.corpus import END_OF_TEXT, documents, is_held_out, standard_library, whole_files

ReadRows = Callable[[np.ndarray], np.ndarray]  # token ids [T] to rows [T, N, D]


def read_text(checkpoint: Checkpoint, path: Path | None, most_tokens: int = 0) -> np.ndarray:
    """Return the first `most_tokens` token ids of a text, int64 [T].

    The default text is the held-out text.

    An end-of-text token separates files. The held-out part of the standard library is split into
    pieces as in training, and each piece has an end-of-text token.
    """
    if most_tokens == 1:
        raise InvalidArgumentError("the most tokens must be at least 2, or 0 for all")
    tokenizer = checkpoint.tokenizer()
    end = tokenizer.token_to_id(END_OF_TEXT)
    ends = [] if end is None else [end]
    if path:
        texts = [text for _, text in whole_files(path)]
        if not texts:
            folder = "holds no text that is UTF-8"
            wrong = folder if path.is_dir() else "is not UTF-8, or cannot be read"
            raise InvalidArgumentError(f"{path} {wrong}: give a text file or a folder of them")
    else:
        texts = [text for name, text in documents(standard_library()) if is_held_out(name)]
    encodings = tokenizer.encode_batch([*filter(None, texts)])
    ids = [i for encoding in encodings for i in (*encoding.ids, *ends)]
    ids = ids[: len(ids) - bool(path and ends)][: most_tokens or None]
    if len(ids) < 2:
        count = f"{len(ids)} token{'s' * (len(ids) != 1)}"
        raise InvalidArgumentError(f"{path or 'the text'} gives {count}; at least 2 are needed")
    return np.array(ids, np.int64)


class TableRows:
    """Reads rows from a table of a checkpoint: from ids [T] to float32 [T, N, D].

    X0 comes first if the table has it, and then `x0` is 1. The rows of layers that the table lacks
    are zero.
    """

    def __init__(self, checkpoint: Checkpoint, client: Client, table: str) -> None:
        config, model_id = checkpoint.config, checkpoint.model_id()
        self.client, self.manifest = client, client.describe(table)
        manifest = self.manifest
        if manifest.model_id != model_id:
            built = f"table {manifest.ref} was built from model {manifest.model_id[:12]}"
            raise MismatchError(f"{built}, but checkpoint {checkpoint.name} is {model_id[:12]}")
        blocks = manifest.model_blocks(config.num_rows)
        sizes, known = (config.vocab_size, config.hidden_size), set(blocks)
        if sizes != (manifest.vocab_size, manifest.width) or not set(manifest.blocks) <= known:
            lack = f"does not hold a row for each token of {checkpoint.name}"
            raise MismatchError(f"table {manifest.ref} {lack}; it may be an auxiliary table")
        self.x0, self.count = int(manifest.has_x0), len(blocks)
        self._places = [blocks.index(block) for block in manifest.blocks]

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        rows = np.zeros((len(ids), self.count, self.manifest.width), np.float32)
        rows[:, self._places] = self.client.fetch(self.manifest, ids)
        return rows


def table_rows(
    checkpoint: Checkpoint, url: str, table: str, credentials: ClientCredentials | None = None
) -> np.ndarray:
    """Return all rows of a table of this checkpoint, float32 [V, N, D], as `TableRows` reads them.

    They take 4 * V * N * D bytes, also if the table has only a few layers.
    """
    with Client(url, credentials=credentials) as client:
        return TableRows(checkpoint, client, table)(np.arange(checkpoint.config.vocab_size))


def read_by(read: ReadRows) -> RowsOf:
    """Return a function from ids [T] to rows [N, T, D], which reads each distinct token once."""

    def rows(ids_T: Tensor) -> Tensor:
        distinct, places = np.unique(ids_T.numpy(), return_inverse=True)
        return torch.from_numpy(read(distinct)[places].swapaxes(0, 1))

    return rows


def through(name: str, rows: np.ndarray) -> np.ndarray:
    """Encode and decode rows [T, N, D] with a codec."""
    return codec(name).decode(codec(name).encode(rows)).astype(np.float32)


def probed(
    rows: np.ndarray, row_scale: float = 1, absent_layers: Iterable[int] = (), x0: int = 0
) -> RowsOf:
    """Return `rows` [V, N, D] times `row_scale`, with zeros for `absent_layers`.

    The first `x0` blocks are unchanged.
    """
    rows_NVD = torch.from_numpy(np.ascontiguousarray(rows.swapaxes(0, 1)))
    scale = scales(rows.shape[1] - x0, row_scale, absent_layers, x0)
    return lambda ids_T: rows_NVD[:, ids_T] * scale


def scales(layers: int, row_scale: float, absent_layers: Iterable[int], x0: int = 0) -> Tensor:
    """Return the factors [x0 + layers, 1, 1] of rows: `row_scale`, 0 for `absent_layers`, 1 for X0.

    Raises InvalidArgumentError if the scale is out of bounds, or if there is no such layer.
    """
    SamplingParams(row_scale=row_scale)  # checks the bounds
    if bad := [layer for layer in absent_layers if not 0 <= layer < layers]:
        there = f"0 to {layers - 1}" if layers > 1 else "one row for all layers"
        raise InvalidArgumentError(
            f"there is no layer {bad[0]} to leave out: this model has {there}"
        )
    scale = torch.full((x0 + layers, 1, 1), float(row_scale))
    scale[:x0] = 1
    scale[[x0 + layer for layer in absent_layers]] = 0
    return scale
