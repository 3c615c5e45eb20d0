"""Check and measure the parts that come from related papers: `make related-check`.

docs/related.md describes the parts and their figures. Identities are measured on what a worker
runs, against references in float64. The last line of the output is JSON with the figures of all
parts. The command fails if a difference exceeds 1e-5 or an equality does not hold.

    python -m loadtest.related [--only moc,avgk]
"""

import argparse
import json
import sys
from collections.abc import Callable

import torch

from loadtest import related_ffn, related_kv, related_retrieval, related_summary, related_tables

Figures = dict[str, float | bool]
LARGEST_DIFFERENCE = 1e-5
PARTS: dict[str, Callable[[], Figures]] = {
    "moc": related_ffn.moc,
    "avgk": related_ffn.avgk,
    "flashmhf": related_ffn.flashmhf,
    "lookup": related_ffn.lookup,
    "kv": related_kv.policies,
    "needle": related_retrieval.needle,
    "gates": related_retrieval.gates,
    "summary": related_summary.summaries,
    "operated": related_tables.operated,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.related",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        default=",".join(PARTS),
        metavar="PARTS",
        help="parts, separated by commas (default: %(default)s)",
    )
    names = parser.parse_args().only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"{unknown[0]!r} is unknown; parts are {', '.join(PARTS)}")
    torch.set_num_threads(1)  # Small models gain little from two, and lose much on a busy machine.
    found: Figures = {}
    for name in names:
        figures = PARTS[name]()
        found |= figures
        print(f"{name}: {json.dumps(figures)}", file=sys.stderr, flush=True)
    print(json.dumps(found))
    if names := failures(found):
        sys.exit(f"these figures are out of bounds: {', '.join(names)}")


def failures(figures: Figures) -> list[str]:
    """Return the names of differences above the limit, and of equalities that do not hold."""
    return [
        name
        for name, value in figures.items()
        if (name.endswith("_diff") and not value <= LARGEST_DIFFERENCE)
        or (name.endswith("_equal") and value != 1)  # a share, or whether all are equal
    ]


if __name__ == "__main__":
    main()
