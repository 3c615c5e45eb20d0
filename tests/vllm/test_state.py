"""Staging in vLLM's second model runner, whose graphs read fixed addresses. Needs no GPU."""

from contextlib import closing
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from tolhouse import Client
from tolhouse.engine.row_providers import RecomputedRows
from tolhouse.integrations.vllm.options import AdditionalConfig, parse
from tolhouse.integrations.vllm.staging import RowStage, open_rows
from tolhouse.integrations.vllm.state import RowsState
from tolhouse.model.checkpoint import open_checkpoint

from tests.vllm.engines import CPU, Case


def test_steps_and_captures_use_the_same_buffers(memory: Case) -> None:
    """A step writes the rows of its tokens and of padding to the buffers that a graph captured."""
    name = memory.checkpoint.name
    config = AdditionalConfig(parse({"tolhouse": {"rows": memory.rows}}), name, (), {})
    recompute = partial(RecomputedRows, open_checkpoint(memory.checkpoint))
    with closing(open_rows(config, recompute, 8, CPU, torch.float32)) as source:
        state = RowsState.__new__(RowsState)  # the rest of it needs a GPU
        state.model = SimpleNamespace(stage=RowStage(source, 8))
        state.supports_mm_inputs = False
        state.prompt_embeds_state = state.rope_state = None
        captured = state.prepare_dummy_inputs(4, 4)
        batch = SimpleNamespace(
            input_ids=torch.tensor([5, 17, 300, 0]),
            query_start_loc_np=np.array([0, 1, 3, 3, 3]),
            num_reqs=2,
        )
        inputs = state.prepare_inputs(batch, None)
        for key in ("rows", "failed"):
            assert captured[key].data_ptr() == inputs[key].data_ptr()
            assert captured[key].shape == inputs[key].shape
        with Client(memory.rows) as client:
            expected = client.fetch(name, [5, 17, 300, 0])
        assert np.array_equal(expected, captured["rows"].numpy())
        assert not captured["failed"].any()
