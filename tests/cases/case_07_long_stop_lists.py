"""Long stop strings that do not occur do not change an answer."""

from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.cases import Result, equal
from tests.cases.serving import gateway

STOPS = [chr(200 + n) * 511 + "!" for n in range(32)]


def check(folder: Path) -> Iterator[Result]:
    url = gateway(folder / "tokenizer.json").url
    body = {"prompt": "def f(", "max_tokens": 20, "n": 8, "seed": 1, "ignore_eos": True}
    plain, stopped = (
        httpx.post(f"{url}/completions", json={**body, **more}, timeout=60).json()["choices"]
        for more in ({}, {"stop": STOPS})
    )
    same = [c["text"] for c in plain] == [c["text"] for c in stopped]
    yield Result("stop strings that do not occur change nothing", same)
    yield equal("all choices reach their length", {"length"}, {c["finish_reason"] for c in stopped})
