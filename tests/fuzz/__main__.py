"""Feed malformed input to every reader: `make fuzz`, or `python -m tests.fuzz [--inputs N] …`.

Each input must be read correctly or refused with one of Tolhouse's errors, within SLOW_SECONDS. On
the first violation the input is written to a file and the exit status is 1. The last line of output
is JSON.
"""

import argparse
import json
import random
import sys
import time
from itertools import islice
from pathlib import Path

from tests.fuzz.mutate import mutations
from tests.fuzz.targets import ALLOWED, folder, targets

SLOW_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--inputs", type=int, default=1_100_000, help="total number of inputs (default %(default)d)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default %(default)d)")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="run only targets whose names contain this word"
    )
    options = parser.parse_args()
    counts = {}
    with folder() as name:
        chosen = {k: target for k, target in targets(Path(name)).items() if options.only in k}
        for what, target in chosen.items():
            read, refused, started = 0, 0, time.perf_counter()
            inputs = mutations(target.seeds, random.Random(f"{options.seed} {what}"))
            for data in islice(inputs, options.inputs // len(chosen) // target.cost):
                begun = time.perf_counter()
                try:
                    target.read(data)
                    read += 1
                except ALLOWED:
                    refused += 1
                except BaseException as error:  # noqa: BLE001 - all others are findings
                    _finding(what, data, error)
                if time.perf_counter() - begun > SLOW_SECONDS:
                    _finding(what, data, TimeoutError(f"took more than {SLOW_SECONDS:g} s"))
            counts[what], seconds = read + refused, time.perf_counter() - started
            line = f"{what:14} {read + refused:8} inputs, {refused:8} refused, {seconds:6.1f} s"
            print(line, flush=True)
    print(json.dumps({"inputs": sum(counts.values()), "findings": 0, "targets": len(counts)}))


def _finding(what: str, data: bytes, error: BaseException) -> None:
    path = Path(f"fuzz-{what.replace(' ', '-')}.bin")
    path.write_bytes(data)
    print(f"{what}: {type(error).__name__}: {error}; the input is in {path}", flush=True)
    if isinstance(error, KeyboardInterrupt):
        raise error
    sys.exit(1)


if __name__ == "__main__":
    main()
