"""Run the science experiments on the committed checkpoints in ten minutes: `make science-check`.

The experiments are: held-out perplexity by codec and size, measured in this process and through a
lookup service and worker; KL divergence and top-token agreement on text like the training text and
on other text (abroad.py); the effect of α and of single layers; the row bytes of One Wide FFN; and
an edited token. The output is a set of tables and a final line of JSON, in which losses are
relative increases of perplexity over 16 bit:

  ppl_16bit                     perplexity with rows in bfloat16
  int8_loss, int4_loss          int4 has one token in 32 at int8 (required: at most 0.0002 and
                                0.002)
  lowrank_half_loss             half the bytes by low rank alone, at 16 bit (required: at most
                                0.0175)
  codec_8x_loss                 an eighth of the bytes
  kl_8x_…, top1_8x_…            KL from exact rows and share of equal top tokens, by text
  one_wide_bytes_ratio          row bytes fetched per token, One Wide FFN over memory
  overlay_changes_only_its_token   for two successive edits of a plain and a compressed table
  served_difference             largest |served perplexity / local - 1| (required: at most 0.001)
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from tolhouse import Client
from tolhouse.store.base import open_store
from tolhouse.store.overlay import make_overlay
from tolhouse.testing import build_table, local_cluster, tiny_model
from tqdm import tqdm

from loadtest.science import abroad
from loadtest.science.codecs import (
    ALIKE,
    Model,
    own_perplexity,
    schemes,
    served,
    served_logprobs,
    served_perplexity,
)

CHECKPOINT = Path("models/demo-memory")
LEAST_TOKENS, PROBE_TOKENS = 1000, 20_000
PROMPT = "import sys\n\ndef main():\n    return"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1)


def compression(model: Model, most_tokens: int) -> dict[str, float]:
    """The loss of each scheme, the perplexity at 16 bit, and the largest difference of served
    perplexity."""
    length = model.checkpoint.config.max_position_embeddings
    lines, found, furthest = [], {}, 0.0
    exact = model.evaluate(
        model.compressed(schemes(len(model.rows))["bf16"]).rows(), most_tokens
    ).perplexity
    for name, scheme in tqdm(
        schemes(len(model.rows)).items(), desc="codecs", leave=False, dynamic_ncols=True
    ):
        made = model.compressed(scheme, alike=name.endswith(ALIKE))
        rows = made.rows()
        loss = model.evaluate(rows, most_tokens).perplexity / exact - 1
        with (
            tempfile.TemporaryDirectory(prefix="tolhouse-science-") as folder,
            served(model, made, Path(folder)) as client,
        ):
            ours, theirs = (
                own_perplexity(model, rows, length),
                served_perplexity(client, model.text, length),
            )
        furthest = max(furthest, abs(theirs / ours - 1))
        found[name] = loss
        lines.append(
            f"  {name:26}{made.bytes / 1e6:8.2f} MB {model.bytes16() / made.bytes:6.2f}x  "
            f"{100 * loss:+8.3f} %   {ours:9.5f} {theirs:9.5f}"
        )
    print(
        f"{model.path.name}: held-out perplexity {exact:.4f} at 16 bit, "
        f"rows of {model.bytes16() / 1e6:.1f} MB"
    )
    print(
        f"  {'codec':26}{'bytes':>11} {'16 bit':>7}  {'perplexity':>10}   {'here':>9} {'served':>9}"
    )
    print("\n".join(lines), flush=True)
    return {**found, "16bit": exact, "furthest": furthest}


def probes(model: Model) -> None:
    """Print the effect of scaling all rows by α and of removing each layer's rows."""
    exact = model.evaluate(model.rows, PROBE_TOKENS).perplexity
    print(f"\nperplexity relative to α = 1, {PROBE_TOKENS:,} tokens")
    print("  α          " + "".join(f"{alpha:9.2f}" for alpha in ALPHAS))
    print(
        "             "
        + "".join(
            f"{model.evaluate(model.rows, PROBE_TOKENS, row_scale=alpha).perplexity / exact:9.3f}"
            for alpha in ALPHAS
        )
    )
    layers = range(model.rows.shape[1])
    print("  without    " + "".join(f"{f'layer {layer}':>9}" for layer in layers))
    dropped = [
        model.evaluate(model.rows, PROBE_TOKENS, absent_layers=(layer,)).perplexity / exact
        for layer in layers
    ]
    print("             " + "".join(f"{d:9.3f}" for d in dropped), flush=True)


