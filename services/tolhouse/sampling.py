"""The sampling parameters, with the names of vLLM. This is the only list of them.

`GenerateRequest` in protos/ has a field for each parameter. Log probabilities are those of the
model. After them, parameters apply in this order: logit_bias, min_tokens, penalties, temperature,
min_p, top_k, top_p.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tolhouse.errors import InvalidArgumentError, PromptTooLongError, UnsupportedError
from tolhouse.v1.generation_pb2 import GenerateRequest

T = TypeVar("T")
MAX_FIELDS = 1024  # in an object; logit_bias has the most fields
MAX_COUNT = 2**31  # more than the tokens in any context
LEAST_TOP_P = 1e-30  # still above 0 in the 32 bits of the protocol


def few_fields(given: Any) -> Any:
    """Refuse an object with too many fields before its fields are validated."""
    if isinstance(given, dict) and len(given) > MAX_FIELDS:
        raise ValueError(f"an object has {len(given)} fields; at most {MAX_FIELDS} are allowed")
    return given


def _option(default: Any, text: str, **bounds: Any) -> Any:
    return Field(default, description=text, **bounds)


# Strict, so that a text is not a number. 32 bits represent each bound exactly.
Bool = Annotated[bool, Field(strict=True)]
Int = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Temperature = Annotated[Number, Field(ge=0, le=100, description="0 is greedy.")]
TopK = Annotated[Int, Field(ge=-1, le=MAX_COUNT), AfterValidator(lambda k: max(0, k))]
TopP = Annotated[Number, Field(gt=0, le=1), AfterValidator(lambda p: max(LEAST_TOP_P, p))]
Scale = Annotated[Number, Field(ge=-16, le=16)]
Seed = Annotated[Int, Field(ge=-(2**63), lt=2**64), AfterValidator(lambda n: n % 2**64)]
MaxTokens = Annotated[
    Int, Field(ge=0, lt=2**32, description="Maximum number of tokens in the answer.")
]
Logprobs = Annotated[Int, Field(ge=0, le=20)]
# Validation stops at the first wrong item. Otherwise, each item of a large body could be an error.
TokenId = Annotated[Int, Field(ge=0, lt=2**32)]
StopIds = Annotated[tuple[TokenId, ...], Field(max_length=256, fail_fast=True)]
Layers = Annotated[tuple[T, ...], Field(max_length=1024, fail_fast=True)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
IdAsText = Annotated[int, Field(ge=0, lt=2**32)]  # a key of a JSON object
Biases = Annotated[dict[IdAsText, Bias], BeforeValidator(few_fields)]


class SamplingOptions(BaseModel):
    """The parameters with the same form in all interfaces."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    temperature: Temperature = 0.0
    top_k: TopK = _option(0, "Sample from this many of the most likely tokens; 0 or -1 is all.")
    top_p: TopP = _option(
        1.0, "Sample from the most likely tokens whose probabilities add up to this."
    )
    min_p: Number = _option(
        0.0, "Least probability, as a fraction of the most likely token's.", ge=0, le=1
    )
    repetition_penalty: Number = _option(
        1.0,
        "Divides positive logits of tokens so far and multiplies negative ones.",
        ge=2**-7,
        le=10,
    )
    presence_penalty: Number = _option(
        0.0, "Subtracted from the logits of tokens in the answer.", ge=-2, le=2
    )
    frequency_penalty: Number = _option(
        0.0, "Subtracted once for each time that the token is in the answer.", ge=-2, le=2
    )
    logit_bias: Biases = _option({}, "Numbers that are added to the logits of token ids.")
    seed: Seed | None = _option(None, "The same seed gives the same tokens. Default: random.")
    stop_token_ids: StopIds = _option(
        (), "Token ids that end the answer, like the model's end tokens."
    )
    ignore_eos: Bool = _option(False, "Do not end the answer at the model's end token.")
    min_tokens: Int = _option(
        0, "Do not end the answer before this many tokens.", ge=0, le=MAX_COUNT
    )
    row_scale: Scale = _option(1.0, "Factor of the looked-up rows of all layers.")
    absent_layers: Layers[TokenId] = _option((), "Layers whose rows are left out.")
    layer_scales: Layers[Scale] = _option((), "A factor for each layer, times row_scale. Empty: 1.")


