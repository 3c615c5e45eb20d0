"""Faults of files, of file descriptors, and of the clock."""

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from tolhouse.errors import InUseError, TolhouseError
from tolhouse.store.base import open_store
from tolhouse.store.registry import delete, stands_for

from tests.chaos.faults import Group, anything, lasting
from tests.chaos.system import CHECKPOINT, System, asking, build_versions, completion
from tests.tables import manifest_of, write

RARE_TOKENS = range(8100, 8192)  # in no prompt or answer of the load
PAST, FUTURE = 0.0, 4_102_444_800.0  # the years 1970 and 2100


@contextmanager
def over_files() -> Iterator[Group]:
    """The system over files, with its own copy of the checkpoint."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="tolhouse-chaos-")))
        checkpoint = Path(shutil.copytree(CHECKPOINT, folder / "model"))
        weights, other = checkpoint / "model.safetensors", folder / "other.safetensors"
        save_file({name: t.flip(0) for name, t in load_file(weights).items()}, other)
        refs = build_versions(url := f"file://{folder}/tables")
        system = System(stack, url, "chaos", checkpoint)
        kept = weights.read_bytes()
        half = {
            shard: shard.read_bytes()[: shard.stat().st_size // 2].ljust(
                shard.stat().st_size, b"\0"
            )
            for shard in (folder / "tables").rglob("shard-00003*")
        }
        errors = {"may_fail": anything, "recovers_within": 11.0}
        faults = [
            lasting("corrupted shard files (from their end)", partial(overwritten, half), **errors),
            lasting("overwritten checkpoint", partial(overwritten, {weights: other.read_bytes()})),
            lasting("truncated checkpoint", partial(overwritten, {weights: kept[:5000]})),
            lasting("no file descriptors left", partial(few_descriptors, system), **errors),
            lasting("jump of the clock of leases", partial(clock_jump, url, refs)),
        ]
        yield Group(system, refs, faults)


@contextmanager
def overwritten(contents: dict[Path, bytes], _: list[str]) -> Iterator[None]:
    """Overwrite files in place with other or shorter contents, as `cp` or a disk fault does."""
    kept = {path: path.read_bytes() for path in contents}
    _write_over(contents)
    yield
    _write_over(kept)


def _write_over(contents: dict[Path, bytes]) -> None:
    for path, content in contents.items():
        with path.open("r+b") as file:
            file.write(content)
            file.truncate()


@contextmanager
def few_descriptors(system: System, found: list[str]) -> Iterator[None]:
    """Prevent the lookup services and the gateway from opening further files and connections."""
    before, tokens = {}, cycle(RARE_TOKENS)
    for service in (system.gateway, *system.lookups):
        pid, limit = service.process.pid, resource.RLIMIT_NOFILE
        before[pid] = resource.prlimit(pid, limit)
        resource.prlimit(pid, limit, (len(list(Path(f"/proc/{pid}/fd").iterdir())), before[pid][1]))
    with asking(lambda: completion(system.gateway.address, next(tokens)), found):
        yield
        for pid, limits in before.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@contextmanager
def clock_jump(url: str, refs: list[str], found: list[str]) -> Iterator[None]:
    """Let leases look as old, or as new, as after a jump of the wall clock.

    Setting the clock itself would need a library or a whole machine, so the test sets the files'
    times. A version in use must not be deletable, and an unused version must be.
    """
    root = Path(url.removeprefix("file://"))

    def jump(seconds: float) -> None:
        for lease in root.rglob("lease"):
            os.utime(lease, (seconds, seconds))

    with closing(open_store(url)) as store:
        spare = write(store, manifest_of("spare"))
        jump(PAST)
        yield
        used = next(ref for ref in refs if not stands_for(store, ref))  # in use until a moment ago
        for seconds in (PAST, FUTURE):
            jump(seconds)
            try:
                delete(store, used)
            except InUseError:
                continue
            found.append("a version in use was deleted")
            build_versions(url)
        try:
            delete(store, spare.ref)
        except TolhouseError as error:
            found.append(f"an unused version can't be deleted: {error}")
