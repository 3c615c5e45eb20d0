"""The forward of a step on its device: from chunks of sequences and their staged rows to hidden states and logits."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tolhouse.engine.attention import AttentionMetadata, PagedKVCache
from tolhouse.engine.dequant import Staged
from tolhouse.engine.row_providers import NoRows, Rows
from tolhouse.engine.scheduler import Chunk
from tolhouse.model.transformer import Transformer


@dataclass
class Launched:
    """A step that has begun: all of it but its rows."""

    ids: Tensor
    positions: Tensor
    view: AttentionMetadata


class Runner:
    def __init__(self, model: Transformer, pages: PagedKVCache, rows: Rows | NoRows) -> None:
        self.model, self.pages, self.rows, self.device = model, pages, rows, pages.device

    def launch(self, step: list[Chunk]) -> Launched:
        """Begin a step before its rows are there. One that is begun and not finished has done nothing."""
        ids_T = torch.from_numpy(
            np.array([i for c in step for i in c.sequence.ids[c.first : c.last]], np.int64)
        )
        positions_T = torch.from_numpy(
            np.array([p for c in step for p in range(c.first, c.last)], np.int64)
        )
        return Launched(
            ids_T.to(self.device),
            positions_T.to(self.device),
            AttentionMetadata.of(self.pages, step),
        )

    def finish(self, begun: Launched, staged: Staged) -> Tensor:
        """Final hidden states [T, D] of the step's tokens. On a GPU it returns before they are there."""
        return self.model.hidden(begun.ids, begun.positions, begun.view, self.rows.decode(staged))

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V]."""
        return self.model.lm_head(hidden_TD)
