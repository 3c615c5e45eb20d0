"""The bodies that the gateway takes. What is not supported, or unknown, is refused by name."""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from tolhouse.client.generation import MAX_ROW_SCALE, Options

T = TypeVar("T")

MAX_CHOICES = 128  # prompts times n
MAX_LOGPROBS = 20
MAX_EXPLORED = 8_192  # characters; a token has at least a quarter of one
MAX_STOPS = 32
MAX_FIELDS = 1024  # of an object: logit_bias has the most

StopString = Annotated[StrictStr, Field(max_length=512)]
BiasedId = Annotated[int, Field(ge=0, lt=2**32)]  # a text in JSON
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**32)]
RowScale = Annotated[float, Field(ge=-MAX_ROW_SCALE, le=MAX_ROW_SCALE, strict=True)]
# The first error ends a list: a body of a million wrong items would make as many errors, in a gigabyte, else.
Several = Annotated[list[T], Field(fail_fast=True)]
Prompts = Annotated[list[T], Field(max_length=MAX_CHOICES, fail_fast=True)]


def _few(given: Any) -> Any:
    """The same for objects."""
    if isinstance(given, dict) and len(given) > MAX_FIELDS:
        raise ValueError(f"an object has {len(given)} fields; at most {MAX_FIELDS} are taken")
    return given


class Object(BaseModel):
    model_config = ConfigDict(extra="forbid")

    _few = model_validator(mode="before")(_few)


class Body(Object):
    unsupported: ClassVar[
        dict[str, tuple]
    ] = {}  # parameters that others know, and the values at which they ask for nothing

    model: Annotated[StrictStr, Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, harmless in cls.unsupported.items():
            if given.get(name) not in (None, *harmless):
                allowed = f", or {' or '.join(map(repr, harmless))}" if harmless else ""
                raise ValueError(f"{name} is not supported: leave it out{allowed}")
        return {name: value for name, value in given.items() if name not in cls.unsupported}


class StreamOptions(Object):
    include_usage: StrictBool | None = False


class Generation(Body):
    """What completions and chats have in common. From `top_k` on, it goes beyond OpenAI's, as vLLM does."""

    max_tokens: StrictInt | None = Field(None, ge=0)
    temperature: float | None = Field(1.0, ge=0, le=2, strict=True)
    top_p: float | None = Field(1.0, gt=0, le=1, strict=True)
    n: StrictInt | None = Field(1, ge=1, le=MAX_CHOICES)
    seed: StrictInt | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: (
        StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None
    ) = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(0.0, ge=-2, le=2, strict=True)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2, strict=True)
    logit_bias: Annotated[dict[BiasedId, Bias], BeforeValidator(_few)] | None = None
    user: Annotated[StrictStr, Field(max_length=512)] | None = None  # taken and not used
    top_k: StrictInt | None = Field(0, ge=-1, le=2**31)  # -1, 0: all
    min_p: float | None = Field(0.0, ge=0, le=1, strict=True)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=10, strict=True)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    include_stop_str_in_output: StrictBool | None = False
    ignore_eos: StrictBool | None = False
    min_tokens: StrictInt | None = Field(0, ge=0, le=2**31)
    row_scale: RowScale | None = 1.0  # feed-forward rows are multiplied by it
    absent_layers: Annotated[list[TokenId], Field(max_length=1024, fail_fast=True)] | None = (
        None  # layers that go without their rows
    )
    layer_scales: Annotated[list[RowScale], Field(max_length=1024, fail_fast=True)] | None = (
        None  # one for each layer, times that
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> "Generation":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is allowed with stream=true only")
        return self

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in stops if s]

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None: no log probabilities."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """The prompt is part of the answer."""
        return False

    def most_tokens(self, room: int) -> int:
        """Tokens of the answer, where the context has room for so many."""
        raise NotImplementedError

    def options(self, number: int) -> Options:
        """The worker's, for choice `number` of a prompt."""
        return Options(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0),
            top_p=1.0
            if self.top_p is None
            else max(self.top_p, 1e-30),  # on the wire it has 32 bits
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=None if self.seed is None else (self.seed + number) % 2**64,
            stop_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            row_scale=1.0 if self.row_scale is None else self.row_scale,
            absent_layers=self.absent_layers or (),
            layer_scales=self.layer_scales or (),
            logprobs=self.top,
        )


class CompletionRequest(Generation):
    """POST /v1/completions."""

    unsupported: ClassVar[dict[str, tuple]] = {
        "suffix": ("",),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "response_format": ({"type": "text"},),
    }

    prompt: StrictStr | Prompts[StrictStr] | Several[StrictInt] | Prompts[Several[StrictInt]]
    logprobs: StrictInt | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: StrictBool | None = False
    best_of: StrictInt | None = None

    @model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        if not self.prompts:
            raise ValueError("prompt is an empty list: give a text, token ids, or a list of either")
        if self.best_of not in (None, self.n or 1):
            raise ValueError(
                f"best_of is not supported: leave it out, or equal to n, which is {self.n or 1}"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1; 0 is allowed with echo=true")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompts)} prompts times n={self.n or 1} is more than {MAX_CHOICES} completions in one request"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    def most_tokens(self, room: int) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def options(self, number: int) -> Options:
        options = super().options(number)
        if self.echoes and (self.top is not None or self.max_tokens == 0):
            options["prompt_logprobs"] = self.top or 0
        return options


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
        content = (
            self.content
            if isinstance(self.content, str)
            else "\n".join(part.text for part in self.content)
        )
        return {"role": self.role, "content": content, **({"name": self.name} if self.name else {})}


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[dict[str, tuple]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "web_search_options": (),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "echo": (False,),
        "continue_final_message": (False,),
        "add_generation_prompt": (True,),
        "store": (False,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    logprobs: StrictBool | None = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs and self.top_logprobs != 0:
            raise ValueError("top_logprobs is allowed with logprobs=true only")
        return self

    @property
    def top(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def most_tokens(self, room: int) -> int:
        return self.max_completion_tokens or self.max_tokens or max(1, room)


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of messages where the checkpoint has a chat template."""

    prompt: StrictStr | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)] | None
    ) = None
    add_generation_prompt: StrictBool = True
    add_special_tokens: StrictBool = False
    return_token_strs: StrictBool | None = False

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt, a text, or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: Several[TokenId]


class ExploreRequest(Body):
    """POST /explore/tokens."""

    text: Annotated[StrictStr, Field(max_length=MAX_EXPLORED)]
