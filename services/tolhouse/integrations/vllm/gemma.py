"""Gemma 3n and Gemma 4 in vLLM, with rows from Tolhouse in place of their per-layer table.

The classes are those of vLLM. They allocate and load no table. Raw rows replace the table alone,
and finished rows replace the projection of token embeddings as well.

Shapes: T tokens of a step, L layers, P values of a layer, D hidden size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma3n import Gemma3nForCausalLM
from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM

from tolhouse.engine.row_providers import ComputedRows
from tolhouse.integrations.vllm.model import request_starts
from tolhouse.integrations.vllm.staging import RowStage, Starts
from tolhouse.sources.gemma import FINISHED, Gemma

_TABLE = ("embed_tokens_per_layer",)
_TABLE_AND_PROJECTION = (*_TABLE, "per_layer_model_projection", "per_layer_projection_norm")
# Methods of vLLM's modules that add the projection to the entries of the table.
_PROJECTING = {
    "Gemma4Model": "project_per_layer_inputs",
    "Gemma4SelfDecoderLayers": "project_per_layer_inputs",
    "Gemma3nSelfDecoder": "get_per_layer_inputs",
}


class PerLayerRows(RowStage):
    """Stages rows [T, L, P]. Ids of media have the row of token 0, as in Gemma 4."""

    media: Tensor | None = None  # ids

    def fill(self, ids_T: Tensor, starts: Starts) -> tuple[Tensor, Tensor]:
        if self.media is not None:
            ids_T = ids_T.masked_fill(torch.isin(ids_T, self.media), 0)
        return super().fill(ids_T, starts)


class WithRows(nn.Module):
    """The part that all classes share."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        additional, model = vllm_config.additional_config, vllm_config.model_config
        with _small_table(model.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        is_finished = additional.blocks[0].startswith(f"{FINISHED}.")
        self.replaced = _TABLE_AND_PROJECTION if is_finished else _TABLE
        for module in list(self.modules()):
            for name in self.replaced:
                if hasattr(module, name):
                    setattr(module, name, None)
            if is_finished and (method := _PROJECTING.get(_name(module))):
                setattr(module, method, _rows_as_they_are)
        recompute = partial(ComputedRows, Gemma(model.model, additional.blocks))
        self.stage = PerLayerRows.of(vllm_config, recompute)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights without those that rows replace."""
        left_out = tuple(f"{name}." for name in self.replaced)
        needed = (pair for pair in weights if not any(name in pair[0] for name in left_out))
        return super().load_weights(needed)  # type: ignore[misc]

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the class that stages rows in the second model runner."""
        from tolhouse.integrations.vllm.state import RowsState

        return RowsState


class _Text(WithRows):
    embed_input_ids: Callable[[Tensor], Tensor]  # of vLLM's class

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        rows: Tensor | None = None,
        failed: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Return the final hidden states [T, D].

        As `model.py` does, this stages rows in the first model runner. The compiled code of vLLM
        reads a table unless it is called with embeddings, so these are computed here.
        """
        if rows is None:
            rows, failed = self.stage.fill(input_ids, request_starts)
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_TD = super().forward(
            None,
            positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=inputs_embeds,
            per_layer_inputs=rows,
            **others,
        )
        return hidden_TD + failed


class TolhouseGemma4ForCausalLM(_Text, Gemma4ForCausalLM):
    pass


class TolhouseGemma3nForCausalLM(_Text, Gemma3nForCausalLM):
    pass


@contextmanager
def _small_table(config: Any) -> Iterator[None]:
    """Let vLLM allocate a table for one token, because it allocates all weights before loading."""
    text = getattr(config, "text_config", config)
    size, text.vocab_size_per_layer_input = text.vocab_size_per_layer_input, 1
    try:
        yield
    finally:
        text.vocab_size_per_layer_input = size


def _name(module: Any) -> str:
    return type(module).__name__


def _rows_as_they_are(_: Tensor, rows_TLP: Tensor) -> Tensor:
    return rows_TLP
