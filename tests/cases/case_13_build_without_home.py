"""A build needs no home folder, and a compile error names the option for the cache folder."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tolhouse.testing import tiny_model

from tests.cases import Result, equal
from tests.cases.commands import run


def check(folder: Path) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as at:
        model, text = tiny_model(Path(at, "tiny")), Path(at, "text.txt")
        text.write_text("def add(a, b):", encoding="utf-8")
        Path(at).chmod(0o777)
        for number, home in enumerate((None, "/")):
            shown = f"HOME={home}"
            options = f"--store file://{at}/{number} --shards 2 --corpus {text}".split()
            done = run("build", model, *options, under=_other_user(), HOME=home)
            yield equal(f"build, {shown}", (0, "tiny@"), (done.returncode, done.stdout[:5]))
            done = run("compile", model, under=_other_user(), HOME=home)
            if done.returncode or _other_user():
                yield equal(f"compile, {shown}", True, "with --compile-cache" in done.stderr)


def _other_user() -> tuple[str, ...]:
    """If run as root, return a command prefix for a user without a passwd entry.

    The user may read all files.
    """
    if os.geteuid() or not shutil.which("setpriv"):
        return ()
    reads = "-all,+dac_read_search"
    capabilities = f"--inh-caps {reads} --ambient-caps +dac_read_search --bounding-set {reads}"
    return ("setpriv", *f"--reuid=1002700000 --regid=0 --clear-groups {capabilities}".split())
