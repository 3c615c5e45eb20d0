"""Recipes as functions: each gives the whole description of one training run."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tolhouse.errors import InvalidArgument
from tolhouse.model.config import ModelConfig, preset


@dataclass(frozen=True)
class Recipe:
    """Optimiser and schedule of PAPER section 3; sizes and rates are the recipe's own."""

    config: ModelConfig
    steps: int
    batch_sequences: int
    sequence_tokens: int
    peak_rate: float
    final_rate: float
    warmup_steps: int
    eval_every_steps: int
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    z_loss: float = 1e-6
    clip_norm: float = 1.0  # the paper is silent
    autocast: bool = True  # bfloat16 matrix products over fp32 weights; the paper is silent

    @property
    def step_tokens(self) -> int:
        return self.batch_sequences * self.sequence_tokens


def tiny(kind: str, beta: int) -> Recipe:
    """A minute on two cores: loss falls, text does not make sense yet."""
    return Recipe(preset("tiny", kind, beta), 200, 8, 128, 3e-3, 3e-4, 20, 50, autocast=False)


def small(kind: str, beta: int) -> Recipe:
    """About ten minutes on one core: for comparing kinds, which have equal total parameters."""
    return Recipe(preset("small", kind, beta), 1500, 16, 256, 3e-3, 1e-4, 100, 250)


def small_active(kind: str, beta: int) -> Recipe:
    """The same run of a narrower model: base has as many parameters as a worker computes with of `small` memory."""
    return replace(small(kind, beta), config=preset("small-active", kind, beta))


def demo(kind: str, beta: int) -> Recipe:
    """About an hour on two cores: completes Python in the manner of the standard library."""
    return Recipe(preset("demo", kind, beta), 4000, 8, 512, 2e-3, 5e-5, 200, 250)


def paper(size: str) -> Callable[[str, int], Recipe]:
    """The paper's own run at one of its sizes, 50B tokens (PAPER section 3). Batch size is our choice."""

    def recipe(kind: str, beta: int) -> Recipe:
        config = preset(size, kind, beta, vocab_size=8192)
        return Recipe(config, 95_000, 256, 2048, 1e-4, 1e-5, 5000, 1000)

    recipe.__doc__ = f"The paper's {size} run: for accelerators."
    return recipe


RECIPES: dict[str, Callable[[str, int], Recipe]] = {
    "tiny": tiny,
    "small": small,
    "small-active": small_active,
    "demo": demo,
    **{f"paper-{size}": paper(size) for size in ("250m", "750m", "1b")},
}


def recipe(name: str, kind: str, beta: int) -> Recipe:
    if name not in RECIPES:
        raise InvalidArgument(f"recipe {name!r} is unknown; one of {', '.join(RECIPES)}")
    return RECIPES[name](kind, beta)
