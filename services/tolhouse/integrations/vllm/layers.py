"""Attention and FFN-C in vLLM's parallel layers, which bring tensor parallelism and quantisation.

Kernels take only some head sizes. Heads are padded with zeros, which change neither dot products
nor outputs; the scale and the rotary embedding are those of the true size.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaMLP

from tolhouse.integrations.vllm.config import padded_head_dim
from tolhouse.model.config import ModelConfig


class PaddedAttention(nn.Module):
    """The attention of `model/transformer.py`."""

    def __init__(self, shape: ModelConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        padded, ranks = padded_head_dim(shape.head_dim), get_tensor_model_parallel_world_size()
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        own, shared = heads // ranks, max(1, kv_heads // ranks)
        self.sizes, self.head_dim = [own * padded, shared * padded, shared * padded], padded
        quant = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            padded,
            heads,
            kv_heads,
            bias=shape.qkv_bias,
            quant_config=quant,
            return_bias=False,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * padded,
            shape.hidden_size,
            bias=shape.o_bias,
            quant_config=quant,
            return_bias=False,
            prefix=f"{prefix}.o_proj",
        )
        # The mean of squares is over the padded size: see `padded_weight`.
        eps = shape.rms_norm_eps * shape.head_dim / padded
        self.q_norm = RMSNorm(padded, eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(padded, eps) if shape.qk_norm else None
        self.rotary_emb = get_rope(
            padded, max_position=shape.max_position_embeddings, rope_parameters=_rope(shape)
        )
        self.attn = Attention(
            own,
            padded,
            shape.head_dim**-0.5,
            num_kv_heads=shared,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x_TD: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x_TD).split(self.sizes, -1)
        if self.q_norm and self.k_norm:
            q, k = (
                norm(x.unflatten(-1, (-1, self.head_dim)).contiguous()).flatten(-2)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))


def _rope(shape: ModelConfig) -> dict[str, Any]:
    """Return the parameters of `get_rope`."""
    scaling = shape.to_json().get("rope_scaling") or {"rope_type": "default"}
    return {**scaling, "rope_theta": shape.rope_theta, "rope_dim": shape.head_dim}


def padded_weight(name: str, weight: Tensor, shape: ModelConfig) -> Tensor:
    """Pad a weight of attention to the head size of the kernels. Return others as they are."""
    size = shape.head_dim
    missing = padded_head_dim(size) - size
    if not missing or ".self_attn." not in name:
        return weight
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        # The norm divides by the root of the mean over the padded size.
        return F.pad(weight * math.sqrt(size / (size + missing)), (0, missing))
    if name.endswith("o_proj.weight"):
        return F.pad(weight.unflatten(1, (-1, size)), (0, missing)).flatten(1)
    if name.endswith("o_proj.bias"):
        return weight
    per_head = weight.unflatten(0, (-1, size))  # of q, k or v: [heads, size] or [heads, size, D]
    padding = (0, missing) if weight.ndim == 1 else (0, 0, 0, missing)
    return F.pad(per_head, padding).flatten(0, 1)


class ParallelLinearStack(nn.Module):
    """FFN-C as maps with SiLU between them: pairs of a column-parallel and a row-parallel map.

    The last of an odd number of maps gathers its output.
    """

    def __init__(self, size: int, depth: int, bias: bool, quant: Any, prefix: str) -> None:
        super().__init__()
        self.maps = nn.ModuleList()
        for i in range(depth):
            options = {"bias": bias, "quant_config": quant, "return_bias": False}
            options["prefix"] = f"{prefix}.maps.{i}"
            if i % 2:
                self.maps.append(RowParallelLinear(size, size, **options))
            else:
                last = i == depth - 1
                self.maps.append(ColumnParallelLinear(size, size, gather_output=last, **options))

    def forward(self, x_TD: Tensor) -> Tensor:
        for linear in self.maps[:-1]:
            x_TD = F.silu(linear(x_TD))
        return self.maps[-1](x_TD)


def parallel_ffn(
    shape: ModelConfig, layer: int, vllm_config: VllmConfig, prefix: str
) -> nn.Module | None:
    """Return the FFN of a layer that reads the residual stream, as `residual_ffn` does."""
    size, quant = shape.hidden_size, vllm_config.quant_config
    converted = bool(shape.flex_layers)
    if shape.kind == "base" or (converted and layer not in shape.flex_layers):
        return LlamaMLP(size, shape.intermediate_size, "silu", quant, prefix=prefix)
    if shape.kind == "flex" and shape.ffn_c == "linear":
        return ParallelLinearStack(size, shape.beta, converted, quant, prefix)
    if shape.kind == "flex":
        return LlamaMLP(size, round(shape.beta * size / 3), "silu", quant, prefix=prefix)
    return None
