"""Request bodies of the API. Unknown and unsupported parameters are refused by name.

A value without an effect is accepted on every route, even if the parameter is not supported: null,
a default of OpenAI or vLLM, or a value that does not change the answer (`NEUTRAL`).
"""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, model_validator
from pydantic_core import PydanticCustomError

from tolhouse import sampling
from tolhouse.sampling import Bool, Int, SamplingOptions, SamplingParams

T = TypeVar("T")
MAX_CHOICES = 128  # the product of the number of prompts and n
MAX_EXPLORED = 8_192  # characters; each has at most four tokens
MAX_COMPARED = 256  # tokens of each completion that the explorer compares

# Validation stops at the first wrong item. Otherwise, each item of a large body could be an error.
Several = Annotated[list[T], Field(fail_fast=True)]
Prompts = Annotated[list[T], Field(max_length=MAX_CHOICES, fail_fast=True)]
StopString = Annotated[StrictStr, Field(max_length=512)]
StopStrings = Annotated[list[StopString], Field(max_length=32, fail_fast=True)]
Positive = Annotated[Int, Field(ge=1)]
_SCORES = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 20}, {"enum": [None, False]}]}
Scores = Annotated[  # clients of the chat API send false instead of null
    sampling.Logprobs | None,
    BeforeValidator(lambda count: None if count is False else count),
    Field(json_schema_extra=_SCORES),
]

