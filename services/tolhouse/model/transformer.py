"""The model, a pure function that takes rows.

    rows   = model.rows(ids)                     # context-free FFN outputs, [N, T, D]
    logits = model(ids, positions, cache, rows)  # attention; adds rows[l] in block l

Rows may begin with the embedding X0: [1 + N, T, D]. The model then needs no embedding of its own.
The caller decides the source of rows: they may be computed, fetched or cached. The cache decides to
which tokens a token attends. This module has two plain caches, and the worker has a paged cache.
The model has T tokens as input, without sequences or batches.

Shapes: T tokens, D hidden size, N layers, H heads, G key-value heads, E head size, K FFN size,
V vocabulary. Query head h reads key-value head h // (H / G). The plain caches have B sequences of S
tokens.
"""

import math
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolhouse.errors import InvalidArgumentError
from tolhouse.model import ffn
from tolhouse.model.config import ModelConfig

Rope = tuple[Tensor, Tensor]  # cos and sin, [T, 1, E] each


class Cache(Protocol):
    """Stores keys and values, and decides to which tokens each token attends."""

    def attend(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        """Store T new tokens, and return their attention outputs [T, H, E]."""
        ...


class Rows(Protocol):
    """Rows [N, T, D] or [1 + N, T, D]: a tensor, or layers that are decoded on access, in order.

    An absent layer is None.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, layer: int, /) -> Tensor | None: ...


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        if not embedding.is_meta:  # on meta, initialisation would import torch's compiler, 100 MB
            embedding.normal_()
        self.embed_tokens: nn.Embedding | None = nn.Embedding.from_pretrained(embedding, False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        count = 0 if config.flex_layers else config.num_rows
        self.ffn_m = nn.ModuleList(ContextFreeFFN(config) for _ in range(count))

    def x0(self, ids_T: Tensor) -> Tensor:
        """Return the embeddings [T, D] of token ids."""
        if self.embed_tokens is None:
            raise InvalidArgumentError(
                "loaded without its embedding, the model needs X0 from a table"
            )
        return self.embed_tokens(ids_T)

    def rows(self, ids_T: Tensor, x0: bool = False) -> Tensor:
        """Compute FFN-M outputs [N, T, D] of token ids (paper, section 2).

        With `x0`, the result is [1 + N, T, D]. A base model has N = 0, and no rows that could
        contain X0.
        """
        x0_TD = self.x0(ids_T)
        if not self.config.num_rows:
            return x0_TD.new_empty(0, *x0_TD.shape)
        if self.config.flex_layers:
            raise InvalidArgumentError("the rows of a converted model are only in its table")
        if not self.ffn_m:
            raise InvalidArgumentError(
                "loaded without its FFN-M, the model needs rows from a table"
            )
        return torch.stack([x0_TD] * x0 + [ffn_m(x0_TD) for ffn_m in self.ffn_m])

    def forward(self, ids_T: Tensor, positions_T: Tensor, cache: Cache, rows_NTD: Tensor) -> Tensor:
        """Compute the logits [T, V] of T tokens at `positions_T`. Each layer adds its row."""
        return self.lm_head(self.hidden(ids_T, positions_T, cache, rows_NTD))

    def hidden(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        cache: Cache,
        rows_NTD: Rows,
        begun_TD: Tensor | None = None,
    ) -> Tensor:
        """Compute the final hidden states [T, D]. Continues from the result of `begin` if given."""
        carried = len(rows_NTD) - self.config.num_rows  # 1 if X0 is the first row
        x_TD = rows_NTD[0] if carried > 0 else begun_TD
        if x_TD is None:
            x_TD = self.x0(ids_T)
        rope = rotary(positions_T, self.config, x_TD.dtype)
        for layer, block in enumerate(self.layers):
            index = carried + (0 if self.config.kind == "wide" else layer)
            row_TD = rows_NTD[index] if len(rows_NTD) else None
            if layer or begun_TD is None:
                x_TD = block(x_TD, rope, cache, row_TD)
            elif row_TD is not None:
                x_TD = cast("Block", block).add(x_TD, row_TD)
        return self.norm(x_TD)

    def begin(self, ids_T: Tensor, positions_T: Tensor, cache: Cache) -> Tensor:
        """Compute the part of `hidden` without rows: the first block before it adds its row."""
        x0_TD = self.x0(ids_T)
        rope = rotary(positions_T, self.config, x0_TD.dtype)
        return self.layers[0](x0_TD, rope, cache, None)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = Attention(config, layer)
        # base: the FFN, which reads the residual stream. flex: FFN-C, the remaining part of it.
        self.mlp = residual_ffn(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(size, eps) if self.mlp else None
        wide = config.kind == "wide"  # each layer has a learned scale for the shared row
        self.ffn_scale = nn.Parameter(torch.ones(size)) if wide else None

    def forward(self, x_TD: Tensor, rope: Rope, cache: Cache, row_TD: Tensor | None) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, cache)
        if self.mlp and self.post_attention_layernorm:
            x_TD = x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        # The change of the paper: FFN_l(LN_l(X0)) is an input.
        return x_TD if row_TD is None else self.add(x_TD, row_TD)

    def add(self, x_TD: Tensor, row_TD: Tensor) -> Tensor:
        """Add a row. One Wide FFN (arXiv 2309.01826) scales it. The scale is our addition."""
        if self.ffn_scale is None:
            return x_TD + row_TD
        return torch.addcmul(x_TD, row_TD, self.ffn_scale)


class Attention(nn.Module):
    """Multi-head attention: 4 h^2 parameters in the paper (section 1).

    LLaMA's relatives have fewer key-value heads, heads of another size, biases, or norms of queries
    and keys.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = config.hidden_size
        own, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(size, own, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, shared, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, shared, bias=config.qkv_bias)
        self.o_proj = nn.Linear(own, size, bias=config.o_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
            for _ in range(2)
        )

    def forward(self, x_TD: Tensor, rope: Rope, cache: Cache) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_THE, k_TGE, v_TGE = (
            proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in projections
        )
        if self.q_norm and self.k_norm:
            q_THE, k_TGE = self.q_norm(q_THE), self.k_norm(k_TGE)
        out_THE = cache.attend(self.layer, rotate(q_THE, rope), rotate(k_TGE, rope), v_TGE)
        return self.o_proj(out_THE.flatten(1))


class ContextFreeFFN(nn.Module):
    """FFN-M of one layer: a norm of the embedding X0, then a SwiGLU (paper, section 1).

    `ffn_m` of the config can choose a form other than SwiGLU.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # RMSNorm: the paper says LayerNorm once, and the LLaMA recipe elsewhere.
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ffn.make(config.ffn_m, config, config.intermediate_size)

    def forward(self, x0_TD: Tensor) -> Tensor:
        return self.mlp(self.norm(x0_TD))


def residual_ffn(config: ModelConfig, layer: int) -> nn.Module | None:
    """Return the FFN of a layer that reads the residual stream, if this kind of model has one."""
    converted = bool(config.flex_layers)
    if config.kind == "base" or (converted and layer not in config.flex_layers):
        return ffn.make("swiglu", config, config.intermediate_size)
    if config.kind == "flex" and config.ffn_c == "linear":
        return ffn.LinearStack(config.hidden_size, config.beta, bias=converted)
    if config.kind == "flex":
        return ffn.make(config.ffn_c, config, round(config.beta * config.hidden_size / 3))
    return None


def rotary(positions_T: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rope:
    """Compute the rotary position embedding (cos, sin), with the signs for `rotate`."""
    angles = positions_T[:, None, None].float() * frequencies(config, positions_T.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Compute the rotary frequencies [E / 2] in radians per token, with the bits of transformers.

    Frequencies that turn fewer than `low_freq_factor` times in the original context are divided in
    llama3, and those with more turns than `high_freq_factor` are kept.
    """
    steps = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    plain = 1.0 / config.rope_theta ** (steps / config.head_dim)
    if not (scaling := config.rope_scaling):
        return plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is None or high is None or scaling.original_max_position_embeddings is None:
        return plain / scaling.factor  # linear
    turns = scaling.original_max_position_embeddings / (2 * math.pi / plain)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the halves (a, b) of x [..., E] to (a cos - b sin, b cos + a sin)."""
    cos, sin = rope
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, torch.cat((x[..., half:], x[..., :half]), -1), sin)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters without embeddings, and the number that a worker uses.

    As in table 1 of the paper, the first number is equal for all kinds of a preset, except for
    norms and the rounding of K.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(n for name, n in sizes.items() if not name.startswith(("embed_", "lm_head.")))
    return total, total - sum(n for name, n in sizes.items() if name.startswith("ffn_m."))


class NoCache:
    """A cache for T = B * S tokens of B whole sequences, with causal attention in each."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def attend(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        k_THE, v_THE = for_queries(k_TGE, q_THE), for_queries(v_TGE, q_THE)
        heads = (-1, self.sequence_length, *q_THE.shape[1:])
        q, k, v = (x_THE.reshape(heads).transpose(1, 2) for x_THE in (q_THE, k_THE, v_THE))
        out_BHSE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out_BHSE.transpose(1, 2).reshape(q_THE.shape)


class GrowingCache:
    """A cache for one sequence that arrives in parts, with causal attention."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        if layer in self.kv:
            k_seen, v_seen = self.kv[layer]
            k_TGE, v_TGE = torch.cat((k_seen, k_TGE)), torch.cat((v_seen, v_TGE))
        self.kv[layer] = k_TGE, v_TGE
        new, total = len(q_THE), len(k_TGE)
        mask = torch.ones(new, total, dtype=torch.bool, device=q_THE.device).tril(total - new)
        every = q_THE, for_queries(k_TGE, q_THE), for_queries(v_TGE, q_THE)
        q, k, v = (x.transpose(0, 1) for x in every)  # [H, ., E]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def for_queries(x_TGE: Tensor, q_THE: Tensor) -> Tensor:
    """Repeat key-value heads [., G, E] for the query heads that read them, to [., H, E]."""
    group = q_THE.shape[1] // x_TGE.shape[1]
    return x_TGE if group == 1 else x_TGE.repeat_interleave(group, 1)
