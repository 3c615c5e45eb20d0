"""`httpx` and curl: the fields and headers that other clients depend on."""

import json
import subprocess

import httpx
from system import OVERLONG, SYSTEM

PACKAGE = "httpx"
CHAT = {"model": SYSTEM.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
COMPLETION = {"model": SYSTEM.model, "prompt": "import", "max_tokens": 4}
ROUTES = ("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)

client = httpx.Client(base_url=SYSTEM.root, timeout=60)


def events(path: str, body: dict, **more) -> list[str]:
    """Return the data of a stream's events."""
    with client.stream("POST", path, json={**body, "stream": True, **more}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = answer.read().decode().split("\n\n")
    assert not blocks.pop()  # each event ends with an empty line
    return [block.removeprefix("data: ") for block in blocks]


def check_response_fields():
    """An answer has id, object, created, model, choices, usage and system_fingerprint"""
    for path, body in ROUTES:
        answer = client.post(path, json=body)
        assert "application/json" == answer.headers["content-type"]
        found = answer.json()
        fields = {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
        assert fields <= found.keys()
        assert {"index", "finish_reason", "logprobs"} <= found["choices"][0].keys()
        assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= found["usage"].keys()


def check_stream_fields():
    """Each chunk has the answer's fields, only the last has a finish_reason, and [DONE] ends it"""
    for path, body in ROUTES:
        *chunks, done = events(path, body)
        assert "[DONE]" == done
        found = [json.loads(chunk) for chunk in chunks]
        assert all({"id", "object", "created", "model", "choices"} <= c.keys() for c in found)
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in found]
        assert reasons[-1] in ("stop", "length")
        assert not any(reasons[:-1])
    first = json.loads(events(*ROUTES[0])[0])["choices"][0]["delta"]
    assert "assistant" == first["role"]
    assert isinstance(first["content"], str)


def check_usage_in_a_stream():
    """With include_usage only the last chunk has usage, and it has no choices"""
    for path, body in ROUTES:
        *chunks, last, _ = events(path, body, stream_options={"include_usage": True})
        assert [] == json.loads(last)["choices"]
        assert json.loads(last)["usage"]["total_tokens"]
        assert all(json.loads(chunk)["usage"] is None for chunk in chunks)


def check_usage_in_each_chunk():
    """With continuous_usage_stats, which vLLM's load generators send, each chunk has usage"""
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in ROUTES:
        usages = [
            json.loads(event)["usage"] for event in events(path, body, stream_options=options)[:-1]
        ]
        assert usages[-1] == usages[-2]


def check_error_form():
    """Every refusal is {"error": {message, type, param, code}}, and codes are texts"""
    answers = [
        client.post("/v1/chat/completions", json={**CHAT, "model": "nothing"}),
        client.post("/v1/completions", json={**COMPLETION, "prompt": OVERLONG, "stream": True}),
        client.post("/v1/completions", json={**COMPLETION, "top_p": 7}),
        client.post("/v1/completions", content="{"),
        client.post("/v1/completions", json=[]),
        client.post("/v1/nothing", json={}),
        client.get("/v1/completions"),
        client.get("/v1/models/nothing"),
        httpx.get(f"{SYSTEM.keyed_url}/models"),
    ]
    assert [404, 400, 400, 400, 400, 404, 405, 404, 401] == [a.status_code for a in answers]
    for answer in answers:
        assert "application/json" == answer.headers["content-type"]
        error = answer.json()["error"]
        assert {"message", "type", "param", "code"} == error.keys()
        assert error["message"]
        assert isinstance(error["type"], str)
        assert isinstance(error["code"], str | None)


def check_nulls():
    """Every documented parameter accepts null"""
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for (path, body), name in zip(ROUTES, ("ChatRequest", "CompletionRequest"), strict=True):
        nulls = dict.fromkeys(schemas[name]["properties"])
        answer = client.post(path, json={**nulls, **body})
        assert 200 == answer.status_code, answer.text


def check_content_types():
    """A body is accepted with and without a charset, and from curl's --json"""
    for kind in ("application/json", "application/json; charset=utf-8"):
        headers = {"content-type": kind}
        answer = client.post("/v1/completions", content=json.dumps(COMPLETION), headers=headers)
        assert 200 == answer.status_code, answer.text


def check_curl():
    """curl -N prints the events of a stream, and curl -f exits with 22 on a refusal"""
    body = json.dumps({**COMPLETION, "stream": True})
    url = f"{SYSTEM.url}/completions"
    command = ["curl", "-sSNf", url, "-H", "Content-Type: application/json", "-d"]
    run = subprocess.run([*command, body], capture_output=True, encoding="utf-8", check=True)
    assert run.stdout.endswith("data: [DONE]\n\n")
    assert 22 == subprocess.run([*command, "{}"], capture_output=True, check=False).returncode


def check_trailing_slashes():
    """An extra slash in the base URL gives an answer or a JSON error, and no redirect to HTML"""
    for path in ("/v1/models/", "/v1//models", "/v1/chat/completions/"):
        answer = client.get(path)
        assert answer.headers["content-type"] == "application/json", (path, answer.text)


def check_model_by_name():
    """GET /v1/models and GET /v1/models/NAME return the model, its length and its owner"""
    (card,) = client.get("/v1/models").json()["data"]
    assert card == client.get(f"/v1/models/{SYSTEM.model}").json()
    assert {"id", "object", "created", "owned_by", "max_model_len"} <= card.keys()
    assert SYSTEM.context == card["max_model_len"]
