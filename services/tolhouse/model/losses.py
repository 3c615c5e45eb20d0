"""Computes losses of a model on text, and the divergence of its predictions with other rows.

The text is split into windows of the model's context. The last token of a window is the first token
of the next, so every token except the first is predicted once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tolhouse.errors import InvalidArgumentError
from tolhouse.model.transformer import NoCache, Transformer

_BATCH_TOKENS = 2048
DECILES = 10

RowsOf = Callable[[Tensor], Tensor]  # token ids [T] to rows [N, T, D]


@dataclass(frozen=True)
class Evaluation:
    """The `losses` [T] in nats for the tokens `targets` [T]."""

    losses: np.ndarray
    targets: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def deciles(self) -> list[dict[str, Any]]:
        """Return the mean loss of each tenth of the occurrences, ordered by token frequency."""
        counts = np.bincount(self.targets)
        order = np.argsort(-counts[self.targets], kind="stable")
        return [
            {
                "decile": number + 1,
                "distinct_tokens": len(np.unique(self.targets[part])),
                "least_count": int(counts[self.targets[part]].min()),
                "loss": round(float(self.losses[part].mean()), 5),
            }
            for number, part in enumerate(np.array_split(order, DECILES))
            if len(part)
        ]


@dataclass(frozen=True)
class Comparison(Evaluation):
    """An evaluation with inexact rows, and the difference of its predictions.

    `divergences` [T] are KL(exact || other) in nats. `agrees` [T] is 1 where the most likely token
    is equal, else 0. Both compare distributions and do not depend on the next token of the text. A
    loss depends on it, and may fall by chance.
    """

    divergences: np.ndarray
    agrees: np.ndarray

    @property
    def kl(self) -> float:
        return float(self.divergences.mean())

    @property
    def agreement(self) -> float:
        return float(self.agrees.mean())


@torch.inference_mode()
def evaluate(
    model: Transformer,
    ids: np.ndarray,
    rows: RowsOf | None = None,
    *,
    context: int = 0,
    quiet: bool = True,
) -> Evaluation:
    """Compute the losses on at least two token ids [T]. `rows` replaces `model.rows`.

    The text is split into windows of `context` tokens, by default of the context of the model.
    """
    losses = [
        F.cross_entropy(logits_of(rows or model.rows), targets_T, reduction="none")
        for targets_T, logits_of in _batches(model, ids, context, quiet)
    ]
    return Evaluation(_joined(losses), ids[1:].astype(np.int64))


@torch.inference_mode()
def compare(
    model: Transformer,
    ids: np.ndarray,
    exact: RowsOf,
    others: Sequence[RowsOf],
    *,
    context: int = 0,
    quiet: bool = True,
) -> list[Comparison]:
    """Compare each of `others` with the rows `exact`, in windows like `evaluate`.

    The exact logits are computed once.
    """
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in others]
    for targets_T, logits_of in _batches(model, ids, context, quiet):
        exact_TV = logits_of(exact).log_softmax(-1)
        for rows, parts in zip(others, found, strict=True):
            other_TV = logits_of(rows).log_softmax(-1)
            losses_T = F.nll_loss(other_TV, targets_T, reduction="none")
            kl_T = F.kl_div(other_TV, exact_TV, log_target=True, reduction="none").sum(-1)
            parts.append((losses_T, kl_T, other_TV.argmax(-1) == exact_TV.argmax(-1)))
    targets = ids[1:].astype(np.int64)
    columns = ([_joined(column) for column in zip(*parts, strict=True)] for parts in found)
    return [Comparison(losses, targets, kl, agrees) for losses, kl, agrees in columns]


def _batches(
    model: Transformer, ids: np.ndarray, context: int, quiet: bool
) -> Iterator[tuple[Tensor, Callable[[RowsOf], Tensor]]]:
    """Yield batches of windows: targets [T], and a function from rows to float32 logits [T, V]."""
    if len(ids) < 2:
        raise InvalidArgumentError(f"the text has {len(ids)} tokens; at least 2 are needed")
    ids_T = torch.from_numpy(ids.astype(np.int64)).to(model.norm.weight.device)
    longest = model.config.max_position_embeddings
    length = min(context or longest, longest, len(ids) - 1)
    end = (len(ids) - 1) // length * length
    windows = ids_T[: end + 1].unfold(0, length + 1, length)
    batches = list(windows.split(max(1, _BATCH_TOKENS // length)))
    if end + 1 < len(ids):
        batches.append(ids_T[None, end:])
    bar = {"unit": "batch", "disable": quiet or None, "leave": False, "dynamic_ncols": True}
    for windows_BS in tqdm(batches, desc="evaluate", **bar):
        inputs_T, size = windows_BS[:, :-1].flatten(), windows_BS.shape[1] - 1
        yield windows_BS[:, 1:].flatten(), partial(_logits, model, inputs_T, size)


def _logits(model: Transformer, inputs_T: Tensor, size: int, rows: RowsOf) -> Tensor:
    """Compute the float32 logits [T, V] of text tokens, for windows of `size` tokens."""
    positions_T = torch.arange(size, device=inputs_T.device).repeat(len(inputs_T) // size)
    logits_TV = model(inputs_T, positions_T, NoCache(size), rows(inputs_T))
    return logits_TV[:, : model.config.text_vocab_size].float()


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return torch.cat(tuple(parts)).double().cpu().numpy()
