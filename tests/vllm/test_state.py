"""Staging in vLLM's second model runner, whose graphs read fixed addresses. Needs no GPU."""

from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tolhouse import Client
from tolhouse.engine.row_providers import RecomputedRows
from tolhouse.integrations.vllm.options import AdditionalConfig, parse
from tolhouse.integrations.vllm.staging import RowStage, open_rows
from tolhouse.integrations.vllm.state import RowsState
from tolhouse.model.checkpoint import open_checkpoint

from tests.vllm.engines import CPU, ON_GPU, Case, tiny_case


@pytest.mark.parametrize("row_memory", ["cache", "host"])
def test_rows_do_not_depend_on_the_default_device(row_memory: str, tmp_path: Path) -> None:
    """Rows are in memory of the host although vLLM makes another device the default."""
    case = tiny_case(tmp_path)
    name, options = case.checkpoint.name, {"rows": case.rows, "row_memory": row_memory}
    with Client(case.rows) as client:
        manifest, expected = client.describe(name), client.fetch(name, [5, 17])
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8),
        device_config=SimpleNamespace(device=CPU),
        model_config=SimpleNamespace(dtype=torch.float32),
        additional_config=AdditionalConfig(
            parse({"tolhouse": options}), name, tuple(manifest.blocks), {}
        ),
        use_v2_model_runner=True,
        speculative_config=None,
    )
    recompute = partial(RecomputedRows, open_checkpoint(case.checkpoint))
    with torch.device("meta"):
        stage = RowStage.of(config, recompute)
    rows, _ = stage.fill(torch.tensor([5, 17]), lambda: None)
    assert np.array_equal(expected, rows.numpy())


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("row_memory", ["host", "device"])
def test_staging_a_whole_table_does_not_wait(row_memory: str, tmp_path: Path) -> None:
    """No operation waits for the GPU, so that the host can prepare the next step meanwhile."""
    case, gpu = tiny_case(tmp_path), torch.device("cuda")
    options = {"rows": case.rows, "row_memory": row_memory}
    config = AdditionalConfig(parse({"tolhouse": options}), case.checkpoint.name, (), {})
    recompute = partial(RecomputedRows, open_checkpoint(case.checkpoint))
    stage = RowStage(open_rows(config, recompute, 8, gpu, torch.float32), 8)
    ids_T = torch.tensor([5, 17, -1, 1 << 20], device=gpu)
    stage.fill(ids_T, lambda: None)  # kernels are loaded in their first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows, _ = stage.fill(ids_T, lambda: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with Client(case.rows) as client:
        expected = client.fetch(case.checkpoint.name, [5, 17, 0, 0])
    assert np.array_equal(expected, rows.cpu().numpy())


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
