"""The inputs of an evaluation: a text and rows.

Rows may come from a table, pass through a codec, be scaled or be left out.

Absent layers and scaled rows are the probes of the paper (section 5). `model/losses.py` computes
the losses.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from tolhouse.client.client import Client
from tolhouse.errors import InvalidArgumentError, MismatchError
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.losses import RowsOf
from tolhouse.net.auth import ClientCredentials
from tolhouse.sampling import SamplingParams
from tolhouse.table.codecs import codec
from tolhouse.train.corpus import END_OF_TEXT, documents, is_held_out, standard_library, whole_files


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


def table_rows(
    checkpoint: Checkpoint, url: str, table: str, credentials: ClientCredentials | None = None
) -> np.ndarray:
    """Return all rows of a table of this checkpoint, float32 [V, N, D].

    X0 comes first if the table has it.

    The rows of layers that the table lacks are zero.
    """
    config, model_id = checkpoint.config, checkpoint.model_id()
    with Client(url, credentials=credentials) as client:
        manifest = client.describe(table)
        fetched = client.fetch(manifest, np.arange(manifest.vocab_size))
    if manifest.model_id != model_id:
        built = f"table {manifest.ref} was built from model {manifest.model_id[:12]}"
        raise MismatchError(f"{built}, but checkpoint {checkpoint.name} is {model_id[:12]}")
    blocks = manifest.model_blocks(config.num_rows)
    sizes = (config.vocab_size, config.hidden_size)
    if sizes != (manifest.vocab_size, manifest.width) or not set(manifest.blocks) <= set(blocks):
        lack = f"does not hold a row for each token of {checkpoint.name}"
        raise MismatchError(f"table {manifest.ref} {lack}; it may be an auxiliary table")
    rows = np.zeros((config.vocab_size, len(blocks), config.hidden_size), np.float32)
    rows[:, [blocks.index(block) for block in manifest.blocks]] = fetched
    return rows


def through(name: str, rows: np.ndarray) -> np.ndarray:
    """Encode and decode rows with a codec."""
    return codec(name).decode(codec(name).encode(rows)).astype(np.float32)


def probed(
    rows: np.ndarray, row_scale: float = 1, absent_layers: Iterable[int] = (), x0: int = 0
) -> RowsOf:
    """Return `rows` [V, N, D] times `row_scale`, with zeros for `absent_layers`.

    The first `x0` blocks are unchanged.
    """
    count = rows.shape[1] - x0
    SamplingParams(row_scale=row_scale)  # checks the bounds
    if bad := [layer for layer in absent_layers if not 0 <= layer < count]:
        layers = f"0 to {count - 1}" if count > 1 else "one row for all layers"
        raise InvalidArgumentError(
            f"there is no layer {bad[0]} to leave out: this model has {layers}"
        )
    scale = torch.full((x0 + count, 1, 1), float(row_scale))
    scale[:x0] = 1
    scale[[x0 + layer for layer in absent_layers]] = 0
    rows_NVD = torch.from_numpy(np.ascontiguousarray(rows.swapaxes(0, 1))) * scale
    return lambda ids_T: rows_NVD[:, ids_T]
