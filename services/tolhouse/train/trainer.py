"""The training loop: deterministic for a seed, resumable after a kill, with its curve as CSV and PNG.

FFN-M reads token ids alone, so each distinct token of a batch goes through it once and its rows are handed to every
place where it stands: with 4,096 tokens a step, about a third of the work. The rows are those of `model.rows`.
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
    """One run of `recipe` over token ids, in folder `out`, which also keeps what a resumed run needs."""

    recipe: Recipe
    train_ids: np.ndarray
    valid_ids: np.ndarray
    out: Path
    seed: int = 0
    compile: bool = False
    save_every_seconds: float = 60.0

    def run(self) -> float:
        """Train to the last step from wherever the folder's saved state stands; returns the held-out loss."""
        torch.manual_seed(self.seed)
        self.model = Transformer(self.recipe.config)
        initialise(self.model)
        self.optimizer = adamw(self.model, self.recipe)
        first = self.resume()
        loss_of = compiled(self.loss) if self.compile else self.loss
        curve, saved = Curve(self.out, first), time.monotonic()
        with tqdm(
            total=self.recipe.steps * self.recipe.step_tokens,
            initial=first * self.recipe.step_tokens,
            unit="tok",
            unit_scale=True,
            desc="train",
            dynamic_ncols=True,
        ) as bar:
            for step in range(first, self.recipe.steps):
                for group in self.optimizer.param_groups:
                    group["lr"] = rate(self.recipe, step)
                loss = loss_of(*self.batch(self.train_ids, self.seed, step))
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                done = step + 1
                valid = (
                    self.evaluate()
                    if done % self.recipe.eval_every_steps == 0 or done == self.recipe.steps
                    else None
                )
                curve.add(done, done * self.recipe.step_tokens, loss.item(), valid)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update(self.recipe.step_tokens)
                if valid is not None or time.monotonic() - saved > self.save_every_seconds:
                    curve.flush()
                    self.save(done)
                    saved = time.monotonic()
        curve.plot()
        save_checkpoint(self.out, self.model, self.out / "tokenizer.json")
        return curve.last_valid if first < self.recipe.steps else self.evaluate()

    def batch(self, ids: np.ndarray, *seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [B * S] each: windows drawn by `seed`, so that step n is the same in every run."""
        recipe = self.recipe
        starts = np.random.default_rng(seed).integers(
            0, len(ids) - recipe.sequence_tokens, recipe.batch_sequences
        )
        windows = torch.from_numpy(
            np.stack([ids[s : s + recipe.sequence_tokens + 1] for s in starts])
        ).long()
        return windows[:, :-1].flatten(), windows[:, 1:].flatten()

    def loss(self, ids_T: Tensor, targets_T: Tensor, z_loss: bool = True) -> Tensor:
        unique_U, inverse_T = ids_T.unique(return_inverse=True)
        return self.loss_of_rows(ids_T, targets_T, unique_U, inverse_T, z_loss)

    def loss_of_rows(
        self, ids_T: Tensor, targets_T: Tensor, unique_U: Tensor, inverse_T: Tensor, z_loss: bool
    ) -> Tensor:
        length = self.recipe.sequence_tokens
        positions_T = torch.arange(length).repeat(len(ids_T) // length)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.autocast):
            rows_NUD = self.model.rows(unique_U)
            # an embedding lookup per layer: its backward adds up the gradients of equal tokens
            rows_NTD = (
                torch.stack([F.embedding(inverse_T, row_UD) for row_UD in rows_NUD])
                if len(rows_NUD)
                else rows_NUD
            )
            logits_TV = self.model(ids_T, positions_T, NoCache(length), rows_NTD).float()
        loss = F.cross_entropy(logits_TV, targets_T)
        return (
            loss + self.recipe.z_loss * logits_TV.logsumexp(-1).square().mean() if z_loss else loss
        )

    @torch.no_grad()
    def evaluate(self, batches: int = 8) -> float:
        """Mean cross-entropy in nats per token over fixed held-out windows."""
        losses = [
            self.loss(*self.batch(self.valid_ids, 0, 1, index), z_loss=False).item()
            for index in range(batches)
        ]
        return float(np.mean(losses))

    def fingerprint(self) -> dict[str, str]:
        return {
            "recipe": repr(self.recipe),
            "seed": str(self.seed),
            "train_tokens": f"{len(self.train_ids)} {xxhash.xxh3_128_hexdigest(self.train_ids.tobytes())}",
        }

    def save(self, step: int) -> None:
        """Weights and optimiser moments as safetensors, replaced at once, so that a kill leaves the old or the new."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            state = self.optimizer.state[p]
            tensors |= {f"mean.{name}": state["exp_avg"], f"square.{name}": state["exp_avg_sq"]}
        partial = self.out / f"{STATE}.partial"
        save_file(tensors, partial, metadata={**self.fingerprint(), "step": str(step)})
        partial.replace(self.out / STATE)

    def resume(self) -> int:
        """Load the saved state if there is one; returns the number of steps already done."""
        file = self.out / STATE
        if not file.exists():
            return 0
        try:
            opened = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise Corrupt(
                f"{file} can't be read: {error}; remove it, or the folder, to begin anew"
            ) from None
        with opened as saved:
            metadata = saved.metadata()
            step = int(metadata.pop("step"))
            if metadata != self.fingerprint():
                changed = sorted(k for k, v in self.fingerprint().items() if metadata.get(k) != v)
                raise Mismatch(
                    f"{self.out} holds another run, which differs in {', '.join(changed)}: "
                    "choose another --out, or remove the folder to begin anew"
                )
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(saved.get_tensor(f"weight.{name}"))
                    self.optimizer.state[p] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": saved.get_tensor(f"mean.{name}"),
                        "exp_avg_sq": saved.get_tensor(f"square.{name}"),
                    }
        return step


