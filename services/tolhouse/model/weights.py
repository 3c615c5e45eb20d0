"""The weights of a checkpoint: a safetensors file, read into the memory of the process.

The file is not mapped. Overwriting or truncating it therefore neither changes weights that were
read nor ends the process. Each read checks that the file has not changed since it was opened.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tolhouse.errors import InvalidArgumentError, MismatchError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_HEADER_BYTES = 100_000_000  # the limit of safetensors
_READ_BYTES = 1 << 24  # hashed at a time


class StoredTensor(NamedTuple):
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int  # in the file
    bytes: int


class WeightsFile:
    """Tensors by name. Thread-safe. InvalidArgumentError if the file is not a safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor, self._digest = path, -1, ""
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self._stat = self._now()
            size = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            text = os.pread(self._descriptor, min(size, _HEADER_BYTES), 8)
        except OSError as error:
            raise self._malformed(error.strerror or str(error)) from None
        if len(text) != size:
            raise self._malformed("it is cut short, or its header is")
        self.tensors = self._parsed(text)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, name: str) -> Tensor:
        """A tensor as stored; MismatchError if the file has changed since it was opened."""
        tensor = self.tensors[name]
        out = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        self._fill(out, tensor.start)
        self.check()
        return out

    def read_rows(self, name: str, ids: np.ndarray) -> Tensor:
        """Rows `ids` [T] of a matrix; MismatchError as in `read`."""
        tensor = self.tensors[name]
        _, width = tensor.shape
        out = torch.empty((len(ids), width), dtype=DTYPES[tensor.dtype])
        for row, i in zip(out, ids.tolist(), strict=True):
            self._fill(row, tensor.start + i * width * out.element_size())
        self.check()
        return out

    def digest(self) -> str:
        """The SHA-256 of the file, 64 hex digits; MismatchError as in `read`."""
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
        """Size and times. A program that writes the file cannot set `st_ctime_ns`."""
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

    def _parsed(self, text: bytes) -> dict[str, StoredTensor]:
        """The tensors that a header lists. They must fill the rest of the file."""
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
            raise self._malformed("its header is malformed") from None
        at = first
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
            size = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else 0
            if tensor.start != at or tensor.bytes < 0 or min(tensor.shape, default=0) < 0:
                raise self._malformed(f"tensor {name} overlaps another, or leaves a gap")
            if size and tensor.bytes != math.prod(tensor.shape) * size:
                raise self._malformed(f"tensor {name} has {tensor.bytes} bytes")
            at += tensor.bytes
        if at != self._stat[0]:
            raise self._malformed(f"it has {self._stat[0]} bytes, and its tensors end at {at}")
        return tensors

    def _malformed(self, why: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{self.path} is not a safetensors file: {why}")
