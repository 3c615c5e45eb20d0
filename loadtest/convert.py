"""Converts SmolLM2-135M without training, and measures what is lost and what leaves the worker.

WikiText, or the text of pydoc's topics where WikiText is missing, is split in two halves. The first
half is the text of the conversion, and the second half measures the result. Layers are chosen for 2
and 5 % more perplexity. The model with the most layers is served with rows over TCP. Its log
probabilities are compared with those in this process, and both with those in float64.

    python -m loadtest.convert --quick
"""

import argparse
import json
import math
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from tolhouse import Client
from tolhouse.build.convert import Choice, Conversion, choose, conversion, rank
from tolhouse.build.stored_rows import StoredRows
from tolhouse.engine.cpu.packed import load
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint, torch_device
from tolhouse.model.generate import greedy
from tolhouse.model.losses import RowsOf, evaluate
from tolhouse.model.transformer import NoCache, Transformer
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import local_cluster
from torch import Tensor

from loadtest import smollm2
from loadtest.text import foreign

CHAT = "<|im_start|>user\nWhat is the capital of France, and what is it known for?<|im_end|>\n"
CHAT += "<|im_start|>assistant\n"
TOLERANCE = 1e-5  # nats
WINDOW = 256
SERVED = 128  # tokens whose probabilities are compared


def rows_of(checkpoint: Checkpoint, url: str) -> RowsOf:
    """Return a function from ids [T] to the rows [N, T, D] in the table of a converted model."""
    stored, config = StoredRows(checkpoint, [open_store(url)]), checkpoint.config
    layers = list(config.row_layers)

    def rows(ids_T: Tensor) -> Tensor:
        found = torch.from_numpy(stored.rows(ids_T.numpy()))
        rows_NTD = torch.zeros(config.num_rows, len(ids_T), config.hidden_size)
        rows_NTD[layers] = found.transpose(0, 1)
        return rows_NTD

    return rows


@torch.inference_mode()
def log_probabilities(model: Transformer, ids_T: Tensor, rows: RowsOf) -> Tensor:
    """Return the log probabilities [T, V] of the next tokens."""
    positions_T, cache = torch.arange(len(ids_T)), NoCache(len(ids_T))
    return model(ids_T, positions_T, cache, rows(ids_T)).log_softmax(-1)


