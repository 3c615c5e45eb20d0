"""The trainer, which is deterministic for a seed, resumes after a kill, and draws a loss curve.

FFN-M depends on token ids alone, so the trainer computes `model.rows` once for each distinct token
of a batch. With 4,096 tokens in a step this is a third of the work.
"""

import csv
import math
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from tolhouse.config import TrainConfig, arguments
from tolhouse.errors import CorruptError, InUseError, MismatchError, UnavailableError
from tolhouse.files import locked
from tolhouse.model import ffn
from tolhouse.model.checkpoint import (
    WEIGHTS,
    open_checkpoint,
    save_checkpoint,
    tensor_shapes,
    torch_device,
)
from tolhouse.model.losses import Evaluation, evaluate
from tolhouse.model.transformer import NoCache, Transformer, parameter_counts
from tolhouse.train import corpus
from tolhouse.train.recipes import Recipe, recipe

STATE = "training-state.safetensors"
ESTIMATE_BATCHES = 8  # the number of batches of held-out windows for each point of the curve
CARD = """# {kind} model

| | |
|---|---|
{table}

`loss.csv` and `loss.png` show the loss during training. Their held-out losses are estimates from
the same {estimate:,} tokens each time. The model continues text that resembles its training data.
Its purpose is to demonstrate and test the serving system.
"""