ANY = ("any value",)  # for parameters that do not change the answer
# OpenAI's and vLLM's parameters that are not supported, and their values without an effect.
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(("metadata", "prompt_cache_key", "prompt_cache_retention"), ANY),
    "safety_identifier": ANY,
    **dict.fromkeys(("store", "use_beam_search", "early_stopping", "logprobs"), (False,)),
    **dict.fromkeys(("return_tokens_as_token_ids", "return_token_ids"), (False,)),
    "continue_final_message": (False,),
    **dict.fromkeys(("spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("parallel_tool_calls", "include_reasoning"), (True, False)),
    **dict.fromkeys(("tools", "functions", "documents", "bad_words", "logits_processors"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("chat_template_kwargs", "mm_processor_kwargs", "vllm_xargs"), ({},)),
    **dict.fromkeys(("audio", "prediction", "web_search_options", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("allowed_token_ids", "prompt_logprobs", "chat_template", "cache_salt"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern"), ()),
    **dict.fromkeys(("structured_outputs", "kv_transfer_params", "request_id"), ()),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none", "medium"),
    "verbosity": ("medium",),
    "length_penalty": (1,),
    "priority": (0,),
    "suffix": ("",),
    "top_logprobs": (0,),
}


def _is_one_of(value: Any, values: tuple) -> bool:
    """Return whether `value` is one of `values`. As in JSON, false is not 0."""
    return any(v == value and isinstance(v, bool) == isinstance(value, bool) for v in values)


def _is_empty(value: Any) -> bool:
    """Return whether a value, or each value inside it, is null, false or an empty text."""
    rest = [value]
    while rest:  # not recursive, because a value may be deep
        one = rest.pop()
        if isinstance(one, dict | list):
            rest += one.values() if isinstance(one, dict) else one
        elif not (one is None or one is False or one == ""):
            return False
    return True


def refusal(param: str, message: str, code: str = "invalid_value") -> PydanticCustomError:
    """Return an error about one parameter with OpenAI's `code`."""
    return PydanticCustomError(code, "{message}", {"message": message, "param": param})


def _described(schema: dict[str, Any], model: type["Object"]) -> None:
    """Add to the schema that null stands for a default, and the accepted unsupported parameters."""
    for name, field in schema["properties"].items():
        if field.get("default") is not None:
            default = field.pop("default")
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], "default": default}
    for name, values in model.neutral.items():
        if name not in schema["properties"]:
            allowed = {} if values == ANY else {"enum": [None, *values]}
            schema["properties"][name] = {**allowed, "description": "Accepted and not used."}
    # The contents of empty objects and lists are allowed, which a schema can't express.
    schema["additionalProperties"] = {} if model.ignores_empty else {"type": "null"}


class Object(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra=_described)
    neutral: ClassVar[dict[str, tuple]] = {}
    ignores_empty: ClassVar[bool] = False  # whether unknown fields may be empty

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        """Return the fields that have an effect."""
        if not isinstance(sampling.few_fields(given), dict):
            return given
        return {k: value for k, value in given.items() if not cls._asks_for_nothing(k, value)}

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        if value is None or name in cls.model_fields:
            return value is None
        if (values := cls.neutral.get(name)) is None:
            return cls.ignores_empty and _is_empty(value)
        if values == ANY or _is_one_of(value, values):
            return True
        allowed = f", or send {' or '.join(map(repr, values))}" if values else ""
        message = f"{name} is not supported: leave it out{allowed}"
        raise refusal(name, message, "unsupported_parameter")


class Body(Object):
    prompt_param: ClassVar[str] = "prompt"  # the parameter that has the text or the tokens
    model: Annotated[StrictStr, Field(max_length=256)] | None = None


class StreamOptions(Object):
    neutral: ClassVar = {"include_obfuscation": (False,)}
    include_usage: Bool = False
    continuous_usage_stats: Bool = False  # with include_usage, each chunk has the usage so far


class Generation(SamplingOptions, Body):
    """Parameters of completions and chats. Parameters that OpenAI lacks have the names of vLLM."""

    neutral = NEUTRAL

    temperature: sampling.Temperature = 1.0
    n: Annotated[Positive, Field(le=MAX_CHOICES)] = 1
    best_of: Int | None = Field(None, description="Not supported: must be equal to n.")
    max_completion_tokens: Positive | None = None
    stop: StopString | StopStrings | None = None
    include_stop_str_in_output: Bool = False
    skip_special_tokens: Bool = Field(True, description="Leave special tokens out of the text.")
    stream: Bool = False
    stream_options: StreamOptions = StreamOptions()
    user: Annotated[StrictStr, Field(max_length=512)] | None = None  # accepted and not used
    echo: Bool = Field(False, description="Begin the answer with the prompt.")

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.stream_options.include_usage and not self.stream:
            message = "stream_options: include_usage is allowed with stream=true only"
            raise refusal("stream_options", message)
        if self.best_of not in (None, self.n):
            message = f"best_of is not supported: leave it out, or send n={self.n}"
            raise refusal("best_of", message, "unsupported_parameter")
        return self

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(
        self, max_tokens: int, logprobs: int | None, end_ids: tuple[int, ...] = ()
    ) -> SamplingParams:
        """Return the worker's parameters for the first choice of a prompt.

        Each further choice has the next seed. `end_ids` end the answer, in addition to
        `stop_token_ids`.
        """
        options = {name: getattr(self, name) for name in SamplingOptions.model_fields}
        options["stop_token_ids"] = (*self.stop_token_ids, *end_ids)
        if self.echo and (logprobs is not None or not max_tokens):
            options["prompt_logprobs"] = logprobs or 0
        return SamplingParams(max_tokens, logprobs=logprobs, **options)


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: StrictStr | Prompts[StrictStr] | Several[Int] | Prompts[Several[Int]]
    max_tokens: sampling.MaxTokens = 16
    logprobs: Scores = None
    add_special_tokens: Bool = Field(
        True, description="Apply the tokenizer's post-processor, which may add a BOS token."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        prompts = len(self.prompts())
        if not prompts:
            message = "prompt is an empty list: send a text, token ids, or a list of either"
            raise refusal("prompt", message)
        if not self.most_tokens(0) and not self.echo:
            message = "max_tokens must be at least 1; 0 is allowed with echo=true"
            raise refusal("max_tokens", message, "integer_below_min_value")
        if prompts * self.n > MAX_CHOICES:
            count = f"{prompts} prompts times n={self.n}"
            raise refusal("n", f"{count} is more than {MAX_CHOICES} completions")
        return self

    def prompts(self) -> list[Any]:
        """Return the prompts one by one, all texts or all token ids."""
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if one else list(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens to return for each token. None: no log probabilities."""
        return self.logprobs

    def most_tokens(self, room: int) -> int:
        return self.max_completion_tokens or self.max_tokens


class Part(Object):
    ignores_empty = True
    neutral: ClassVar = {"cache_control": ANY}
    type: Literal["text"]
    text: StrictStr


class Message(Object):
    """A message. In the history, answers of any server are accepted with all their fields."""

    ignores_empty = True
    calls: ClassVar = ("tool_calls", "function_call", "audio")  # contents beside text
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Several[Part] | None = None
    name: StrictStr | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_metadata(cls, given: Any) -> Any:
        """Remove fields of an answer that its text does not depend on, such as an id."""
        if not isinstance(sampling.few_fields(given), dict) or given.get("role") != "assistant":
            return given
        return {k: v for k, v in given.items() if k in cls.model_fields or k in cls.calls}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and self.role != "assistant":
            message = f"content of a {self.role} message is required: a text, or a list of parts"
            raise refusal("messages", message)
        return self

    @property
    def plain(self) -> dict[str, str]:
        """The message in the form that templates expect, with the content as one text."""
        parts, name = self.content or "", {"name": self.name} if self.name else {}
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return {"role": self.role, "content": text, **name}


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    prompt_param = "messages"
    messages: Messages
    echo: Literal[False] = False
    max_tokens: Positive | None = None
    logprobs: Bool = False
    top_logprobs: sampling.Logprobs = 0
    add_special_tokens: Bool = Field(
        False, description="Apply the tokenizer's post-processor to the chat template's text."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "top_logprobs is allowed with logprobs=true only")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def most_tokens(self, room: int) -> int:
        return self.max_completion_tokens or self.max_tokens or max(1, room)


GenerationRequest = CompletionRequest | ChatRequest


class TokenizeRequest(Body):
    """POST /tokenize, for a text, or for messages if the checkpoint has a chat template."""

    neutral = NEUTRAL

    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_generation_prompt: Bool = True
    add_special_tokens: Bool | None = Field(
        None, description="Apply the tokenizer's post-processor. Default: to a prompt only."
    )
    return_token_strs: Bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("prompt", "send either prompt, a text, or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    prompt_param = "tokens"
    tokens: Several[sampling.TokenId]


class ExploreRequest(Body):
    """POST /explore/tokens."""

    prompt_param = "text"
    text: Annotated[StrictStr, Field(max_length=MAX_EXPLORED)]


class CompareRequest(ExploreRequest):
    """POST /explore/compare."""

    max_tokens: Annotated[Positive, Field(le=MAX_COMPARED)] = 24
    row_scale: sampling.Scale = 1.0
    layer_scales: sampling.Layers[sampling.Scale] = ()
