"""Bytes that form no character appear as U+FFFD and do not end an answer."""

from collections.abc import Iterator
from pathlib import Path

import httpx
from tolhouse.model.tokenizer import load_tokenizer

from tests.cases import Result, equal
from tests.cases.serving import Cluster, gateway

ANSWERS = {
    ("<0x0A>", "<0xE4>", "A"): "\n\ufffdA",
    ("<0x0A>", "<0xE4>", "<0xBD>", "A"): "\n\ufffd\ufffdA",
    ("<0x0A>", "<0xE4>", "<0xBD>", "<0xA0>", "A"): "\n\u4f60A",
    ("<0xE4>", "A"): "\ufffdA",
}


def check(folder: Path) -> Iterator[Result]:
    for file in (folder / "tokenizer.json", folder / "unigram" / "tokenizer.json"):
        cluster = gateway(file)
        ids = load_tokenizer(file).get_vocab()
        for tokens, text in ANSWERS.items():
            yield from _of(cluster, [ids[t] for t in tokens], f"{file.parent.name} {tokens}", text)
        bias = {str(ids["<0xE4>"]): 100}
        body = {"prompt": [ids["A"]], "max_tokens": 50, "logit_bias": bias, "ignore_eos": True}
        whole = httpx.post(f"{cluster.url}/completions", json=body, timeout=60)
        yield equal(f"{file.parent.name}: an answer of such bytes", "\ufffd" * 50, _text(whole))
        body = {**body, "stream": True}
        streamed = httpx.post(f"{cluster.url}/completions", json=body, timeout=60).text
        yield equal("streamed", (50, 0), (streamed.count("\ufffd"), streamed.count('"error"')))


def _of(cluster: Cluster, ids: list[int], what: str, text: str) -> Iterator[Result]:
    """Check the tokens in an echoed prompt and in /detokenize."""
    start = ids[-1]  # "A", as the decoder strips a space at the start
    body = {"prompt": [start, *ids], "echo": True, "max_tokens": 0, "logprobs": 1}
    answer = httpx.post(f"{cluster.url}/completions", json=body, timeout=60)
    yield equal(f"{what}: echo", (200, f"A{text}"), (answer.status_code, _text(answer)))
    if answer.status_code == 200:
        offsets = answer.json()["choices"][0]["logprobs"]["text_offset"]
        yield equal(f"{what}: offset of the last token", len(text), offsets[-1])
    url = f"http://{cluster.gateway}/detokenize"
    shown = httpx.post(url, json={"tokens": [start, *ids]}, timeout=60).json()["prompt"]
    yield equal(f"{what}: /detokenize", f"A{text}", shown)


def _text(answer: httpx.Response) -> str:
    return answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text