class SamplingParams(SamplingOptions):
    """The parameters that choose the tokens of one answer and end it.

    Raises InvalidArgumentError if a value is not allowed. The message begins with the parameter's
    name.
    """

    max_tokens: MaxTokens = 16  # 0 is allowed with prompt_logprobs
    logprobs: Logprobs | None = _option(
        None, "Return log probabilities, and those of this many most likely tokens."
    )
    prompt_logprobs: Logprobs | None = _option(None, "The same for the tokens of the prompt.")

    def __init__(self, max_tokens: int = 16, **options: Any) -> None:
        try:
            super().__init__(**{"max_tokens": max_tokens, **options})
        except ValidationError as error:
            first = error.errors()[0]
            name, given = ".".join(map(str, first["loc"])), f"{first['input']!r:.100}"
            raise InvalidArgumentError(f"{name}: {first['msg']}; {given} was given") from None
        if not max_tokens and self.prompt_logprobs is None:
            raise InvalidArgumentError("max_tokens must be at least 1, not 0")
        if self.min_tokens > max_tokens:
            raise InvalidArgumentError(f"min_tokens must be at most max_tokens={max_tokens}")

    def to_proto(self, ids: Iterable[int], request_id: str = "") -> GenerateRequest:
        try:
            return GenerateRequest(**dict(self), request_id=request_id, prompt_token_ids=ids)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidArgumentError(f"the prompt is not a list of token ids: {error}") from None

    @classmethod
    def from_proto(cls, request: GenerateRequest) -> Self:
        given = {f.name: value for f, value in request.ListFields() if f.name in cls.model_fields}
        return cls(**{**given, "max_tokens": request.max_tokens})

    @property
    def probes(self) -> bool:
        """Whether the request scales rows or leaves rows out."""
        return bool({self.row_scale, *self.layer_scales} - {1.0} or self.absent_layers)

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


# The parameters that a worker implements. DescribeWorker reports them, because a server ignores
# unknown fields.
FEATURES = tuple(SamplingParams.model_fields)
_UNSTATED = {*FEATURES} - {"layer_scales"}  # parameters of workers that do not report them


def check_features(request: GenerateRequest, stated: Iterable[str], worker: str) -> None:
    """Raise UnsupportedError if a worker ignores parameters that are not at their defaults.

    `stated` has the features in the worker's description.
    """
    heeded, fields = set(stated) or _UNSTATED, SamplingParams.model_fields
    given = {f.name: value for f, value in request.ListFields() if f.name in fields}
    lacking = [n for n, v in given.items() if n not in heeded and v != fields[n].default]
    if lacking:
        what = f"{worker} is of an earlier release and does not implement {', '.join(lacking)}"
        raise UnsupportedError(f"{what}: leave them out, or upgrade the worker")


def check_prompt(
    prompt_ids: Iterable[int], max_tokens: int, vocab_size: int, context_tokens: int
) -> list[int]:
    """Check the prompt, and return it as a list.

    Raises InvalidArgumentError if it is empty or has an id outside the vocabulary, and
    PromptTooLongError if prompt and `max_tokens` do not fit the context.
    """
    ids = list(prompt_ids)
    if not ids:
        raise InvalidArgumentError("the prompt is empty; at least one token is needed")
    if len(ids) + max_tokens > context_tokens:
        raise PromptTooLongError(  # OpenAI's words, for which clients search
            f"This model's maximum context length is {context_tokens} tokens. However, you "
            f"requested {len(ids) + max_tokens} tokens ({len(ids)} in the prompt, {max_tokens} in "
            "the completion). Please reduce the length of the prompt or completion."
        )
    return check_ids(ids, vocab_size)


def check_ids(ids: list[int], vocab_size: int) -> list[int]:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        bad = next(i for i in ids if not 0 <= i < vocab_size)
        allowed = f"allowed are 0 to {vocab_size - 1}"
        raise InvalidArgumentError(f"token id {bad} is outside the vocabulary: {allowed}")
    return ids
