"""Computes rows with MemoryLLM checkpoints, including Flex and One Wide."""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tolhouse.errors import InvalidArgumentError
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.transformer import Transformer
from tolhouse.sources.batches import in_batches


class MemoryLLM:
    """Computes rows [T, blocks, width]. Raises InvalidArgumentError for a model without rows.

    The default blocks are `ffn.0`, `ffn.1` and so on, one for each layer. Block `x0` is the
    embedding.
    """

    def __init__(
        self, checkpoint: Checkpoint, blocks: Iterable[str] = (), model: Transformer | None = None
    ) -> None:
        config = checkpoint.config
        if not config.num_rows:
            lack = "it has no token memory, no context-free FFNs to make rows of"
            raise InvalidArgumentError(
                f"checkpoint {checkpoint.name} is of kind {config.kind}: {lack}"
            )
        if config.flex_layers:
            lack = "its rows come from no FFN-M; they are in the table that `tolhouse convert` made"
            raise InvalidArgumentError(f"checkpoint {checkpoint.name} is converted: {lack}")
        self.checkpoint, self.name = checkpoint, checkpoint.name
        self.blocks = tuple(blocks) or tuple(f"ffn.{layer}" for layer in range(config.num_rows))
        self.width, self.vocab_size = config.hidden_size, config.vocab_size
        if model is not None:
            self.model = model

    @cached_property
    def model(self) -> Transformer:
        return self.checkpoint.model()

    @property
    def tokenizer_id(self) -> str:
        return self.checkpoint.tokenizer_id

    def rows_id(self) -> str:
        return self.checkpoint.rows_id()

    def model_id(self) -> str:
        return self.checkpoint.model_id()

    def rows(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Compute the float32 rows of `ids`, or of the whole vocabulary."""
        ids = np.arange(self.vocab_size) if ids is None else ids
        return np.concatenate([rows for _, rows in self.batches(ids)])

    def batches(self, ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows of `ids` in batches, each with its slice of `ids`."""
        return in_batches(ids, self._compute)

    def _compute(self, ids: np.ndarray) -> Tensor:
        x0 = self.model.x0(torch.from_numpy(ids))
        parts = [x0 if b == "x0" else self.model.ffn_m[int(b[4:])](x0) for b in self.blocks]
        return torch.stack(parts, dim=1)


def select_blocks(checkpoint: Checkpoint, embedding: str, absent: Iterable[int]) -> list[str]:
    """Return the blocks of a table: all layers except `absent`, and x0 first if included.

    `embedding` decides whether x0 is included. It is "yes", "no" or "auto", which stands for "yes"
    if the embedding is not tied to the head.
    """
    count, left_out = checkpoint.config.num_rows, set(absent)
    if bad := sorted(left_out - set(range(count))):
        there = f"rows are of layers 0 to {count - 1}"
        raise InvalidArgumentError(f"there is no layer {bad[0]} to leave out: {there}")
    if count and len(left_out) == count:
        raise InvalidArgumentError("all layers are left out: at least one must stay")
    x0 = embedding == "yes" or (embedding == "auto" and not checkpoint.config.tie_word_embeddings)
    return ["x0"] * x0 + [f"ffn.{layer}" for layer in range(count) if layer not in left_out]
