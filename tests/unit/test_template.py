"""Chat templates: their files, and rendering as in transformers."""

import json
from pathlib import Path

import pytest
from tolhouse.errors import InvalidArgumentError
from tolhouse.gateway.templates import ChatTemplate

MESSAGES = [{"role": "user", "content": "<b>é</b>"}]


def made(folder: Path, **config) -> ChatTemplate:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return ChatTemplate(folder)


def test_a_template_is_found_in_either_file(tmp_path: Path) -> None:
    """tokenizer_config.json has one or several, and chat_template.jinja takes precedence."""
    assert "a" == made(tmp_path, chat_template="a").render(MESSAGES)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert "d" == made(tmp_path, chat_template=named).render(MESSAGES)
    (tmp_path / "chat_template.jinja").write_text("j", encoding="utf-8")
    assert "j" == made(tmp_path, chat_template="a").render(MESSAGES)


def test_templates_have_what_transformers_gives_them(tmp_path: Path) -> None:
    """Special tokens, plain tojson, trimmed blocks and loop controls, without escaping."""
    text = "{% for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n"
    text += "{{ m.content }}{{ m | tojson }}\n{% endfor %}"
    text = "{{ bos_token }}" + text + "{{ eos_token }}"
    template = made(tmp_path, bos_token={"content": "<s>"}, eos_token="</s>", chat_template=text)
    expected = '<s><b>é</b>{"role": "user", "content": "<b>é</b>"}\n</s>'
    assert expected == template.render(MESSAGES * 2)
    asked = made(tmp_path, chat_template="{% if add_generation_prompt %}x{% endif %}")
    assert "x" == asked.render(MESSAGES)
    assert "" == asked.render(MESSAGES, add_generation_prompt=False)
    assert made(tmp_path, chat_template="{{ strftime_now('%Y') }}").render(MESSAGES).isdecimal()


def test_a_developer_is_a_system_where_the_template_has_none(tmp_path: Path) -> None:
    """OpenAI's newer role is rendered as the older one, unless the template has it."""
    messages = [{"role": "developer", "content": "a"}]
    source = "{{ messages[0].role }}"
    assert "system" == made(tmp_path, chat_template=source).render(messages)
    source += "{# developer #}"
    assert "developer" == made(tmp_path, chat_template=source).render(messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages[7].content + 'a' }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
    ],
)
def test_a_failing_template_is_reported(tmp_path: Path, source: str, message: str) -> None:
    """A refusal by the template, an error in it, and an escape from the sandbox are refused."""
    with pytest.raises(InvalidArgumentError, match=message):
        made(tmp_path, chat_template=source).render(MESSAGES)


def test_no_template_and_bad_ones(tmp_path: Path) -> None:
    """The error names the missing files, and a malformed file is refused at start."""
    needed = r"needs a chat_template.jinja, or a tokenizer_config.json"
    with pytest.raises(InvalidArgumentError, match=needed):
        ChatTemplate(tmp_path).render(MESSAGES)
    malformed = (
        ('{"chat_template": "{% if %}"}', "malformed"),
        ("[]", "object"),
        ("{", "not JSON"),
    )
    for text, message in malformed:
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(InvalidArgumentError, match=message):
            ChatTemplate(tmp_path)
