"""The forward pass of a step, from scheduled chunks and staged rows to hidden states and logits.

On a GPU a decode step replays two CUDA graphs, which are recorded once for each batch size. The
first graph ends where the first row is needed, so the device attends while rows arrive. On a CPU no
graph is recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tolhouse.engine.attention import AttentionMetadata, PagedKVCache, Places
from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.gpu import kernels
from tolhouse.engine.gpu.transfer import pinned, upload
from tolhouse.engine.row_providers import RowProvider
from tolhouse.engine.scheduler import ScheduledChunk, token_ids
from tolhouse.model.transformer import Transformer


@dataclass
class Launched:
    """A launched step that still lacks its rows."""

    ids: Tensor
    positions: Tensor
    view: AttentionMetadata
    first: Tensor | None = None  # [T, D]: the result of the first block before its row, if launched
    graph: "DecodeGraph | None" = None


class Runner:
    def __init__(self, model: Transformer, pages: PagedKVCache, rows: RowProvider) -> None:
        self.model, self.pages, self.rows, self.device = model, pages, rows, pages.device

    def launch(self, step: list[ScheduledChunk]) -> Launched:
        """Begin a step before its rows are available. A step that is not finished has no effect."""
        ids_T, positions_T = map(torch.from_numpy, tokens_of(step))
        return Launched(ids_T, positions_T, AttentionMetadata.of(self.pages, step))

    def finish(self, step: Launched, staged: StagedRows) -> Tensor:
        """Return the final hidden states [T, D] of the step.

        On a GPU the computation may still run.
        """
        rows = self.rows.decode(staged)
        return self.model.hidden(step.ids, step.positions, step.view, rows, step.first)

    def move(self, step: list[ScheduledChunk]) -> None:
        """Move the places that policies keep of segments that end in a step."""
        self.pages.move(step)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return the logits [T, V] of text tokens for hidden states [T, D]."""
        return self.model.lm_head(hidden_TD)[:, : self.model.config.text_vocab_size]


