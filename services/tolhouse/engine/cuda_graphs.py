"""Decode steps on a GPU as CUDA graphs: recorded once for each size, then a step is two launches, not a thousand.

The first graph ends where the first row is wanted, so that the device attends while rows are still on their way; the second
decodes the rows from the slab and does the rest. Steps that compute prompts run as they come. On a CPU nothing is recorded:
the same code runs each time, which is how it is tested there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tolhouse.engine.attention import AttentionMetadata, PagedKVCache
from tolhouse.engine.dequant import Staged
from tolhouse.engine.row_providers import NoRows, Rows
from tolhouse.engine.runner import Launched, Runner
from tolhouse.engine.scheduler import Chunk
from tolhouse.model.transformer import Transformer


@dataclass
class Ahead(Launched):
    """A step of which the first block's own part is on its way too."""

    first: Tensor | None = None
    graph: "DecodeGraph | None" = None


class GraphRunner(Runner):
    """Wants one block more in `pages` than are dealt out: what pads a step to its graph's size is written there."""

    def __init__(self, model: Transformer, pages: PagedKVCache, rows: Rows | NoRows) -> None:
        super().__init__(model, pages, rows)
        self.carried = bool(
            rows.manifest and rows.manifest.has_x0
        )  # then nothing can begin without rows
        self.graphs: dict[tuple[int, int], DecodeGraph] = {}
        self.pool = (
            torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        )  # one for all: no two run at once

    def launch(self, step: list[Chunk]) -> Ahead:
        begun = super().launch(step)
        ahead = Ahead(begun.ids, begun.positions, begun.view)
        if begun.view.chunks:
            if not self.carried:
                ahead.first = self.model.begin(begun.ids, begun.positions, begun.view)
            return ahead
        sequences, blocks = begun.view.tables_BC.shape
        size = 1 << (sequences - 1).bit_length(), 1 << (blocks - 1).bit_length()
        if size not in self.graphs:
            self.graphs[size] = DecodeGraph(self, *size)
        ahead.graph = self.graphs[size]
        ahead.graph.begin(begun)
        return ahead

    def finish(self, begun: Launched, staged: Staged) -> Tensor:
        assert isinstance(begun, Ahead)
        if begun.graph and staged.records is begun.graph.records and staged.scales is None:
            return begun.graph.finish(staged)
        return self.model.hidden(
            begun.ids, begun.positions, begun.view, self.rows.decode(staged), begun.first
        )


class DecodeGraph:
    """A step of up to B sequences with up to C blocks each, in buffers of its own."""

    def __init__(self, runner: GraphRunner, sequences: int, blocks: int) -> None:
        pages, device = runner.pages, runner.device
        spare = pages.keys.shape[1] - 1

        def buffer(*shape: int, filled: int = 0) -> Tensor:
            return torch.full(shape, filled, dtype=torch.int64, device=device)

        self.ids_B, self.positions_B, self.index_B = (
            buffer(sequences),
            buffer(sequences),
            buffer(sequences),
        )
        self.places_B = buffer(sequences, filled=-1)
        self.view = AttentionMetadata(
            pages,
            sequences,
            buffer(sequences, filled=spare),
            buffer(sequences),
            buffer(sequences, blocks, filled=spare),
            buffer(sequences, filled=1),
        )
        self.spare, self.count = spare, 0
        self.records = runner.rows.records
        model, rows = runner.model, runner.rows
        self.begun_BD: Tensor | None = None
        if not runner.carried:
            self._begin, self.begun_BD = recorded(
                lambda: model.begin(self.ids_B, self.positions_B, self.view), device, runner.pool
            )
        self._finish, self.hidden_BD = recorded(
            lambda: model.hidden(
                self.ids_B,
                self.positions_B,
                self.view,
                rows.decode(Staged(self.records, self.index_B, self.places_B)),
                self.begun_BD,
            ),
            device,
            runner.pool,
        )

    def begin(self, step: Launched) -> None:
        self.count = len(step.ids)
        theirs, mine = step.view, self.view
        mine.blocks_T.fill_(self.spare)
        mine.tables_BC.fill_(self.spare)
        mine.lengths_B.fill_(1)
        mine.tables_BC[: self.count, : theirs.tables_BC.shape[1]] = theirs.tables_BC
        for buffer, given in (
            (self.ids_B, step.ids),
            (self.positions_B, step.positions),
            (mine.blocks_T, theirs.blocks_T),
            (mine.offsets_T, theirs.offsets_T),
            (mine.lengths_B, theirs.lengths_B),
        ):
            buffer[: self.count] = given
        if self.begun_BD is not None:
            self._begin()

    def finish(self, staged: Staged) -> Tensor:
        self.index_B[: self.count] = staged.index
        if staged.places is not None:
            self.places_B[: self.count] = staged.places
        self._finish()
        return self.hidden_BD[: self.count]


def recorded(
    work: Callable[[], Tensor], device: torch.device, pool: Any
) -> tuple[Callable[[], object], Tensor]:
    """What repeats `work`, and where its result is then each time."""
    if device.type == "cpu":
        out = work()
        return lambda: out.copy_(work()), out
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries get ready when first called, which can't be recorded
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = work()
    return graph.replay, out
