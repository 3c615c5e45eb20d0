"""One request on its way through the worker."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tolhouse.engine.sampler import Logprobs, State
from tolhouse.errors import TolhouseError
from tolhouse.sampling import SamplingParams
from tolhouse.tracing import INVALID_SPAN, Span


@dataclass(frozen=True)
class Output:
    """What a step emits for one sequence. The last one has a reason or an error."""

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
    times: list[float] = field(default_factory=list)  # of its arrival and of its last token
    state: State = field(init=False)  # of the sampler

    def __post_init__(self) -> None:
        self.state = State(self.sampling, self.ids)

    @property
    def rows_key(self) -> str:
        """Identifies the rows behind its keys and values: sequences of the same key share them."""
        s = self.sampling
        return f"{self.table} {s.row_scale} {sorted(s.absent_layers)} {s.layer_scales}"

    def append(
        self,
        token_id: int,
        logprobs: Logprobs | None = None,
        prompt_logprobs: Logprobs | None = None,
    ) -> Output:
        """Add a sampled token, unless it is an end token; what there is to emit."""
        if not self.sampling.max_tokens:  # only the prompt's log probabilities are asked for
            return Output(finish_reason="length", prompt_logprobs=prompt_logprobs)
        if token_id in self.sampling.stop_token_ids:
            return Output([], "stop", None, token_id, logprobs, prompt_logprobs)
        self.ids.append(token_id)
        full = len(self.ids) - self.prompt_tokens >= self.sampling.max_tokens
        return Output([token_id], "length" * full, None, None, logprobs, prompt_logprobs)
