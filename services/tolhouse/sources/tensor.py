"""Reads the rows of a table from one tensor [V, blocks * width] of safetensors files.

The tensor may be in a file or in a folder with model.safetensors.index.json. It is read row by row.
"""

import difflib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.model.checkpoint import checkpoint_name
from tolhouse.model.tokenizer import TOKENIZER, tokenizer_id
from tolhouse.model.weights import DTYPES, StoredTensor, Weights, WeightsFile

_BATCH_BYTES = 1 << 21  # float32 rows that are converted at once
LIKELY = 8  # names in an error


class TensorRows:
    """Rows [T, blocks, width] of a tensor. The blocks are PREFIX.0, PREFIX.1 and so on.

    Raises NotFoundError if a file or the tensor is missing, and InvalidArgumentError if the tensor
    does not consist of `num_blocks` blocks.
    """

    def __init__(self, path: Path, tensor: str, num_blocks: int, prefix: str = "block") -> None:
        if path.is_dir():
            self._file: Weights | WeightsFile = Weights(path)
        elif path.is_file():
            self._file = WeightsFile(path)
        else:
            raise NotFoundError(f"there is no file or folder {path}")
        stored = find_tensor(self._file.tensors, tensor, str(path))
        self.vocab_size, self.width = stored.shape[0], stored.shape[1] // num_blocks
        if num_blocks < 1 or stored.shape[1] % num_blocks:
            raise InvalidArgumentError(
                f"{tensor} has {stored.shape[1]} values a row, which `blocks` {num_blocks} does not"
                " divide: a row consists of blocks of equal width"
            )
        if not re.fullmatch("[a-z][a-z0-9_]{0,31}", prefix):
            allowed = "a lower-case letter, then up to 31 lower-case letters, digits or _"
            raise InvalidArgumentError(
                f"`block_prefix` {prefix!r:.60} is not allowed: use {allowed}"
            )
        self.blocks = tuple(f"{prefix}.{k}" for k in range(num_blocks))
        self.codec_name = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}[stored.dtype]
        self.name, self._tensor, self._stored = checkpoint_name(path), tensor, stored
        self._tokenizer = path / TOKENIZER

    @property
    def tokenizer_id(self) -> str:
        return tokenizer_id(self._tokenizer) if self._tokenizer.is_file() else ""

    def rows_id(self) -> str:
        """Return a hash of the type, the shape and the bytes of the tensor."""
        return self._file.tensor_digest(self._tensor)

    def model_id(self) -> str:
        """Return a hash of the name and the contents of the tensor."""
        return hashlib.sha256(f"{self._tensor} {self.rows_id()}".encode()).hexdigest()

    def rows(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Return the float32 rows of `ids`, or of the whole vocabulary."""
        ids = np.arange(self.vocab_size) if ids is None else ids
        return np.concatenate([rows for _, rows in self.batches(ids)])

    def batches(self, ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows of `ids` in batches, each with its slice of `ids`."""
        step = max(1, _BATCH_BYTES // (4 * self._stored.shape[1]))
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            rows = self._file.read_rows(self._tensor, part).float().numpy()
            yield (
                slice(start, start + len(part)),
                rows.reshape(len(part), len(self.blocks), self.width),
            )


def find_tensor(tensors: dict[str, StoredTensor], name: str, where: str) -> StoredTensor:
    """Return the tensor `name`, a matrix of floats.

    Raises NotFoundError with likely names, or InvalidArgumentError for another type or shape.
    """
    if name not in tensors:
        matrices = {n: t.shape for n, t in tensors.items() if len(t.shape) == 2}
        similar = difflib.get_close_matches(name, matrices, LIKELY, 0.3)
        largest = sorted(matrices, key=lambda n: -tensors[n].bytes)
        likely = list(dict.fromkeys((*similar, *largest)))[:LIKELY]
        names = ", ".join(f"{n} {list(matrices[n])}" for n in likely) or "no matrix"
        raise NotFoundError(f"{where} has no tensor {name}; it has {names}")
    found = tensors[name]
    if len(found.shape) != 2 or found.dtype not in DTYPES or not found.bytes:
        allowed = f"allowed are matrices [V, blocks * width] of {', '.join(DTYPES)}"
        raise InvalidArgumentError(
            f"{where}: {name} is {found.dtype} {list(found.shape)}; {allowed}"
        )
    return found
