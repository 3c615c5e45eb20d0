"""The shape of a model, stored as config.json with Hugging Face's field names, and the presets.

This module has no tensors. `transformer.py` reads the shape, and `checkpoint.py` stores it.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from tolhouse.errors import InvalidArgumentError
from tolhouse.validation import validated

Kind = Literal["base", "memory", "flex", "wide"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Size = Annotated[int, Field(ge=1, le=2**31)]
Positive = Annotated[float, Field(gt=0)]


def _end_tokens(value: Any) -> int | tuple[int, ...] | None:
    """Return one id as an int, several ids as a tuple, and no id as None."""
    ids = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        expected = "Input should be a token id, a list of token ids or null"
        raise PydanticCustomError("end_tokens", expected)
    unique = tuple(dict.fromkeys(ids))
    return unique if len(unique) > 1 else next(iter(unique), None)


EndTokens = Annotated[int | tuple[int, ...] | None, PlainValidator(_end_tokens)]


@validated("model config")
@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class ModelConfig:
    """The shape of a model. Raises InvalidArgumentError if the fields contradict each other.

    The kind base is LLaMA. In memory, every FFN reads only the token. In flex, a part of the FFN
    reads the residual stream. In wide, all layers share one FFN, which reads only the token.
    `intermediate_size` is K in table 1 of the paper, for the FFN (base) or for FFN-M (other kinds).
    """

    kind: Kind
    vocab_size: Size
    hidden_size: Annotated[Size, Field(le=2**17)]
    num_hidden_layers: Annotated[Size, Field(le=2**10)]
    num_attention_heads: Annotated[Size, Field(le=2**16)]
    intermediate_size: Annotated[Size, Field(le=2**20)]
    beta: int = 0  # flex: FFN-C has beta * hidden_size^2 parameters
    ffn_c: Literal["linear", "swiglu"] = "linear"  # flex: form of FFN-C, not in the paper
    max_position_embeddings: Size = 2048
    rope_theta: Positive = 10000.0
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = True
    eos_token_id: EndTokens = 0

    def __post_init__(self) -> None:
        size, heads, beta = self.hidden_size, self.num_attention_heads, self.beta
        if size % (2 * heads):
            rule = f"must be an even multiple of num_attention_heads {heads}"
            raise InvalidArgumentError(f"model config: hidden_size {size} {rule}")
        if beta not in ((1, 2, 3) if self.kind == "flex" else (0,)):
            rule = "is 1, 2 or 3 for flex and 0 for other kinds"
            raise InvalidArgumentError(f"model config: beta {rule}, not {beta}")
        if outside := [i for i in self.end_token_ids if i >= self.vocab_size]:
            rule = f"must be below vocab_size {self.vocab_size}"
            raise InvalidArgumentError(f"model config: eos_token_id {outside[0]} {rule}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ids = self.eos_token_id
        return () if ids is None else ids if isinstance(ids, tuple) else (ids,)

    @property
    def num_rows(self) -> int:
        """The number of rows per token: one for each layer, one that all layers share, or none."""
        return {"base": 0, "wide": 1}.get(self.kind, self.num_hidden_layers)

    def to_json(self) -> dict[str, Any]:
        return {"model_type": "memoryllm", "torch_dtype": "bfloat16", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> "ModelConfig":
        """Return the config in `data`, with the fields that Hugging Face's save_pretrained adds.

        Raises InvalidArgumentError for another architecture, or for a field that changes the
        computation.
        """
        kind = data.get("model_type") if isinstance(data, dict) else None
        if kind != "memoryllm":
            message = f"model config: model_type must be 'memoryllm', not {kind!r:.60}"
            raise InvalidArgumentError(f"{message}: only MemoryLLM checkpoints can be served")
        own = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in data.items() if name in own}
        if (theta := _rope_theta(data)) is not None:
            given["rope_theta"] = theta
        config = cls(**given)
        for name in data.keys() - own - _NEUTRAL:
            _check_foreign(name, data, config)
        return config


# Fields of Hugging Face's configs that do not change the computation.
_NEUTRAL = frozenset(
    """
    model_type architectures auto_map name_or_path torch_dtype dtype use_cache initializer_range
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class
    prefix is_decoder torchscript use_bfloat16 tf_legacy_loss return_dict pretraining_tp
    output_attentions output_hidden_states output_scores return_dict_in_generate
    chunk_size_feed_forward attn_implementation max_window_layers original_max_position_embeddings
    rope_scaling rope_parameters transformers.js_config unsloth_fixed
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()  # noqa: SIM905 - a list would have a line for each name
)
_NEUTRAL_PATTERN = re.compile(r"_.*|.*_token_id|.*_version|.*dropout.*|.*_pdrop")


