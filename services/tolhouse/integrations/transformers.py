"""MemoryLLM, Flex and One Wide models as models of the library transformers.

    import tolhouse.integrations.transformers  # registers the classes with the Auto classes
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("models/demo-memory")

The layers are those of `tolhouse.model.transformer`, and tensors have the names of
`tolhouse.model.checkpoint`. transformers provides attention, masks and caches.

Shapes: B sequences of S tokens, T = B * S, U distinct tokens; others as in `model/transformer.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from tolhouse.errors import InvalidArgumentError
from tolhouse.model import ffn
from tolhouse.model.checkpoint import tensor_shapes
from tolhouse.model.config import ModelConfig
from tolhouse.model.transformer import Block, ContextFreeFFN, Rope, rotary

RowsOf = Callable[[Tensor], Tensor]  # token ids [B, S] to rows [N, B, S, D] or [1 + N, B, S, D]

_renamed = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # as in transformers


class MemoryLLMConfig(PreTrainedConfig):
    """The fields of `ModelConfig`, and those of every config of transformers.

    Raises InvalidArgumentError for a field that changes the computation and is not supported.
    """

    model_type: ClassVar[str] = "memoryllm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if "kind" not in kwargs:
            return  # transformers makes empty configs
        for name, value in dataclasses.asdict(self.shape()).items():
            if not name.startswith("rope_"):  # transformers keeps these in rope_parameters
                setattr(self, name, list(value) if isinstance(value, tuple) else value)

    def shape(self) -> ModelConfig:
        """Return the shape of the model. Raises UnsupportedError if it has summary tokens."""
        return ModelConfig.from_json(self.to_dict()).without_summaries()


class MemoryLLMBlock(GradientCheckpointingLayer, Block):
    """A block that computes its row with its own FFN-M unless it gets a row."""

    def __init__(self, config: MemoryLLMConfig, layer: int, has_ffn_m: bool) -> None:
        shape = config.shape()
        super().__init__(shape, layer)
        self.ffn_m = ContextFreeFFN(shape) if has_ffn_m else None
        for name, module in self.named_modules():
            if name.endswith(("o_proj", "down_proj")) or ".maps." in name:
                module.writes_residual = True  # read by `_init_weights`
        # Attention functions of transformers read these attributes.
        attention: Any = self.self_attn
        attention.config, attention.layer_idx, attention.is_causal = config, layer, True

    def forward(  # type: ignore[override]  # batches of sequences
        self,
        x_BSD: Tensor,
        rope: Rope,
        mask: Any = None,
        row_BSD: Tensor | None = None,
        x0_UD: Tensor | None = None,
        inverse_BS: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the block. Its row is `row_BSD`, or FFN-M of the distinct embeddings `x0_UD`."""
        if row_BSD is None and self.ffn_m and x0_UD is not None and inverse_BS is not None:
            row_BSD = F.embedding(inverse_BS, self.ffn_m(x0_UD))
        attention = _Attention(self.self_attn, len(x_BSD), mask, cache, kwargs)
        row_TD = None if row_BSD is None else row_BSD.flatten(0, 1)
        return Block.forward(self, x_BSD.flatten(0, 1), rope, attention, row_TD).view_as(x_BSD)


class _Attention:
    """The `Cache` of `model/transformer.py` in terms of transformers' caches and attention."""

    def __init__(
        self, module: Any, batch: int, mask: Any, cache: Cache | None, options: dict[str, Any]
    ) -> None:
        self._module, self._batch, self._mask = module, batch, mask
        self._cache, self._options = cache, options

    def attend(self, layer: int, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        shape, module = (self._batch, -1), self._module
        q, k, v = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in (q_THE, k_THE, v_THE))
        module.num_key_value_groups = q.shape[1] // k.shape[1]
        if self._cache is not None:
            k, v = self._cache.update(k, v, layer)
        implementation = module.config._attn_implementation  # noqa: SLF001 - no public name
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        scaling = q.shape[-1] ** -0.5
        out, _ = attend(module, q, k, v, self._mask, dropout=0.0, scaling=scaling, **self._options)
        return out.reshape(q_THE.shape)


