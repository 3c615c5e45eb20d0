"""Compare kinds of models at equal total parameters: `python -m loadtest.science.kinds [--seeds
2]`.

The program trains all runs whose loss curves are missing, two at a time on one core each. Then it
prints a table with held-out perplexity, total and active parameters for each kind and seed, and the
ranking of the kinds. A perplexity is the last estimate of its curve, from eight batches of held-out
windows that are the same for all runs. A killed run resumes where it stopped. Loss curves are
stored in loadtest/science/curves, so that `--print` needs no training.

`--forms` trains the forms of docs/related.md, and `--recipe tiny` tries all of it in minutes.
"""

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tolhouse.model.transformer import Transformer, parameter_counts
from tolhouse.train.recipes import recipe
from torch import device

CURVES = Path(__file__).parent / "curves"
RUNS = Path("runs/kinds")


class Run(NamedTuple):
    name: str
    recipe: str
    kind: str
    beta: int = 0
    ffn_c: str = "linear"
    ffn_by: str = "gate"

    def curve(self, seed: int) -> Path:
        folder = CURVES if self.recipe.startswith("small") else RUNS / self.recipe
        return folder / f"{self.name}-{seed}.csv"

    def parameters(self) -> tuple[int, int]:
        """Numbers of total and active parameters, without embeddings."""
        form: dict[str, Any] = {"ffn_c": self.ffn_c, "ffn_by": self.ffn_by}
        config = replace(recipe(self.recipe, self.kind, self.beta).config, **form)
        with device("meta"):
            return parameter_counts(Transformer(config))


KINDS = (
    Run("memory", "small", "memory"),
    Run("base", "small", "base"),
    Run("flex-1", "small", "flex", 1),
    Run("flex-3", "small", "flex", 3),
    Run("wide", "small", "wide"),
    Run("base-active", "small-active", "base"),
    Run("flex-2", "small", "flex", 2),
    Run("flex-3-swiglu", "small", "flex", 3, "swiglu"),
    Run("flex-1-swiglu", "small", "flex", 1, "swiglu"),
    Run("flex-2-swiglu", "small", "flex", 2, "swiglu"),
)
FORMS = (
    Run("flex-3-moc", "small", "flex", 3, "moc"),
    Run("flex-3-moc-activation", "small", "flex", 3, "moc", "activation"),
    Run("flex-3-avgk", "small", "flex", 3, "avgk"),
    Run("flex-3-flashmhf", "small", "flex", 3, "flashmhf"),
    Run("flex-3-lookup", "small", "flex", 3, "lookup"),
)


def train(run: Run, seed: int) -> None:
    """Train a model unless its loss curve exists."""
    kept = run.curve(seed)
    if kept.exists():
        return
    out = RUNS / ("" if kept.parent == CURVES else run.recipe) / f"{run.name}-{seed}"
    form = f"--kind {run.kind} --beta {run.beta} --ffn-c {run.ffn_c} --ffn-by {run.ffn_by}"
    flags = f"{form} --seed {seed} --out {out}".split()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{run.name}, seed {seed}: tolhouse train {run.recipe} {' '.join(flags)}", flush=True)
    if not (out / "model.safetensors").exists():
        with (out / "train.log").open("ab") as log:
            subprocess.run(
                [sys.executable, "-m", "tolhouse.cli", "train", run.recipe, *flags],
                stdout=log,
                stderr=log,
                check=True,
            )
    shutil.copy(out / "loss.csv", kept)


def last_loss(run: Run, seed: int) -> float | None:
    kept = run.curve(seed)
    if not kept.exists():
        return None
    with kept.open(encoding="utf-8") as file:
        return [
            float(row["held_out_loss"]) for row in csv.DictReader(file) if row["held_out_loss"]
        ][-1]


def table(seeds: int, runs: tuple[Run, ...]) -> tuple[str, dict[str, float]]:
    """A Markdown table sorted by perplexity, and the mean perplexity of each kind with a curve."""
    found: dict[str, list[float]] = {}
    for run in runs:
        losses = [last_loss(run, seed) for seed in range(seeds)]
        if any(losses):
            found[run.name] = [math.exp(loss) for loss in losses if loss is not None]
    mean = {name: math.exp(sum(map(math.log, p)) / len(p)) for name, p in found.items()}
    lines = [
        "| kind | total | active | held-out perplexity, by seed | mean |",
        "|---|---|---|---|---|",
    ]
    for run in sorted((r for r in runs if r.name in found), key=lambda r: mean[r.name]):
        total, active = run.parameters()
        lines.append(
            f"| {run.name} | {total:,} | {active:,} "
            f"| {' · '.join(f'{p:.2f}' for p in found[run.name])} | {mean[run.name]:.2f} |"
        )
    return "\n".join(lines), mean


def orders(seeds: int, runs: tuple[Run, ...]) -> str:
    """Markdown: for each form of FFN-C and seed, base, memory and the Flex kinds by increasing
    loss."""
    lines = []
    for form in ("linear", "swiglu"):
        some = [r for r in runs if r.name in ("base", "memory") or (r.beta and r.ffn_c == form)]
        for seed in range(seeds):
            losses = {run.name: last_loss(run, seed) for run in some}
            found = {name: loss for name, loss in losses.items() if loss is not None}
            order = " < ".join(sorted(found, key=lambda name: found[name]))
            lines.append(f"- FFN-C {form}, seed {seed}: {order}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.science.kinds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="number of runs of each kind (default %(default)d)"
    )
    parser.add_argument(
        "--only", default="", metavar="WORD", help="train only kinds whose names contain this word"
    )
    parser.add_argument(
        "--print",
        action="store_true",
        help="train nothing and print the table from the stored curves",
    )
    parser.add_argument("--forms", action="store_true", help="train the forms in place of kinds")
    parser.add_argument("--recipe", default="", help="train another recipe, for a trial")
    options = parser.parse_args()
    CURVES.mkdir(exist_ok=True)
    chosen: tuple[Run, ...] = FORMS if options.forms else KINDS
    if options.recipe:
        chosen = tuple(run._replace(recipe=options.recipe) for run in chosen)
    if not options.print:
        runs = [
            (run, seed)
            for seed in range(options.seeds)
            for run in chosen
            if options.only in run.name
        ]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: train(*one), runs))
    shown = chosen if options.recipe else (*KINDS, *FORMS)
    text, mean = table(options.seeds, shown)
    print(f"{text}\n\n{orders(options.seeds, shown)}")
    print(json.dumps({"perplexity": {name: round(p, 3) for name, p in mean.items()}}))


if __name__ == "__main__":
    main()
