"""Rows computed in the worker, from weights that stay in the checkpoint's file.

The file is mapped: FFN-M is read only when a row is computed, and the kernel may drop its pages
again. A layer's weights are float32 while it runs, as they were for the builder, and only then.
"""

import threading
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tolhouse.engine.cpu.packed import Embedding
from tolhouse.errors import Mismatch
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.sources.memoryllm import MemoryLLM
from tolhouse.table.manifest import Manifest


class Widened(nn.Module):
    """A module whose weights stay as stored, and are float32 while it runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        wide = {name: p.float() for name, p in self.module.named_parameters()}
        return functional_call(self.module, wide, (x,))


class RecomputedRows:
    """Records of the table, byte for byte the builder's."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        for refused, what in (
            (manifest.parent, "the changed rows of overlay"),
            (manifest.ranks, "the coefficients of low-rank table"),
        ):
            if refused:
                message = f"--fallback recompute can't compute {what} {manifest.ref}"
                raise Mismatch(f"{message}: serve it without")
        self.rows = 0
        self._lock = threading.Lock()  # a prefetch may run beside a step, over the same modules
        self.manifest = manifest
        self.model = checkpoint.model(embedding=False, dtype=None)
        self.model.ffn_m = nn.ModuleList(Widened(ffn) for ffn in self.model.ffn_m)
        embedding = Embedding(checkpoint.embedding(), torch.float32)
        self.model.embed_tokens = cast("nn.Embedding", embedding)
        self.source = MemoryLLM(checkpoint, manifest.blocks, self.model)

    def records(self, ids: np.ndarray) -> np.ndarray:
        """Records uint8 [T, record_bytes] of `ids` [T], at least one."""
        parts = self.source.batches(ids)
        return np.concatenate([self.manifest.encode(ids[part], rows) for part, rows in parts])

    def fetch(self, ids: np.ndarray, out: np.ndarray, slots: np.ndarray) -> None:
        with self._lock:
            out[slots] = self.records(ids)
            self.rows += len(ids)

    def counts(self) -> dict[str, float]:
        return {"recomputed": self.rows}
