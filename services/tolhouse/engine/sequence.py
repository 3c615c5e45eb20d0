"""One request on its way through the worker."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tolhouse.engine.sampler import Logprobs, State
from tolhouse.errors import TolhouseError
from tolhouse.sampling import SamplingParams
from tolhouse.tracing import INVALID_SPAN, Span


@dataclass(frozen=True)
class Output:
    """What a step has for the caller of one sequence. A reason or an error is its last word."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    error: TolhouseError | None = None
    end_id: int | None = None  # "stop": the end token, which is not one of `tokens`
    logprobs: Logprobs | None = None  # of `tokens`, and of the end token
    prompt_logprobs: Logprobs | None = None  # of the prompt's next tokens, from its second on


@dataclass(eq=False)
class Sequence:
    """Owned by the engine's thread once added. `emit` is called there."""

    prompt_tokens: int
    ids: list[int]  # prompt and answer
    sampling: SamplingParams
    emit: Callable[[Output], None]
    computed: int = 0  # tokens of `ids` whose keys and values are in the cache
    span: Span = INVALID_SPAN  # of its request, if that is traced
    table: str = ""  # "name@version" of its rows; the engine says which when it comes
    priority: int = 0  # lower goes first
    arrival: int = 0  # the scheduler's count
    blocks: list[int] = field(default_factory=list)  # of the KV cache, in order
    digests: list[bytes] = field(default_factory=list)  # of its text, block by block
    scored: int = 0  # prompt tokens whose log probabilities have been emitted
    times: list[float] = field(default_factory=list)  # when it came, and when it last got a token
    state: State = field(init=False)  # of the sampler

    def __post_init__(self) -> None:
        self.state = State(self.sampling, self.ids)

    @property
    def rows_key(self) -> str:
        """Says what rows its keys and values come from: those of others may be shared where it is the same."""
        sampling = self.sampling
        if not sampling.probes:
            return self.table
        return f"{self.table} {sampling.row_scale!r} {sorted(sampling.absent_layers)} {sampling.layer_scales}"

    @property
    def most_tokens(self) -> int:
        """Tokens it may come to have in the cache; the last one sampled never gets there."""
        return self.prompt_tokens + max(1, self.sampling.max_tokens) - 1

    def take(self, token_id: int) -> str:
        """Add a sampled token; the finish reason if it was the last: "stop" leaves an end token out, "length" keeps it."""
        if not self.sampling.max_tokens:  # only the prompt's log probabilities were wanted
            return "length"
        if token_id in self.sampling.stop_token_ids:
            return "stop"
        self.ids.append(token_id)
        return "length" if len(self.ids) - self.prompt_tokens >= self.sampling.max_tokens else ""
