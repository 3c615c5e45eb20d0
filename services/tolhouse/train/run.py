"""`tolhouse train`: recipe and corpus in, checkpoint with its model card out."""

import math
import platform
from dataclasses import replace
from pathlib import Path

import torch

from tolhouse.config import TrainConfig, arguments
from tolhouse.errors import InUse, InvalidArgument, Unavailable
from tolhouse.model.checkpoint import WEIGHTS
from tolhouse.model.transformer import active_parameters, total_parameters
from tolhouse.train import corpus
from tolhouse.train.recipes import Recipe, recipe
from tolhouse.train.trainer import STATE, Trainer


def train_checkpoint(name: str, options: TrainConfig) -> float:
    """Train recipe `name`, or continue a run that was interrupted; returns the held-out loss."""
    chosen = recipe(name, options.kind, options.beta)
    if options.kind != "flex" and options.ffn_c != "linear":
        raise InvalidArgument(
            f"--ffn-c {options.ffn_c} is for --kind flex; a {options.kind} model has no FFN-C"
        )
    chosen = replace(chosen, config=replace(chosen.config, ffn_c=options.ffn_c))
    if steps := options.steps:
        chosen = replace(chosen, steps=steps, warmup_steps=min(chosen.warmup_steps, steps))
    out = options.out or Path("runs") / f"{name}-{options.kind}"
    if (out / WEIGHTS).exists() and not (out / STATE).exists():
        raise InUse(
            f"{out} holds a finished checkpoint: choose another --out, or remove the folder"
        )
    torch.set_num_threads(options.threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
        source = options.corpus or corpus.standard_library()
        ids = corpus.prepare(source, out, chosen.config.vocab_size, chosen.sequence_tokens)
        trainer = Trainer(chosen, *ids, out, seed=options.seed, compile=options.compile)
        loss = trainer.run()
    except OSError as error:
        place = error.filename or out
        raise Unavailable(f"can't write {place}: {error.strerror or error}") from None
    python = f"sources of the Python standard library ({platform.python_version()}), without tests"
    facts = {
        "parameters": f"{total_parameters(trainer.model):,} without embeddings, "
        f"{active_parameters(trainer.model):,} of them active in a worker",
        "data": f"{f'text at {source}' if options.corpus else python}, {len(ids[0]):,} tokens; "
        "about one piece in forty of its 20,000-character pieces held out",
        "trained on": f"{chosen.steps * chosen.step_tokens:,} tokens "
        f"({chosen.steps * chosen.step_tokens / len(ids[0]):.1f} passes), "
        f"{chosen.steps} steps of {chosen.step_tokens:,}",
        "held-out loss": f"{loss:.4f} nats per token, perplexity {math.exp(loss):.2f}",
        "weights": "bfloat16, safetensors",
        "command": f"`{' '.join(['tolhouse train', name, *arguments(options)])}`",
    }
    (out / "README.md").write_text(card(chosen, facts))
    return loss


def card(recipe: Recipe, facts: dict[str, str]) -> str:
    """A model card in Markdown."""
    c = recipe.config
    beta = f", beta {c.beta}, FFN-C {c.ffn_c}" if c.kind == "flex" else ""
    shape = {
        "kind": f"{c.kind}{beta}",
        "shape": f"{c.num_hidden_layers} layers, hidden size {c.hidden_size}, "
        f"{c.num_attention_heads} heads, K = {c.intermediate_size}, vocabulary {c.vocab_size} "
        f"(tied, {c.vocab_size * c.hidden_size:,} parameters), "
        f"context {c.max_position_embeddings}",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in {**shape, **facts}.items())
    return f"""# {c.kind} model

| | |
|---|---|
{table}

`loss.csv` and `loss.png` are the run's curve. The model knows the manner of its data and nothing
else: it is here to show and to test the serving system.
"""
