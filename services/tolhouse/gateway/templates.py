"""The checkpoint's chat template, which turns messages into a prompt as transformers does."""

import json
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tolhouse.errors import InvalidArgumentError

CONFIG, FILE = "tokenizer_config.json", "chat_template.jinja"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


_options = {"trim_blocks": True, "lstrip_blocks": True}  # as in transformers
_environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols], **_options)
# Jinja's own filter escapes HTML.
_environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
_environment.globals |= {"strftime_now": time.strftime, "raise_exception": _refuse}


class ChatTemplate:
    """The chat template in a folder.

    It is chat_template.jinja, or otherwise `chat_template` of tokenizer_config.json.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / CONFIG
        try:
            config = {**json.loads(file.read_bytes())} if file.is_file() else {}
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(f"{file} is not JSON of an object: {error}") from None
        given = {name: config.get(name) for name in _TOKENS}
        texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in given.items()}
        self.tokens = {name: text for name, text in texts.items() if isinstance(text, str)}
        source = config.get("chat_template")
        if isinstance(source, list):  # several templates with names
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if (folder / FILE).is_file():
            source = (folder / FILE).read_text(encoding="utf-8-sig")
        self.source: str | None = source if isinstance(source, str) else None
        try:
            self.template = None if self.source is None else _environment.from_string(self.source)
        except TemplateError as error:
            raise InvalidArgumentError(
                f"the chat template in {folder} is malformed: {error}"
            ) from None

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Return the text of the prompt.

        Raises InvalidArgumentError if there is no template, or if the template fails on the
        messages.
        """
        if self.template is None:
            files = f"a {FILE}, or a {CONFIG} with chat_template, beside the tokenizer.json"
            raise InvalidArgumentError(f"this model has no chat template: chat needs {files}")
        if "developer" not in (self.source or ""):  # the newer name of the system role
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        known = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self.template.render(**known, **self.tokens)
        except Exception as error:  # noqa: BLE001 - a template is a program and may raise any error
            raise InvalidArgumentError(
                f"the chat template refuses these messages: {error}"
            ) from None