def _rope_theta(data: dict[str, Any]) -> Any:
    """Return the value of rope_theta, or None if it is not set.

    transformers 5 writes it into rope_parameters. Raises InvalidArgumentError for scaled position
    embeddings.
    """
    thetas = {"rope_theta": data.get("rope_theta")}
    for field in ("rope_scaling", "rope_parameters"):
        rope = data.get(field) or {}
        if not isinstance(rope, dict):
            raise InvalidArgumentError(f"model config: {field} must be an object or null")
        thetas[f"{field}.rope_theta"] = rope.get("rope_theta")
        kind = rope.get("rope_type", rope.get("type", "default"))
        unscaled = kind == "default" or (kind == "linear" and rope.get("factor") == 1)
        known = "rope_type", "type", "rope_theta", "original_max_position_embeddings"
        if not unscaled or [k for k, v in rope.items() if k not in known and v not in (None, 1)]:
            message = f"model config: {field} {rope!r:.200} is not supported"
            raise InvalidArgumentError(f"{message}: allowed are null and rope_type 'default'")
    given = {name: theta for name, theta in thetas.items() if theta is not None}
    first, *others = given.values() or [None]
    if any(theta != first for theta in others):
        values = " and ".join(f"{name} {theta!r:.20}" for name, theta in given.items())
        raise InvalidArgumentError(f"model config: {values} differ: remove the wrong one")
    return first


def _check_foreign(name: str, data: dict[str, Any], config: ModelConfig) -> None:
    """Raise InvalidArgumentError if a field of Hugging Face's changes the computation."""
    value, window = data[name], data.get("sliding_window")
    full = data.get("use_sliding_window") is False or (
        isinstance(window, int) and window >= config.max_position_embeddings
    )
    allowed: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("hidden_act", "hidden_activation"), ("silu", "swish")),
        "num_key_value_heads": (config.num_attention_heads,),
        "head_dim": (config.head_dim,),
        "layer_types": (["full_attention"] * config.num_hidden_layers,),
        "sliding_window": (window,) if full else (),
        **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "logit_scale"), (1,)),
        **dict.fromkeys(("residual_multiplier", "embedding_multiplier", "logits_scaling"), (1,)),
    }
    unset = value is None or value is False or value in ([], {}, "")
    if unset or value in allowed.get(name, ()) or _NEUTRAL_PATTERN.fullmatch(name):
        return
    values = " or ".join(map(repr, allowed.get(name, ()))) or "null or false"
    message = f"model config: {name} is {value!r:.60}, which a memoryllm model does not support"
    raise InvalidArgumentError(f"{message}: set it to {values}, or remove it, if that is right")


# Hidden size, layers, heads, vocabulary, context, and K: for base and memory, then for flex with
# beta 1, 2, 3 (table 1 of the paper). The first four presets are ours. Their total parameters are
# equal for all kinds: 3 * K = (8 - beta) * h exactly. A base `small-active` has as many parameters
# as a memory `small` has active parameters.
_PRESETS: dict[str, tuple[int, int, int, int, int, tuple[int, int, int, int]]] = {
    "tiny": (96, 4, 4, 1024, 256, (256, 224, 192, 160)),
    "small": (144, 6, 4, 4096, 256, (384, 336, 288, 240)),
    "small-active": (84, 6, 3, 4096, 256, (224, 196, 168, 140)),
    "demo": (288, 6, 6, 8192, 512, (768, 672, 576, 480)),
    "250m": (960, 24, 16, 128_256, 2048, (2560, 2240, 1920, 1600)),
    "750m": (1600, 24, 16, 128_256, 2048, (4272, 3738, 3200, 2668)),
    "1b": (2048, 24, 32, 128_256, 2048, (5464, 4778, 4096, 3418)),
}
PRESETS = tuple(_PRESETS)


def preset(name: str, kind: str, beta: int = 0, **overrides: Any) -> ModelConfig:
    """Return the preset `name` (one of PRESETS) for a model of `kind`.

    `overrides` replace fields.
    """
    if name not in _PRESETS:
        raise InvalidArgumentError(f"preset {name!r} is unknown; one of {', '.join(PRESETS)}")
    hidden, layers, heads, vocab, context, ffn = _PRESETS[name]
    size = ffn[beta if 0 <= beta <= 3 else 0]
    # In wide, the one FFN is as large as all FFNs of memory together.
    size *= layers if kind == "wide" else 1
    fields: dict[str, Any] = {"kind": kind, "beta": beta, "vocab_size": vocab}
    fields |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    fields |= {"intermediate_size": size, "max_position_embeddings": context}
    return ModelConfig(**{**fields, **overrides})
