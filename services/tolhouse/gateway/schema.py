"""The bodies of the OpenAI-compatible API. What is not supported yet, or unknown, is refused by name."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

MAX_CHOICES = 128  # prompts times n


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False


class CompletionRequest(BaseModel):
    """POST /v1/completions. `top_k` and `ignore_eos` go beyond OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: StrictInt | None = Field(16, ge=1)
    temperature: float | None = Field(1.0, ge=0, le=2, strict=True)
    top_p: float | None = Field(1.0, gt=0, le=1, strict=True)
    top_k: StrictInt = Field(0, ge=0, le=2**31)
    n: StrictInt | None = Field(1, ge=1, le=MAX_CHOICES)
    seed: StrictInt | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StrictStr | list[StrictStr] | None = Field(None, max_length=4096)
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool = False
    user: StrictStr | None = None  # taken and not used
    # known to OpenAI's API, and so far only allowed to ask for nothing
    best_of: StrictInt | None = None
    echo: StrictBool | None = False
    frequency_penalty: float | None = 0
    logit_bias: dict[str, Any] | None = None
    logprobs: StrictInt | None = None
    presence_penalty: float | None = 0
    suffix: StrictStr | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "CompletionRequest":
        for name in ("echo", "frequency_penalty", "logit_bias", "logprobs", "presence_penalty", "suffix"):
            value = getattr(self, name)
            if value not in (None, False, 0, "", {}) or (name == "logprobs" and value is not None):
                raise ValueError(f"{name} is not supported yet: leave it out")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported yet: leave it out, or equal to n")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is allowed with stream=true only")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts times n={self.n or 1} is more than {MAX_CHOICES} completions in one request")
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
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [s for s in stops if s]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """The answer, and each piece of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int  # Unix time, seconds
    model: str
    choices: list[Choice]
    usage: Usage | None = None
