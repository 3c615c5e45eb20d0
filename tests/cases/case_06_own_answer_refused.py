"""Answers of this and other servers are valid as history, including their empty fields."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.cases import Result, equal
from tests.cases.serving import gateway

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def check(folder: Path) -> Iterator[Result]:
    file = folder.parent / "07-long-stop-lists" / "tokenizer.json"
    url = f"{gateway(file, TEMPLATE).url}/chat/completions"
    lines = (folder / "bodies.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        answer = httpx.post(url, json=json.loads(line), timeout=60)
        expected = 200 if number < 5 else 400
        yield equal(f"body {number}: status", expected, answer.status_code)
    yield Result("the refusal names the role", "messages.1.role" in answer.text, answer.text)
    messages = [{"role": "user", "content": "hi"}]
    for turn in (1, 2, 3):
        body = {"messages": messages, "max_tokens": 2}
        answer = httpx.post(url, json=body, timeout=60)
        yield equal(f"turn {turn} with the server's own messages", 200, answer.status_code)
        messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "more"}]
