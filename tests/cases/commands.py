"""`tolhouse` commands in a changed environment, for the cases."""

import os
import subprocess
import sys
from pathlib import Path


def run(
    *words: str | bytes | Path, under: tuple[str, ...] = (), **variables: str | None
) -> subprocess.CompletedProcess:
    """Run a command with these environment variables; a value of None removes a variable.

    under: a command prefix, such as one that changes the user.
    """
    environment = {**os.environ, **{k: v for k, v in variables.items() if v is not None}}
    for name, value in variables.items():
        if value is None:
            environment.pop(name, None)
    command = [*under, sys.executable, "-m", "tolhouse.cli", *words]
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        check=False,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
