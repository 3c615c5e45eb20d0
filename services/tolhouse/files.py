"""Files that can be replaced while they are in use: certificates, tokens, keys."""

import fcntl
import json
import logging
import os
import secrets
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
    """What `read` makes of `paths`, read again when they change. Threads may share it.

    If a later reading fails, as of a file half written, the value stays and the log says why.
    """

    def __init__(self, paths: Iterable[str], read: Callable[[], T]) -> None:
        self.paths, self._read = tuple(path for path in paths if path), read
        self._lock = threading.Lock()
        self._seen = self._versions()  # before reading, so that a change meanwhile is noticed
        self._value = read()

    def get(self) -> T:
        """What the files hold now, for one `stat` of each."""
        if self._versions() == self._seen:
            return self._value
        with self._lock:
            versions = self._versions()
            if versions != self._seen:
                try:
                    self._value = self._read()
                    event("files read again", files=", ".join(self.paths))
                except (OSError, InvalidArgumentError) as error:
                    news = "files changed and can't be used: the contents before stay in use"
                    event(news, logging.ERROR, reason=str(error))
                self._seen = versions
            return self._value

    def _versions(self) -> list[tuple[str | int, ...]]:
        found: list[tuple[str | int, ...]] = []
        for path in self.paths:
            with suppress(OSError):
                s = Path(path).stat()  # ctime: it may have become readable
                found.append((path, s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino))
        return found


@contextmanager
def locked(path: Path, seconds: float = 30.0) -> Iterator[None]:
    """Hold the lock of a folder, or of a file, which is made; InUseError if it is not free in time.

    The lock ends with the process. Network file systems lock files alone.
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
                    what = f"another process has the lock of {path}"
                    raise InUseError(f"{what}: try again once it is done") from None
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def read_file(path: str, what: str) -> bytes:
    """The bytes of `path`; an InvalidArgumentError says what the file is for."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(
            f"{what} {path} can't be read: {error.strerror or error}"
        ) from None


def read_json(path: Path) -> Any:
    """The JSON in a file in UTF-8 or UTF-16, with or without a byte order mark.

    NotFoundError without the file; InvalidArgumentError if it can't be read or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise InvalidArgumentError(f"{path} can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}") from None


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file, which keeps its mode and owner, at once; a pipe or device is written into."""
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
        raise  # the reader has had enough
    except OSError as error:  # its own text names the fresh file
        raise InvalidArgumentError(f"{path} can't be written: {error.strerror or error}") from None
