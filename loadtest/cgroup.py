"""A cgroup that limits the memory of a process together with the page cache of its files."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tolhouse.testing import wait_until

# By version: the files of the limit, of the highest usage and of the swap's limit.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.memsw.limit_in_bytes"),
    2: ("memory.max", "memory.peak", "memory.swap.max"),
}


class MemoryGroup:
    """A cgroup with a limit. Run `[*group.command, PROGRAM, …]` to start a program in it."""

    def __init__(self, folder: Path, version: int, limit: int) -> None:
        self.folder = folder
        self._limit, self._peak, swap = (folder / name for name in _FILES[version])
        self._limit.write_text(str(limit), encoding="utf-8")
        with suppress(OSError):  # a kernel without limits of swap
            swap.write_text(str(limit if version == 1 else 0), encoding="utf-8")
        self.command = "sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(folder)

    def limits(self, pid: int, most: int) -> bool:
        """Whether the process is in the group, and the group's limit is at most `most` bytes."""
        members = (self.folder / "cgroup.procs").read_text(encoding="utf-8").split()
        limit = self._limit.read_text(encoding="utf-8").strip()
        return str(pid) in members and limit.isdecimal() and int(limit) <= most

    def peak(self) -> int:
        """The highest usage so far in bytes, including the page cache."""
        return int(self._peak.read_text(encoding="utf-8"))


@contextmanager
def memory_limited(limit: int) -> Iterator[MemoryGroup | None]:
    """Make a cgroup with a memory limit in bytes for the block, or yield None where this process
    may not. Processes in it must end before the block does."""
    group = next(filter(None, (_make(*place, limit) for place in _places())), None)
    try:
        yield group
    finally:
        if group:
            wait_until(partial(_remove, group.folder), f"removal of {group.folder}")


def _remove(folder: Path) -> bool:
    folder.rmdir()
    return True


def _make(version: int, folder: Path, limit: int) -> MemoryGroup | None:
    try:
        folder.mkdir()
    except OSError as error:
        print(f"no cgroup in {folder.parent}: {error.strerror}", file=sys.stderr)
        return None
    try:
        return MemoryGroup(folder, version, limit)
    except OSError as error:  # version 2: the parent does not delegate the memory controller
        print(f"no memory limit in {folder.parent}: {error.strerror}", file=sys.stderr)
        folder.rmdir()
        return None


def _places() -> Iterator[tuple[int, Path]]:
    """Yield the version and the folder of each cgroup that could be made.

    They are below the cgroup of this process. Version 2 allows none there while processes are in
    it, so that those below its ancestors follow.
    """
    own = dict[str, Path]()
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), Path(path))
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields, _, (kind, _, options) = (part.split() for part in line.partition(" - "))
        version = 2 if kind == "cgroup2" else 1
        controller = "" if version == 2 else "memory"
        if kind not in ("cgroup", "cgroup2") or controller not in ["", *options.split(",")]:
            continue
        with suppress(KeyError, ValueError):
            inside = own[controller].relative_to(fields[3])
            for parent in (inside, *(inside.parents if version == 2 else ())):
                yield version, Path(fields[4]) / parent / f"tolhouse-{os.getpid()}"
