"""The training loop: deterministic for a seed, resumable after a kill, with its curve as CSV and PNG.

FFN-M reads token ids alone, so each distinct token of a batch goes through it once and its rows are
used wherever it stands: with 4,096 tokens a step, a third of the work. Rows are `model.rows`.
"""

import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from tolhouse.errors import Corrupt, Mismatch
from tolhouse.model.checkpoint import save_checkpoint
from tolhouse.model.kv import NoCache
from tolhouse.model.transformer import Transformer
from tolhouse.train.recipes import Recipe

STATE = "training-state.safetensors"


@dataclass
class Trainer:
    """One run of `recipe` over token ids, in folder `out`, which also keeps the state to resume."""

    recipe: Recipe
    train_ids: np.ndarray
    valid_ids: np.ndarray
    out: Path
    seed: int = 0
    compile: bool = False
    save_every_seconds: float = 60.0

    def run(self) -> float:
        """Train from the folder's saved state to the last step; returns the held-out loss."""
        recipe = self.recipe
        torch.manual_seed(self.seed)
        self.model = Transformer(recipe.config)
        initialise(self.model)
        self.optimizer = adamw(self.model, recipe)
        first = self.resume()
        loss_of = compiled(self.loss) if self.compile else self.loss
        curve, saved = Curve(self.out, first), time.monotonic()
        counts = {"total": recipe.steps * recipe.step_tokens, "initial": first * recipe.step_tokens}
        bar = tqdm(**counts, unit="tok", unit_scale=True, desc="train", dynamic_ncols=True)
        for step in range(first, recipe.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = rate(recipe, step)
            loss = loss_of(*self.batch(self.train_ids, self.seed, step))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            done = step + 1
            evaluates = done % recipe.eval_every_steps == 0 or done == recipe.steps
            valid = self.evaluate() if evaluates else None
            curve.add(done, done * recipe.step_tokens, loss.item(), valid)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update(recipe.step_tokens)
            if evaluates or time.monotonic() - saved > self.save_every_seconds:
                curve.write()
                self.save(done)
                saved = time.monotonic()
        bar.close()
        curve.plot()
        save_checkpoint(self.out, self.model, self.out / "tokenizer.json")
        return curve.last_valid if first < recipe.steps else self.evaluate()

    def batch(self, ids: np.ndarray, *seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [B * S] each: windows drawn by `seed`, the same in every run."""
        size = self.recipe.sequence_tokens
        random = np.random.default_rng(seed)
        starts = random.integers(0, len(ids) - size, self.recipe.batch_sequences)
        windows = torch.from_numpy(np.stack([ids[s : s + size + 1] for s in starts])).long()
        return windows[:, :-1].flatten(), windows[:, 1:].flatten()

    def loss(self, ids_T: Tensor, targets_T: Tensor, z_loss: bool = True) -> Tensor:
        length = self.recipe.sequence_tokens
        unique_U, inverse_T = ids_T.unique(return_inverse=True)
        positions_T = torch.arange(length).repeat(len(ids_T) // length)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
            rows = self.model.rows(unique_U)  # [N, U, D]
            if len(rows):
                # an embedding lookup per layer: its backward adds up gradients of equal tokens
                rows = torch.stack([F.embedding(inverse_T, row_UD) for row_UD in rows])
            logits_TV = self.model(ids_T, positions_T, NoCache(length), rows).float()
        loss = F.cross_entropy(logits_TV, targets_T)
        if z_loss:
            loss = loss + self.recipe.z_loss * logits_TV.logsumexp(-1).square().mean()
        return loss

    @torch.no_grad()
    def evaluate(self, batches: int = 8) -> float:
        """Mean cross-entropy in nats per token over fixed held-out windows."""
        windows = (self.batch(self.valid_ids, 0, 1, index) for index in range(batches))
        return float(np.mean([self.loss(*window, z_loss=False).item() for window in windows]))

    def fingerprint(self) -> dict[str, str]:
        tokens = f"{len(self.train_ids)} {xxhash.xxh3_128_hexdigest(self.train_ids.tobytes())}"
        return {"recipe": repr(self.recipe), "seed": str(self.seed), "train_tokens": tokens}

    def save(self, step: int) -> None:
        """Weights and optimiser moments as safetensors: a kill leaves the old file or the new."""
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
        """Load the saved state if there is one; returns the number of steps already done."""
        file = self.out / STATE
        if not file.exists():
            return 0
        try:
            opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise Corrupt(f"{file} can't be read: {error}; remove it to begin anew") from None
        with opened as saved:
            metadata, expected = saved.metadata(), self.fingerprint()
            step = int(metadata["step"])
            if changed := sorted(k for k, v in expected.items() if metadata.get(k) != v):
                raise Mismatch(
                    f"{self.out} holds another run, which differs in {', '.join(changed)}: "
                    "choose another --out, or remove the folder to begin anew"
                )
            for name, p in self.model.named_parameters():
                p.copy_(saved.get_tensor(f"weight.{name}"))
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": saved.get_tensor(f"mean.{name}"),
                    "exp_avg_sq": saved.get_tensor(f"square.{name}"),
                }
        return step


def initialise(model: Transformer) -> None:
    """Normal(0.02); projections into the residual stream smaller by sqrt(2 N), as in GPT-2.

    The paper is silent.
    """
    small = 0.02 / math.sqrt(2 * model.config.num_hidden_layers)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = any(part in name for part in ("o_proj", "down_proj", ".maps."))
            nn.init.normal_(p, std=small if residual else 0.02)


def adamw(model: Transformer, recipe: Recipe) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == dim], "weight_decay": decay}
        for dim, decay in ((2, recipe.weight_decay), (1, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=recipe.betas, fused=True)


def rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine from the peak to the final rate."""
    peak, final, warmup = recipe.peak_rate, recipe.final_rate, recipe.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss` through torch.compile, or as it is where no compiler is at hand."""
    chosen = torch.compile(loss, dynamic=True)

    def call(*args: Tensor) -> Tensor:
        nonlocal chosen
        try:
            return chosen(*args)
        except Exception as error:
            if chosen is loss:
                raise
            tqdm.write(f"no torch.compile here ({type(error).__name__}): training uncompiled")
            chosen = loss
            return loss(*args)

    return call


class Curve:
    """loss.csv and loss.png of a run. A resumed run drops the rows past its first step."""

    def __init__(self, out: Path, first: int) -> None:
        self.file = out / "loss.csv"
        self.rows: list[tuple[int, int, float, float | None]] = []  # the last: held out
        if first and self.file.exists():
            with self.file.open() as file:
                for step, tokens, loss, valid in list(csv.reader(file))[1:]:
                    if int(step) <= first:
                        self.add(
                            int(step), int(tokens), float(loss), float(valid) if valid else None
                        )

    @property
    def last_valid(self) -> float:
        return next((valid for *_, valid in reversed(self.rows) if valid is not None), math.nan)

    def add(self, step: int, tokens: int, loss: float, valid: float | None) -> None:
        self.rows.append((step, tokens, round(loss, 5), valid and round(valid, 5)))

    def write(self) -> None:
        partial = self.file.with_suffix(".partial")
        with partial.open("w", newline="") as file:
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
        _, tokens, losses, _ = zip(*self.rows, strict=True)
        axes.plot(tokens, losses, lw=0.6, alpha=0.6, label="training")
        evals = [(tokens, valid) for _, tokens, _, valid in self.rows if valid is not None]
        axes.plot(*zip(*evals, strict=True), marker="o", ms=3, label="held out")
        axes.set(xlabel="tokens", ylabel="cross-entropy, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.file.with_suffix(".png"), dpi=120)
        plt.close(figure)
