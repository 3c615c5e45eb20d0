"""The file store, with a folder for each version and a safetensors file for each shard.

    <root>/<name>/<version>/shard-00000-of-00064.safetensors    uint8 "records" [rows, record_bytes]
    <root>/<name>/<version>/manifest.json                       written last
    <root>/<name>/<version>/lease                               empty; readers hold a lock on it
    <root>/<name>/alias.json                                    the published version
    <root>/.log.jsonl                                           one line for each change
    <root>/.lock                                                locked during an update

Files are written under a temporary name, fsynced and renamed. `pread` reads records directly into
their destination, and all processes of a machine share one copy in the page cache. The rows of a
request are prefetched, so that the device reads many of them at once.
"""

import fcntl
import json
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tolhouse.errors import CorruptError, InvalidArgumentError, TolhouseError, UnavailableError
from tolhouse.files import locked
from tolhouse.store.base import LEASE_SECONDS, Changes, Kind, Store, Views
from tolhouse.table.manifest import Manifest, split_ref

_READ_BYTES = 16 << 20  # the limit of one read of neighbouring records
_READ_RECORDS = 1024  # IOV_MAX
_READS_AHEAD = 16  # prefetched reads of a thread; each keeps a file open
_PREFETCH_BYTES = 256 << 10  # the part of a read that is prefetched
_HEADER_BYTES = 1 << 20  # the limit of a header


