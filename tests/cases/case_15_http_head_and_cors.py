"""HEAD works on every GET route, and configured origins get CORS headers."""

from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.cases import Result, equal
from tests.cases.serving import gateway

PAGE = "https://page.example"


def check(folder: Path) -> Iterator[Result]:
    file = folder.parent / "07-long-stop-lists" / "tokenizer.json"
    url = f"http://{gateway(file).gateway}"
    for path in ("/health", "/ping", "/version", "/v1/models", "/metrics", "/explore"):
        head, got = httpx.head(f"{url}{path}"), httpx.get(f"{url}{path}")
        same = {name: got.headers[name] for name in ("content-type",)}
        found = {name: head.headers.get(name) for name in same}
        yield equal(f"HEAD {path}", (200, b"", same), (head.status_code, head.content, found))
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    plain = httpx.options(f"{url}/v1/completions", headers=asked)
    yield equal("no origin by default", None, plain.headers.get("access-control-allow-origin"))
    url = f"http://{gateway(file, '', '--cors-origins', PAGE).gateway}"
    for what, answer in (
        ("preflight", httpx.options(f"{url}/v1/completions", headers=asked)),
        ("answer", httpx.get(f"{url}/v1/models", headers={"Origin": PAGE})),
        ("error", httpx.get(f"{url}/nothing", headers={"Origin": PAGE})),
    ):
        yield equal(f"{what}: origin", PAGE, answer.headers.get("access-control-allow-origin"))
