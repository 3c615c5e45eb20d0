"""config.json of a MemoryLLM checkpoint as vLLM reads it."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from tolhouse.errors import InvalidArgumentError, UnsupportedError
from tolhouse.integrations.vllm import ARCHITECTURE
from tolhouse.integrations.vllm.versions import check_version, installed
from tolhouse.model.config import ModelConfig

FFN_C = ("linear", "swiglu")  # the forms in `layers.py`
# The head sizes of vLLM's attention on CPUs. Kernels for GPUs have them too.
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def padded_head_dim(size: int) -> int:
    """Return the smallest head size of vLLM's kernels that is at least `size`.

    Raises InvalidArgumentError if there is none.
    """
    for padded in HEAD_SIZES:
        if padded >= size:
            return padded
    rule = f"is too large for vLLM's attention; the largest is {HEAD_SIZES[-1]}"
    raise InvalidArgumentError(f"model config: head_dim {size} {rule}")


class MemoryLLMConfig(PreTrainedConfig):
    """The fields that vLLM reads, with `head_dim` padded. vLLM pickles this class.

    Raises InvalidArgumentError for a field that changes the computation and is not supported, and
    UnsupportedError for summary tokens, or for a form of FFN-C or a version of vLLM that is not
    supported.
    """

    model_type: ClassVar[str] = "memoryllm"

    def __post_init__(self, **kwargs: Any) -> None:
        if "kind" in kwargs:  # transformers also makes empty configs
            check_version(installed())
            given = {**kwargs, "model_type": self.model_type}
            shape = ModelConfig.from_json(kwargs.pop("shape_fields", None) or given)
            shape = shape.without_summaries()
            if shape.kind == "flex" and shape.ffn_c not in FFN_C:
                allowed = f"allowed are {' and '.join(FFN_C)}"
                raise UnsupportedError(f"FFN-C {shape.ffn_c} does not run in vLLM; {allowed}")
            kwargs |= _fields(shape)
            kwargs.pop("rope_scaling", None)
        super().__post_init__(**kwargs)

    @property
    def shape(self) -> ModelConfig:
        """The shape of the model, with the true head size."""
        return ModelConfig.from_json(self.shape_fields)


def _fields(shape: ModelConfig) -> dict[str, Any]:
    end = shape.eos_token_id
    # vLLM would multiply the context by the factor of a scaling, so only `shape` has the scaling.
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    return {
        "shape_fields": shape.to_json(),
        "architectures": [ARCHITECTURE],
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": padded_head_dim(shape.head_dim),
        "eos_token_id": list(end) if isinstance(end, tuple) else end,
        "rope_parameters": rope,
    }
