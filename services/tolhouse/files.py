"""Files that may be replaced while they are in use: certificates, tokens, keys."""

import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from tolhouse.errors import InUseError, InvalidArgumentError, NotFoundError
from tolhouse.logs import event

T = TypeVar("T")


class ReloadingFiles(Generic[T]):
    """Caches the value of `read()`, and calls `read` again when one of the files `paths` changes.

    If `read` fails later, for example on a half-written file, the old value stays in use and the
    error is logged. Several threads may share one object.
    """

    def __init__(self, paths: Iterable[str], read: Callable[[], T]) -> None:
        self.paths, self._read = tuple(path for path in paths if path), read
        self._lock = threading.Lock()
        self._seen = self._versions()  # before reading, to detect a change during the read
        self._value = read()

    def get(self) -> T:
        """Return the current value, after one `stat` per file."""
        if self._versions() == self._seen:
            return self._value
        with self._lock:
            versions = self._versions()
            if versions != self._seen:
                try:
                    self._value = self._read()
                    event("files read again", files=", ".join(self.paths))
                except (OSError, InvalidArgumentError) as error:
                    news = "changed files cannot be used: the previous contents stay in use"
                    event(news, logging.ERROR, reason=str(error))
                self._seen = versions
            return self._value

    def _versions(self) -> list[tuple[str | int, ...]]:
        found: list[tuple[str | int, ...]] = []
        for path in self.paths:
            with suppress(OSError):
                s = Path(path).stat()  # ctime also changes when the file becomes readable
                found.append((path, s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino))
        return found


@contextmanager
def locked(path: Path, seconds: float = 30.0) -> Iterator[None]:
    """Hold the lock of a folder or of a file for the block. A missing file is created.

    The lock ends with the process. Network file systems lock only files.

    Raises:
        InUseError: Another process has held the lock for `seconds`.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor, deadline = os.open(path, flags, 0o666), time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    what = f"another process holds the lock of {path}"
                    raise InUseError(f"{what}: try again once it is done") from None
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def read_file(path: str, what: str) -> bytes:
    """Read a file. `what` is the purpose that the InvalidArgumentError names."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(
            f"{what} {path} cannot be read: {error.strerror or error}"
        ) from None


def read_json(path: Path) -> Any:
    """Read JSON from a file in UTF-8 or UTF-16, with or without a byte order mark.

    Raises NotFoundError if there is no file, and InvalidArgumentError if it cannot be read or is
    not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}") from None


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file atomically with the same mode and owner, or write to a pipe or a device."""
    try:
        before = path.stat() if path.exists() else None
        if before and not stat.S_ISREG(before.st_mode):
            path.write_bytes(data)
            return
        target = path.resolve()
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            mode = stat.S_IMODE(before.st_mode) if before else mode
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as f:
                f.write(data)
                f.flush()
                if before:
                    os.fchown(f.fileno(), before.st_uid, before.st_gid)
                os.fsync(f.fileno())
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)
    except BrokenPipeError:
        raise  # the reader has closed the pipe
    except OSError as error:  # the error's message names the temporary file
        raise InvalidArgumentError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` at the end of the block.

    After an error it is deleted. Raises InUseError if `path` is a file or a folder that is not
    empty.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InUseError(f"{path} exists: name a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    fresh.mkdir()
    try:
        yield fresh
        fresh.replace(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
