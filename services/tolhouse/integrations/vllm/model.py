"""MemoryLLM, Flex and wide models in vLLM. `model/transformer.py` is the reference.

Shapes: T tokens of a step, N blocks of a row, D hidden size.
"""

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from tolhouse.engine.row_providers import RecomputedRows
from tolhouse.integrations.vllm.layers import PaddedAttention, padded_weight, parallel_ffn
from tolhouse.integrations.vllm.staging import RowStage
from tolhouse.model.checkpoint import EMBEDDING, open_checkpoint
from tolhouse.model.config import ModelConfig

_STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


class RowsLayer(nn.Module):
    """A block of the model. It adds block `row` of the rows, unless that is None."""

    def __init__(
        self, shape: ModelConfig, layer: int, row: int | None, vllm_config: VllmConfig, prefix: str
    ) -> None:
        super().__init__()
        size, eps = shape.hidden_size, shape.rms_norm_eps
        self.row = row
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = PaddedAttention(shape, vllm_config, f"{prefix}.self_attn")
        self.mlp = parallel_ffn(shape, layer, vllm_config, f"{prefix}.mlp")
        self.post_attention_layernorm = RMSNorm(size, eps) if self.mlp else None
        wide = shape.kind == "wide"
        self.ffn_scale = nn.Parameter(torch.ones(size), requires_grad=False) if wide else None

    def forward(
        self, positions: Tensor, x_TD: Tensor, residual: Tensor | None, rows_TND: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return a part that the next norm adds to the residual stream, and the stream."""
        if residual is None:
            residual, x_TD = x_TD, self.input_layernorm(x_TD)
        else:
            x_TD, residual = self.input_layernorm(x_TD, residual)
        x_TD = self.self_attn(positions, x_TD)
        if self.mlp and self.post_attention_layernorm:
            x_TD, residual = self.post_attention_layernorm(x_TD, residual)
            x_TD = self.mlp(x_TD)
        if rows_TND is None or self.row is None:
            return x_TD, residual
        # The next norm may write to its inputs, and must not write to the buffer of rows.
        row_TD = rows_TND[:, self.row]
        if self.ffn_scale is not None:
            row_TD = row_TD * self.ffn_scale
        return x_TD, residual + row_TD


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": 0,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
        "rows": 0,
    }
)
class RowsModel(nn.Module):
    """The model without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        shape = vllm_config.model_config.hf_config.shape
        number = {name: i for i, name in enumerate(vllm_config.additional_config.blocks)}
        self.x0 = number.get("x0")
        needed = self.x0 is None or shape.tie_word_embeddings
        size = shape.vocab_size, shape.hidden_size
        # Any, because only X0 can replace it.
        self.embed_tokens: Any = VocabParallelEmbedding(*size) if needed else None
        wide = shape.kind == "wide"  # all layers share a block
        self.layers = nn.ModuleList(
            RowsLayer(
                shape,
                layer,
                number.get(f"ffn.{0 if wide else layer}"),
                vllm_config,
                f"{prefix}.layers.{layer}",
            )
            for layer in range(shape.num_hidden_layers)
        )
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        if self.x0 is not None and rows is not None:
            x_TD = rows[:, self.x0].clone()  # layers write to it
        else:
            x_TD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            x_TD, residual = layer(positions, x_TD, residual, rows)
        return self.norm(x_TD, residual)[0]


class TolhouseForCausalLM(nn.Module, SupportsLoRA):
    hf_to_vllm_mapper = WeightsMapper(
        # An adapter of FFN-M would change rows. vLLM refuses it only if no layer has this name.
        orig_to_new_regex={re.compile(r"(\.ffn_m\..+)(\.lora_[AB])"): r"\1.ffn_m\2"},
        orig_to_new_substr={".ffn_m.": None},
        orig_to_new_stacked=_STACKED,
    )
    packed_modules_mapping = {  # noqa: RUF012 - as vLLM's own models have it
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        self.config, self.shape = model.hf_config, model.hf_config.shape
        self.stage: RowStage | None = None
        if self.shape.num_rows:
            recompute = partial(RecomputedRows, open_checkpoint(model.model))
            self.stage = RowStage.of(vllm_config, recompute)
        self.model = RowsModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.shape.vocab_size,
            self.shape.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.shape.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.shape.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [T, D]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        rows: Tensor | None = None,
        failed: Tensor | None = None,
    ) -> Tensor:
        """Return the final hidden states [T, D].

        The first model runner captures no more than the inner model, so that this method runs at
        each step and stages the rows. The second one passes them (`state.py`).
        """
        if self.stage and rows is None and input_ids is not None:
            rows, failed = self.stage.fill(input_ids, request_starts)
        hidden_TD = self.model(input_ids, positions, intermediate_tensors, inputs_embeds, rows=rows)
        return hidden_TD if failed is None else hidden_TD + failed

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return the logits [T, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the checkpoint without FFN-M, and without an embedding that X0 replaces."""
        left_out = EMBEDDING if self.model.embed_tokens is None else ""
        padded = (
            (name, padded_weight(name, weight, self.shape))
            for name, weight in weights
            if name != left_out
        )
        return AutoWeightsLoader(self).load_weights(padded, mapper=self.hf_to_vllm_mapper)

    @staticmethod
    def get_model_state_cls() -> type:
        """Return the class that stages rows in the second model runner."""
        from tolhouse.integrations.vllm.state import RowsState

        return RowsState


def request_starts() -> np.ndarray | None:
    """Return the first token of each request of this step and the end, or None in a dummy step."""
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict) or not metadata:
        return None
    return next(iter(metadata.values())).query_start_loc.cpu().numpy()
