"""The shape of a model, stored as config.json with Hugging Face's field names, and the presets.

This module has no tensors. `transformer.py` reads the shape, and `checkpoint.py` stores it.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from tolhouse.errors import InvalidArgumentError, UnsupportedError
from tolhouse.validation import validated

Kind = Literal["base", "memory", "flex", "wide"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FfnM = Literal["swiglu", "moc", "avgk", "flashmhf", "lookup"]
FfnC = Literal["linear", FfnM]
Size = Annotated[int, Field(ge=1, le=2**31)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


def _end_tokens(value: Any) -> int | tuple[int, ...] | None:
    """Return one id as an int, several ids as a tuple, and no id as None."""
    ids = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        expected = "Input should be a token id, a list of token ids or null"
        raise PydanticCustomError("end_tokens", expected)
    unique = tuple(dict.fromkeys(ids))
    return unique if len(unique) > 1 else next(iter(unique), None)


EndTokens = Annotated[int | tuple[int, ...] | None, PlainValidator(_end_tokens)]
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@validated("model config: rope_scaling")
@dataclass(frozen=True, config=_STRICT)
class RopeScaling:
    """The scaling of rotary frequencies for a context longer than in training.

    `linear` divides all of them by `factor`. `llama3` divides the low ones, and blends in between.
    """

    rope_type: Literal["linear", "llama3"]
    factor: Positive
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None

    def __post_init__(self) -> None:
        values = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        if self.rope_type == "linear" and any(value is not None for value in values):
            raise InvalidArgumentError("model config: rope_type 'linear' has only a factor")
        if self.rope_type == "llama3":
            low, high, original = values
            if not (low and high and original and low < high):
                need = (
                    "low_freq_factor below high_freq_factor, and original_max_position_embeddings"
                )
                raise InvalidArgumentError(f"model config: rope_type 'llama3' needs {need}")


@validated("model config")
@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The shape of a model. Raises InvalidArgumentError if the fields contradict each other.

    The kind base is LLaMA, also with the attention of Qwen 2 and 3. In memory, every FFN reads only
    the token. In flex, a part of the FFN reads the residual stream. In wide, all layers share one
    FFN, which reads only the token.
    `intermediate_size` is K in table 1 of the paper, for the FFN (base) or for FFN-M (other kinds).
    """

    kind: Kind
    vocab_size: Size
    hidden_size: Annotated[Size, Field(le=2**17)]
    num_hidden_layers: Annotated[Size, Field(le=2**10)]
    num_attention_heads: Annotated[Size, Field(le=2**16)]
    intermediate_size: Annotated[Size, Field(le=2**20)]
    beta: int = 0  # flex: FFN-C has beta * hidden_size^2 parameters
    ffn_c: FfnC = "linear"  # flex: form of FFN-C, not in the paper
    max_position_embeddings: Size = 2048
    rope_theta: Positive = 10000.0
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = True
    eos_token_id: EndTokens = 0
    # Attention. 0 stands for the number of heads, and for hidden_size / num_attention_heads.
    num_key_value_heads: Annotated[int, Field(ge=0, le=2**16)] = 0
    head_dim: Annotated[int, Field(ge=0, le=2**16)] = 0
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's query and key, as in Qwen 3
    rope_scaling: RopeScaling | None = None
    # Forms of FFN-C and FFN-M in model/ffn.py. Each of the other fields belongs to some forms.
    ffn_m: FfnM = "swiglu"
    ffn_share: Share = 0.25  # moc, avgk: the share of channels that a token reads
    ffn_blocks: Size = 16  # avgk: the blocks of channels, of which a token reads whole ones
    ffn_heads: Size = 4  # flashmhf
    ffn_experts: Size = 3  # flashmhf: the networks of a head
    ffn_bits: Annotated[int, Field(ge=1, le=16)] = 4  # lookup: bits of a code
    ffn_by: Literal["gate", "activation"] = "gate"  # moc: the score of a channel
    # flex, made by `tolhouse convert`: the layers that are Flex, while the others stay dense. FFN-C
    # has a bias, there is no FFN-M, and the rows are only in the table. Empty: all layers are Flex.
    flex_layers: Annotated[tuple[int, ...], Field(strict=False)] = ()
    # The number of summary tokens, the last ids of the vocabulary, and of the tokens of text before
    # them (engine/kv_policy.py).
    summary_tokens: Annotated[int, Field(ge=0)] = 0
    summary_segment: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        size, heads, beta = self.hidden_size, self.num_attention_heads, self.beta
        if not self.head_dim and size % (2 * heads):
            rule = f"must be an even multiple of num_attention_heads {heads}, or head_dim be given"
            raise InvalidArgumentError(f"model config: hidden_size {size} {rule}")
        object.__setattr__(self, "head_dim", self.head_dim or size // heads)
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        if self.head_dim % 2:
            raise InvalidArgumentError(f"model config: head_dim {self.head_dim} must be even")
        if heads % self.num_key_value_heads:
            rule = f"must divide num_attention_heads {heads}"
            message = f"model config: num_key_value_heads {self.num_key_value_heads} {rule}"
            raise InvalidArgumentError(message)
        if beta not in ((1, 2, 3) if self.kind == "flex" else (0,)):
            rule = "is 1, 2 or 3 for flex and 0 for other kinds"
            raise InvalidArgumentError(f"model config: beta {rule}, not {beta}")
        given = self.flex_layers
        if given and (form := (self.kind, beta, self.ffn_c)) != ("flex", 1, "linear"):
            rule = f"need kind flex, beta 1 and a linear ffn_c, not {form}"
            raise InvalidArgumentError(f"model config: flex_layers {rule}")
        in_order = list(given) == sorted({*given} & {*range(self.num_hidden_layers)})
        if not in_order:
            rule = f"must be ascending layers from 0 to {self.num_hidden_layers - 1}"
            raise InvalidArgumentError(f"model config: flex_layers {rule}, not {list(given)}")
        if self.kind != "flex" and self.ffn_c != "linear":
            rule = f"is for kind flex: a {self.kind} model has no FFN-C"
            raise InvalidArgumentError(f"model config: ffn_c {self.ffn_c} {rule}")
        if (self.kind == "base" or given) and self.ffn_m != "swiglu":
            rule = f"is for models with FFN-M: a {'converted' if given else 'base'} model has none"
            raise InvalidArgumentError(f"model config: ffn_m {self.ffn_m} {rule}")
        forms = {self.ffn_c, self.ffn_m}
        for name, users in FORM_FIELDS.items():
            if not forms & users and getattr(self, name) != getattr(type(self), name):
                rule = f"is for the forms {', '.join(sorted(users))}"
                found = f"ffn_c {self.ffn_c} and ffn_m {self.ffn_m}"
                raise InvalidArgumentError(f"model config: {name} {rule}, not for {found}")
        if bool(self.summary_tokens) != bool(self.summary_segment) or self.text_vocab_size < 1:
            rule = "must both be given, and leave ids for text"
            raise InvalidArgumentError(f"model config: summary_tokens and summary_segment {rule}")
        if outside := [i for i in self.end_token_ids if i >= self.text_vocab_size]:
            rule = f"must be below vocab_size {self.text_vocab_size}"
            raise InvalidArgumentError(f"model config: eos_token_id {outside[0]} {rule}")

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ids = self.eos_token_id
        return () if ids is None else ids if isinstance(ids, tuple) else (ids,)

    @property
    def text_vocab_size(self) -> int:
        """The number of token ids that texts have. Summary tokens follow them."""
        return self.vocab_size - self.summary_tokens

    @property
    def context_tokens(self) -> int:
        """The most tokens of text that fit the positions, beside their summary tokens."""
        positions, segment = self.max_position_embeddings, self.summary_segment
        if not segment:
            return positions
        segments, rest = divmod(positions, segment + self.summary_tokens)
        return segments * segment + min(rest, segment - 1)

    def without_summaries(self) -> Self:
        """Return the config. Raises UnsupportedError if the model has summary tokens."""
        if self.summary_tokens:
            only = "only `tolhouse worker --kv-policy summary` runs it"
            raise UnsupportedError(f"the model has {self.summary_tokens} summary tokens: {only}")
        return self

    @property
    def num_rows(self) -> int:
        """The number of rows per token: one for each layer, one that all layers share, or none."""
        return {"base": 0, "wide": 1}.get(self.kind, self.num_hidden_layers)

    @property
    def row_layers(self) -> tuple[int, ...]:
        """The layers that add a block of the row. In wide, block 0 is that of all layers."""
        return self.flex_layers or tuple(range(self.num_rows))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON, without fields of later releases that are at their default."""
        fields = dataclasses.asdict(self)
        derived = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.hidden_size // self.num_attention_heads,
            **dict.fromkeys(("qkv_bias", "o_bias", "qk_norm"), False),
            "rope_scaling": None,
            "flex_layers": (),
            **dict.fromkeys(("summary_tokens", "summary_segment"), 0),
            **{name: getattr(type(self), name) for name in ("ffn_m", *FORM_FIELDS)},
        }
        left = {n: v for n, v in fields.items() if n not in derived or v != derived[n]}
        if scaling := left.get("rope_scaling"):
            left["rope_scaling"] = {n: v for n, v in scaling.items() if v is not None}
        return {"model_type": "memoryllm", "torch_dtype": "bfloat16", **left}

    @classmethod
    def from_json(cls, data: Any) -> "ModelConfig":
        """Return the config in `data`, with the fields that Hugging Face's save_pretrained adds.

        A config of LLaMA, Mistral, Qwen 2 or Qwen 3 is one of kind base. Raises
        InvalidArgumentError for another architecture, or for a field that changes the computation.
        """
        if not isinstance(data, dict):
            raise InvalidArgumentError(f"model config must be a JSON object, not {data!r:.60}")
        kind = data.get("model_type")
        if kind not in ("memoryllm", *_FAMILIES):  # a list is not hashable
            dense = ", ".join(map(repr, _FAMILIES))
            allowed = f"allowed are 'memoryllm', and for dense models {dense}"
            raise InvalidArgumentError(f"model config: model_type is {kind!r:.60}; {allowed}")
        own = {field.name for field in dataclasses.fields(cls)}
        forms = {"ffn_c", "ffn_m", *FORM_FIELDS}
        if kind in _FAMILIES:
            data = {**_FAMILIES[kind], **data}
            own -= {"kind", "beta", "qkv_bias", "o_bias", "qk_norm"} | forms
            own -= {"summary_tokens", "summary_segment"}
        given = {name: value for name, value in data.items() if name in own}
        if kind in _FAMILIES:
            given |= {"kind": "base", "qk_norm": kind == "qwen3"}
        given |= _biases(kind, data)
        for name in ("num_key_value_heads", "head_dim"):  # null stands for the default
            if given.get(name, 0) is None:
                del given[name]
        theta, given["rope_scaling"] = _rope(data)
        if theta is not None:
            given["rope_theta"] = theta
        config = cls(**given)
        for name in sorted(data.keys() - own - _NEUTRAL):
            _check_foreign(name, data, config)
        return config


# The forms of FFN-C and FFN-M that each field belongs to.
FORM_FIELDS = {
    "ffn_share": {"moc", "avgk"},
    "ffn_by": {"moc"},
    "ffn_blocks": {"avgk"},
    "ffn_heads": {"flashmhf"},
    "ffn_experts": {"flashmhf"},
    "ffn_bits": {"lookup"},
}

# The defaults of model types that are served as kind base, for fields that config.json may lack.
_HUGGING_FACE = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": None}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_HUGGING_FACE, "max_position_embeddings": 2048, "eos_token_id": 2},
    "mistral": {
        **_HUGGING_FACE,
        "max_position_embeddings": 131_072,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        **_HUGGING_FACE,
        "max_position_embeddings": 32_768,
        "eos_token_id": None,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
    },
    "qwen3": {
        **_HUGGING_FACE,
        "max_position_embeddings": 32_768,
        "eos_token_id": None,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
    },
}


def _biases(kind: Any, data: dict[str, Any]) -> dict[str, bool]:
    """Return the biases of attention. `attention_bias` adds all four.

    In Qwen 2 it adds those of q, k and v, and its default is true.
    """
    given = data.get("attention_bias")
    if given is not None and not isinstance(given, bool):
        raise InvalidArgumentError(f"model config: attention_bias must be a boolean, not {given!r}")
    if kind == "qwen2":
        return {"qkv_bias": given is not False}
    return {"qkv_bias": True, "o_bias": True} if given and kind != "mistral" else {}


# Fields of Hugging Face's configs that do not change the computation.
_NEUTRAL = frozenset(
    """
    model_type architectures auto_map name_or_path torch_dtype dtype use_cache initializer_range
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class
    prefix is_decoder torchscript use_bfloat16 tf_legacy_loss return_dict pretraining_tp
    output_attentions output_hidden_states output_scores return_dict_in_generate
    chunk_size_feed_forward attn_implementation max_window_layers original_max_position_embeddings
    rope_scaling rope_parameters rope_theta transformers.js_config unsloth_fixed is_llama_config
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()  # noqa: SIM905 - a list would have a line for each name
)
_NEUTRAL_PATTERN = re.compile(r"_.*|.*_token_id|.*_version|.*dropout.*|.*_pdrop")


