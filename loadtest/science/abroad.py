"""Compare compression on in-domain and out-of-domain text.

    python -m loadtest.science.abroad [--tokens N]

Token frequencies and the weights of the SVD come from text like the training text. `home` is the
held-out part of that text. `abroad` is the validation part of WikiText-2 if a copy exists, and
otherwise the English text of Python's documentation. For both the output has the perplexity with
rows at 16 bit, the increase of perplexity by each scheme, and two measures that do not depend on
the actual next token: KL(exact || compressed) in nats per token, and the share of positions with
the same most likely token. Lines with "by it" use frequencies from the second half of the `abroad`
text, whose first half is measured. N tokens of each text are measured, in windows of the model's
context length that are spread evenly over the text. The output is a table and a final line of JSON.
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
    """About `most` ids: windows of `length` ids, spread evenly over the text and concatenated."""
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    return windows[:: max(1, round(windows.size / most))].ravel()


def without_seams(found: Comparison, length: int) -> Comparison:
    """The comparison without each window's last prediction, whose target belongs to another
    window."""
    kept = np.arange(1, 1 + len(found.losses)) % length != 0
    return Comparison(
        found.losses[kept], found.targets[kept], found.divergences[kept], found.agrees[kept]
    )


def measure(
    model: Model, tokens: int, text_abroad: tuple[str, Path] | None = None
) -> dict[str, dict[str, Comparison]]:
    """By text (`home` and `abroad`) and scheme, the comparison with the model's own rows."""
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
            f"{text}: {named}, {len(exact.losses):,} tokens, "
            f"{share:.0%} of them among the {FREQUENT} most frequent at home; "
            f"{exact.loss:.4f} nats per token at 16 bit, perplexity {exact.perplexity:.2f}",
            flush=True,
        )
    return found


def table(found: dict[str, dict[str, Comparison]]) -> str:
    """A Markdown table with a line for each scheme and columns for each text."""
    titles = (f"perplexity {text} | KL | same top token" for text in found)
    lines = [f"| | {' | '.join(titles)} |", "|---" * 7 + "|"]
    for name in found["abroad"]:
        cells = []
        for of in found.values():
            if other := of.get(name):
                loss = other.perplexity / of["bf16"].perplexity - 1
                cell = f"{loss:+.3%} | {other.kl:.6f} | {other.agreement:.2%}"
                cells.append(cell.replace("%", " %"))
            else:
                cells.append("| | ")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(model: Model, tokens: int) -> dict[str, float]:
    """Print the table and return KL and agreement at an eighth of the bytes, for both texts."""
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
        "--tokens", type=int, default=TOKENS, help="tokens of each text (default %(default)d)"
    )
    print(json.dumps(run(Model(Path("models/demo-memory")), parser.parse_args().tokens)))


if __name__ == "__main__":
    main()