class FileStore(Store):
    """A store in a folder."""

    def __init__(
        self, root: str | Path, open_files: int = 256, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self.root = Path(root).absolute()
        if self.root.exists() and not self.root.is_dir():
            raise InvalidArgumentError(f"the store {self.root} is a file, not a folder of tables")
        super().__init__(f"file://{self.root}")
        self._leasing, self._lease_seconds = threading.Lock(), lease_seconds
        # By ref: the descriptor of the locked file, and the time of the last use.
        self._leases: dict[str, tuple[int, float]] = {}
        self._expiring = False  # whether the timer of all leases runs
        # A file that the cache evicts stays open while a thread reads it.
        self._opened = lru_cache(open_files)(self._new_file)

    def refs(self) -> list[str]:
        refs = []
        for path in self.root.glob("*/*/manifest.json"):
            ref = f"{path.parent.parent.name}@{path.parent.name}"
            with suppress(InvalidArgumentError):
                split_ref(ref)
                refs.append(ref)
        return sorted(refs)

    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        text = json.dumps({"records": _tensor(*records.shape)}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        length = len(text).to_bytes(8, "little")
        place = manifest.name, manifest.version, manifest.num_shards, shard
        path = Path(self._path(*place))
        _write(path, length, text, np.ascontiguousarray(records).data)
        self._opened.cache_clear()

    def count(self, manifest: Manifest, shard: int) -> int:
        with suppress(TolhouseError):
            return self._file(manifest, shard).rows
        return 0

    def delete_records(self, ref: str) -> None:
        folder, gone = self._folder(ref), self.root / f".deleted-{secrets.token_hex(8)}"
        with _errors("delete", folder), suppress(FileNotFoundError):
            folder.rename(gone)  # atomic, even while a build writes to the folder
        self._opened.cache_clear()
        for left in self.root.glob(".deleted-*"):  # includes folders of killed processes
            shutil.rmtree(left, ignore_errors=True)

    def lease(self, ref: str) -> None:
        path = self._folder(ref) / "lease"
        with self._leasing, _errors("lease", path):
            descriptor, _ = self._leases.pop(ref, (-1, 0.0))
            # Without a link, the version was deleted and built again.
            if descriptor >= 0 and not os.fstat(descriptor).st_nlink:
                os.close(descriptor)
                descriptor = -1
            if descriptor < 0:
                descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._leases[ref] = descriptor, time.monotonic()
            if not self._expiring:
                self._expire_later()

    def leased(self, ref: str) -> bool:
        with suppress(FileNotFoundError), (self._folder(ref) / "lease").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def close(self) -> None:
        self._opened.cache_clear()
        self._lease_seconds = 0.0
        self._expire()

    def update(self, change: Callable[[], Changes]) -> None:
        with _errors("write", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with locked(self.root / ".lock"):
                changes = change()
                for (kind, ref), text in changes.items():
                    if kind != "log":
                        self._write_text(ref, kind, text)
                for (kind, _), text in changes.items():  # a log must not be ahead of the store
                    if kind == "log":
                        self._append(text or b"")

    def _expire_later(self) -> None:
        self._expiring = True
        timer = threading.Timer(self._lease_seconds, self._expire)
        timer.daemon = True
        timer.start()

    def _expire(self) -> None:
        """Release leases that were not renewed in time."""
        with self._leasing:
            self._expiring = False
            for ref, (descriptor, used) in list(self._leases.items()):
                if time.monotonic() - used >= self._lease_seconds:
                    del self._leases[ref]
                    os.close(descriptor)
            if self._leases:
                self._expire_later()

    def _fill(
        self, manifest: Manifest, ids: np.ndarray, views: Views
    ) -> Generator[memoryview | str]:
        for read, part in _begun(self._reads(manifest, ids), views):
            try:
                if read:
                    file, row, _, _ = read
                    if isinstance(file, CorruptError):
                        raise file
                    file.read(row, part)
            except CorruptError as error:
                yield from [str(error)] * len(part)
            else:
                yield from part

    def _reads(self, manifest: Manifest, ids: np.ndarray) -> Iterator["_Read"]:
        """Yield the reads of neighbouring records, in the order of `ids`."""
        shards, rows = manifest.shard_of(ids), manifest.positions(ids)
        most = min(_READ_RECORDS, max(1, _READ_BYTES // manifest.record_bytes))
        apart = (np.diff(shards) != 0) | (np.diff(rows) != 1)
        starts = [0, *(np.flatnonzero(apart) + 1).tolist()]
        ends = [*starts[1:], len(ids)]
        runs = zip(starts, ends, shards[starts].tolist(), rows[starts].tolist(), strict=True)
        last = -1
        for start, end, shard, row in runs:
            if shard != last:
                last, file = shard, self._open(manifest, shard)
            for first in range(start, end, most):
                yield file, row + first - start, first, min(first + most, end)

    def _reopen(self, manifest: Manifest, ids: np.ndarray) -> None:
        for shard in np.unique(manifest.shard_of(ids)).tolist():
            with suppress(TolhouseError):
                if self._file(manifest, shard).is_replaced():
                    self._opened.cache_clear()  # other files are opened again on their next use
                    return

    def _open(self, manifest: Manifest, shard: int) -> "_ShardFile | CorruptError":
        """Return the file of a shard, or the reason why its rows cannot be read."""
        try:
            return self._file(manifest, shard)
        except CorruptError as error:
            return error

    def _file(self, manifest: Manifest, shard: int) -> "_ShardFile":
        name, version, count = manifest.name, manifest.version, manifest.num_shards
        return self._opened(name, version, count, shard, manifest.record_bytes)

    def _new_file(
        self, name: str, version: str, count: int, shard: int, record_bytes: int
    ) -> "_ShardFile":
        return _ShardFile(self._path(name, version, count, shard), record_bytes)

    def _path(self, name: str, version: str, count: int, shard: int) -> str:
        return f"{self.root}/{name}/{version}/shard-{shard:05}-of-{count:05}.safetensors"

    def _folder(self, ref: str) -> Path:
        name, version = split_ref(ref)
        return self.root / name / (version or "")

    def _read_text(self, ref: str, kind: Kind) -> bytes | None:
        path = self._folder(ref) / f"{kind}.json"
        with _errors("read", path), suppress(FileNotFoundError, NotADirectoryError):
            return path.read_bytes()
        return None

    def _read_log(self) -> list[bytes]:
        path = self.root / ".log.jsonl"
        with _errors("read", path), suppress(FileNotFoundError):
            return path.read_bytes().splitlines()
        return []

    def _append(self, line: bytes) -> None:
        path = self.root / ".log.jsonl"
        with _errors("write", path), path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a killed process has left a part of a line
                    line = b"\n" + line
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _write_text(self, ref: str, kind: Kind, text: bytes | None) -> None:
        path = self._folder(ref) / f"{kind}.json"
        if text is None:
            with _errors("delete", path):
                path.unlink(missing_ok=True)
            return
        _write(path, text)
        if kind == "manifest":  # readers without write access need this file for leases
            (path.parent / "lease").touch()


# A read of the records from `row` of a shard's file into `views[first:end]`: file, row, first, end.
_Read = tuple["_ShardFile | CorruptError", int, int, int]


def _begun(reads: Iterator[_Read], views: Views) -> Iterator[tuple[_Read | None, Views]]:
    """Yield the views of each read in order, after the following reads have begun.

    Records in the page cache are read at once, and None stands for their read. Others are
    prefetched.
    """
    begun: deque[tuple[_Read | None, Views]] = deque()
    for read in reads:
        file, row, first, end = read
        part = views[first:end]
        if isinstance(file, _ShardFile):
            if file.read_cached(row, part):
                if begun:
                    begun.append((None, part))
                else:
                    yield None, part
                continue
            file.prefetch(row, end - first)
        begun.append((read, part))
        while begun and (len(begun) > _READS_AHEAD or begun[0][0] is None):
            yield begun.popleft()
    yield from begun


class _ShardFile:
    """An open shard file, which closes when nothing refers to it."""

    def __init__(self, path: str, record_bytes: int) -> None:
        self.path, self.record_bytes, self._descriptor = path, record_bytes, -1
        with _errors("read", path):
            try:
                self._descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                raise CorruptError(f"shard file {path} is missing") from None
            # Readahead of neighbours, which the kernel starts beside cached rows, is of no use.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            text = os.pread(self._descriptor, min(length, _HEADER_BYTES), 8)
            self.start, self.size = 8 + length, os.fstat(self._descriptor).st_size
        self.rows, rest = divmod(self.size - self.start, record_bytes)
        with suppress(ValueError, LookupError, TypeError, RecursionError):  # a malformed header
            if json.loads(text)["records"] == _tensor(self.rows, record_bytes) and not rest:
                return
        raise CorruptError(
            f"shard file {path} is truncated, or does not have records of {record_bytes} bytes"
        )

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._descriptor >= 0:
            close(self._descriptor)  # when the interpreter exits, `os` may be None

    def prefetch(self, row: int, count: int) -> None:
        """Start to read `count` records from `row` into the page cache, without waiting."""
        start = self.start + row * self.record_bytes
        size = min(count * self.record_bytes, _PREFETCH_BYTES)
        with _errors("read", self.path):
            os.posix_fadvise(self._descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def read_cached(self, row: int, views: list[memoryview]) -> bool:
        """Read consecutive records if all of them are in the page cache. Returns whether they are.

        Some file systems do not tell.
        """
        start, size = self.start + row * self.record_bytes, len(views) * self.record_bytes
        try:
            count = os.preadv(self._descriptor, views, start, os.RWF_NOWAIT)
            return count == size and os.fstat(self._descriptor).st_size == self.size
        except OSError:
            return False

    def read(self, row: int, views: list[memoryview]) -> None:
        """Read consecutive records from `row` into `views`."""
        with _errors("read", self.path):
            count = os.preadv(self._descriptor, views, self.start + row * self.record_bytes)
            size = os.fstat(self._descriptor).st_size
        if (count, size) != (len(views) * self.record_bytes, self.size):
            raise CorruptError(f"shard file {self.path} changed its size while it was in use")

    def is_replaced(self) -> bool:
        """Return whether the path has another file, or the file has another size."""
        with suppress(OSError):
            own, now = os.fstat(self._descriptor), Path(self.path).stat()
            return not os.path.samestat(own, now) or now.st_size != self.size
        return True


def _tensor(rows: int, record_bytes: int) -> dict[str, Any]:
    """Return the description of a shard file's only tensor in its safetensors header."""
    end = rows * record_bytes
    return {"dtype": "U8", "shape": [rows, record_bytes], "data_offsets": [0, end]}


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a whole file atomically and durably."""
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


class _errors:  # noqa: N801 - used like `suppress`; a generator takes longer than a read
    """Turn errors of the operating system into UnavailableError."""

    def __init__(self, work: str, path: str | Path) -> None:
        self.work, self.path = work, path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, TolhouseError):
            reason = error.strerror or error
            raise UnavailableError(f"cannot {self.work} {self.path}: {reason}") from None
