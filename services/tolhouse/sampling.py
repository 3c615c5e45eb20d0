"""How the tokens of one request are chosen, and when they end: the values, each checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tolhouse.client.generation import MAX_ROW_SCALE
from tolhouse.errors import InvalidArgument

MAX_LOGPROBS = 20
MAX_BIASED = 1024
MAX_STOP_IDS = 256
_ROUNDING = 1e-8  # what 32 bits on the wire make of a lower bound


@dataclass(frozen=True)
class SamplingParams:
    """Temperature 0 is greedy; every other default leaves the model's distribution as it is.

    The order: logit_bias, min_tokens, repetition_penalty, frequency and presence penalty, temperature, min_p, top_k, top_p.
    Log probabilities are those before all of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # as a share of the likeliest token's probability
    repetition_penalty: float = (
        1.0  # divides positive logits of tokens in prompt or answer, multiplies negative ones
    )
    presence_penalty: float = 0.0  # off the logits of tokens in the answer
    frequency_penalty: float = 0.0  # the same, as often as they are there
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0  # before a stop id
    logprobs: int | None = None  # tell each token's, and those of so many likeliest
    prompt_logprobs: int | None = None
    row_scale: float = 1.0  # feed-forward rows are multiplied by it (PAPER section 5)
    absent_layers: frozenset[int] = frozenset()  # layers that go without theirs
    layer_scales: tuple[float, ...] = ()  # one for each layer, times row_scale; none: 1 for all

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise InvalidArgument(message)

        def within(name: str, low: float, high: float) -> None:  # false for what is not a number
            value = getattr(self, name)
            require(
                low - _ROUNDING <= value <= high,
                f"{name} must be from {low:g} to {high:g}, not {value:g}",
            )

        least = 0 if self.wants_prompt_logprobs else 1
        require(
            self.max_tokens >= least, f"max_tokens must be at least {least}, not {self.max_tokens}"
        )
        within("temperature", 0, 100)
        require(self.top_k >= 0, f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p:g}")
        within("min_p", 0, 1)
        within("repetition_penalty", 0.01, 10)
        within("presence_penalty", -2, 2)
        within("frequency_penalty", -2, 2)
        within("row_scale", -MAX_ROW_SCALE, MAX_ROW_SCALE)
        far = next(
            (scale for scale in self.layer_scales if not -MAX_ROW_SCALE <= scale <= MAX_ROW_SCALE),
            0,
        )
        require(
            far == 0,
            f"layer_scales must be from {-MAX_ROW_SCALE:g} to {MAX_ROW_SCALE:g}, not {far:g}",
        )
        require(
            len(self.logit_bias) <= MAX_BIASED,
            f"logit_bias has {len(self.logit_bias)} tokens; allowed are {MAX_BIASED}",
        )
        wrong = next((value for value in self.logit_bias.values() if not -100 <= value <= 100), 0)
        require(wrong == 0, f"logit_bias must be from -100 to 100, not {wrong:g}")
        require(
            len(self.stop_ids) <= MAX_STOP_IDS,
            f"there are {len(self.stop_ids)} stop ids; allowed are {MAX_STOP_IDS}",
        )
        require(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens must be from 0 to max_tokens, which is {self.max_tokens}, not {self.min_tokens}",
        )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                within(name, 0, MAX_LOGPROBS)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Logits are needed at every position of the prompt."""
        return self.prompt_logprobs is not None

    @property
    def probes(self) -> bool:
        """Rows are not added as they are."""
        return (
            self.row_scale != 1
            or bool(self.absent_layers)
            or any(scale != 1 for scale in self.layer_scales)
        )

    @property
    def penalises(self) -> bool:
        """What was said before matters."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
