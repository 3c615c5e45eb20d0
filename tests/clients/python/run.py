"""Run the checks of one client: `python run.py PROGRAM RESULTS`.

A check is a function, possibly a coroutine, whose name begins with `check_`. The results are lines
of JSON: the client's name and version, then one line for each check.
"""

import asyncio
import importlib
import importlib.metadata
import inspect
import json
import sys
import traceback
from pathlib import Path


def run(function) -> str:
    """Return the error of a check, or an empty text."""
    try:
        result = function()
        if inspect.isawaitable(result):
            asyncio.run(result)
    except Exception as error:  # noqa: BLE001 - any exception is a result
        where = traceback.extract_tb(error.__traceback__)[1:2]
        line = f" at line {where[0].lineno}: {where[0].line}" if where else ""
        return f"{type(error).__name__}{line}: {error}"[:1000]
    return ""


def main(program: str, results: str) -> None:
    module = importlib.import_module(Path(program).stem)
    version = importlib.metadata.version(module.PACKAGE)
    about = {"client": f"{module.PACKAGE} (Python)", "version": version}
    with Path(results).open("w", buffering=1, encoding="utf-8") as out:
        print(json.dumps(about), file=out)
        for name, function in vars(module).copy().items():
            if name.startswith("check_"):
                print(
                    json.dumps({"check": function.__doc__ or name, "error": run(function)}),
                    file=out,
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
