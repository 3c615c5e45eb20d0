"""Faults of builds and concurrent changes of one store, without a running system."""

import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from redis import Redis
from tolhouse.errors import TolhouseError
from tolhouse.store.base import open_store
from tolhouse.store.writer import shard_digest
from tolhouse.testing import redis_server, tiny_model

from tests.chaos.history import Row
from tests.chaos.system import CHECKPOINT
from tests.commands import start
from tests.interleaving import PAIRS, TRIPLES, new_stores, not_serial

OPTIONS = f"--codec int8 --workers 1 --publish --corpus {__file__}"
_KEYS = rb"tolhouse:\{(registry\}:\w+(:.*)?|.+:\d+\})"  # keys of a store without running operations
_ADVICE = "is in|is being deleted|try again|build it again"  # errors that say what to do


def build_faults(only: str) -> Iterator[Row]:
    if only in (name := "full disk during a build") and (row := _full_disk(name)):
        yield row
    for name, shards in (
        ("two builds at once", (8, 8)),
        ("two builds at once, in other shards", (8, 5)),
    ):
        if only in name:
            yield _two_builds(name, shards)
    if only in (name := "publish, roll back, delete at once"):
        yield _interleaved(name)


def _full_disk(name: str) -> Row | None:
    """A build on a full disk fails with one line and publishes nothing, and completes when the disk
    has room."""
    with TemporaryDirectory(prefix="tolhouse-chaos-") as folder:
        url, wrong = f"file://{folder}/tables", []
        started = time.monotonic()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            print(f"{name}: skipped, because mounting a small disk needs root")
            return None
        try:
            command = f"build {CHECKPOINT} --store {url} {OPTIONS}"
            build = start(command)
            _, stderr = build.communicate(timeout=200)
            explained = (
                "Traceback" not in stderr and "No space left" in stderr.strip().splitlines()[-1]
            )
            if build.returncode != 1 or not explained:
                wrong.append(
                    f"a build on a full disk ended with {build.returncode}: {stderr[-300:]}"
                )
            with closing(open_store(url)) as store:
                if store.refs():
                    wrong.append(f"an incomplete table exists: {store.refs()}")
            left = list(Path(folder).rglob(".shard*"))
            if left:
                wrong.append(f"temporary files were left: {left}")
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            again = start(command)
            again.communicate(timeout=200)
            if again.returncode:
                wrong.append("the build failed although the disk had room")
            with closing(open_store(url)) as store:
                if len(store.refs()) != 1 or store.alias(CHECKPOINT.name) is None:
                    wrong.append("the table does not exist after the second build")
        finally:
            subprocess.run(["umount", folder], check=True)
        return Row(name, 2, 1, wrong, time.monotonic() - started, 120.0)


def _two_builds(name: str, shards: tuple[int, int]) -> Row:
    """Two builds of one version into files and Redis leave one complete table and nothing else."""
    with TemporaryDirectory(prefix="tolhouse-chaos-") as folder, redis_server() as url:
        model, root = tiny_model(Path(folder, "m")), Path(folder, "tables")
        stores, started, wrong = (f"file://{root}", url), time.monotonic(), []
        command = f"build {model} --store {','.join(stores)} {OPTIONS}"
        builds = [start(f"{command} --shards {count}") for count in shards]
        failed = 0
        for build in builds:
            _, stderr = build.communicate(timeout=200)
            line = stderr.strip().splitlines()[-1]
            failed += bool(build.returncode)
            if build.returncode and (not re.search(_ADVICE, line) or "Traceback" in stderr):
                wrong.append(f"a build ended with {build.returncode}: {stderr[-300:]}")
        wrong += chain.from_iterable(map(_incomplete, stores))
        left = [path.name for path in root.rglob(".*") if path.name != ".lock"]
        with closing(Redis.from_url(url)) as redis:
            left += [key for key in redis.scan_iter() if not re.fullmatch(_KEYS, key)]
        if left:
            wrong.append(f"temporary files or keys were left: {left}")
        return Row(name, len(builds), failed, wrong, time.monotonic() - started, 120.0)


def _incomplete(url: str) -> Iterator[str]:
    """Yield what is wrong with the only table in a store."""
    with closing(open_store(url)) as store:
        try:
            (ref,) = store.refs()
            table = store.manifest(ref)
            digests = [shard_digest(store, table, shard) for shard in range(table.num_shards)]
        except (TolhouseError, ValueError) as error:
            yield f"{url}: {error}"
            return
        if digests != [*table.shards] or store.alias(table.name) is None:
            yield f"{url}: the table is incomplete or not published: {digests}"


def _interleaved(name: str) -> Row:
    """Run operations that change the registry concurrently, in files and Redis, and report outcomes
    that no serial order explains."""
    started = time.monotonic()
    with TemporaryDirectory(prefix="tolhouse-chaos-") as folder, redis_server() as url:

        def found(base: str) -> list[str]:
            new_store = new_stores(base)
            rounds = [(names, 4) for names in PAIRS] + [(names, 3) for names in TRIPLES]
            outcomes = (not_serial(new_store, names, count) for names, count in rounds)
            return [f"{base}: {outcome}" for outcome in chain.from_iterable(outcomes)]

        with ThreadPoolExecutor() as pool:
            wrong = [*chain.from_iterable(pool.map(found, (f"file://{folder}", url)))]
    rounds = 2 * (4 * len(PAIRS) + 3 * len(TRIPLES))
    return Row(name, rounds, 0, wrong, time.monotonic() - started, 120.0)
