"""A stop string within the first `min_tokens` tokens does not end the answer."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.cases import Result, equal
from tests.cases.serving import gateway


def check(folder: Path) -> Iterator[Result]:
    url = gateway(folder.parent / "07-long-stop-lists" / "tokenizer.json").url
    body = json.loads((folder / "body.json").read_text(encoding="utf-8"))
    for more in ({}, {"n": 2}):
        answer = httpx.post(f"{url}/completions", json={**body, **more}, timeout=60).json()
        tokens = 20 * more.get("n", 1)
        yield equal(
            f"{more or 'one choice'}: 20 tokens", tokens, answer["usage"]["completion_tokens"]
        )
    lines = httpx.post(f"{url}/completions", json={**body, "stream": True}, timeout=60).text
    yield equal("streamed: ends by its length", 1, lines.count('"finish_reason":"length"'))
