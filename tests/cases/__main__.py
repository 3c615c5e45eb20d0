"""Run the cases: `python -m tests.cases [NUMBER…]`; the exit code is 1 if a result is wrong."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.cases import Result
from tests.cases.serving import gateways

HERE = Path(__file__).parent
OWN, SHARED = HERE / "inputs", HERE.parents[2] / "shared" / "cases"


def numbers() -> list[str]:
    return sorted(path.name.split("_")[1] for path in HERE.glob("case_*.py"))


def check(number: str, root: Path) -> Iterator[Result]:
    """Yield the results of a case with inputs in `root`; an exception counts as a wrong result."""
    [module] = HERE.glob(f"case_{number}_*.py")
    folder = next(root.glob(f"{number}-*"), root / number)
    try:
        yield from importlib.import_module(f"tests.cases.{module.stem}").check(folder)
    except Exception as error:  # noqa: BLE001 - the other cases must still run
        yield Result("the check runs to its end", False, f"{type(error).__name__}: {error}")


def main(chosen: list[str]) -> int:
    wrong = 0
    with gateways():
        for number in chosen or numbers():
            roots = [r for r in (OWN, SHARED) if any(r.glob(f"{number}-*"))]
            for root in roots or [OWN]:
                source = "own copy" if root == OWN else str(root)
                for claim, right, seen in check(number, root):
                    wrong += not right
                    line = f"{number} {'right' if right else 'WRONG'}: {claim} ({source})"
                    print(line if right else f"{line}: {seen}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
