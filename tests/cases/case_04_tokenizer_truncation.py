"""Truncation and padding in tokenizer.json do not change prompts."""

from collections.abc import Iterator
from pathlib import Path

import httpx
from tolhouse.model.tokenizer import load_tokenizer

from tests.cases import Result, equal
from tests.cases.serving import gateway

LONG = "def main(argv): return sum(int(x) for x in argv if x.isdigit()) and here is the question"


def check(folder: Path) -> Iterator[Result]:
    file = folder / "tokenizer.json"
    tokenizer, cluster = load_tokenizer(file), gateway(file)
    for text in ("hi", LONG):
        ids = tokenizer.encode(text).ids
        yield equal(f"{len(text)} characters keep all ids", text, tokenizer.decode(ids))
        url = f"http://{cluster.gateway}/tokenize"
        found = httpx.post(url, json={"prompt": text}, timeout=60).json()
        yield equal("/tokenize has the same", ids, found["tokens"])
    body = {"prompt": LONG * 100, "max_tokens": 1}
    answer = httpx.post(f"{cluster.url}/completions", json=body, timeout=60)
    yield equal("a prompt beyond the context is refused", 400, answer.status_code)
