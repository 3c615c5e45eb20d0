"""`tolhouse train`: recipe and corpus in, checkpoint with its model card out."""

import platform
from dataclasses import replace
from pathlib import Path

import torch

from tolhouse.errors import InUse, InvalidArgument, Unavailable
from tolhouse.model.checkpoint import WEIGHTS
from tolhouse.model.transformer import active_parameters, total_parameters
from tolhouse.train import corpus
from tolhouse.train.recipes import recipe
from tolhouse.train.trainer import STATE, Trainer, card


def train_checkpoint(
    name: str,
    out: Path,
    *,
    kind: str,
    beta: int,
    ffn_c: str,
    corpus_path: Path | None,
    seed: int,
    threads: int,
    steps: int | None,
    compile: bool,
) -> float:
    """Train recipe `name` in folder `out`, or go on with a run that is there; returns the held-out loss."""
    chosen = recipe(name, kind, beta)
    if kind != "flex" and ffn_c != "linear":
        raise InvalidArgument(f"--ffn-c {ffn_c} is for --kind flex; a {kind} model has no FFN-C")
    chosen = replace(chosen, config=replace(chosen.config, ffn_c=ffn_c))
    if steps:
        chosen = replace(chosen, steps=steps, warmup_steps=min(chosen.warmup_steps, steps))
    if (out / WEIGHTS).exists() and not (out / STATE).exists():
        raise InUse(
            f"{out} holds a finished checkpoint: choose another --out, or remove the folder to train it anew"
        )
    torch.set_num_threads(threads)
    source = corpus_path or corpus.standard_library()
    try:
        out.mkdir(parents=True, exist_ok=True)
        train_ids, valid_ids = corpus.prepare(
            source, out, chosen.config.vocab_size, chosen.sequence_tokens
        )
        trainer = Trainer(chosen, train_ids, valid_ids, out, seed=seed, compile=compile)
        loss = trainer.run()
    except OSError as error:
        raise Unavailable(
            f"can't write {error.filename or out}: {error.strerror or error}"
        ) from None
    flags = [f"--kind {kind}"] if kind != "memory" else []
    flags += [f"--beta {beta}"] if beta else []
    flags += [f"--ffn-c {ffn_c}"] if ffn_c != "linear" else []
    flags += [f"--corpus {corpus_path}"] if corpus_path else []
    flags += [f"--seed {seed}"] if seed else []
    flags += [f"--threads {threads}"] if threads != 1 else []
    flags += [f"--steps {steps}"] if steps else []
    flags += ["--no-compile"] if not compile else []
    flags += [f"--out {out}"] if out != Path("runs") / f"{name}-{kind}" else []
    command = " ".join(["tolhouse train", name, *flags])
    text = (
        f"text at {corpus_path}"
        if corpus_path
        else f"sources of the Python standard library ({platform.python_version()}), without its tests"
    )
    model = trainer.model
    sizes = total_parameters(model), active_parameters(model)
    (out / "README.md").write_text(card(chosen, command, text, len(train_ids), loss, sizes))
    return loss
