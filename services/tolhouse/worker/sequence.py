"""One request on its way through the worker."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tolhouse.errors import InvalidArgument, TolhouseError

Emit = Callable[[list[int], str, TolhouseError | None], None]  # new tokens, finish reason, error


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to end. temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in."""

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise InvalidArgument(message)

        require(0 <= self.temperature <= 100, f"temperature must be from 0 to 100, not {self.temperature:g}")
        require(self.top_k >= 0, f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p:g}")


@dataclass(eq=False)
class Sequence:
    """Owned by the engine's thread once added. `emit` is called there: with tokens, and once with a reason or an error."""

    prompt_tokens: int
    ids: list[int]  # prompt and answer
    sampling: Sampling
    emit: Emit
    computed: int = 0  # tokens of `ids` whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)  # of the KV cache, in order
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed & 0x7FFF_FFFF_FFFF_FFFF)

    @property
    def most_tokens(self) -> int:
        """Tokens it may come to have in the cache; the last one sampled never gets there."""
        return self.prompt_tokens + self.sampling.max_tokens - 1

    def take(self, token_id: int) -> str:
        """Add a sampled token; the finish reason if it was the last: "stop" leaves an end token out, "length" keeps it."""
        if token_id in self.sampling.stop_ids:
            return "stop"
        self.ids.append(token_id)
        return "length" if len(self.ids) - self.prompt_tokens >= self.sampling.max_tokens else ""
