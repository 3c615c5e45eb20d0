"""Chooses the classes of `gemma.py` for Gemma checkpoints if rows are configured.

Without options of Tolhouse, vLLM uses its own classes.
"""

from typing import Any, ClassVar

from tolhouse.errors import InvalidArgumentError
from tolhouse.integrations.vllm.options import is_configured
from tolhouse.integrations.vllm.start import prepare
from tolhouse.integrations.vllm.versions import check_version, installed
from tolhouse.sources.gemma import FINISHED

STOCK = (
    "Gemma3nForCausalLM",
    "Gemma3nForConditionalGeneration",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
)
_MEDIA = ("image", "video", "audio")


class GemmaStart:
    """vLLM calls these methods for the architectures of `STOCK`."""

    stock: ClassVar[Any] = None  # vLLM's own class for this

    @classmethod
    def before(cls, stock: Any) -> type["GemmaStart"]:
        """Return a class that calls `stock` first."""
        return type("GemmaStart", (cls,), {"stock": stock})

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        if cls.stock:
            cls.stock.verify_and_update_model_config(model_config)

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Find the table and choose a class with rows, if rows are configured.

        Raises UnsupportedError for a version or an option of vLLM that does not work, NotFoundError
        if the model is not a folder, and InvalidArgumentError for all other errors of Tolhouse.
        """
        if cls.stock:
            cls.stock.verify_and_update_config(vllm_config)
        if not is_configured(vllm_config.additional_config or {}):
            return
        check_version(installed())
        model = vllm_config.model_config
        prepare(vllm_config, needs_table=True)
        if vllm_config.additional_config.blocks[0].startswith(f"{FINISHED}."):
            _refuse_media(model)
        model.hf_config.architectures = [class_name(model.architecture)]


def class_name(stock: str) -> str:
    """Return the name of the class in `gemma.py` for an architecture of `STOCK`."""
    return f"Tolhouse{stock}"


def _refuse_media(model: Any) -> None:
    limits = model.multimodal_config
    if limits and any(limits.get_limit_per_prompt(medium) for medium in _MEDIA):
        zeros = ", ".join(f'"{medium}": 0' for medium in _MEDIA)
        advice = f"give --limit-mm-per-prompt '{{{zeros}}}', or build it with --rows raw"
        raise InvalidArgumentError(f"a table of finished rows serves text only: {advice}")
