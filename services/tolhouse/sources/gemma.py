"""Computes rows of Gemma 3n and Gemma 4: their per-layer inputs, from the safetensors files alone.

The per-layer input of layer l depends on the token alone, as long as the embedding comes from a
token id. With D hidden units, P values a layer, and the tables E and T of `embed_tokens` and
`embed_tokens_per_layer`, the two kinds of rows are

    ple.l      (RMSNorm(W (E[id] sqrt(D)) / sqrt(D))_l + T[id]_l sqrt(P)) / sqrt(2)
    ple_raw.l  T[id]_l sqrt(P)

Finished rows, `ple`, replace the table and the projection W of the model. They are computed for
text only, because W reads the features of an image or of sound in place of E[id]. Raw rows replace
the table alone, and serve all inputs.

All operations are those of transformers, in the dtype of the weights and with its rounding. Raw
rows are therefore equal to the bit. In finished rows, the order of additions inside the product
with W may depend on the shape of a batch, as it does in transformers itself. One thread computes
batches of one size, so that builders and resumed builds compute equal bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolhouse.errors import InvalidArgumentError
from tolhouse.files import read_json
from tolhouse.model.checkpoint import CONFIG, checkpoint_name
from tolhouse.model.tokenizer import TOKENIZER, tokenizer_id
from tolhouse.model.weights import DTYPES, Weights
from tolhouse.sources.batches import in_batches

FINISHED, RAW = "ple", "ple_raw"  # block names, followed by the layer
_TABLE, _EMBEDDING = "embed_tokens_per_layer.weight", "embed_tokens.weight"
_PROJECTION, _NORM = "per_layer_model_projection.weight", "per_layer_projection_norm.weight"
_LARGEST = {  # of the fields of the config
    "vocab_size": 2**31,
    "vocab_size_per_layer_input": 2**31,
    "hidden_size": 2**17,
    "hidden_size_per_layer_input": 2**17,
    "num_hidden_layers": 2**10,
}


class Gemma:
    """Computes rows [T, L, P] of the checkpoint in folder `path`, which may lack a tokenizer.

    `blocks` are the finished or the raw rows of all layers in order. The default is finished rows.
    Raises InvalidArgumentError for a model without per-layer embeddings, and for other blocks.
    """

    def __init__(self, path: str | Path, blocks: Iterable[str] = ()) -> None:
        self.path, self.name = Path(path).resolve(), checkpoint_name(Path(path))
        self._config: dict[str, Any] = read_json(self.path / CONFIG)
        self._text = self._config.get("text_config") or self._config
        if not isinstance(self._text, dict):
            raise InvalidArgumentError(f"{self.path / CONFIG}: text_config must be a JSON object")
        self._has_old_scales = str(self._text.get("model_type")).startswith("gemma3n")
        size, inner, self._hidden, self.width, layers = map(self._size, _LARGEST)
        if not (self.width and inner):
            lack = "it has no per-layer embeddings, and so no rows"
            raise InvalidArgumentError(f"{self.path}: hidden_size_per_layer_input is 0: {lack}")
        self.vocab_size = vocabulary(self._text)
        self._inner_size = inner
        kinds = {kind: blocks_of(kind, layers) for kind in (FINISHED, RAW)}
        self.blocks = tuple(blocks) or kinds[FINISHED]
        if self.blocks not in kinds.values():
            allowed = f"{FINISHED}.0 to {FINISHED}.{layers - 1}, or the same of {RAW}"
            raise InvalidArgumentError(f"{self.path}: rows have the blocks {allowed}")
        self.is_finished = self.blocks == kinds[FINISHED]
        self.weights = Weights(self.path)
        packed = layers * self.width
        self._check(_TABLE, inner, packed)
        if self.is_finished:
            self._check(_EMBEDDING, size, self._hidden)
            self._check(_PROJECTION, packed, self._hidden)
            self._check(_NORM, self.width)

    @property
    def tokenizer_id(self) -> str:
        """The hash of tokenizer.json, or "" without this file."""
        file = self.path / TOKENIZER
        return tokenizer_id(file) if file.is_file() else ""

    def model_id(self) -> str:
        """Return a hash of the config and all weights, as 64 hex digits."""
        return hashlib.sha256(_canonical(self._config) + self.weights.digest().encode()).hexdigest()

    def rows_id(self) -> str:
        """Return a hash of the values that define the rows, as 64 hex digits."""
        about = self._has_old_scales, self.vocab_size, self._eps if self.is_finished else 0
        digest = hashlib.sha256(_canonical(about))
        for name in (_TABLE, _EMBEDDING, _PROJECTION, _NORM) if self.is_finished else (_TABLE,):
            digest.update(f"{name} {self.weights.tensor_digest(self._prefix + name)}\n".encode())
        return digest.hexdigest()

    def rows(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Compute the float32 rows of `ids`, or of the whole vocabulary."""
        ids = np.arange(self.vocab_size) if ids is None else ids
        out = np.empty((len(ids), len(self.blocks), self.width), np.float32)
        for part, rows in self.batches(ids):
            out[part] = rows
        return out

    def batches(self, ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows of `ids` in batches, each with its slice of `ids`."""
        return in_batches(ids, self._finished if self.is_finished else self._raw)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor of the text model in its stored dtype."""
        return self.weights.read(self._prefix + name)

    def _raw(self, ids: np.ndarray) -> Tensor:
        """Return T[id] sqrt(P), [T, L, P]."""
        ids = np.where(ids < self._inner_size, ids, 0)
        rows = self.weights.read_rows(self._prefix + _TABLE, ids)
        return (rows * _scale(self.width**0.5, rows.dtype)).view(len(ids), -1, self.width)

    def _finished(self, ids: np.ndarray) -> Tensor:
        """Return the complete per-layer input, [T, L, P]."""
        raw = self._raw(ids)
        embeddings = self.weights.read_rows(self._prefix + _EMBEDDING, ids)
        dtype = embeddings.dtype
        projection, norm = self._projection_and_norm
        x_TD = embeddings * _scale(self._hidden**0.5, dtype)
        by, half = self._hidden**-0.5, 2.0**-0.5
        # Gemma 3n rounds these factors to the dtype of the weights, and Gemma 4 does not.
        factors = (_scale(by, dtype), _scale(half, dtype)) if self._has_old_scales else (by, half)
        projected = ((x_TD @ projection.to(dtype).T) * factors[0]).view(raw.shape)
        wide = projected.float()
        wide = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + self._eps, -0.5)
        return ((wide * norm.float()).to(dtype) + raw) * factors[1]

    @cached_property
    def _projection_and_norm(self) -> tuple[Tensor, Tensor]:
        return self.tensor(_PROJECTION), self.tensor(_NORM)

    @property
    def _eps(self) -> float:
        eps = self._text.get("rms_norm_eps", 1e-6)
        if not (isinstance(eps, float | int) and eps >= 0):
            raise InvalidArgumentError(f"{self.path / CONFIG}: rms_norm_eps must be a number")
        return float(eps)

    @cached_property
    def _prefix(self) -> str:
        """The prefix of the text model's tensors, which differs among classes of transformers."""
        found = [name for name in self.weights.tensors if name.endswith(_TABLE)]
        if len(found) != 1:
            lack = f"its weights have {len(found)} tensors {_TABLE} instead of one"
            raise InvalidArgumentError(f"{self.path}: {lack}")
        return found[0].removesuffix(_TABLE)

    def _size(self, field: str) -> int:
        value, most = self._text.get(field), _LARGEST[field]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            need = f"{field} must be a whole number up to {most}, not {value!r:.40}"
            raise InvalidArgumentError(f"{self.path / CONFIG}: {need}")
        return value

    def _check(self, name: str, *shape: int) -> None:
        tensor = self.weights.tensors.get(self._prefix + name)
        if tensor is None:
            raise InvalidArgumentError(f"{self.path}: its weights lack {self._prefix}{name}")
        if tensor.shape != shape:
            wrong = f"{list(tensor.shape)}, but {CONFIG} asks for {list(shape)}"
            raise InvalidArgumentError(f"{self.path}: {self._prefix}{name} has shape {wrong}")
        if tensor.dtype not in DTYPES:
            allowed = f"{tensor.dtype}; allowed are {', '.join(DTYPES)}"
            raise InvalidArgumentError(f"{self.path}: {self._prefix}{name} is {allowed}")


def vocabulary(text_config: dict[str, Any]) -> int:
    """Return the number of tokens with rows, from the config of a text model.

    Gemma 3n gives tokens beyond its per-layer table the entry of token 0.
    """
    size, inner = text_config["vocab_size"], text_config["vocab_size_per_layer_input"]
    old = str(text_config.get("model_type")).startswith("gemma3n")
    return size if old else min(size, inner)


def blocks_of(kind: str, layers: int) -> tuple[str, ...]:
    """Return the blocks of a table of `kind`, FINISHED or RAW, in order."""
    return tuple(f"{kind}.{layer}" for layer in range(layers))


def _scale(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value).to(dtype)


def _canonical(data: object) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