def one_wide(folder: Path) -> float:
    """Row bytes that a worker fetches per token, for a One Wide model relative to a memory
    model."""
    fetched = {}
    for kind in ("wide", "memory"):
        path = tiny_model(folder / kind, kind)
        url = f"file://{folder / kind}-tables"
        build_table(path, url, codec="bf16")
        options = ("--row-cache-megabytes", "0", "--compile", "never")
        with (
            local_cluster(path, url, worker_options=options) as cluster,
            Client(cluster.workers) as client,
        ):
            list(client.generate(range(1, 40), 8, ignore_eos=True))
            rows = client.describe_worker().rows
            fetched[kind] = rows.remote_bytes / rows.from_remote
    print(
        f"\none wide FFN: {fetched['wide']:.0f} bytes per token, "
        f"memory model with 4 layers: {fetched['memory']:.0f}"
    )
    return fetched["wide"] / fetched["memory"]


def edited(model: Model, scheme: str, folder: Path) -> bool:
    """Whether each of two edits changes log probabilities after its token and no others."""
    url = f"file://{folder}"
    store = open_store(url)
    refs = [model.compressed(schemes(len(model.rows))[scheme]).store(store).ref]
    tokenizer = model.checkpoint.tokenizer()
    edits = [(" return", " raise"), (" self", " import")]
    tokens = [[tokenizer.encode(word).ids[0] for word in edit] for edit in edits]
    for token, other in tokens:
        row = store.rows(store.manifest(refs[-1]), np.array([other], np.uint32))
        refs.append(make_overlay(store, refs[-1], np.array([token]), row).ref)
    texts = [model.text[start : start + 64] for start in range(0, 6400, 64)]
    scores: list[list[list[float]]] = []
    print(f"\n{scheme}")
    for what, ref in zip(
        ("unedited", *(f"{a!r} has the row of {b!r}" for a, b in edits)), refs, strict=True
    ):
        options = ("--table", ref, "--compile", "never")
        with (
            local_cluster(model.path, url, worker_options=options) as cluster,
            Client(cluster.workers) as client,
        ):
            scores.append([served_logprobs(client, t.tolist()) for t in texts])
            shown = "".join(
                tokenizer.decode(
                    list(client.generate(tokenizer.encode(PROMPT).ids, 8, ignore_eos=True))
                )
            )
            print(f"  {what:34} {PROMPT!r} continues with {shown!r}", flush=True)
    right = []
    for (token, _), earlier, later in zip(tokens, scores, scores[1:], strict=False):
        for text, before, after in zip(texts, earlier, later, strict=True):
            at = np.flatnonzero(text == token)
            # predictions from this position on may change
            first = int(at[0]) if len(at) else len(text)
            right.append(
                before[:first] == after[:first]
                and (first >= len(text) - 1 or before[first:] != after[first:])
            )
        print(
            f"  {sum(token in t for t in texts)} of {len(texts)} texts contain "
            f"{tokenizer.decode([token])!r}"
        )
    return all(right) and all(any(token in t for t in texts) for token, _ in tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.science.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=0,
        help="held-out tokens for the codecs; 0 means all (default)",
    )
    most = parser.parse_args().tokens
    if most and most < LEAST_TOKENS:
        parser.error(f"--tokens must be 0 (all) or at least {LEAST_TOKENS}, not {most}")
    if not CHECKPOINT.is_dir():
        parser.error(f"{CHECKPOINT} does not exist; run the command in the repository's root")
    run(most)


def run(most_tokens: int) -> None:
    model = Model(CHECKPOINT)
    found = compression(model, most_tokens)
    both = abroad.run(model, min(most_tokens or abroad.TOKENS, abroad.TOKENS))
    probes(model)
    with tempfile.TemporaryDirectory(prefix="tolhouse-science-") as name:
        wide = one_wide(Path(name))
        only = [
            edited(model, scheme, Path(name) / scheme) for scheme in ("bf16", "int4 low rank, 8x")
        ]
    figures: dict[str, float] = {
        "ppl_16bit": round(found["16bit"], 4),
        "int8_loss": round(found["int8"], 6),
        "int4_loss": round(found["int4"], 6),
        "lowrank_half_loss": round(found["low rank, half"], 6),
        "codec_8x_loss": round(found["int4 low rank, 8x"], 6),
        **both,
        "one_wide_bytes_ratio": round(wide, 4),
        "overlay_changes_only_its_token": all(only),
        "served_difference": round(found["furthest"], 6),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
