"""`tolhouse …` as a process of its own."""

import shlex
import subprocess
import sys
from pathlib import Path


def tolhouse(line: str, *more: str | bytes | Path, code: int = 0) -> subprocess.CompletedProcess:
    """Run the command `line`, then `more` arguments; it ends with `code` and without a traceback."""
    command = [sys.executable, "-m", "tolhouse.cli", *shlex.split(line), *more]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert code == ended.returncode, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended
