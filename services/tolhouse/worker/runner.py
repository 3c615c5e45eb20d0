"""The forward of a step on its device: from chunks of sequences and their staged rows to hidden states and logits."""

import numpy as np
import torch
from torch import Tensor

from tolhouse.model.transformer import Transformer
from tolhouse.worker.attention import Pages, StepView
from tolhouse.worker.rows import NoRows, Rows, Staged
from tolhouse.worker.scheduler import Chunk


class Runner:
    def __init__(self, model: Transformer, pages: Pages, rows: Rows | NoRows) -> None:
        self.model, self.pages, self.rows, self.device = model, pages, rows, pages.device

    def __call__(self, step: list[Chunk], staged: Staged) -> Tensor:
        """Final hidden states [T, D] of the step's tokens. On a GPU it returns before they are there."""
        ids_T = torch.from_numpy(np.concatenate([c.sequence.ids[c.first : c.last] for c in step]).astype(np.int64))
        positions_T = torch.from_numpy(np.concatenate([np.arange(c.first, c.last) for c in step]))
        view = StepView.of(self.pages, step)
        return self.model.hidden(ids_T.to(self.device), positions_T.to(self.device), view, self.rows.decode(staged))

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V]."""
        return self.model.lm_head(hidden_TD)
