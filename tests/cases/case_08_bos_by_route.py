"""The post-processor adds BOS to texts, but not to chat templates or token ids."""

from collections.abc import Iterator
from pathlib import Path

import httpx
from tolhouse.model.tokenizer import load_tokenizer

from tests.cases import Result, equal
from tests.cases.serving import gateway

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def check(folder: Path) -> Iterator[Result]:
    file = folder.parent / "01-byte-fallback-500" / "tokenizer.json"
    ids, cluster = load_tokenizer(file).encode("import os").ids, gateway(file, TEMPLATE)

    def usage(path: str, **body: object) -> int:
        answer = httpx.post(f"{cluster.url}{path}", json={"max_tokens": 1, **body}, timeout=60)
        return answer.json()["usage"]["prompt_tokens"]

    def tokens(**body: object) -> list[int]:
        url = f"http://{cluster.gateway}/tokenize"
        return httpx.post(url, json=body, timeout=60).json()["tokens"]

    text, chat = {"prompt": "import os"}, {"messages": [{"role": "user", "content": "import os"}]}
    bare = {"add_special_tokens": False}
    yield equal("the command line adds <s>", 1, ids[0])
    yield equal("so do completions", len(ids), usage("/completions", **text))
    yield equal("unless asked not to", len(ids) - 1, usage("/completions", **text, **bare))
    yield equal("and /tokenize", (ids, ids[1:]), (tokens(**text), tokens(**text, **bare)))
    yield equal("token ids stay as they are", 3, usage("/completions", prompt=ids[1:]))
    yield equal("chats do not", len(ids) - 1, usage("/chat/completions", **chat))
    yield equal("nor their /tokenize", ids[1:], tokens(**chat))
    asked = {"add_special_tokens": True}
    yield equal("unless asked to", len(ids), usage("/chat/completions", **chat, **asked))
    body = {**text, "echo": True, "max_tokens": 0}
    answer = httpx.post(f"{cluster.url}/completions", json=body, timeout=60).json()
    yield equal("an echo has the prompt alone", "import os", answer["choices"][0]["text"])
