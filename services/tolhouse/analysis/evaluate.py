"""How well a model predicts text: loss and perplexity, and the loss by how frequent the predicted token is.

Text is read in windows of the model's context, one after the other: each window's last token is the first of the next one, so that every
token but the text's first is predicted once, from what is before it in its window.
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
from tolhouse.model.kv import NoCache
from tolhouse.model.transformer import Transformer

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
        """The loss by frequency: tokens of the text from the most frequent down, cut into ten parts of as many occurrences each."""
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
    """The losses of token ids [T] after the first, with `rows` in place of the model's own; InvalidArgument for less than two ids."""
    if len(ids) < 2:
        raise InvalidArgument(
            f"the text has {len(ids)} tokens; at least 2 are needed, one to predict the other from"
        )
    length = min(model.config.max_position_embeddings, len(ids) - 1)
    rows = rows or model.rows
    whole = (len(ids) - 1) // length
    windows = torch.from_numpy(ids[: whole * length + 1].astype(np.int64)).unfold(
        0, length + 1, length
    )
    rest = torch.from_numpy(ids[whole * length :].astype(np.int64))[None]
    batches = [
        *windows.split(max(1, _BATCH_TOKENS // length)),
        *([rest] if rest.shape[1] > 1 else []),
    ]
    losses = []
    for some_BS in tqdm(
        batches, desc="evaluate", unit="batch", disable=quiet, leave=False, dynamic_ncols=True
    ):
        inputs_T, targets_T = some_BS[:, :-1].flatten(), some_BS[:, 1:].flatten()
        size = some_BS.shape[1] - 1
        logits_TV = model(
            inputs_T, torch.arange(size).repeat(len(some_BS)), NoCache(size), rows(inputs_T)
        )
        losses.append(F.cross_entropy(logits_TV.float(), targets_T, reduction="none"))
    return Evaluation(torch.cat(losses).double().numpy(), ids[1:].astype(np.int64))
