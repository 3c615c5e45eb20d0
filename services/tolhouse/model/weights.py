"""The weights of a checkpoint: safetensors files, read into the memory of the process.

The files are not mapped. Overwriting or truncating a file therefore neither changes weights in
memory nor ends the process. Each read checks that the file has not changed since it was opened.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tolhouse.errors import InvalidArgumentError, MismatchError, NotFoundError
from tolhouse.files import read_json

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # the longest header that safetensors writes
_READ_BYTES = 1 << 24  # the size of reads for hashes and comparisons
_UNUSED = re.compile(r"(.*\.)?rotary_emb\.\w+")  # buffers in files of old transformers
_WRAPPERS = re.compile(r"((_orig_mod|module)\.)+")  # prefixes of torch.compile and of DDP


class StoredTensor(NamedTuple):
    dtype: str  # the name in safetensors
    shape: tuple[int, ...]
    start: int  # the position in the file
    bytes: int


class Weights:
    """The tensors of a checkpoint folder, by the names in `checkpoint.py`. Thread-safe.

    They are in model.safetensors, or in several files that model.safetensors.index.json names.
    Raises NotFoundError if a file is missing, and InvalidArgumentError if one is malformed.
    """

    def __init__(self, folder: Path) -> None:
        self.path, wanted = folder / WEIGHTS, dict[str, str]()
        if not self.path.is_file():
            self.path, wanted = folder / INDEX, _read_index(folder)
        names = sorted(set(wanted.values())) or [WEIGHTS]
        self._files = [WeightsFile(folder / name) for name in names]
        # By our name: the file, and the name in the file.
        self._places: dict[str, tuple[WeightsFile, str]] = {}
        for file in self._files:
            for stored in file.tensors:
                name = _WRAPPERS.sub("", stored, count=1).replace(".row_scale", ".ffn_scale")
                if _UNUSED.fullmatch(name) or wanted.get(stored, file.path.name) != file.path.name:
                    continue
                if name in self._places:
                    other = self._places[name][1]
                    raise InvalidArgumentError(f"{self.path}: {stored} and {other} are one tensor")
                self._places[name] = file, stored
        self.tensors = {name: file.tensors[at] for name, (file, at) in self._places.items()}
        for stored, name in wanted.items():
            if not any(stored in f.tensors for f in self._files if f.path.name == name):
                raise InvalidArgumentError(f"{self.path}: {stored} is not in {name}")

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype.

        Raises MismatchError if the file was overwritten.
        """
        file, stored = self._places[name]
        return file.read(stored)

    def read_rows(self, name: str, ids: np.ndarray) -> Tensor:
        """Read rows `ids` [T] of a matrix. Raises MismatchError if the file was overwritten."""
        file, stored = self._places[name]
        return file.read_rows(stored, ids)

    def equal(self, one: str, other: str) -> bool:
        """Return whether two tensors have the same dtype, shape and bytes."""
        if self.tensors[one][:2] != self.tensors[other][:2]:
            return False
        parts = [file.chunks(stored) for file, stored in (self._places[one], self._places[other])]
        return all(left == right for left, right in zip(*parts, strict=True))

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise InvalidArgumentError unless there is a float tensor of this name and shape."""
        found = self.tensors.get(name)
        if found is None:
            raise InvalidArgumentError(f"{self.path} lacks {name}, of shape {list(shape)}")
        if found.shape != shape or found.dtype not in DTYPES:
            wanted = f"expected is {list(shape)} of {', '.join(DTYPES)}"
            raise InvalidArgumentError(
                f"{self.path}: {name} is {list(found.shape)} of {found.dtype}; {wanted}"
            )

    def tensor_digest(self, name: str) -> str:
        """Return a hash of a tensor's dtype, shape and bytes. Raises MismatchError like `read`."""
        file, stored = self._places[name]
        return file.tensor_digest(stored)

    def digest(self) -> str:
        """Return a hash of all files, as 64 hex digits.

        Raises MismatchError if a file was overwritten.
        """
        digests = [file.digest() for file in self._files]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def check(self) -> None:
        """Raise MismatchError if a file was overwritten since it was opened."""
        for file in self._files:
            file.check()


