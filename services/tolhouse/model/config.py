"""The shape of a model: one frozen dataclass, saved as config.json with Hugging Face field names, and the presets.

It knows nothing of tensors; `transformer.py` reads it, `checkpoint.py` stores it.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tolhouse.errors import InvalidArgument

KINDS = ("base", "memory", "flex", "wide")
FFN_C_FORMS = ("linear", "swiglu")
_LIMITS = {
    "vocab_size": 2**31,
    "hidden_size": 2**17,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**16,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**31,
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one model. `intermediate_size` is K of the FFN (base) or of FFN-M (memory, flex, wide); PAPER table 1."""

    kind: str  # base: LLaMA · memory: every FFN reads the token alone · flex: a part of the budget stays in the block · wide: one for all layers
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    beta: int = 0  # flex: FFN-C has beta * hidden_size^2 parameters
    ffn_c: str = "linear"  # flex: the form of FFN-C, which the paper leaves open
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    eos_token_id: int = 0

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise InvalidArgument(f"model config: {message}")

        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), field.type
            numeric = wanted is float and isinstance(value, int) and not isinstance(value, bool)
            ok = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))  # type: ignore[arg-type]
            require(ok or numeric, f"{field.name} must be {wanted.__name__}, not {value!r}")  # type: ignore[union-attr]
        require(self.kind in KINDS, f"kind {self.kind!r} is unknown; one of {', '.join(KINDS)}")
        for name, limit in _LIMITS.items():
            require(
                0 < getattr(self, name) <= limit,
                f"{name} must be from 1 to {limit}, not {getattr(self, name)}",
            )
        for name in ("rope_theta", "rms_norm_eps"):
            require(
                0 < getattr(self, name) < math.inf,
                f"{name} must be a number above 0, not {getattr(self, name)}",
            )
        require(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            f"hidden_size {self.hidden_size} must be an even multiple of num_attention_heads {self.num_attention_heads}",
        )
        require(
            self.ffn_c in FFN_C_FORMS,
            f"ffn_c {self.ffn_c!r} is unknown; one of {', '.join(FFN_C_FORMS)}",
        )
        flex = self.kind == "flex"
        require(
            self.beta in ((1, 2, 3) if flex else (0,)),
            "beta is 1, 2 or 3 for flex, and 0 for the other kinds",
        )
        require(0 <= self.eos_token_id < self.vocab_size, "eos_token_id must lie in the vocabulary")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_rows(self) -> int:
        """Rows of a token: one for each layer, one that all layers share, or none in a base model."""
        return {"base": 0, "wide": 1}.get(self.kind, self.num_hidden_layers)

    def to_json(self) -> dict[str, Any]:
        return {"model_type": "memoryllm", "torch_dtype": "bfloat16", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> "ModelConfig":
        """The config that `data` describes; InvalidArgument where a field is missing, unknown or of the wrong type."""
        if not isinstance(data, dict):
            raise InvalidArgument("model config: not a JSON object")
        if data.get("model_type") != "memoryllm":
            raise InvalidArgument(
                f"model config: model_type must be 'memoryllm', not {data.get('model_type')!r}"
            )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        given = {k: v for k, v in data.items() if k not in ("model_type", "torch_dtype")}
        if unknown := sorted(set(given) - set(fields)):
            raise InvalidArgument(
                f"model config: unknown fields {unknown}; known are {sorted(fields)}"
            )
        required = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(given)):
            raise InvalidArgument(f"model config: missing fields {missing}")
        return cls(**given)


# hidden size, layers, heads, vocabulary, context, and K for base and memory, then for flex with beta 1, 2, 3 (PAPER table 1).
# The first four are ours, at equal total parameters across kinds: 3 * K = (8 - beta) * h exactly.
_PRESETS: dict[str, tuple[int, int, int, int, int, tuple[int, int, int, int]]] = {
    "tiny": (96, 4, 4, 1024, 256, (256, 224, 192, 160)),
    "small": (144, 6, 4, 4096, 256, (384, 336, 288, 240)),
    "small-active": (
        84,
        6,
        3,
        4096,
        256,
        (224, 196, 168, 140),
    ),  # a base model of this is as large as what is active of `small` memory
    "demo": (288, 6, 6, 8192, 512, (768, 672, 576, 480)),
    "250m": (960, 24, 16, 128_256, 2048, (2560, 2240, 1920, 1600)),
    "750m": (1600, 24, 16, 128_256, 2048, (4272, 3738, 3200, 2668)),
    "1b": (2048, 24, 32, 128_256, 2048, (5464, 4778, 4096, 3418)),
}
PRESETS = tuple(_PRESETS)


def preset(name: str, kind: str, beta: int = 0, **overrides: Any) -> ModelConfig:
    """The shape `name` (one of PRESETS) as a model of `kind`; `overrides` replace single fields, such as vocab_size."""
    if name not in _PRESETS:
        raise InvalidArgument(f"preset {name!r} is unknown; one of {', '.join(PRESETS)}")
    hidden, layers, heads, vocab, context, ffn = _PRESETS[name]
    if not 0 <= beta <= 3:
        raise InvalidArgument(f"beta is 1, 2 or 3 for flex, and 0 for the other kinds, not {beta}")
    fields: dict[str, Any] = {
        "kind": kind,
        "beta": beta,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn[beta]
        * (layers if kind == "wide" else 1),  # as many parameters as all the others' together
        "max_position_embeddings": context,
    }
    return ModelConfig(**{**fields, **overrides})
