"""Compare models that take rows from Tolhouse with their implementation in transformers.

    python -m loadtest.models [--quick]

The architectures are real, their weights are random and tiny, and rows travel over TCP from a
lookup service. The output is a table and a final line of JSON:

    gemma4_equal, gemma3n_equal   share of logits and of generated tokens that are equal to the bit
    mole_diff                     largest difference of a logit of MoLE with experts or with rows,
                                  over the standard deviation of all logits
    import_peak_over_bound        anonymous memory of `tolhouse import tensor`, beyond that of an
                                  import of a small tensor, over four shards
    hf_logit_diff                 largest difference between the logits of our model and those of
                                  transformers with our classes, for memory and flex in float32
    gemma4_e2b_freed_gb, …        bytes that leave the accelerator, from the sizes of public configs
    two_resident_mb, two_attached_resident_mb
                                  memory of two processes with a model in float32 each, and with
                                  one table in files for both (proportional set size)
    gemma_int8_loss, …            loss added by rows of a codec, in nats per token
    smollm2_…                     SmolLM2 against transformers, from loadtest.smollm2
    gemma_loss                    loss of the tiny Gemma 4 of that comparison, trained on text

The model of the last comparison is trained from scratch on the Python standard library for a
minute. Its figures say little about the loss of models that are trained for long.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tolhouse.integrations.attach import attach
from tolhouse.testing import build_table, end
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from loadtest import ALLOCATOR, smollm2, sources, tables
from loadtest.gemma import saved, tiny_gemma
from loadtest.smollm2 import quiet
from loadtest.text import foreign

CODECS = ("bf16", "int8", "int4")
# Sizes of the public configs: layers, hidden size, tokens with per-layer embeddings. A layer has
# 256 values.
PUBLIC = {
    "gemma4_e2b": (35, 1536, 262_144),
    "gemma4_e4b": (42, 2560, 262_144),
    "gemma3n_e2b": (30, 2048, 262_144),
    "gemma3n_e4b": (35, 2048, 262_144),
}
# Loads a model, attaches a table if a row source is given, generates, and waits for its end.
HOLD = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
if sys.argv[2]:
    from tolhouse.integrations.attach import attach
    attach(model, sys.argv[2], "gemma4")
model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
print("ready", flush=True)
sys.stdin.read()
"""
PER_LAYER, BYTES = 256, 2  # values of a row per layer, bytes of a bfloat16