def loss(model: Transformer, ids: np.ndarray, rows: RowsOf | None = None) -> float:
    windows = np.array_split(ids, len(ids) // WINDOW)
    return float(np.mean([evaluate(model, window, rows).loss for window in windows]))


def served_differences(made: Checkpoint, url: str, ids: np.ndarray) -> dict[str, float]:
    """The largest differences of the log probabilities of a text, in nats.

    A worker is compared with its packed matrices in this process, which add in the same order, and
    with plain matrices. Both orders are compared with float64.
    """
    ids_T, rows = torch.from_numpy(ids[:SERVED].astype(np.int64)), rows_of(made, url)
    models = {
        "": (load(made, torch.device("cpu"), torch.float32), rows),
        "_plain": (made.model(), rows),
        "_float64": (made.model().double(), lambda ids_T: rows(ids_T).double()),
    }
    logs = {
        name: log_probabilities(model, ids_T, of)[:-1].gather(1, ids_T[1:, None])[:, 0]
        for name, (model, of) in models.items()
    }
    with local_cluster(made.path, url) as cluster, Client(cluster.workers) as client:
        output = next(iter(client.replies(ids_T.tolist(), 1, prompt_logprobs=0)))
        assert output.prompt_logprobs
        served = torch.tensor(output.prompt_logprobs.chosen)
    found = {f"served_diff{name}": float((served - own).abs().max()) for name, own in logs.items()}
    exact = logs["_float64"]
    return found | {"plain_diff_float64": float((logs["_plain"] - exact).abs().max())}


def completion(checkpoint: Checkpoint, model: Transformer, rows: RowsOf | None = None) -> str:
    tokenizer = checkpoint.tokenizer()
    return tokenizer.decode(list(greedy(model, tokenizer.encode(CHAT).ids, 40, rows=rows)))


def draw(choice: Choice, path: Path) -> None:
    """Draw the perplexity over the number of converted layers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    changes = [0.0, *(100 * (ratio - 1) for _, ratio in choice.steps)]
    axes.plot(range(len(changes)), changes, marker="o", markersize=4)
    for count, (layer, _) in enumerate(choice.steps, 1):
        axes.annotate(f"{layer}", (count, changes[count]), (3, 4), textcoords="offset points")
    axes.set(xlabel="converted layers", ylabel="change of perplexity, %")
    axes.set_title("SmolLM2-135M; numbers are the added layers", fontsize=10)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def keeps_all(made: Conversion, folder: Path, ids: np.ndarray) -> bool:
    """Whether the model with no converted layer has the logits of the dense model to the bit."""
    url, ids_T = f"file://{folder}/none", torch.from_numpy(ids[:WINDOW].astype(np.int64))
    same = made.write(Choice({}, ()), folder / "same", "", "bf16", open_store(url)).checkpoint
    models = (checkpoint.model() for checkpoint in (made.checkpoint, same))
    return torch.equal(*(log_probabilities(model, ids_T, model.rows) for model in models))


def write(made: Conversion, choice: Choice, folder: Path, url: str) -> Checkpoint:
    """Write a converted model, and publish its table."""
    with closing(open_store(url)) as store:
        one = made.write(choice, folder, "", "bf16", store)
        assert one.manifest
        publish(store, one.manifest.ref)
    print(f"  {one.sizes(made.checkpoint)}")
    return one.checkpoint


def choices(made: Conversion) -> dict[int, Choice]:
    """Choose layers for 2 and 5 % more perplexity. The second choice continues the first."""
    trials = made.trials()
    single = rank(trials)
    for layer, ratio in single.items():
        print(f"  layer {layer:2} alone: perplexity {100 * (ratio - 1):+7.2f} %")
    small = choose(trials, single, 0.02)
    more = choose(trials, single, 0.05)
    return {2: small, 5: Choice(single, small.steps + more.steps)}


def measure(folder: Path, plot: Path, device: torch.device, *, quick: bool) -> dict[str, float]:
    """Convert, serve and compare."""
    most, held_out, unseen = (24_576, 1024, 2048) if quick else (0, 16_384, 16_384)
    dense, (source, text) = open_checkpoint(smollm2.checkpoint()), foreign()
    ids = np.array(dense.tokenizer().encode(text.read_text(encoding="utf-8")).ids, np.int64)
    first, second = ids[: len(ids) // 2], ids[len(ids) // 2 :][:unseen]
    started, url = time.perf_counter(), f"file://{folder}/tables"
    with conversion(dense, first, folder, most, held_out, device) as made:
        found: dict[str, float] = {"keep_all_equal": keeps_all(made, folder, second)}
        chosen = choices(made)
        found["convert_seconds"] = round(time.perf_counter() - started, 1)
        draw(chosen[5], plot)
        base, before = loss(made.model, second), completion(dense, dense.model())
        for percent, choice in chosen.items():
            found[f"layers_at_{percent}pct"] = count = len(choice.layers)
            if not count:
                continue
            one = write(made, choice, folder / f"flex-{percent}", url)
            model, rows = one.model(), rows_of(one, url)
            ratio = math.exp(loss(model, second, rows) - base)
            found[f"unseen_at_{percent}pct"] = round(ratio, 4)
            about = f"{choice.ratio:.4f} where chosen, {ratio:.4f} on unseen {source}"
            print(f"{count} layers {choice.layers} at {percent} %: perplexity {about}")
    if not len(chosen[5].layers):
        return found
    print(f"before: {before!r}\nafter:  {completion(one, model, rows)!r}")
    differences = served_differences(one, url, second)
    left = dense.weight_bytes(dense=True) - one.weight_bytes(dense=False)
    table = StoredRows(one, [open_store(url)]).manifest.table_bytes
    found |= {"served_equal": differences["served_diff"] <= TOLERANCE, **differences}
    return found | {"left_mb": round(left / 1e6, 1), "table_mb": round(table / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less text; within five minutes")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto; converts there")
    parser.add_argument("--plot", type=Path, default=Path("dist/convert.png"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tolhouse-convert-") as folder:
        device = torch_device(given.device)
        print(json.dumps(measure(Path(folder), given.plot, device, quick=given.quick)))


if __name__ == "__main__":
    main()
