"""A sequence: the state of one request in the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from tolhouse.engine.kv_policy import FULL, Full
from tolhouse.engine.sampler import Logprobs, State
from tolhouse.errors import TolhouseError
from tolhouse.sampling import SamplingParams
from tolhouse.tracing import INVALID_SPAN, Span


@dataclass(frozen=True)
class Output:
    """The output of one step for one sequence. The last output has a reason or an error."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    error: TolhouseError | None = None
    end_id: int | None = None  # the end token if the reason is "stop"; `tokens` does not contain it
    logprobs: Logprobs | None = None  # of `tokens` and the end token
    prompt_logprobs: Logprobs | None = None  # of the next prompt tokens, from the second on


@dataclass(eq=False)
class Sequence:
    """A prompt and its answer. After `add`, the engine's thread owns it and calls `emit`."""

    prompt_tokens: int
    ids: list[int]  # the tokens of the prompt and the answer, with those that the policy adds
    sampling: SamplingParams
    emit: Callable[[Output], None]
    computed: int = 0  # the number of `ids` whose keys and values were computed
    policy: Full = FULL  # decides which tokens the cache keeps
    memory: Tensor | None = None  # of dropped tokens, [N, G, E, E + 1] (kv_policy.Compressive)
    dropped: int = 0  # the number of computed tokens that the cache has dropped
    span: Span = INVALID_SPAN  # the trace span of the request
    table: str = ""  # the "name@version" of its rows, which the engine sets on arrival
    priority: int = 0  # a lower value runs first
    arrival: int = 0  # the number that the scheduler assigns in order of arrival
    blocks: list[int] = field(default_factory=list)  # blocks of the KV cache, in order
    copy: list[int] = field(default_factory=list)  # blocks that replace `blocks` after the prompt
    digests: list[bytes] = field(default_factory=list)  # one for each full block
    scored: int = 0  # the number of prompt tokens with emitted log probabilities
    times: list[float] = field(default_factory=list)  # the times of arrival and of the last token
    state: State = field(init=False)  # the sampler's state

    def __post_init__(self) -> None:
        self.state = State(self.sampling, self.ids)

    @property
    def rows_key(self) -> str:
        """The identity of the rows and the policy on which the keys and values depend.

        Sequences share cached blocks only if they have the same key.
        """
        s = self.sampling
        rows = f"{self.table} {s.row_scale} {sorted(s.absent_layers)} {s.layer_scales}"
        return f"{rows} {self.policy.key}"

    @property
    def answer_tokens(self) -> int:
        """The number of text tokens of the answer so far."""
        text_tokens = self.policy.text_tokens
        return text_tokens(len(self.ids)) - text_tokens(self.prompt_tokens)

    def follow(self, policy: Full) -> None:
        """Set the policy, and add its summary tokens to the prompt."""
        self.policy, prompt = policy, self.ids[: self.prompt_tokens]
        self.ids = policy.with_summaries(self.ids)
        self.prompt_tokens = len(policy.with_summaries(prompt))

    def append(
        self,
        token_id: int,
        logprobs: Logprobs | None = None,
        prompt_logprobs: Logprobs | None = None,
    ) -> Output:
        """Append a sampled token unless it is an end token. Returns the output to emit."""
        if not self.sampling.max_tokens:  # the request is only for prompt log probabilities
            return Output(finish_reason="length", prompt_logprobs=prompt_logprobs)
        if token_id in self.sampling.stop_token_ids:
            return Output([], "stop", None, token_id, logprobs, prompt_logprobs)
        self.ids.append(token_id)
        if not self.policy.is_text(len(self.ids)):
            self.ids += self.policy.summary
        full = self.answer_tokens >= self.sampling.max_tokens
        return Output([token_id], "length" * full, None, None, logprobs, prompt_logprobs)
