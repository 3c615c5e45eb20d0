"""Decode steps on a GPU as CUDA graphs: recorded once for each size, so that a step is two launches
in place of a thousand.

The first graph ends where the first row is needed, so that the device attends while rows are on
their way; the second decodes the rows from the slab and does the rest. Steps with prompts run
uncaptured. On a CPU nothing is recorded: the same code runs each time, which is how it is tested
there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tolhouse.engine.attention import AttentionMetadata, PagedKVCache
from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.row_providers import RowProvider
from tolhouse.engine.runner import Launched, Runner
from tolhouse.engine.scheduler import ScheduledChunk
from tolhouse.model.transformer import Transformer


@dataclass
class GraphLaunched(Launched):
    """A step whose first block, up to its row, is launched too."""

    first: Tensor | None = None
    graph: "DecodeGraph | None" = None


class GraphRunner(Runner):
    """Needs one block more in `pages` than are allocated, where padding is written."""

    def __init__(self, model: Transformer, pages: PagedKVCache, rows: RowProvider) -> None:
        super().__init__(model, pages, rows)
        # where rows carry X0, nothing can begin without them
        self.carries_x0 = bool(rows.manifest and rows.manifest.has_x0)
        self.graphs: dict[tuple[int, int], DecodeGraph] = {}
        # one pool for all graphs: no two run at once
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def launch(self, step: list[ScheduledChunk]) -> GraphLaunched:
        plain = super().launch(step)
        launched = GraphLaunched(plain.ids, plain.positions, plain.view)
        if plain.view.chunks:
            if not self.carries_x0:
                launched.first = self.model.begin(plain.ids, plain.positions, plain.view)
            return launched
        sequences, blocks = plain.view.tables_BC.shape
        size = 1 << (sequences - 1).bit_length(), 1 << (blocks - 1).bit_length()
        if size not in self.graphs:
            self.graphs[size] = DecodeGraph(self, *size)
        launched.graph = self.graphs[size]
        launched.graph.launch(plain)
        return launched

    def finish(self, step: Launched, staged: StagedRows) -> Tensor:
        assert isinstance(step, GraphLaunched)
        if step.graph and staged.records is self.rows.records and staged.scales is None:
            return step.graph.finish(staged)
        rows = self.rows.decode(staged)
        return self.model.hidden(step.ids, step.positions, step.view, rows, step.first)


class DecodeGraph:
    """A step of up to B sequences with up to C blocks each, in buffers of its own."""

    def __init__(self, runner: GraphRunner, sequences: int, blocks: int) -> None:
        model, rows, pages, device = runner.model, runner.rows, runner.pages, runner.device
        self.spare, self.count = pages.keys.shape[1] - 1, 0

        def buffer(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        self.ids_B, self.positions_B, self.index_B = (buffer(sequences) for _ in range(3))
        self.finer_B = buffer(sequences, fill=-1)
        blocks_B, offsets_B = buffer(sequences, fill=self.spare), buffer(sequences)
        tables_BC = buffer(sequences, blocks, fill=self.spare)
        lengths_B = buffer(sequences, fill=1)
        self.view = AttentionMetadata(pages, sequences, blocks_B, offsets_B, tables_BC, lengths_B)

        def first() -> Tensor:
            return model.begin(self.ids_B, self.positions_B, self.view)

        def rest() -> Tensor:
            decoded = rows.decode(StagedRows(rows.records, self.index_B, self.finer_B))
            return model.hidden(self.ids_B, self.positions_B, self.view, decoded, self.first_BD)

        self.first_BD: Tensor | None = None
        if not runner.carries_x0:
            self._first, self.first_BD = record(first, device, runner.pool)
        self._rest, self.hidden_BD = record(rest, device, runner.pool)

    def launch(self, step: Launched) -> None:
        self.count = len(step.ids)
        source, own = step.view, self.view
        own.blocks_T.fill_(self.spare)
        own.tables_BC.fill_(self.spare)
        own.lengths_B.fill_(1)
        own.tables_BC[: self.count, : source.tables_BC.shape[1]] = source.tables_BC
        for buffer, value in (
            (self.ids_B, step.ids),
            (self.positions_B, step.positions),
            (own.blocks_T, source.blocks_T),
            (own.offsets_T, source.offsets_T),
            (own.lengths_B, source.lengths_B),
        ):
            buffer[: self.count] = value
        if self.first_BD is not None:
            self._first()

    def finish(self, staged: StagedRows) -> Tensor:
        self.index_B[: self.count] = staged.index
        if staged.finer is not None:
            self.finer_B[: self.count] = staged.finer
        self._rest()
        return self.hidden_BD[: self.count]


def record(
    work: Callable[[], Tensor], device: torch.device, pool: Any
) -> tuple[Callable[[], object], Tensor]:
    """A function that repeats `work`, and the tensor that has its result each time."""
    if device.type == "cpu":
        out = work()
        return lambda: out.copy_(work()), out
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries initialise at their first calls, which can't be recorded
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = work()
    return graph.replay, out
