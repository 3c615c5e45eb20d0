"""Measure how much held-out loss each codec adds.

    python -m loadtest.accuracy [--quick] [--x0] [--orders N] [CHECKPOINT …]

Each checkpoint is evaluated on the held-out text of its training corpus, in consecutive windows,
with rows that were encoded and decoded by each codec. With --x0, rows include X0, encoded like the
other blocks. Each codec's difference from fp32 is printed with its standard error over the windows.
With --orders N, the benchmark measures int4 at several group sizes instead and averages over N
random column orders, because the rounding error of a single order is noisy.
"""

import argparse
import json
import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.transformer import NoCache
from tolhouse.table import codecs
from tolhouse.train.corpus import END_OF_TEXT, documents, is_held_out, standard_library
from torch import Tensor
from tqdm import tqdm

WINDOW = 512
GROUPS = (16, 32, 64, 2**20)


def windows(checkpoint: Checkpoint, most: int) -> Tensor:
    """Held-out token ids [W, WINDOW + 1]. The last token of each window is the first of the
    next."""
    tokenizer = checkpoint.tokenizer()
    texts = [text for name, text in documents(standard_library()) if is_held_out(name)]
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = torch.tensor(
        [i for encoding in tokenizer.encode_batch(texts) for i in (*encoding.ids, end)]
    )
    return ids.unfold(0, WINDOW + 1, WINDOW)[:most]


@torch.inference_mode()
def losses(model: torch.nn.Module, ids_WS: Tensor, rows_VND: np.ndarray) -> np.ndarray:
    """Mean loss of each window with the given rows, in nats per token."""
    rows_NVD = torch.from_numpy(np.ascontiguousarray(rows_VND.swapaxes(0, 1)))
    found = []
    for some_BS in ids_WS.split(8):
        inputs_T, targets_T = some_BS[:, :-1].flatten(), some_BS[:, 1:].flatten()
        positions_T = torch.arange(WINDOW).repeat(len(some_BS))
        logits_TV = model(inputs_T, positions_T, NoCache(WINDOW), rows_NVD[:, inputs_T])
        found.append(
            F.cross_entropy(logits_TV, targets_T, reduction="none")
            .unflatten(0, (len(some_BS), WINDOW))
            .mean(1)
        )
    return torch.cat(found).double().numpy()


def back(name: str, rows: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """Rows after encoding and decoding, with their columns stored in `order`."""
    codec = codecs.codec(name)
    if order is None:
        return codec.decode(codec.encode(rows)).astype(np.float32)
    return back(name, np.ascontiguousarray(rows[..., order]))[..., np.argsort(order)]


def measure(path: Path, most: int, orders: int, x0: bool) -> dict[str, float]:
    checkpoint = open_checkpoint(path)
    model, ids_WS = checkpoint.model(), windows(checkpoint, most)
    with torch.inference_mode():
        rows = np.ascontiguousarray(
            model.rows(torch.arange(checkpoint.config.vocab_size), x0).numpy().swapaxes(0, 1)
        )
    exact = losses(model, ids_WS, rows)
    nats = exact.mean()
    size = f"{len(ids_WS)} windows of {WINDOW}"
    print(f"{path.name}: {size}, fp32 loss {nats:.4f} nats, perplexity {math.exp(nats):.3f}")
    found = {}

    def tell(label: str, results: list[np.ndarray]) -> None:
        difference = np.mean([losses(model, ids_WS, result) for result in results], axis=0) - exact
        error = math.sqrt(
            np.mean([np.square(result - rows).sum() / np.square(rows).sum() for result in results])
        )
        found[label] = round(float(difference.mean()), 5)
        spread = difference.std(ddof=1) / math.sqrt(len(difference))
        perplexity = math.exp(exact.mean() + difference.mean())
        loss = f"{difference.mean():+10.5f} ± {spread:.5f}   perplexity {perplexity:.3f}"
        print(f"  {label:18}{loss}   row error {error:7.4f}")

    for name in () if orders else codecs.CODECS:
        tell(name, [back(name, rows)])
    random = np.random.default_rng(0)
    columns = [random.permutation(rows.shape[-1]) for _ in range(orders)]
    for group in tqdm(GROUPS if orders else (), desc="groups", leave=False):
        with patch.object(codecs, "GROUP", group):
            tell(
                "int4, " + ("whole rows" if group > rows.shape[-1] else f"groups of {group}"),
                [back("int4", rows, c) for c in columns],
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        nargs="*",
        type=Path,
        default=[Path("models/demo-memory"), Path("models/demo-flex")],
    )
    parser.add_argument("--quick", action="store_true", help="evaluate fewer windows")
    parser.add_argument("--x0", action="store_true", help="include X0 in the rows")
    parser.add_argument(
        "--orders", type=int, default=0, help="random column orders for int4's group sizes"
    )
    given = parser.parse_args()
    most = 32 if given.quick else 10_000
    print(
        json.dumps(
            {path.name: measure(path, most, given.orders, given.x0) for path in given.checkpoint}
        )
    )


if __name__ == "__main__":
    main()
