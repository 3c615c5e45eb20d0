"""Recipes: each is the whole description of one training run."""

from dataclasses import dataclass

from tolhouse.errors import InvalidArgumentError
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


# Steps, sequences and tokens of a batch, peak and final rate, warm-up, steps between evaluations.
_SMALL = (1500, 16, 256, 3e-3, 1e-4, 100, 250)  # ten minutes on a core: kinds at equal parameters
# The paper's: such a step needs more memory than a GPU has; nothing here divides it.
_PAPER = (95_000, 256, 2048, 1e-4, 1e-5, 5000, 1000)  # 50B tokens; the batch size is our choice
RECIPES = {
    "tiny": (200, 8, 128, 3e-3, 3e-4, 20, 50),  # a minute on two cores: loss falls, no sense yet
    **dict.fromkeys(("small", "small-active"), _SMALL),
    "demo": (4000, 8, 512, 2e-3, 5e-5, 200, 250),  # an hour on two cores: completes Python
    **dict.fromkeys(("paper-250m", "paper-750m", "paper-1b"), _PAPER),
}


def recipe(name: str, kind: str, beta: int) -> Recipe:
    if name not in RECIPES:
        raise InvalidArgumentError(f"recipe {name!r} is unknown; one of {', '.join(RECIPES)}")
    vocabulary = {"vocab_size": 8192} if name.startswith("paper-") else {}
    config = preset(name.removeprefix("paper-"), kind, beta, **vocabulary)
    return Recipe(config, *RECIPES[name], autocast=name != "tiny")
