"""A failed start of Ray is a one-line error without a traceback."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tolhouse.testing import tiny_model

from tests.cases import Result, equal
from tests.cases.commands import run

TOO_LONG = f"/tmp/{'x' * 100}"  # too long for Ray's socket paths


def check(folder: Path) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as at:
        model, text = tiny_model(Path(at, "tiny")), Path(at, "text.txt")
        text.write_text("def add(a, b):", encoding="utf-8")
        options = f"--store file://{at}/tables --shards 2 --corpus {text}".split()
        try:
            done = run("build", model, *options, RAY_TMPDIR=TOO_LONG)
        finally:
            shutil.rmtree(TOO_LONG, ignore_errors=True)
    last = done.stderr.splitlines()[-1]
    yield equal("the exit code and stdout", (1, ""), (done.returncode, done.stdout))
    yield equal("no traceback", False, "Traceback" in done.stderr)
    yield Result("the last line is the reason", last.startswith("error: Ray did not start"), last)
