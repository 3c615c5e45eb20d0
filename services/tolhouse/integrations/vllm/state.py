"""Stages rows in vLLM's second model runner, which replays one graph for a whole step."""

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class RowsState(DefaultModelState):
    """Fills the buffers of the model's `stage` before the graph is replayed."""

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        starts = input_batch.query_start_loc_np[: input_batch.num_reqs + 1]
        rows, failed = self.model.stage.fill(input_batch.input_ids, lambda: starts)
        return {**inputs, "rows": rows, "failed": failed}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs, stage = super().prepare_dummy_inputs(num_reqs, num_tokens), self.model.stage
        # A graph that is captured with these buffers reads them in each replay.
        return {**inputs, "rows": stage.rows[:num_tokens], "failed": stage.failed[:num_tokens]}
