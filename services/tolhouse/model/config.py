"""The shape of a model, saved as config.json with Hugging Face field names, and the presets.

It knows nothing of tensors; `transformer.py` reads it, `checkpoint.py` stores it.
"""

import dataclasses
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from tolhouse.errors import InvalidArgumentError
from tolhouse.validation import validated

Kind = Literal["base", "memory", "flex", "wide"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Size = Annotated[int, Field(ge=1, le=2**31)]
Positive = Annotated[float, Field(gt=0)]


@validated("model config")
@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class ModelConfig:
    """Shape of one model; InvalidArgumentError where the fields do not make one.

    base: LLaMA · memory: every FFN reads the token alone · flex: a part of the FFN stays in the
    block · wide: one FFN, of the token alone, for all layers. `intermediate_size` is K of the FFN
    (base) or of FFN-M (the others); PAPER table 1.
    """

    kind: Kind
    vocab_size: Size
    hidden_size: Annotated[Size, Field(le=2**17)]
    num_hidden_layers: Annotated[Size, Field(le=2**10)]
    num_attention_heads: Annotated[Size, Field(le=2**16)]
    intermediate_size: Annotated[Size, Field(le=2**20)]
    beta: int = 0  # flex: FFN-C has beta * hidden_size^2 parameters
    ffn_c: Literal["linear", "swiglu"] = "linear"  # flex: its form, which the paper leaves open
    max_position_embeddings: Size = 2048
    rope_theta: Positive = 10000.0
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = True
    eos_token_id: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        size, heads, beta = self.hidden_size, self.num_attention_heads, self.beta
        if size % (2 * heads):
            rule = f"must be an even multiple of num_attention_heads {heads}"
            raise InvalidArgumentError(f"model config: hidden_size {size} {rule}")
        if beta not in ((1, 2, 3) if self.kind == "flex" else (0,)):
            rule = "is 1, 2 or 3 for flex and 0 for other kinds"
            raise InvalidArgumentError(f"model config: beta {rule}, not {beta}")
        if self.eos_token_id >= self.vocab_size:
            raise InvalidArgumentError("model config: eos_token_id must lie in the vocabulary")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_rows(self) -> int:
        """Rows of a token: one for each layer, one that all layers share, or none."""
        return {"base": 0, "wide": 1}.get(self.kind, self.num_hidden_layers)

    def to_json(self) -> dict[str, Any]:
        return {"model_type": "memoryllm", "torch_dtype": "bfloat16", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> "ModelConfig":
        """The config that `data` describes; InvalidArgumentError where it is none of ours."""
        kind = data.get("model_type") if isinstance(data, dict) else None
        if kind != "memoryllm":
            raise InvalidArgumentError(
                f"model config: model_type must be 'memoryllm', not {kind!r:.60}"
            )
        return cls(**{k: v for k, v in data.items() if k not in ("model_type", "torch_dtype")})


# Hidden size, layers, heads, vocabulary, context, and K for base and memory, then for flex with
# beta 1, 2, 3 (PAPER table 1). The first four are ours, of equal total parameters across kinds:
# 3 * K = (8 - beta) * h exactly. A base `small-active` has the active parameters of memory `small`.
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
    """The shape `name` (one of PRESETS) as a model of `kind`; `overrides` replace single fields."""
    if name not in _PRESETS:
        raise InvalidArgumentError(f"preset {name!r} is unknown; one of {', '.join(PRESETS)}")
    hidden, layers, heads, vocab, context, ffn = _PRESETS[name]
    size = ffn[beta if 0 <= beta <= 3 else 0]
    size *= layers if kind == "wide" else 1  # it has the parameters of all the others together
    fields: dict[str, Any] = {"kind": kind, "beta": beta, "vocab_size": vocab}
    fields |= {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    fields |= {"intermediate_size": size, "max_position_embeddings": context}
    return ModelConfig(**{**fields, **overrides})