@torch.no_grad()
def answers(model: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a padded batch, and its greedy continuation."""
    ids = torch.randint(3, 280, (4, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = ids[0, :5] = 0
    given: dict[str, Any] = {"attention_mask": mask, "do_sample": False}
    logits = model(ids, attention_mask=mask).logits
    return logits, model.generate(ids, max_new_tokens=tokens, **given)


def gemma_equal(family: str, tokens: int) -> float:
    """The share of logits and tokens that are equal with rows over TCP, in two dtypes."""
    shares = []
    for dtype, codec in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        with tempfile.TemporaryDirectory() as folder:
            path, url = Path(folder) / family, f"file://{folder}/tables"
            model = saved(tiny_gemma(family), path, dtype)
            wanted = answers(model, tokens)
            build_table(path, url, codec=codec)
            with tables.service(url, 1) as lookup:
                attachment = attach(model, lookup.address, family)
                found = answers(model, tokens)
                attachment.detach()
        pairs = zip(wanted, found, strict=True)
        shares += [float((a == b).float().mean()) for a, b in pairs if a.shape == b.shape]
    return min(shares) if len(shares) == 4 else 0.0


@torch.no_grad()
def hf_logit_diff() -> float:
    """The largest difference of logits between our model and transformers with our classes."""
    import tolhouse.integrations.transformers  # noqa: F401 - registers the classes
    from tolhouse.model.checkpoint import open_checkpoint
    from tolhouse.model.transformer import NoCache
    from transformers import AutoModelForCausalLM

    differences = []
    for name in ("demo-memory", "demo-flex"):
        path = Path(__file__).parent.parent / "models" / name
        own = open_checkpoint(path).model()
        other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        size, generator = own.config.vocab_size, torch.Generator().manual_seed(0)
        ids_BS = torch.randint(size, (4, 128), generator=generator)
        ids_T, positions_T = ids_BS.flatten(), torch.arange(128).repeat(4)
        logits_TV = own(ids_T, positions_T, NoCache(128), own.rows(ids_T))
        differences.append((logits_TV - other(ids_BS).logits.flatten(0, 1)).abs().max().item())
    return max(differences)


def freed_gb(layers: int, hidden: int, vocabulary: int) -> float:
    """Gigabytes of the table and the projection that a worker no longer holds, in bfloat16."""
    return layers * PER_LAYER * (vocabulary + hidden) * BYTES / 1e9


def resident_mb(path: Path, url: str) -> float:
    """Megabytes of memory that two processes with a model share and own together."""
    pipe = subprocess.PIPE
    # A process of a user has the defaults of the C library.
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    command = [sys.executable, "-c", HOLD, str(path), url]
    options: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(command, env=environment, **options) for _ in range(2)]
    try:
        for process in running:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
        texts = [Path(f"/proc/{p.pid}/smaps_rollup").read_text(encoding="ascii") for p in running]
        return sum(int(text.split("Pss:")[1].split()[0]) for text in texts) / 1e3
    finally:
        for process in running:
            end(process)


def resident() -> dict[str, float]:
    """The memory of two processes with a table of 403 MB each, and with a table in files."""
    model = tiny_gemma("gemma4", vocab_size=1 << 16, hidden_size_per_layer_input=PER_LAYER)
    with tempfile.TemporaryDirectory() as folder:
        path, url = Path(folder) / "gemma4", f"file://{folder}/tables"
        model.to(torch.bfloat16).save_pretrained(path)
        del model
        build_table(path, url, codec="bf16")
        found = {"two_resident_mb": resident_mb(path, "")}
        found["two_attached_resident_mb"] = resident_mb(path, url)
    return {name: round(value, 1) for name, value in found.items()}


def train(model: Any, ids_WS: torch.Tensor, seconds: float) -> None:
    """Train on windows of token ids for some seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    model.train()
    started = time.monotonic()
    bar = tqdm(desc="train", unit="step", leave=False)
    while (spent := (time.monotonic() - started) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, 2 * (1 - spent))
        chosen = ids_WS[torch.randint(len(ids_WS), (16,), generator=generator)]
        loss = model(chosen, labels=chosen).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.update()
    model.eval()


@torch.no_grad()
def loss_of(model: Any, ids_WS: torch.Tensor) -> np.ndarray:
    """Mean loss of each window, in nats per token."""
    parts = []
    for chosen in ids_WS.split(16):
        logits = model(chosen).logits[:, :-1].float().flatten(0, 1)
        losses = cross_entropy(logits, chosen[:, 1:].flatten(), reduction="none")
        parts.append(losses.view(len(chosen), -1).mean(1))
    return torch.cat(parts).double().numpy()


def windows(*, held_out: bool, width: int, most: int) -> torch.Tensor:
    """Windows [W, width] of the standard library in the tokens of models/demo-memory."""
    from tolhouse.model.tokenizer import load_tokenizer
    from tolhouse.train.corpus import documents, is_held_out, standard_library

    file = Path(__file__).parent.parent / "models" / "demo-memory" / "tokenizer.json"
    found = documents(standard_library())
    texts = [text for name, text in found if is_held_out(name) == held_out]
    encoded = load_tokenizer(file).encode_batch(texts[:: 1 if held_out else 4])
    ids = torch.tensor([i for encoding in encoded for i in encoding.ids])
    return ids.unfold(0, width, width)[:most]


@contextmanager
def attached(model: Any, url: str, table: str) -> Iterator[None]:
    attachment = attach(model, url, table)
    try:
        yield
    finally:
        attachment.detach()


def gemma_losses(seconds: float) -> dict[str, float]:
    """The loss of a tiny trained Gemma 4 on held-out text, and what each codec adds to it."""
    sizes: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 192, "intermediate_size": 512}
    sizes |= {"num_attention_heads": 4, "head_dim": 48, "sliding_window": 64}
    sizes |= {"hidden_size_per_layer_input": 64}
    torch.manual_seed(0)
    model = tiny_gemma("gemma4", **sizes)
    train(model, windows(held_out=False, width=129, most=20_000), seconds)
    held_out = windows(held_out=True, width=129, most=128)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, url = Path(folder) / "gemma4", f"file://{folder}/tables"
        model.save_pretrained(path)
        model = type(model).from_pretrained(path, dtype="auto").eval()
        exact = loss_of(model, held_out)
        found["gemma_loss"] = round(float(exact.mean()), 4)
        for codec in CODECS:
            build_table(path, url, codec=codec, name=codec)
            with attached(model, url, codec):
                added = loss_of(model, held_out) - exact
            error = added.std() / len(added) ** 0.5
            print(f"  {codec:6} {added.mean():+.5f} ± {error:.5f} nats per token")
            found[f"gemma_{codec}_loss"] = round(float(added.mean()), 5)
    return found


def measure(*, quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for family in ("gemma4", "gemma3n"):
        found[f"{family}_equal"] = gemma_equal(family, 8 if quick else 64)
        print(f"  {family:30}{found[f'{family}_equal']:.3f} of logits and tokens are equal")
    found["mole_diff"] = sources.mole_diff()
    print(f"  {'mole':30}{found['mole_diff']:.1e} is the largest difference of a logit")
    found["import_peak_over_bound"] = round(sources.import_peak_over_bound(), 3)
    print(f"  {'import, four shards':30}{found['import_peak_over_bound']:.3f} of them in memory")
    found["hf_logit_diff"] = hf_logit_diff()
    print(f"  {'hf_logit_diff':30}{found['hf_logit_diff']:.1e} with our classes in transformers")
    for name, sizes in PUBLIC.items():
        found[f"{name}_freed_gb"] = round(freed_gb(*sizes), 3)
        print(f"  {name:30}{found[f'{name}_freed_gb']:.3f} GB leave the accelerator")
    memory = resident()
    for name, megabytes in memory.items():
        print(f"  {name:30}{megabytes:.0f} MB in two processes, a table of 403 MB in float32")
    found |= smollm2.measure(foreign()[1], 2048 if quick else 16_384, quick=quick)
    for name in ("greedy_equal", "chat_equal", "perplexity_diff"):
        print(f"  {f'smollm2_{name}':30}{found[f'smollm2_{name}']:.6f}")
    print("loss that codecs add to a tiny Gemma 4:")
    return found | memory | gemma_losses(20 if quick else 120)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="takes about a minute")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    print(json.dumps(measure(quick=arguments.quick)))


if __name__ == "__main__":
    main()
