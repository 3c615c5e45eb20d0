"""Faults of disks: a shard file that is altered while it is served, and a disk that fills up during
a build."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from tolhouse.store.base import open_store
from tolhouse.testing import build_table

from tests.chaos.history import rate, recovery_seconds, violations
from tests.chaos.system import CHECKPOINT, DEADLINE_SECONDS, Load, System, right_answers


def storage_faults(only: str) -> Iterator[dict]:
    if only in "corrupted shard file":
        yield _shard_file()
    if only in "full disk during a build":
        row = _full_disk()
        if row:
            yield row


def _shard_file() -> dict:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tolhouse-chaos-")))
        url = f"file://{folder}"
        other, ref = (
            build_table(CHECKPOINT, url, name="chaos", codec=codec, shards=16)
            for codec in ("int4", "int8")
        )
        answers = right_answers(url, [ref, other])
        system = System(stack, url, "chaos")
        load = Load(system.gateway.address)
        load.start()
        started = time.monotonic()
        time.sleep(4)
        moment = time.monotonic()
        shard = min((folder / "chaos" / ref.partition("@")[2]).glob("shard-00003*"))
        whole = shard.read_bytes()
        with shard.open("r+b") as file:  # in place, as a failing disk would
            file.seek(len(whole) // 2)
            file.write(bytes(len(whole) // 2))
        time.sleep(4)
        flipped = system.flip(other)
        time.sleep(2)
        with shard.open("r+b") as file:
            file.write(whole)
        mended = time.monotonic()
        time.sleep(5)
        load.stop()
        usual = rate(load.history, started + 1, moment)
        recovery = recovery_seconds(load.history, mended, time.monotonic(), usual)
        failed = sum(seen.failed for seen in load.history)
        wrong = violations(load.history, answers, DEADLINE_SECONDS)
        versions = {seen.version for seen in load.history if not seen.failed}
        if not flipped or versions != {ref, other}:
            wrong.append("not both versions were answered with")
        return {
            "fault": "corrupted shard file (from its end)",
            "requests": len(load.history),
            "failed": failed,
            "wrong": wrong,
            "usual": usual,
            "recovery_s": recovery,
            "limit_s": 5.0,
        }


def _full_disk() -> dict:
    """A build on a disk that is too small says so in a line, publishes nothing, and ends what it
    began once there is room."""
    with tempfile.TemporaryDirectory(prefix="tolhouse-chaos-") as folder:
        url, wrong = f"file://{folder}/tables", []
        started = time.monotonic()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            print("full disk during a build: left out, as only root may make a small disk")
            return {}
        try:

            def build() -> subprocess.CompletedProcess:
                options = f"--store {url} --codec int8 --publish --workers 1".split()
                command = [sys.executable, "-m", "tolhouse.cli", "build", str(CHECKPOINT), *options]
                kept = {"capture_output": True, "text": True}
                return subprocess.run(command, **kept, timeout=200, check=False)

            first = build()
            said = first.stderr.strip().splitlines()[-1:] or [""]
            told = "Traceback" not in first.stderr and "No space left" in said[0]
            if first.returncode != 1 or not told:
                code, text = first.returncode, first.stderr[-300:]
                wrong.append(f"a build on a full disk ended with {code}: {text}")
            with closing(open_store(url)) as store:
                if store.refs():
                    wrong.append(f"a table that is not whole is there: {store.refs()}")
            left = list(Path(folder).rglob(".shard*"))
            if left:
                wrong.append(f"temporary files were left: {left}")
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            if build().returncode:
                wrong.append("the build could not be ended once there was room")
            with closing(open_store(url)) as store:
                if len(store.refs()) != 1 or store.alias(CHECKPOINT.name) is None:
                    wrong.append("the table is not there after the second build")
        finally:
            subprocess.run(["umount", folder], check=True)
        return {
            "fault": "full disk during a build",
            "requests": 2,
            "failed": 1,
            "wrong": wrong,
            "usual": 0,
            "recovery_s": time.monotonic() - started,
            "limit_s": 120.0,
        }
