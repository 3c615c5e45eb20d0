"""Compute every table and plot of SCIENCE.md.

    python -m loadtest.science [--tokens N]     # or make science

The tables are: size against perplexity for both committed checkpoints and many compression ratios,
the survey of their memory, the results of check.py, and the comparison of model kinds from their
stored training curves (kinds.py, which can also train them). Plots are written to
loadtest/science/plots, and tables are printed.
"""

import argparse
from pathlib import Path

from tolhouse.analysis.survey import summary, survey
from tolhouse.build.compress import FREQUENT_SHARE, Scheme
from tolhouse.model.checkpoint import open_checkpoint
from tqdm import tqdm

from loadtest.science import check, kinds
from loadtest.science.codecs import Model

PLOTS = Path(__file__).parent / "plots"
RATIOS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)


def curves(model: Model, most_tokens: int) -> dict[str, list[tuple[float, float]]]:
    """(size reduction relative to 16 bit, relative increase of perplexity), by family of
    schemes."""
    head = len(model.rows) // FREQUENT_SHARE
    families = {
        "low rank at 16 bit": [Scheme("bf16", ratio=ratio) for ratio in RATIOS if ratio <= 8],
        "low rank and head at 16 bit": [
            Scheme("bf16", ratio=ratio, frequent=head, frequent_codec="bf16")
            for ratio in RATIOS
            if ratio <= 8
        ],
        "int8 low rank, int8 head": [
            Scheme("int8", ratio=ratio, frequent=head) for ratio in RATIOS if ratio > 2
        ],
        "int4 low rank, int8 head": [
            Scheme("int4", ratio=ratio, frequent=head) for ratio in RATIOS if ratio > 3
        ],
        "int8, int4": [Scheme("int8"), Scheme("int4")],
        "int4, int8 head": [Scheme("int4", frequent=head)],
    }
    exact = model.evaluate(model.rows, most_tokens).perplexity
    found: dict[str, list[tuple[float, float]]] = {}
    print(
        f"\n{model.path.name}: perplexity {exact:.4f} in float32"
        f"\n  {'':30}{'16 bit':>8} {'perplexity':>11}"
    )
    for family, schemes in tqdm(families.items(), desc="families", leave=False, dynamic_ncols=True):
        for scheme in schemes:
            made = model.compressed(scheme)
            loss = model.evaluate(made.rows(), most_tokens).perplexity / exact - 1
            found.setdefault(family, []).append((model.bytes16() / made.bytes, loss))
            print(
                f"  {family:30}{model.bytes16() / made.bytes:7.2f}x {100 * loss:+10.3f} %",
                flush=True,
            )
    return found


def plot(found: dict[str, list[tuple[float, float]]], name: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for family, points in found.items():
        axes.plot(
            [x for x, _ in points],
            [max(100 * y, 1e-2) for _, y in points],
            marker="o",
            ms=4,
            label=family,
        )
    axes.set(
        xlabel="size reduction relative to 16 bit",
        ylabel="increase of perplexity, %",
        xscale="log",
        yscale="log",
        title=name,
    )
    axes.set_xticks([1, 2, 3, 4, 6, 8, 12, 16], labels=["1", "2", "3", "4", "6", "8", "12", "16"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(PLOTS / f"{name}.png", dpi=110)
    plt.close(figure)


def compared() -> str:
    """The table of all kinds and forms, and their order for each seed, from the stored curves."""
    runs = (*kinds.KINDS, *kinds.FORMS)
    text, _ = kinds.table(2, runs)
    return f"{text}\n\n{kinds.orders(2, runs)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.science",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=0,
        help="held-out tokens per measurement; 0 means all (default)",
    )
    options = parser.parse_args()
    PLOTS.mkdir(exist_ok=True)
    for name in ("demo-memory", "demo-flex"):
        path = Path("models") / name
        plot(curves(Model(path), options.tokens), name)
        print(f"\n{summary(survey(open_checkpoint(path), 64, 20_000))}", flush=True)
    print(f"\n{compared()}\n", flush=True)
    check.run(options.tokens)


if __name__ == "__main__":
    main()
