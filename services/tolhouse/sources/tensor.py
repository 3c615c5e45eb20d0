"""Reads the rows of a table from one tensor [V, blocks * width] of safetensors files.

The tensor may be in a file or in a folder with model.safetensors.index.json, both local or at a URL
that fsspec reads. Local files are read row by row. From a URL, the range of the tensor is copied
once to a temporary file, because each shard of a table has rows from all parts of the tensor.
"""

import difflib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tolhouse.errors import InvalidArgumentError, NotFoundError, TolhouseError, UnavailableError
from tolhouse.model.checkpoint import checkpoint_name
from tolhouse.model.tokenizer import TOKENIZER, tokenizer_id
from tolhouse.model.weights import (
    DTYPES,
    HEADER_BYTES,
    INDEX,
    WEIGHTS,
    StoredTensor,
    Weights,
    WeightsFile,
    parse_header,
    parse_index,
)

_BATCH_BYTES = 1 << 21  # float32 rows that are converted at once
_PART_BYTES = 1 << 24  # one request to an object store
_LIKELY = 8  # names in an error


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
        similar = difflib.get_close_matches(name, matrices, _LIKELY, 0.3)
        largest = sorted(matrices, key=lambda n: -tensors[n].bytes)
        likely = list(dict.fromkeys((*similar, *largest)))[:_LIKELY]
        names = ", ".join(f"{n} {list(matrices[n])}" for n in likely) or "no matrix"
        raise NotFoundError(f"{where} has no tensor {name}; it has {names}")
    found = tensors[name]
    if len(found.shape) != 2 or found.dtype not in DTYPES or not found.bytes:
        allowed = f"allowed are matrices [V, blocks * width] of {', '.join(DTYPES)}"
        raise InvalidArgumentError(
            f"{where}: {name} is {found.dtype} {list(found.shape)}; {allowed}"
        )
    return found


@contextmanager
def local_copy(url: str, tensor: str, progress: Any) -> Iterator[Path]:
    """Copy one tensor from a URL to a temporary safetensors file, which the block may read.

    `url` is a file or a folder. `progress` makes a progress bar from a number of bytes. Raises
    NotFoundError, InvalidArgumentError, or UnavailableError if the object store fails.
    """
    with tempfile.TemporaryDirectory(prefix="tolhouse-import-") as folder:
        with _store_errors(url):
            file = _copied(url, tensor, Path(folder), progress)
        yield file


def _copied(url: str, tensor: str, folder: Path, progress: Any) -> Path:
    fs, root = _filesystem(url)
    place = _place(fs, root.rstrip("/"), tensor)
    stored = find_tensor(_header(fs, place), tensor, place)
    name = root.rstrip("/").rpartition("/")[2].removesuffix(".safetensors") or "tensor"
    file = folder / name
    with file.open("wb") as out, progress(stored.bytes) as bar:
        about = {"dtype": stored.dtype, "shape": stored.shape}
        header = json.dumps({tensor: {**about, "data_offsets": [0, stored.bytes]}}).encode()
        out.write(len(header).to_bytes(8, "little") + header)
        end = stored.start + stored.bytes
        for start in range(stored.start, end, _PART_BYTES):
            part = fs.cat_file(place, start=start, end=min(end, start + _PART_BYTES))
            out.write(part)
            bar.update(len(part))
    return file


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped] # it has no types

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the package of a protocol is missing
        raise InvalidArgumentError(f"{url} cannot be read: {error}") from None


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Map errors of the object store to errors of Tolhouse."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{url}: there is no file {error}") from None
    except PermissionError as error:
        raise InvalidArgumentError(f"{url} cannot be read: {error}") from None
    except ConnectionError as error:
        raise UnavailableError(f"{url} cannot be read: {error}") from None
    except (TolhouseError, OSError):  # such as a full disk
        raise
    except Exception as error:  # noqa: BLE001 - each object store has classes of its own
        reason = f"{type(error).__name__}: {error}"
        raise UnavailableError(f"{url} cannot be read: {reason}") from None


def _place(fs: Any, root: str, tensor: str) -> str:
    """Return the file that holds the tensor: `root`, or a file of the folder `root`."""
    if fs.isfile(root):
        return root
    if fs.isfile(f"{root}/{WEIGHTS}"):
        return f"{root}/{WEIGHTS}"
    index = f"{root}/{INDEX}"
    if not fs.isfile(index):
        raise NotFoundError(f"{root} is no file, nor a folder with {WEIGHTS} or {INDEX}")
    files = parse_index(_json(fs.cat_file(index), index), index)
    if tensor not in files:
        similar = difflib.get_close_matches(tensor, files, _LIKELY, 0.3) or list(files)[:_LIKELY]
        raise NotFoundError(f"{index} has no tensor {tensor}; it has {', '.join(similar)}")
    place = f"{root}/{files[tensor]}"
    if not fs.isfile(place):
        raise NotFoundError(f"{root} lacks {files[tensor]}, which {INDEX} names")
    return place


def _header(fs: Any, place: str) -> dict[str, StoredTensor]:
    length = int.from_bytes(fs.cat_file(place, start=0, end=8), "little")
    size = fs.size(place)
    if length > min(size - 8, HEADER_BYTES):
        raise InvalidArgumentError(f"{place} is not a safetensors file: its header is truncated")
    return parse_header(fs.cat_file(place, start=8, end=8 + length), size, place)


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{where} is not JSON: {error}") from None
