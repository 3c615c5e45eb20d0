"""Computes rows of MoLE checkpoints: the outputs of all experts of all layers for a token.

Expert e of layer l reads RMSNorm_l of the token's embedding. It has two matrices with a GELU
between them. Checkpoints after re-parameterization store the outputs in `model.moe_table.weight`
[V, L * E * D], of which single rows are read. Others store the experts, which compute the rows.
Block `expert.L.E` is the output of expert E of layer L.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tolhouse.errors import InvalidArgumentError
from tolhouse.files import read_json
from tolhouse.model.checkpoint import CONFIG, EMBEDDING, checkpoint_name
from tolhouse.model.tokenizer import TOKENIZER, tokenizer_id
from tolhouse.model.weights import Weights
from tolhouse.sources.batches import in_batches

TABLE = "model.moe_table.weight"
_MAX_EXPERTS = 65_536  # in all layers
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "intermediate_size")


class Mole:
    """Rows [T, blocks, width] of a MoLE checkpoint.

    The default blocks are all experts, by layer. Raises NotFoundError if a file is missing, and
    InvalidArgumentError if config and weights do not fit.
    """

    def __init__(self, path: Path, blocks: Iterable[str] = ()) -> None:
        config: dict[str, Any] = read_json(path / CONFIG)
        sizes = [size for name in _SIZES if type(size := config.get(name)) is int and size > 0]
        if len(sizes) < len(_SIZES):
            raise InvalidArgumentError(f"{path / CONFIG}: {', '.join(_SIZES)} must be positive")
        eps = config.get("rms_norm_eps", 1e-6)
        if not (isinstance(eps, float | int) and eps >= 0):
            raise InvalidArgumentError(f"{path / CONFIG}: rms_norm_eps must be a number")
        self.vocab_size, self.width, layers, self._experts, inner = sizes
        if layers * self._experts > _MAX_EXPERTS:
            message = (
                f"{layers} layers of {self._experts} experts; allowed are {_MAX_EXPERTS} in all"
            )
            raise InvalidArgumentError(f"{path / CONFIG}: {message}")
        self._eps, self._config = float(eps), config
        self.name, self.path, self._weights = checkpoint_name(path), path, Weights(path)
        every = [f"expert.{n}.{e}" for n in range(layers) for e in range(self._experts)]
        self.blocks = tuple(blocks) or tuple(every)
        if unknown := sorted(set(self.blocks) - set(every)):
            raise InvalidArgumentError(
                f"{self.name} has no block {unknown[0]}; it has {every[0]} to {every[-1]}"
            )
        vocabulary, width = self.vocab_size, self.width
        self._is_stored = TABLE in self._weights.tensors
        shapes: dict[str, tuple[int, ...]] = {TABLE: (vocabulary, len(every) * width)}
        if not self._is_stored:
            shapes = {EMBEDDING: (vocabulary, width)}
            for block in self.blocks:
                norm, up, down = _names(block)
                shapes |= {norm: (width,), up: (inner, width), down: (width, inner)}
        self._rows_tensors = sorted(shapes)
        for name, shape in shapes.items():
            self._weights.expect(name, shape)
        self._places = [every.index(block) for block in self.blocks]
        self._tensor = cache(lambda name: self._weights.read(name).float())

    @property
    def tokenizer_id(self) -> str:
        file = self.path / TOKENIZER
        return tokenizer_id(file) if file.is_file() else ""

    def rows_id(self) -> str:
        """Return a hash of the stored table, or of the embedding, the norms and the experts."""
        digests = [f"{name} {self._weights.tensor_digest(name)}" for name in self._rows_tensors]
        return hashlib.sha256("\n".join((f"mole {self._eps}", *digests)).encode()).hexdigest()

    def model_id(self) -> str:
        """Return a hash of the config and all weights."""
        config = json.dumps(self._config, sort_keys=True)
        return hashlib.sha256(f"{config}\n{self._weights.digest()}".encode()).hexdigest()

    def rows(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Return the float32 rows of `ids`, or of the whole vocabulary."""
        ids = np.arange(self.vocab_size) if ids is None else ids
        return np.concatenate([rows for _, rows in self.batches(ids)])

    def batches(self, ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows of `ids` in batches, each with its slice of `ids`."""
        return in_batches(ids, self._stored if self._is_stored else self._computed)

    def _stored(self, ids: np.ndarray) -> Tensor:
        rows = self._weights.read_rows(TABLE, ids).float()
        return rows.view(len(ids), -1, self.width)[:, self._places]

    def _computed(self, ids: np.ndarray) -> Tensor:
        x_TD = self._weights.read_rows(EMBEDDING, ids).float()
        x_TD = x_TD * torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True) + self._eps)
        parts = []
        for block in self.blocks:
            norm_D, up_KD, down_DK = map(self._tensor, _names(block))
            parts.append(F.linear(F.gelu(F.linear(norm_D * x_TD, up_KD)), down_DK))
        return torch.stack(parts, dim=1)


def _names(block: str) -> tuple[str, str, str]:
    """Return the tensors that compute a block: the norm, and the two matrices of the expert."""
    _, layer, expert = block.split(".")
    prefix = f"model.layers.{layer}."
    matrices = (f"{prefix}experts.{expert}.{name}_proj.weight" for name in ("up", "down"))
    return f"{prefix}expert_layernorm.weight", *matrices  # type: ignore[return-value] # three names