def initialise(model: Transformer) -> None:
    """Normal(0.02); projections back into the residual stream smaller by sqrt(2 N), as in GPT-2. The paper is silent."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = "o_proj" in name or "down_proj" in name or ".maps." in name
            nn.init.normal_(
                p, std=0.02 / math.sqrt(2 * model.config.num_hidden_layers) if residual else 0.02
            )


def adamw(model: Transformer, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=recipe.betas, fused=True)


def rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine from the peak to the final rate."""
    if step < recipe.warmup_steps:
        return recipe.peak_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return (
        recipe.final_rate
        + (recipe.peak_rate - recipe.final_rate) * (1 + math.cos(math.pi * progress)) / 2
    )


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss` through torch.compile, or as it is where no compiler is at hand."""
    fast = torch.compile(loss, dynamic=True)
    chosen = fast

    def call(*args: Tensor) -> Tensor:
        nonlocal chosen
        try:
            return chosen(*args)
        except Exception as error:
            if chosen is loss:
                raise
            tqdm.write(
                f"torch.compile is not available here ({type(error).__name__}); training runs uncompiled"
            )
            chosen = loss
            return loss(*args)

    return call


class Curve:
    """loss.csv and loss.png of a run. A resumed run drops the rows past its first step and goes on."""

    def __init__(self, out: Path, first: int) -> None:
        self.file, self.picture = out / "loss.csv", out / "loss.png"
        self.rows: list[tuple[int, int, float, float | None]] = []
        if first and self.file.exists():
            with self.file.open() as file:
                for step, tokens, loss, valid in list(csv.reader(file))[1:]:
                    if int(step) <= first:
                        self.rows.append(
                            (int(step), int(tokens), float(loss), float(valid) if valid else None)
                        )

    @property
    def last_valid(self) -> float:
        return next((valid for *_, valid in reversed(self.rows) if valid is not None), math.nan)

    def add(self, step: int, tokens: int, loss: float, valid: float | None) -> None:
        self.rows.append((step, tokens, round(loss, 5), None if valid is None else round(valid, 5)))

    def flush(self) -> None:
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

        self.flush()
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        axes.plot(
            [r[1] for r in self.rows],
            [r[2] for r in self.rows],
            lw=0.6,
            alpha=0.6,
            label="training",
        )
        evals = [(r[1], r[3]) for r in self.rows if r[3] is not None]
        axes.plot(*zip(*evals, strict=True), marker="o", ms=3, label="held out")
        axes.set(xlabel="tokens", ylabel="cross-entropy, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.picture, dpi=120)
        plt.close(figure)


def card(
    recipe: Recipe,
    command: str,
    corpus: str,
    train_tokens: int,
    loss: float,
    parameters: tuple[int, int],
) -> str:
    """A model card in Markdown."""
    c = recipe.config
    beta = f", beta {c.beta}, FFN-C {c.ffn_c}" if c.kind == "flex" else ""
    total, active = parameters
    seen = recipe.steps * recipe.step_tokens
    return f"""# {c.kind} model

| | |
|---|---|
| kind | {c.kind}{beta} |
| shape | {c.num_hidden_layers} layers, hidden size {c.hidden_size}, {c.num_attention_heads} heads, K = {c.intermediate_size}, vocabulary {c.vocab_size}, context {c.max_position_embeddings} |
| parameters | {total:,} without embeddings, {active:,} of them active in a worker; embedding {c.vocab_size * c.hidden_size:,}, tied |
| data | {corpus}, {train_tokens:,} tokens; about one piece in forty of its 20,000-character pieces held out |
| trained on | {seen:,} tokens ({seen / train_tokens:.1f} passes), {recipe.steps} steps of {recipe.step_tokens:,} |
| held-out loss | {loss:.4f} nats per token, perplexity {math.exp(loss):.2f} |
| weights | bfloat16, safetensors |
| command | `{command}` |

`loss.csv` and `loss.png` are the run's curve. The model knows the manner of its data and nothing else:
it is here to show and to test the serving system.
"""
