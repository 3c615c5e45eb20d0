"""Compression at home and abroad: `python -m loadtest.science.abroad [--tokens N]`.

Frequent tokens and the weights of an SVD come from text like that of training, and its held-out
part is text of the same kind: home. Abroad is WikiText-2's validation part, where there is a copy
of it, or else the English of Python's own documentation. Told of both: perplexity over that with
rows at 16 bit, and what does not depend on which token comes next, KL(exact || compressed) in nats
a token and how often the likeliest token is the same. Lines with "by it" have their frequencies
from the second half of the text abroad, of which the first is measured. N tokens of each text are
measured, in windows of the model's context evenly over it. Prints a table and, last, a line of
JSON.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from tolhouse.analysis.evaluate import probed, read_text
from tolhouse.model.losses import Comparison, compare

from loadtest.science.codecs import ALIKE, Model, schemes
from loadtest.text import foreign

TOKENS = 20_000
NAMES = ("bf16", "int8", "int4, no head", "int4", "low rank, half", "int4 low rank, 8x")
HALF, FREQUENT = "low rank, half", 256


def spread(ids: np.ndarray, length: int, most: int) -> np.ndarray:
    """About `most` ids: windows of `length` ids, evenly over the text, one behind the other."""
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    return windows[:: max(1, round(windows.size / most))].ravel()


def without_seams(found: Comparison, length: int) -> Comparison:
    """Without the last token that each window predicts, which is another window's first."""
    kept = np.arange(1, 1 + len(found.losses)) % length != 0
    return Comparison(
        found.losses[kept], found.targets[kept], found.divergences[kept], found.agrees[kept]
    )


def measure(
    model: Model, tokens: int, text_abroad: tuple[str, Path] | None = None
) -> dict[str, dict[str, Comparison]]:
    """By text, `home` and `abroad`, and by scheme, beside the model's own rows."""
    source, path = text_abroad or foreign()
    read, known = read_text(model.checkpoint, path), schemes(len(model.rows))
    length = model.checkpoint.config.max_position_embeddings
    half = len(read) // 2
    home, abroad = spread(model.text, length, tokens), spread(read[:half], length, tokens)
    counts = Counter(read[half:].tolist())
    rows = {name: model.compressed(known[name]).rows() for name in NAMES}
    rows[HALF + ALIKE] = model.compressed(known[HALF], alike=True).rows()
    by_it = {
        f"{name}, by it": model.compressed(known[name], counts=counts).rows()
        for name in ("int4", HALF, "int4 low rank, 8x")
    }
    frequent = [token for token, _ in Counter(model.counts).most_common(FREQUENT)]
    found = {}
    for text, named, ids, others in (
        ("home", "held-out sources", home, rows),
        ("abroad", source, abroad, rows | by_it),
    ):
        replaced = [probed(r) for r in others.values()]
        results = compare(model.model, ids, probed(model.rows), replaced)
        found[text] = {
            name: without_seams(r, length) for name, r in zip(others, results, strict=True)
        }
        exact, share = found[text]["bf16"], np.isin(ids, frequent).mean()
        print(
            f"{text}: {named}, {len(exact.losses):,} tokens, {share:.0%} of them of the {FREQUENT} "
            f"most frequent at home; {exact.loss:.4f} nats each at 16 bit, "
            f"perplexity {exact.perplexity:.2f}",
            flush=True,
        )
    return found


def table(found: dict[str, dict[str, Comparison]]) -> str:
    """Markdown: a line for each scheme, home beside abroad."""
    titles = (f"perplexity {text} | KL | same top token" for text in found)
    lines = [f"| | {' | '.join(titles)} |", "|---" * 7 + "|"]
    for name in found["abroad"]:
        cells = []
        for of in found.values():
            if other := of.get(name):
                loss = other.perplexity / of["bf16"].perplexity - 1
                told = f"{loss:+.3%} | {other.kl:.6f} | {other.agreement:.2%}"
                cells.append(told.replace("%", " %"))
            else:
                cells.append("| | ")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(model: Model, tokens: int) -> dict[str, float]:
    """Print the table; of both texts, KL and agreement at an eighth of the bytes."""
    found = measure(model, tokens)
    print(f"{table(found)}\n", flush=True)
    smallest = {text: of["int4 low rank, 8x"] for text, of in found.items()}
    return {
        **{f"kl_8x_{text}": round(one.kl, 5) for text, one in smallest.items()},
        **{f"top1_8x_{text}": round(one.agreement, 4) for text, one in smallest.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.science.abroad",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help="of each text (default %(default)d)"
    )
    print(json.dumps(run(Model(Path("models/demo-memory")), parser.parse_args().tokens)))


if __name__ == "__main__":
    main()