@dataclass
class Trainer:
    """One run of `recipe` on token ids. Writes its checkpoint and its state to folder `out`."""

    recipe: Recipe
    train_ids: np.ndarray
    valid_ids: np.ndarray
    out: Path
    seed: int = 0
    compile: bool = False
    save_every_seconds: float = 60.0
    device: str = "cpu"

    def run(self) -> Evaluation:
        """Train to the last step, from the saved state in the folder if there is one.

        Returns the losses of the saved checkpoint on the whole held-out text, as `tolhouse eval`
        measures them.
        """
        recipe = self.recipe
        torch.manual_seed(self.seed)
        self.model = Transformer(recipe.config)
        initialise(self.model)
        self.model.to(self.device)
        matrices, vectors = ([p for p in self.model.parameters() if p.dim() == d] for d in (2, 1))
        groups: list[dict[str, Any]] = [{"params": matrices}]
        groups += [{"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, recipe.peak_rate, recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        first = self.resume()
        loss_of = torch.compile(self.loss, dynamic=True) if self.compile else self.loss
        curve, saved = Curve(self.out, first), time.monotonic()
        counts = {"total": recipe.steps * recipe.step_tokens, "initial": first * recipe.step_tokens}
        look: Any = {"dynamic_ncols": True, "disable": None}  # shown on a terminal only
        bar = tqdm(**counts, unit="tok", unit_scale=True, desc="train", **look)
        for step in range(first, recipe.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = rate(recipe, step)
            batch = self.batch(self.train_ids, self.seed, step)
            try:
                loss = loss_of(*batch)
            except Exception as error:
                if loss_of == self.loss:
                    raise
                tqdm.write(f"no torch.compile here ({type(error).__name__}): training uncompiled")
                loss_of = self.loss
                loss = loss_of(*batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            done = step + 1
            evaluates = done % recipe.eval_every_steps == 0 or done == recipe.steps
            curve.add(done, done * recipe.step_tokens, loss.item(), evaluates and self.estimate())
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update(recipe.step_tokens)
            if evaluates or time.monotonic() - saved > self.save_every_seconds:
                curve.write()
                self.save(done)
                saved = time.monotonic()
        bar.close()
        curve.plot()
        save_checkpoint(self.out, self.model, self.out / "tokenizer.json")
        return evaluate(open_checkpoint(self.out).model().to(self.device), self.valid_ids)

    def batch(self, ids: np.ndarray, *seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, [B * S] each, from windows that depend on `seed` alone."""
        size = self.recipe.sequence_tokens
        random = np.random.default_rng(seed)
        starts = random.integers(0, len(ids) - size, self.recipe.batch_sequences)
        windows = torch.from_numpy(np.stack([ids[s : s + size + 1] for s in starts])).long()
        windows = windows.to(self.device)
        return windows[:, :-1].flatten(), windows[:, 1:].flatten()

    def loss(self, ids_T: Tensor, targets_T: Tensor, z_loss: bool = True) -> Tensor:
        length = self.recipe.sequence_tokens
        unique_U, inverse_T = ids_T.unique(return_inverse=True)
        positions_T = torch.arange(length, device=ids_T.device).repeat(len(ids_T) // length)
        with torch.autocast(ids_T.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            rows = self.model.rows(unique_U)  # [N, U, D]
            if len(rows):
                # An embedding lookup. Its backward pass sums the gradients of equal tokens.
                rows = torch.stack([F.embedding(inverse_T, row_UD) for row_UD in rows])
            logits_TV = self.model(ids_T, positions_T, NoCache(length), rows).float()
        loss = F.cross_entropy(logits_TV, targets_T)
        if z_loss:
            loss = loss + self.recipe.z_loss * logits_TV.logsumexp(-1).square().mean()
        return loss

    @torch.no_grad()
    def estimate(self) -> float:
        """Compute the mean cross-entropy in nats per token over a fixed set of held-out windows."""
        windows = (self.batch(self.valid_ids, 0, 1, index) for index in range(ESTIMATE_BATCHES))
        return float(np.mean([self.loss(*window, z_loss=False).item() for window in windows]))

    def fingerprint(self) -> dict[str, str]:
        tokens = f"{len(self.train_ids)} {xxhash.xxh3_128_hexdigest(self.train_ids.tobytes())}"
        return {"recipe": repr(self.recipe), "seed": str(self.seed), "train_tokens": tokens}

    def save(self, step: int) -> None:
        """Save weights and optimiser moments as safetensors. Replaces the old file atomically."""
        tensors = {}
        for name, p in self.model.named_parameters():
            state = self.optimizer.state[p]
            tensors[f"weight.{name}"] = p.detach()
            tensors |= {f"mean.{name}": state["exp_avg"], f"square.{name}": state["exp_avg_sq"]}
        partial = self.out / f"{STATE}.partial"
        save_file(tensors, partial, metadata={**self.fingerprint(), "step": str(step)})
        partial.replace(self.out / STATE)

    @torch.no_grad()
    def resume(self) -> int:
        """Load the saved state if there is one. Returns the number of completed steps."""
        file = self.out / STATE
        if not file.exists():
            return 0
        try:
            opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise CorruptError(
                f"{file} cannot be read: {error}; remove it to start again"
            ) from None
        with opened as saved:
            metadata, expected = saved.metadata(), self.fingerprint()
            step = int(metadata["step"])
            if changed := sorted(k for k, v in expected.items() if metadata.get(k) != v):
                other = f"{self.out} holds another run, which differs in {', '.join(changed)}"
                raise MismatchError(f"{other}: choose another --out, or remove the folder")
            for name, p in self.model.named_parameters():
                p.copy_(saved.get_tensor(f"weight.{name}"))
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(step), device=p.device),
                    "exp_avg": saved.get_tensor(f"mean.{name}").to(p.device),
                    "exp_avg_sq": saved.get_tensor(f"square.{name}").to(p.device),
                }
        return step


def initialise(model: Transformer) -> None:
    """Initialise with Normal(0.02), scaled down for projections into the residual stream.

    GPT-2 does the same. The paper does not define the initialisation.
    """
    small = 0.02 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = any(part in name for part in ("o_proj", "down_proj", ".maps."))
            nn.init.normal_(p, std=small if residual else 0.02)
    for module in model.modules():
        ffn.initialise(module)


def rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate: a linear warm-up, then a cosine from the peak to the final rate."""
    peak, final, warmup = recipe.peak_rate, recipe.final_rate, recipe.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


class Curve:
    """Writes loss.csv and loss.png of a run. A resumed run drops rows after its first step."""

    def __init__(self, out: Path, first: int) -> None:
        self.file = out / "loss.csv"
        self.rows: list[list[str]] = []  # step, tokens, loss, held-out loss or ""
        if first and self.file.exists():
            with self.file.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= first]

    def add(self, step: int, tokens: int, loss: float, held_out: float) -> None:
        rounded = str(round(held_out, 5)) if held_out else ""
        self.rows.append([str(step), str(tokens), str(round(loss, 5)), rounded])

    def held_out(self) -> list[tuple[int, float]]:
        """Return the tokens and the held-out loss at each evaluation."""
        return [(int(tokens), float(loss)) for _, tokens, _, loss in self.rows if loss]

    def write(self) -> None:
        partial = self.file.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "tokens", "loss", "held_out_loss"))
            writer.writerows(self.rows)
        partial.replace(self.file)

    def plot(self) -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        self.write()
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        training = [(int(tokens), float(loss)) for _, tokens, loss, _ in self.rows]
        axes.plot(*zip(*training, strict=True), lw=0.6, alpha=0.6, label="training")
        estimates = zip(*self.held_out(), strict=True)
        axes.plot(*estimates, marker="o", ms=3, label="held out, estimated")
        axes.set(xlabel="tokens", ylabel="cross-entropy, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.file.with_suffix(".png"), dpi=120)
        plt.close(figure)


def train_checkpoint(name: str, options: TrainConfig) -> None:
    """Train recipe `name`, or resume an interrupted run, and write the model card."""
    chosen = recipe(name, options.kind, options.beta)
    forms = {name: value for name, value in options if name.startswith("ffn_")}
    config = replace(chosen.config, **forms)
    tensor_shapes(config)  # refuses sizes that a form cannot have
    steps = options.steps or chosen.steps
    warmup = min(chosen.warmup_steps, steps)
    chosen = replace(chosen, config=config, steps=steps, warmup_steps=warmup)
    out = options.out or Path("runs") / f"{name}-{options.kind}"
    if (out / WEIGHTS).exists() and not (out / STATE).exists():
        advice = "choose another --out, or remove the folder"
        raise InUseError(f"{out} holds a finished checkpoint: {advice}")
    torch.set_num_threads(options.threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
        source = options.corpus or corpus.standard_library()
        ids = corpus.prepare(source, out, config.vocab_size, chosen.sequence_tokens)
        device = str(torch_device(options.device))
        trainer = Trainer(chosen, *ids, out, options.seed, options.compile, device=device)
        with locked(out, seconds=0):
            held_out = trainer.run()
    except OSError as error:
        place = error.filename or out
        raise UnavailableError(f"can't write {place}: {error.strerror or error}") from None
    text = f"sources of the Python standard library ({platform.python_version()}), without tests"
    if options.corpus:
        text = f"text at {source}"
    total, active = parameter_counts(trainer.model)
    tokens, seen = len(ids[0]), steps * chosen.step_tokens
    beta = f", beta {config.beta}, FFN-C {config.ffn_c}" if config.kind == "flex" else ""
    ffn_m = "" if config.ffn_m == "swiglu" else f", FFN-M {config.ffn_m}"
    facts = {
        "kind": f"{config.kind}{beta}{ffn_m}",
        "shape": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{config.num_attention_heads} heads, K = {config.intermediate_size}, "
        f"vocabulary {config.vocab_size} (tied, {config.vocab_size * config.hidden_size:,} "
        f"parameters), context {config.max_position_embeddings}",
        "parameters": f"{total:,} without embeddings, {active:,} of them active in a worker",
        "data": f"{text}, {tokens:,} tokens; "
        "about one in forty of its 20,000-character pieces held out",
        "trained on": f"{seen:,} tokens ({seen / tokens:.1f} passes), "
        f"{steps} steps of {chosen.step_tokens:,}",
        "held-out loss": f"{held_out.loss:.4f} nats per token, perplexity "
        f"{held_out.perplexity:.2f}, over all {len(held_out.losses):,} held-out tokens",
        "weights": "bfloat16, safetensors",
        "command": f"`{' '.join(['tolhouse train', name, *arguments(options)])}`",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    estimate = ESTIMATE_BATCHES * chosen.step_tokens
    card = CARD.format(kind=config.kind, table=table, estimate=estimate)
    (out / "README.md").write_text(card, encoding="utf-8")
