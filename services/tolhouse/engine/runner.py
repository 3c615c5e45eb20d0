"""The forward of a step: from chunks of sequences and staged rows to hidden states and logits."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tolhouse.engine.attention import AttentionMetadata, PagedKVCache
from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.row_providers import RowProvider
from tolhouse.engine.scheduler import ScheduledChunk, token_ids
from tolhouse.model.transformer import Transformer


@dataclass
class Launched:
    """A launched step: all of it but its rows."""

    ids: Tensor
    positions: Tensor
    view: AttentionMetadata


class Runner:
    def __init__(self, model: Transformer, pages: PagedKVCache, rows: RowProvider) -> None:
        self.model, self.pages, self.rows, self.device = model, pages, rows, pages.device

    def launch(self, step: list[ScheduledChunk]) -> Launched:
        """Begin a step before its rows are there. One that is never finished has no effect."""
        ids_T = torch.from_numpy(token_ids(step).astype(np.int64))
        positions_T = torch.from_numpy(np.concatenate([np.arange(c.first, c.last) for c in step]))
        view = AttentionMetadata.of(self.pages, step)
        return Launched(ids_T.to(self.device), positions_T.to(self.device), view)

    def finish(self, step: Launched, staged: StagedRows) -> Tensor:
        """Final hidden states [T, D] of the step's tokens; on a GPU, not computed yet."""
        return self.model.hidden(step.ids, step.positions, step.view, self.rows.decode(staged))

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V]."""
        return self.model.lm_head(hidden_TD)