def tokens_of(step: list[ScheduledChunk]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and positions of the tokens of a step, int64 [T]."""
    positions_T = np.concatenate([np.arange(chunk.first, chunk.last) for chunk in step])
    return token_ids(step).astype(np.int64), positions_T


class GraphRunner(Runner):
    """A runner for a GPU, which replays CUDA graphs for decode steps.

    `pages` needs one block that the block manager does not allocate. Padding is written there.
    """

    def __init__(self, model: Transformer, pages: PagedKVCache, rows: RowProvider) -> None:
        super().__init__(model, pages, rows)
        self.graphs: dict[tuple[int, int], DecodeGraph] = {}
        # Graphs read rows in the row cache, which can have no slots.
        self.replays = rows.manifest is None or len(rows.records) > 0
        # All graphs share one memory pool, because no two run at once.
        self.pool: Any = None
        self.metadata = AttentionMetadata
        if self.device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        if kernels.available(self.device):
            from tolhouse.engine.gpu import tiled_attention  # needs Triton

            if tiled_attention.fits(pages):
                self.metadata = tiled_attention.TiledMetadata

    def launch(self, step: list[ScheduledChunk]) -> Launched:
        if self.replays and all(chunk.decodes for chunk in step):
            return self._replay(step)
        ids, positions = upload(tokens_of(step), self.device)
        launched = Launched(ids, positions, self.metadata.of(self.pages, step))
        if not self.rows.has_x0:  # otherwise the first block needs X0 from the rows
            launched.first = self.model.begin(ids, positions, launched.view)
        return launched

    def _replay(self, step: list[ScheduledChunk]) -> Launched:
        places = Places.of(step)
        sequences, blocks = places.tables_BC.shape
        size = 1 << (sequences - 1).bit_length(), 1 << (blocks - 1).bit_length()
        if size not in self.graphs:
            self.graphs[size] = DecodeGraph(self, *size)
        return self.graphs[size].launch(tokens_of(step), places)

    def finish(self, step: Launched, staged: StagedRows) -> Tensor:
        if step.graph and staged.records is self.rows.records and staged.scales is None:
            return step.graph.finish(staged)
        return super().finish(step, staged)


class DecodeGraph:
    """The graphs and the buffers of a step of up to B sequences with up to C blocks each."""

    def __init__(self, runner: GraphRunner, sequences: int, blocks: int) -> None:
        model, rows, pages, device = runner.model, runner.rows, runner.pages, runner.device
        self.metadata, self.pages, self.device = runner.metadata, pages, device
        self.spare, self.count = pages.keys.shape[1] - 1, 0
        # Ids, positions, blocks, offsets and spans, and then the tables. Padding is one token of
        # a sequence whose only block is the spare one.
        self.padding = np.full(sequences * (7 + blocks), self.spare, np.int64)
        self.padding[: 7 * sequences] = np.repeat([0, 0, self.spare, 0, 1, 0, 1], sequences)
        self.inputs = torch.from_numpy(self.padding).to(device, copy=True)
        self.inputs_7B, self.tables_BC = self._parts(self.inputs, sequences)
        self.index_B = torch.zeros(sequences, dtype=torch.int64, device=device)
        ids, positions, blocks_B, offsets_B, *_ = self.inputs_7B
        slots = blocks_B, offsets_B, self.tables_BC, self.inputs_7B[4:]

        def view() -> AttentionMetadata:  # a new one, because it keeps what it derives from spans
            return runner.metadata(pages, sequences, *slots)

        self.first_BD: Tensor | None = None
        if not rows.has_x0:

            def begin() -> Tensor:
                return model.begin(ids, positions, view())

            self._first, self.first_BD = record(begin, device, runner.pool)

        def rest() -> Tensor:
            decoded = rows.decode(StagedRows(rows.records, self.index_B, ids))
            return model.hidden(ids, positions, view(), decoded, self.first_BD)

        self._rest, self.hidden_BD = record(rest, device, runner.pool)

    def launch(self, tokens: tuple[np.ndarray, np.ndarray], places: Places) -> Launched:
        memory = pinned(self.inputs.numel(), self.device)
        memory.numpy()[:] = self.padding
        inputs_7B, tables_BC = self._parts(memory, self.inputs_7B.shape[1])
        self.count = count = places.decoding
        rows = *tokens, places.blocks_T, places.offsets_T, *places.spans_3B
        inputs_7B.numpy()[:, :count] = rows
        tables_BC.numpy()[:count, : places.tables_BC.shape[1]] = places.tables_BC
        self.inputs.copy_(memory, non_blocking=True)
        if self.first_BD is not None:
            self._first()
        ids, positions, blocks, offsets, *_ = self.inputs_7B[:, :count]
        slots = blocks, offsets, self.tables_BC[:count], self.inputs_7B[4:, :count]
        view = self.metadata(self.pages, count, *slots)
        return Launched(ids, positions, view, graph=self)

    @staticmethod
    def _parts(inputs: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        inputs_7B, tables_BC = inputs.split([7 * sequences, len(inputs) - 7 * sequences])
        return inputs_7B.view(7, sequences), tables_BC.view(sequences, -1)

    def finish(self, staged: StagedRows) -> Tensor:
        self.index_B[: self.count] = staged.index
        self._rest()
        return self.hidden_BD[: self.count]


def record(
    work: Callable[[], Tensor], device: torch.device, pool: Any
) -> tuple[Callable[[], object], Tensor]:
    """Record `work`. Returns a function that replays it, and the tensor with its result."""
    if device.type == "cpu":
        out = work()
        return lambda: out.copy_(work()), out
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries initialise in their first calls, which can't be recorded
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Another thread may allocate memory meanwhile, for another version of the table.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = work()
    return graph.replay, out