class WeightsFile:
    """The tensors of one file, by name. Thread-safe.

    Raises InvalidArgumentError if the file is not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor, self._digest = path, -1, ""
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self._stat = self._now()
            size = int.from_bytes(start := os.pread(self._descriptor, 8, 0), "little")
            text = os.pread(self._descriptor, min(size, HEADER_BYTES), 8)
        except OSError as error:
            raise _malformed(path, error.strerror or str(error)) from None
        if start == b"version ":
            raise _malformed(path, "it is a Git LFS pointer; run `git lfs pull`")
        if len(start) < 8 or len(text) != size:
            raise _malformed(path, "the file or its header is truncated")
        self.tensors = parse_header(text, self._stat[0], path)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._descriptor >= 0:
            close(self._descriptor)  # when the interpreter exits, `os` may be None

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype.

        Raises MismatchError if the file has changed since it was opened.
        """
        tensor = self.tensors[name]
        out = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        self._fill(out, tensor.start)
        self.check()
        return out

    def read_rows(self, name: str, ids: np.ndarray) -> Tensor:
        """Read rows `ids` [T] of a matrix. Raises MismatchError like `read`."""
        tensor = self.tensors[name]
        _, width = tensor.shape
        out = torch.empty((len(ids), width), dtype=DTYPES[tensor.dtype])
        for row, i in zip(out, ids.tolist(), strict=True):
            self._fill(row, tensor.start + i * width * out.element_size())
        self.check()
        return out

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a tensor in parts of equal size. Raises MismatchError like `read`."""
        tensor = self.tensors[name]
        for done in range(0, tensor.bytes, _READ_BYTES):
            size = min(_READ_BYTES, tensor.bytes - done)
            yield os.pread(self._descriptor, size, tensor.start + done)
        self.check()

    def tensor_digest(self, name: str) -> str:
        """Return a hash of a tensor's dtype, shape and bytes. Raises MismatchError like `read`."""
        tensor = self.tensors[name]
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        for chunk in self.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def digest(self) -> str:
        """Return the SHA-256 of the file, as 64 hex digits. Raises MismatchError like `read`."""
        if not self._digest:
            digest = self._hash()
            self.check()
            self._digest = digest
        return self._digest

    def check(self) -> None:
        """Raise MismatchError if the file has changed since it was opened."""
        if (now := self._now()) == self._stat:
            return
        # Moving or linking a file also changes its times, so the content decides.
        if self._digest and now[0] == self._stat[0] and self._hash() == self._digest:
            self._stat = now
            return
        what = "was overwritten while in use: put the file back, or start again with the new one"
        raise MismatchError(f"{self.path.name} of checkpoint {self.path.parent.name} {what}")

    def _now(self) -> tuple[int, int, int]:
        """Return size and times. Programs that write the file cannot set `st_ctime_ns`."""
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    def _fill(self, out: Tensor, start: int) -> None:
        view = out.reshape(-1).view(torch.uint8).numpy().data
        while view:
            count = os.preadv(self._descriptor, [view], start)
            if not count:
                self.check()
                raise MismatchError(f"{self.path} ends before its last tensor does")
            view, start = view[count:], start + count

    def _hash(self) -> str:
        digest, at = hashlib.sha256(), 0
        while part := os.pread(self._descriptor, _READ_BYTES, at):
            digest.update(part)
            at += len(part)
        return digest.hexdigest()


def parse_header(text: bytes, size: int, where: str | Path) -> dict[str, StoredTensor]:
    """Parse the tensors in the header of a safetensors file of `size` bytes.

    Raises InvalidArgumentError unless they fill the rest of the file.
    """
    first, tensors = 8 + len(text), {}
    try:
        header: dict[str, Any] = json.loads(text)
        for name, about in header.items():
            if name == "__metadata__":
                continue
            start, end = map(int, about["data_offsets"])
            shape = tuple(map(int, about["shape"]))
            tensors[name] = StoredTensor(str(about["dtype"]), shape, first + start, end - start)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _malformed(where, "its header is malformed") from None
    at = first
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        width = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else 0
        if tensor.start != at or tensor.bytes < 0 or min(tensor.shape, default=0) < 0:
            raise _malformed(where, f"tensor {name} overlaps another, or leaves a gap")
        if width and tensor.bytes != math.prod(tensor.shape) * width:
            raise _malformed(where, f"tensor {name} has {tensor.bytes} bytes")
        at += tensor.bytes
    if at != size:
        raise _malformed(where, f"it has {size} bytes, and its tensors end at {at}")
    return tensors


def parse_index(index: Any, path: str | Path) -> dict[str, str]:
    """Return the file name of each tensor in the JSON of model.safetensors.index.json."""
    files = index.get("weight_map") if isinstance(index, dict) else None
    named = re.compile(r"[^/\\]+\.safetensors").fullmatch
    if not (files and isinstance(files, dict) and all(named(str(f)) for f in files.values())):
        expected = "a weight_map from tensors to .safetensors files of its folder"
        raise InvalidArgumentError(f"{path} must have {expected}")
    return files


def _malformed(where: str | Path, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{where} is not a safetensors file: {why}")


def _read_index(folder: Path) -> dict[str, str]:
    """Read the file name of each tensor from model.safetensors.index.json.

    Raises NotFoundError if a file is missing.
    """
    path = folder / INDEX
    if not path.is_file():
        unsafe = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        others = ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in unsafe))
        hint = others and f"; {others} can run code when loaded and is refused: convert it"
        raise NotFoundError(f"checkpoint {folder} has no {WEIGHTS}{hint}")
    files = parse_index(read_json(path), path)
    if missing := sorted({f for f in files.values() if not (folder / f).is_file()}):
        more = f" and {len(missing) - 1} more files" if missing[1:] else ""
        message = f"checkpoint {folder} lacks {missing[0]}{more}"
        raise NotFoundError(f"{message}, which {INDEX} names: download the checkpoint again")
    return files