class MemoryLLMPreTrainedModel(PreTrainedModel):
    config: MemoryLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryLLMBlock"]  # noqa: RUF012 - as in the parent
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MemoryLLMBlock}  # noqa: RUF012 - as in the parent

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as `tolhouse train` does."""
        super()._init_weights(module)
        if getattr(module, "writes_residual", False):
            small = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
            initialization.normal_(cast("nn.Linear", module).weight, std=small)
        ffn.initialise(module, initialization.normal_)
        if isinstance(module, MemoryLLMBlock) and module.ffn_scale is not None:
            initialization.ones_(module.ffn_scale)


class MemoryLLMModel(MemoryLLMPreTrainedModel):
    """The model without its head.

    Attributes:
        row_source: Replaces FFN-M. It takes ids [B, S], and returns the rows [N, B, S, D] of
            `shape.row_layers`, or [1 + N, B, S, D] with the embedding first. Default: None.
    """

    row_source: RowsOf | None = None

    def __init__(self, config: MemoryLLMConfig) -> None:
        super().__init__(config)
        self.shape = shape = config.shape()
        stored = tensor_shapes(shape)
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            MemoryLLMBlock(config, i, f"model.layers.{i}.ffn_m.norm.weight" in stored)
            for i in range(shape.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def rows_of(self, input_ids: Tensor) -> Tensor:
        """Return the rows [N, B, S, D] of ids [B, S], from `row_source` or from FFN-M."""
        if self.row_source is not None:
            return self.row_source(input_ids)
        self._check_own_rows()
        ids_U, inverse_BS = input_ids.unique(return_inverse=True)
        x0_UD = self.embed_tokens(ids_U)
        own = [part for layer in self.layers if (part := cast("MemoryLLMBlock", layer).ffn_m)]
        rows = [F.embedding(inverse_BS, part(x0_UD)) for part in own]
        return torch.stack(rows) if rows else x0_UD.new_empty(0, *input_ids.shape, x0_UD.shape[1])

    def _check_own_rows(self) -> None:
        """Raise InvalidArgumentError for a converted model, which has no FFN-M."""
        if self.shape.flex_layers:
            advice = "attach it with tolhouse.integrations.attach"
            raise InvalidArgumentError(
                f"the rows of a converted model are only in its table: {advice}"
            )

    @_renamed
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states [B, S, D] after the last norm.

        With `inputs_embeds`, FFN-M reads these embeddings. Raises InvalidArgumentError unless
        exactly one of `input_ids` and `inputs_embeds` is given, and for `inputs_embeds` with a
        `row_source`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidArgumentError("give either input_ids or inputs_embeds")
        rows, x0_UD, inverse_BS, x_BSD = self._begin(input_ids, inputs_embeds)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        batch, length = x_BSD.shape[:2]
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(length, device=x_BSD.device)[None] + seen
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BSD,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        positions_T = position_ids.expand(batch, length).flatten()
        rope = rotary(positions_T, self.shape, x_BSD.dtype)
        shared = rows[0] if self.shape.kind == "wide" else None
        row_of = dict(zip(self.shape.row_layers, rows, strict=False))
        for layer, block in enumerate(self.layers):
            row_BSD = row_of.get(layer, shared)
            x_BSD = block(x_BSD, rope, mask, row_BSD, x0_UD, inverse_BS, cache=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BSD), cache=cache)

    def _begin(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Any, Tensor | None, Tensor | None, Tensor]:
        """Return rows or [], distinct embeddings [U, D], their indices [B, S], and X0 [B, S, D]."""
        if self.row_source is not None:
            if input_ids is None:
                raise InvalidArgumentError("rows are looked up by token id: give input_ids")
            rows = self.row_source(input_ids)
            carried = len(rows) - len(self.shape.row_layers)
            return rows[carried:], None, None, rows[0] if carried else self.embed_tokens(input_ids)
        self._check_own_rows()
        if inputs_embeds is None:
            # FFN-M depends on token ids alone, so it is computed once for each distinct token.
            ids_U, inverse_BS = input_ids.unique(return_inverse=True)  # type: ignore[union-attr]
            x0_UD = self.embed_tokens(ids_U)
            x_BSD = F.embedding(inverse_BS, x0_UD)
        else:
            x_BSD, x0_UD = inputs_embeds, inputs_embeds.flatten(0, 1)
            inverse_BS = torch.arange(len(x0_UD), device=x0_UD.device).view(x_BSD.shape[:2])
        if self.shape.kind == "wide":  # all layers share the row
            shared = cast("ContextFreeFFN", self.layers[0].ffn_m)
            return F.embedding(inverse_BS, shared(x0_UD))[None], None, None, x_BSD
        return [], x0_UD, inverse_BS, x_BSD


class MemoryLLMForCausalLM(MemoryLLMPreTrainedModel, GenerationMixin):
    """The model with its head, for generation and training."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as in the parent

    def __init__(self, config: MemoryLLMConfig) -> None:
        super().__init__(config)
        self.model = MemoryLLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def rows_of(self, input_ids: Tensor) -> Tensor:
        """Return the rows [N, B, S, D] of ids [B, S]."""
        return self.model.rows_of(input_ids)

    @_renamed
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits [B, S, V], and the loss if `labels` [B, S] are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register("memoryllm", MemoryLLMConfig)
AutoModel.register(MemoryLLMConfig, MemoryLLMModel)
AutoModelForCausalLM.register(MemoryLLMConfig, MemoryLLMForCausalLM)
