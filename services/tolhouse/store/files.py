"""The file store: a folder per version and a safetensors file per shard, read by `pread`.

    <root>/<name>/<version>/shard-00000-of-00064.safetensors    uint8 "records" [rows, record_bytes]
    <root>/<name>/<version>/manifest.json                       written last
    <root>/<name>/<version>/lease                               empty; when it was last used
    <root>/<name>/alias.json                                    what the name stands for

Files are written under a temporary name, fsynced and renamed. Records are read straight into their
destination; the page cache is the one copy that a machine needs, for any number of processes.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tolhouse.errors import Corrupt, InvalidArgument, TolhouseError, Unavailable
from tolhouse.store.base import LEASE_SECONDS, Store, Views
from tolhouse.table.manifest import Manifest, split_ref

_READ_BYTES = 16 << 20  # of neighbouring records that are read at once
_READ_RECORDS = 1024  # IOV_MAX
_HEADER_BYTES = 1 << 20  # the longest that is read


class FileStore(Store):
    def __init__(self, root: str | Path, open_files: int = 256) -> None:
        self.root = Path(root).absolute()
        if self.root.exists() and not self.root.is_dir():
            raise InvalidArgument(f"the store {self.root} is a file, and no folder of tables")
        super().__init__(f"file://{self.root}")
        self._opened = lru_cache(open_files)(_ShardFile)  # threads that read keep theirs open

    def refs(self) -> list[str]:
        refs = []
        for path in self.root.glob("*/*/manifest.json"):
            ref = f"{path.parent.parent.name}@{path.parent.name}"
            with suppress(InvalidArgument):
                split_ref(ref)
                refs.append(ref)
        return sorted(refs)

    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        text = json.dumps({"records": _tensor(*records.shape)}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        length = len(text).to_bytes(8, "little")
        path = Path(self._path(manifest, shard))
        _write(path, length, text, np.ascontiguousarray(records).data)
        self._opened.cache_clear()

    def count(self, manifest: Manifest, shard: int) -> int:
        with suppress(TolhouseError):
            return self._opened(self._path(manifest, shard), manifest.record_bytes).rows
        return 0

    def delete(self, ref: str) -> None:
        (self._folder(ref) / "manifest.json").unlink(missing_ok=True)
        self._opened.cache_clear()
        with suppress(FileNotFoundError):
            shutil.rmtree(self._folder(ref))

    def lease(self, ref: str) -> None:
        path = self._folder(ref) / "lease"
        with _errors("write", path):
            path.touch()

    def leased(self, ref: str) -> bool:
        with suppress(OSError):
            return time.time() - (self._folder(ref) / "lease").stat().st_mtime < LEASE_SECONDS
        return False

    def close(self) -> None:
        self._opened.cache_clear()

    def _fill(
        self, manifest: Manifest, ids: np.ndarray, views: Views
    ) -> Generator[memoryview | str]:
        shards, rows = manifest.shard_of(ids), manifest.positions(ids)
        most = min(_READ_RECORDS, max(1, _READ_BYTES // manifest.record_bytes))
        apart = (np.diff(shards) != 0) | (np.diff(rows) != 1)
        starts = [0, *(np.flatnonzero(apart) + 1).tolist()]  # of runs of neighbours
        ends = [*starts[1:], len(ids)]
        runs = zip(starts, ends, shards[starts].tolist(), rows[starts].tolist(), strict=True)
        for start, end, shard, row in runs:
            for first in range(start, end, most):
                part = views[first : min(first + most, end)]
                try:
                    file = self._opened(self._path(manifest, shard), manifest.record_bytes)
                    file.read(row + first - start, part)
                except Corrupt as error:
                    yield from [str(error)] * len(part)
                else:
                    yield from part

    def _reopen(self, manifest: Manifest, ids: np.ndarray) -> None:
        for shard in np.unique(manifest.shard_of(ids)).tolist():
            with suppress(TolhouseError):
                if self._opened(self._path(manifest, shard), manifest.record_bytes).is_replaced():
                    self._opened.cache_clear()  # others reopen theirs
                    return

    def _path(self, manifest: Manifest, shard: int) -> str:
        file = f"shard-{shard:05}-of-{manifest.num_shards:05}.safetensors"
        return f"{self.root}/{manifest.name}/{manifest.version}/{file}"

    def _folder(self, ref: str) -> Path:
        name, version = split_ref(ref)
        return self.root / name / (version or "")

    def _read_text(self, ref: str, what: str) -> bytes | None:
        path = self._folder(ref) / f"{what}.json"
        with _errors("read", path), suppress(FileNotFoundError, NotADirectoryError):
            return path.read_bytes()
        return None

    def _write_text(self, ref: str, what: str, text: bytes) -> None:
        _write(self._folder(ref) / f"{what}.json", text)


class _ShardFile:
    """An open shard file. It closes with the last thread that reads from it."""

    def __init__(self, path: str, record_bytes: int) -> None:
        self.path, self.record_bytes, self._descriptor = path, record_bytes, -1
        with _errors("read", path):
            try:
                self._descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise Corrupt(f"shard file {path} is missing") from None
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            text = os.pread(self._descriptor, min(length, _HEADER_BYTES), 8)
            self.start, self.size = 8 + length, os.fstat(self._descriptor).st_size
        self.rows, rest = divmod(self.size - self.start, record_bytes)
        with suppress(ValueError, LookupError, TypeError, RecursionError):  # not such a header
            if json.loads(text)["records"] == _tensor(self.rows, record_bytes) and not rest:
                return
        raise Corrupt(f"shard file {path} is truncated, or not of records of {record_bytes} bytes")

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, row: int, views: list[memoryview]) -> None:
        """Read the records from `row` on into `views`."""
        with _errors("read", self.path):
            count = os.preadv(self._descriptor, views, self.start + row * self.record_bytes)
            size = os.fstat(self._descriptor).st_size
        if (count, size) != (len(views) * self.record_bytes, self.size):
            raise Corrupt(f"shard file {self.path} changed its size while in use")

    def is_replaced(self) -> bool:
        """Whether its path has another file by now, or one of another size."""
        with suppress(OSError):
            own, now = os.fstat(self._descriptor), Path(self.path).stat()
            return not os.path.samestat(own, now) or now.st_size != self.size
        return True


def _tensor(rows: int, record_bytes: int) -> dict[str, Any]:
    """The only tensor of a shard file, as a safetensors header describes it."""
    end = rows * record_bytes
    return {"dtype": "U8", "shape": [rows, record_bytes], "data_offsets": [0, end]}


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file so that it is either there whole, also after a power failure, or not at all."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with _errors("write", path), ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(partial.unlink, missing_ok=True)
        with partial.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        stack.callback(os.close, folder)
        os.fsync(folder)


@contextmanager
def _errors(work: str, path: str | Path) -> Iterator[None]:
    """What the system refuses is Unavailable."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"can't {work} {path}: {error.strerror or error}") from None
