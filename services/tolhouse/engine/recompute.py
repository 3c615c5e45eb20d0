"""Rows that the worker computes itself: the records of the table, byte for byte, from weights that stay in the checkpoint's file.

The file is mapped: nothing of FFN-M is read before a row is computed, and the kernel may drop again what was. A layer's
weights are in float32 while it runs, as they were for the builder, and only then.
"""

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tolhouse.engine.cpu.packed import Embedding
from tolhouse.errors import Mismatch
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.rows import batches
from tolhouse.table.manifest import Manifest


class Widened(nn.Module):
    """A module whose weights stay as stored, and are float32 while it runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(
            self.module, {name: p.float() for name, p in self.module.named_parameters()}, (x,)
        )


class Recompute:
    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        if manifest.parent:
            raise Mismatch(
                f"--fallback recompute can't compute the changed rows of overlay {manifest.ref}: serve it without"
            )
        if manifest.ranks:
            raise Mismatch(
                f"--fallback recompute can't compute the coefficients of low-rank table {manifest.ref} to the last bit: serve it without"
            )
        self.manifest = manifest
        self.model = checkpoint.model(embedding=False, dtype=None)
        self.model.ffn_m = nn.ModuleList(Widened(ffn) for ffn in self.model.ffn_m)
        self.model.embed_tokens = cast(
            "nn.Embedding", Embedding(checkpoint.embedding(), torch.float32)
        )

    def records(self, ids: np.ndarray) -> np.ndarray:
        """Records uint8 [T, record_bytes] of `ids` [T], at least one."""
        return np.concatenate(
            [
                self.manifest.encode(ids[part], rows)
                for part, rows in batches(
                    self.model, ids, self.manifest.has_x0, self.manifest.layers
                )
            ]
        )
