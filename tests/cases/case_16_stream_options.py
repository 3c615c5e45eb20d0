"""Both routes accept parameters whose values have no effect."""

from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.cases import Result, equal
from tests.cases.serving import gateway

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
USAGE = {"include_usage": True}
NOTHING = (
    {"stream": True, "stream_options": {**USAGE, "include_obfuscation": False}},
    {"stream": True, "stream_options": {**USAGE, "continuous_usage_stats": False}},
    {"stream_options": None},
    {"skip_special_tokens": True, "spaces_between_special_tokens": True},
    {"metadata": {}, "store": False, "user": "u", "service_tier": "auto"},
)


def check(folder: Path) -> Iterator[Result]:
    file = folder.parent / "07-long-stop-lists" / "tokenizer.json"
    url = gateway(file, TEMPLATE).url
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for path, body in (("completions", {"prompt": "hi"}), ("chat/completions", chat)):
        for more in NOTHING:
            sent = {**body, "max_tokens": 2, **more}
            answer = httpx.post(f"{url}/{path}", json=sent, timeout=60)
            yield equal(f"{path}: {more}", 200, answer.status_code)
