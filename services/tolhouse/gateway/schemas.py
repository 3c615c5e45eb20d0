"""Request bodies of the API. Unknown and unsupported parameters are refused by name."""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictStr, model_validator

from tolhouse import sampling
from tolhouse.sampling import Bool, Int, SamplingOptions, SamplingParams

T = TypeVar("T")
MAX_CHOICES = 128  # prompts times n
MAX_EXPLORED = 8_192  # characters; a token has at least a quarter of one

# The first wrong item ends a list: a large body would make an error for each of its items, else.
Several = Annotated[list[T], Field(fail_fast=True)]
Prompts = Annotated[list[T], Field(max_length=MAX_CHOICES, fail_fast=True)]
StopString = Annotated[StrictStr, Field(max_length=512)]
StopStrings = Annotated[list[StopString], Field(max_length=32, fail_fast=True)]
Positive = Annotated[Int, Field(ge=1)]


def _nullable(schema: dict[str, Any]) -> None:
    """Clients send null for what they leave at its default."""
    for name, field in schema["properties"].items():
        if field.get("default") is not None:
            default = field.pop("default")
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], "default": default}


class Object(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra=_nullable)
    # OpenAI's or vLLM's parameters, and the values at which they change nothing
    unsupported: ClassVar[dict[str, tuple]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(sampling.few_fields(given), dict):
            return given
        for name, harmless in cls.unsupported.items():
            if given.get(name) not in (None, *harmless):
                allowed = f", or {' or '.join(map(repr, harmless))}" if harmless else ""
                raise ValueError(f"{name} is not supported: leave it out{allowed}")
        unset = {k for k, value in given.items() if value is None and k in cls.model_fields}
        return {k: v for k, v in given.items() if k not in unset and k not in cls.unsupported}


class Body(Object):
    model: Annotated[StrictStr, Field(max_length=256)] | None = None


class StreamOptions(Object):
    include_usage: Bool = False


class Generation(SamplingOptions, Body):
    """Parameters of completions and chats; those beyond OpenAI's are as in vLLM."""

    unsupported = {
        **dict.fromkeys(("audio", "prediction", "reasoning_effort", "web_search_options"), ()),
        **dict.fromkeys(("use_beam_search", "continue_final_message", "store"), (False,)),
        **dict.fromkeys(("tools", "functions"), ([],)),
        **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "add_generation_prompt": (True,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
        "length_penalty": (1,),
        "suffix": ("",),
    }

    temperature: sampling.Temperature = 1.0
    n: Annotated[Positive, Field(le=MAX_CHOICES)] = 1
    stop: StopString | StopStrings | None = None
    include_stop_str_in_output: Bool = False
    stream: Bool = False
    stream_options: StreamOptions = StreamOptions()
    echo: Bool = False  # the prompt is part of the answer
    user: Annotated[StrictStr, Field(max_length=512)] | None = None  # accepted and not used

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise ValueError("stream_options is allowed with stream=true only")
        return self

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """The worker's parameters for the first choice of a prompt; each next has the next seed."""
        options = {name: getattr(self, name) for name in SamplingOptions.model_fields}
        if self.echo and (logprobs is not None or not max_tokens):
            options["prompt_logprobs"] = logprobs or 0
        return SamplingParams(max_tokens, logprobs=logprobs, **options)


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: StrictStr | Prompts[StrictStr] | Several[Int] | Prompts[Several[Int]]
    max_tokens: sampling.MaxTokens = 16
    logprobs: sampling.Logprobs | None = None
    best_of: Int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        prompts = len(self.prompts())
        if not prompts:
            raise ValueError("prompt is an empty list: give a text, token ids, or a list of either")
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of is not supported: leave it out, or equal to n={self.n}")
        if not self.max_tokens and not self.echo:
            raise ValueError("max_tokens must be at least 1; 0 is allowed with echo=true")
        if prompts * self.n > MAX_CHOICES:
            count = f"{prompts} prompts times n={self.n}"
            raise ValueError(f"{count} is more than {MAX_CHOICES} completions")
        return self

    def prompts(self) -> list[Any]:
        """The prompts one by one, all texts or all token ids."""
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if one else list(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        """Number of likeliest tokens to return for each token; None: no log probabilities."""
        return self.logprobs

    def most_tokens(self, room: int) -> int:
        return self.max_tokens


class Part(Object):
    type: Literal["text"]
    text: StrictStr


class Message(Object):
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Several[Part]
    name: StrictStr | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As templates know it: the content is one text."""
        parts, name = self.content, {"name": self.name} if self.name else {}
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return {"role": self.role, "content": text, **name}


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    echo: Literal[False] = False
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: Bool = False
    top_logprobs: sampling.Logprobs = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is allowed with logprobs=true only")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def most_tokens(self, room: int) -> int:
        return self.max_completion_tokens or self.max_tokens or max(1, room)


GenerationRequest = CompletionRequest | ChatRequest


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of messages where the checkpoint has a chat template."""

    prompt: StrictStr | None = None
    messages: Messages | None = None
    add_generation_prompt: Bool = True
    add_special_tokens: Bool = False
    return_token_strs: Bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt, a text, or messages")
        return self


class DetokenizeRequest(Body):
    tokens: Several[sampling.TokenId]


class ExploreRequest(Body):
    text: Annotated[StrictStr, Field(max_length=MAX_EXPLORED)]
