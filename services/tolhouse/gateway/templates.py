"""The checkpoint's chat template: messages to a prompt's text, rendered as transformers does."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tolhouse.errors import InvalidArgument

CONFIG, FILE = "tokenizer_config.json", "chat_template.jinja"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """chat_template.jinja of a folder, or else `chat_template` of its tokenizer_config.json."""

    def __init__(self, folder: Path) -> None:
        config = _read_config(folder / CONFIG)
        self.tokens: dict[str, str] = {}
        for name in _TOKENS:
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                self.tokens[name] = value
        source = config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if (folder / FILE).is_file():
            source = (folder / FILE).read_text()
        self.source: str | None = source if isinstance(source, str) else None
        self.template: Template | None = None
        try:
            if self.source is not None:
                self.template = _environment().from_string(self.source)
        except TemplateError as error:
            raise InvalidArgument(f"the chat template in {folder} is malformed: {error}") from None

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text; InvalidArgument without a template, or if it refuses the messages."""
        if self.template is None:
            raise InvalidArgument(
                f"this model has no chat template: chat needs a {FILE}, or a {CONFIG} with "
                "chat_template, beside the gateway's tokenizer.json; /v1/completions needs none"
            )
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.tokens
            )
        except Exception as error:  # noqa: BLE001 - templates are programs: messages make them fail
            raise InvalidArgument(f"the chat template refuses these messages: {error}") from None


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise InvalidArgument(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidArgument(f"{file} is not a JSON object")
    return config


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    # jinja's own tojson escapes for HTML
    made.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    made.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    made.globals["raise_exception"] = _raise
    return made


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
