"""The checkpoint's chat template: messages to the text of a prompt, rendered as transformers does."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tolhouse.errors import InvalidArgument

CONFIG, FILE = "tokenizer_config.json", "chat_template.jinja"


class ChatTemplate:
    """Of a folder with a tokenizer.json: chat_template.jinja, or else `chat_template` of tokenizer_config.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens: dict[str, str] = {}  # bos_token and the like
        self.template: Template | None = None
        config: Any = {}
        if (folder / CONFIG).is_file():
            try:
                config = json.loads((folder / CONFIG).read_text())
            except ValueError as error:
                raise InvalidArgument(f"{folder / CONFIG} is not JSON: {error}") from None
            if not isinstance(config, dict):
                raise InvalidArgument(f"{folder / CONFIG} is not a JSON object")
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                self.tokens[name] = value
        source = (
            (folder / FILE).read_text()
            if (folder / FILE).is_file()
            else config.get("chat_template")
        )
        if isinstance(source, list):  # several, by name
            source = next(
                (
                    t.get("template")
                    for t in source
                    if isinstance(t, dict) and t.get("name") == "default"
                ),
                None,
            )
        self.source = source if isinstance(source, str) else None
        if self.source is not None:
            try:
                self.template = _environment().from_string(self.source)
            except TemplateError as error:
                raise InvalidArgument(
                    f"the chat template in {folder} is malformed: {error}"
                ) from None

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text; InvalidArgument where there is no template, or it does not take these messages."""
        if self.template is None:
            raise InvalidArgument(
                f"this model has no chat template: chat needs a {FILE}, or a {CONFIG} with chat_template, beside the gateway's "
                "tokenizer.json; /v1/completions works without"
            )
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.tokens
            )
        except Exception as error:  # noqa: BLE001 - templates are programs: what fails in one is what the messages brought
            raise InvalidArgument(
                f"the chat template does not take these messages: {error}"
            ) from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().astimezone().strftime(form),
    }
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja's own escapes for HTML


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
