"""Files that are read again when they change: certificates, tokens and keys are replaced without a restart."""

import logging
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from tolhouse.errors import InvalidArgument
from tolhouse.logs import event

T = TypeVar("T")


class ReloadingFiles(Generic[T]):
    """What `read` makes of `paths`. Safe to use from several threads.

    The first reading may fail. A later one that fails leaves what was read before, and is told in the log: whoever
    replaces a file by writing into it is seen in the middle of that, and once more at its end.
    """

    def __init__(self, paths: Iterable[str], read: Callable[[], T]) -> None:
        self.paths, self._read = tuple(path for path in paths if path), read
        self._lock = threading.Lock()
        self._seen = self._looks()  # before reading: a change in between is then seen as one
        self._value = read()

    def get(self) -> T:
        """What the files hold now. Costs a look at each of them."""
        if self.paths and self._looks() != self._seen:
            with self._lock:
                looks = self._looks()
                if looks != self._seen:
                    try:
                        self._value = self._read()
                        event("read again", files=", ".join(self.paths))
                    except (OSError, InvalidArgument) as error:
                        event(
                            "not read again; what was read before holds",
                            logging.ERROR,
                            reason=str(error),
                        )
                    self._seen = looks
        return self._value

    def _looks(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_looks(path) for path in self.paths)


def read_file(path: str, what: str) -> bytes:
    """The bytes of `path`; InvalidArgument, which says what the file is for, if it can't be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{what} {path} can't be read: {error.strerror or error}") from None


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file whole, so that nobody sees half of it. A new one gets `mode`; one that is there keeps its own, and its owner.

    Through a link its target is replaced, and what is no file, such as a pipe, is written into. InvalidArgument if it can't be.
    """
    try:
        before: os.stat_result | None = None
        with suppress(FileNotFoundError):
            before = path.stat()
            mode = stat.S_IMODE(before.st_mode)
        if before and not stat.S_ISREG(before.st_mode):
            with path.open("wb") as there:
                there.write(data)
            return
        target = path.resolve()
        fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            with os.fdopen(
                os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb"
            ) as file:
                file.write(data)
                file.flush()
                if before and (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(
                        file.fileno(), before.st_uid, before.st_gid
                    )  # whoever serves reads it still
                os.fsync(file.fileno())
            fresh.replace(target)
        finally:
            fresh.unlink(missing_ok=True)
    except BrokenPipeError:
        raise  # who reads has had enough
    except OSError as error:  # its own text names the fresh file
        raise InvalidArgument(f"{path} can't be written: {error.strerror or error}") from None


def _looks(path: str) -> tuple[int, ...]:
    try:
        status = Path(path).stat()
    except OSError:
        return ()
    return (
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_size,
        status.st_ino,
    )  # ctime: it may have become readable
