"""A stop string that equals a special token ends the answer at that token."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.cases import Result, equal
from tests.cases.serving import gateway

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def check(folder: Path) -> Iterator[Result]:
    file = folder.parent / "07-long-stop-lists" / "tokenizer.json"
    url = gateway(file, TEMPLATE).url
    body = json.loads((folder / "body.json").read_text(encoding="utf-8"))
    chat = {**body, "messages": [{"role": "user", "content": body["prompt"]}]}
    del chat["prompt"]
    shown = {"include_stop_str_in_output": True}
    for path, sent, text in (
        ("completions", body, ""),
        ("chat/completions", chat, ""),
        ("completions", {**body, **shown}, "<|im_end|>"),
        ("chat/completions", {**chat, **shown}, "<|im_end|>"),
    ):
        answer = httpx.post(f"{url}/{path}", json=sent, timeout=60).json()
        [choice] = answer["choices"]
        found = choice["text"] if "text" in choice else choice["message"]["content"]
        yield equal(f"{path}: {text!r}", (text, "stop"), (found, choice["finish_reason"]))
        yield equal("without tokens after it", 0, answer["usage"]["completion_tokens"])
        lines = httpx.post(f"{url}/{path}", json={**sent, "stream": True}, timeout=60).text
        found = lines.count("<|im_end|>"), lines.count('"finish_reason":"stop"')
        yield equal("streamed", (int(bool(text)), 1), found)
    sent = {**body, "stop": ["x<|im_end|>"], "skip_special_tokens": False}
    [choice] = httpx.post(f"{url}/completions", json=sent, timeout=60).json()["choices"]
    yield equal(
        "shown on request", ("<|im_end|>" * 3, "length"), (choice["text"], choice["finish_reason"])
    )
    sent = {**body, "stop": ["<|im_end|><|im_end|>"]}
    answer = httpx.post(f"{url}/completions", json=sent, timeout=60).json()
    [choice] = answer["choices"]
    yield equal(
        "part of a longer stop string", ("", "stop"), (choice["text"], choice["finish_reason"])
    )
