"""Training recipes. A recipe is a complete description of a training run."""

from dataclasses import dataclass

from tolhouse.errors import InvalidArgumentError
from tolhouse.model.config import ModelConfig, preset


@dataclass(frozen=True)
class Recipe:
    """The optimiser and schedule of the paper (section 3), with the sizes and rates of a run."""

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
    clip_norm: float = 1.0  # our choice, as the paper does not say
    autocast: bool = True  # bfloat16 products of fp32 weights; our choice, not in the paper

    @property
    def step_tokens(self) -> int:
        return self.batch_sequences * self.sequence_tokens


# Steps, sequences in a batch, tokens in a sequence, peak rate, final rate, warm-up steps, steps
# between evaluations.
_SMALL = (1500, 16, 256, 3e-3, 1e-4, 100, 250)  # ten minutes on one core; compares kinds of models
# The paper's run. One step exceeds the memory of a GPU, and there is no gradient accumulation.
_PAPER = (95_000, 256, 2048, 1e-4, 1e-5, 5000, 1000)  # 50B tokens; the batch size is our choice
RECIPES = {
    # A minute on two cores. The loss falls, but the model does not yet complete texts.
    "tiny": (200, 8, 128, 3e-3, 3e-4, 20, 50),
    **dict.fromkeys(("small", "small-active"), _SMALL),
    # An hour on two cores. The model completes Python code.
    "demo": (4000, 8, 512, 2e-3, 5e-5, 200, 250),
    **dict.fromkeys(("paper-250m", "paper-750m", "paper-1b"), _PAPER),
}


def recipe(name: str, kind: str, beta: int) -> Recipe:
    if name not in RECIPES:
        raise InvalidArgumentError(f"recipe {name!r} is unknown; one of {', '.join(RECIPES)}")
    vocabulary = {"vocab_size": 8192} if name.startswith("paper-") else {}
    config = preset(name.removeprefix("paper-"), kind, beta, **vocabulary)
    return Recipe(config, *RECIPES[name], autocast=name != "tiny")