def _rope(data: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Return the value of rope_theta, or None if it is not set, and the scaling.

    transformers 4 writes rope_theta and rope_scaling, and transformers 5 writes rope_parameters.
    Raises InvalidArgumentError for other position embeddings, and if two values differ.
    """
    thetas, scalings = {"rope_theta": data.get("rope_theta")}, dict[str, RopeScaling | None]()
    for field in ("rope_scaling", "rope_parameters"):
        rope = data.get(field) or {}
        if not isinstance(rope, dict):
            raise InvalidArgumentError(f"model config: {field} must be an object or null")
        thetas[f"{field}.rope_theta"] = rope.get("rope_theta")
        if rope:
            scalings[field] = _rope_scaling(field, rope, data)
    theta = _only("rope_theta", {name: v for name, v in thetas.items() if v is not None})
    return theta, _only("", scalings)


def _only(what: str, values: dict[str, Any]) -> Any:
    """Return the one value in `values`, or None. Raises InvalidArgumentError if two differ."""
    first, *others = values.values() or [None]
    if any(value != first for value in others):
        shown = " and ".join(f"{name} {v!r:.20}" if what else name for name, v in values.items())
        raise InvalidArgumentError(f"model config: {shown} differ: remove the wrong one")
    return first


def _rope_scaling(field: str, rope: dict[str, Any], data: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    own = {"linear": _LLAMA3[:1], "llama3": _LLAMA3}.get(str(kind), ())
    known = "rope_type", "type", "rope_theta", "original_max_position_embeddings", *own
    others = [k for k, v in rope.items() if k not in known and v not in (None, 1)]
    if kind not in ("default", "linear", "llama3") or others:
        message = f"model config: {field} {rope!r:.200} is not supported"
        allowed = "allowed are null and rope_type 'default', 'linear' or 'llama3'"
        raise InvalidArgumentError(f"{message}: {allowed}")
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        return None
    values = {name: rope[name] for name in own if name in rope}
    if kind == "llama3":  # the order of transformers
        name, context = "original_max_position_embeddings", data.get("max_position_embeddings")
        values[name] = data.get(name) or rope.get(name) or context
    return RopeScaling(rope_type=kind, **values)


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


def _check_foreign(name: str, data: dict[str, Any], config: ModelConfig) -> None:
    """Raise InvalidArgumentError if a field of Hugging Face's changes the computation."""
    value, window, kind = data[name], data.get("sliding_window"), data["model_type"]
    first = data.get("max_window_layers", 28) if kind in ("qwen2", "qwen3") else 0
    full = (
        window is None
        or data.get("use_sliding_window") is False
        or (isinstance(window, int) and window >= config.max_position_embeddings)
        or (isinstance(first, int) and first >= config.num_hidden_layers)
    )
    allowed: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("hidden_act", "hidden_activation"), ("silu", "swish")),
        "attention_bias": () if kind == "mistral" else (True,),
        "layer_types": (["full_attention"] * config.num_hidden_layers,),
        "sliding_window": (window,) if full else (),
        "use_sliding_window": (True,) if full else (),
        **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "logit_scale"), (1,)),
        **dict.fromkeys(("residual_multiplier", "embedding_multiplier", "logits_scaling"), (1,)),
    }
    unset = value is None or value is False or value in ([], {}, "")
    if unset or value in allowed.get(name, ()) or _NEUTRAL_PATTERN.fullmatch(name):
        return
    values = " or ".join(map(repr, allowed.get(name, ()))) or "null or false"
    message = f"model config: {name} is {value!r:.60}, which a {kind} model does not support"
    if name == "sliding_window":
        advice = f"attention within a window equals ours only if max_position_embeddings <= {value}"
        raise InvalidArgumentError(f"{message} here: {advice}")
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
