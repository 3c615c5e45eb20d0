"""A completion keeps the leading space that the decoder strips at the start of a text."""

from collections.abc import Iterator
from pathlib import Path

import httpx
from tolhouse.model.tokenizer import TokenTexts, load_tokenizer

from tests.cases import Result, equal
from tests.cases.serving import gateway


def check(folder: Path) -> Iterator[Result]:
    tokenizers = folder.parent / "01-byte-fallback-500"
    file = tokenizers / "tokenizer.json"
    tokenizer, url = load_tokenizer(file), gateway(file).url
    prompt, the, key, bare = map(tokenizer.token_to_id, ("▁import", "▁the", "▁key", "key"))

    def choice(**body: object) -> dict:
        answer = httpx.post(f"{url}/completions", json={"prompt": [prompt], **body}, timeout=60)
        return answer.json()["choices"][0]

    forced = {"logit_bias": {the: 100}, "max_tokens": 2}
    yield equal("the answer has its leading space", " the the", choice(**forced)["text"])
    echoed = choice(**forced, echo=True, logprobs=2)
    yield equal("an echo too", "import the the", echoed["text"])
    scores = echoed["logprobs"]
    yield equal("offsets", [0, 6, 10], scores["text_offset"])
    yield equal("tokens", ["import", " the", " the"], scores["tokens"])
    for token, name in ((key, " key"), (bare, "key")):
        scored = choice(prompt=[prompt, token], echo=True, max_tokens=0, logprobs=1)["logprobs"]
        yield equal(f"the name of {name!r}", name, scored["tokens"][-1])
        value = scored["top_logprobs"][-1].get(name)
        yield equal(f"the value of {name!r}", scored["token_logprobs"][-1], value)
    body = {"prompt": "import the", "return_token_strs": True}
    found = httpx.post(f"{url.removesuffix('/v1')}/tokenize", json=body, timeout=60).json()
    words = "".join(found["token_strs"][1:])  # without <s>
    yield equal("/tokenize gives the text's parts", "import the", words)
    texts = TokenTexts(tokenizer)
    names = [texts.name(i)[0] for i in (key, bare)]
    yield equal("names in `tolhouse explain`", [" key", "key"], names)
