"""How well a model predicts text: loss, perplexity, and the loss by frequency of the token.

Text is read in windows of the model's context. Each window's last token is the first of the next
one: every token but the text's first is predicted once, from what is before it in its window.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tolhouse.errors import InvalidArgument
from tolhouse.model.transformer import NoCache, Transformer

_BATCH_TOKENS = 4096
DECILES = 10

RowsOf = Callable[[Tensor], Tensor]  # token ids [T] to rows [N, T, D]


@dataclass(frozen=True)
class Evaluation:
    """`losses` in nats of the tokens `targets`, both [T]."""

    losses: np.ndarray
    targets: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def deciles(self) -> list[dict[str, Any]]:
        """The loss by frequency: occurrences from the most frequent token down, in ten parts."""
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


@torch.inference_mode()
def evaluate(
    model: Transformer, ids: np.ndarray, rows: RowsOf | None = None, *, quiet: bool = True
) -> Evaluation:
    """The losses of at least two token ids [T], with `rows` in place of the model's own."""
    if len(ids) < 2:
        raise InvalidArgument(f"the text has {len(ids)} tokens; at least 2 are needed")
    rows, ids_T = rows or model.rows, torch.from_numpy(ids.astype(np.int64))
    length = min(model.config.max_position_embeddings, len(ids) - 1)
    end = (len(ids) - 1) // length * length
    windows = ids_T[: end + 1].unfold(0, length + 1, length)
    batches = list(windows.split(max(1, _BATCH_TOKENS // length)))
    if end + 1 < len(ids):
        batches.append(ids_T[None, end:])
    losses = []
    bar = {"unit": "batch", "disable": quiet, "leave": False, "dynamic_ncols": True}
    for windows_BS in tqdm(batches, desc="evaluate", **bar):
        inputs_T, targets_T = windows_BS[:, :-1].flatten(), windows_BS[:, 1:].flatten()
        size = windows_BS.shape[1] - 1
        positions_T = torch.arange(size).repeat(len(windows_BS))
        logits_TV = model(inputs_T, positions_T, NoCache(size), rows(inputs_T))
        losses.append(F.cross_entropy(logits_TV.float(), targets_T, reduction="none"))
    return Evaluation(torch.cat(losses).double().numpy(), ids[1:].astype(np.int64))
