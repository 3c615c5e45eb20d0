"""API keys of the gateway: authentication, rates, limits, and changes of the file."""

import asyncio
import hashlib
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
from click.testing import CliRunner
from starlette.responses import PlainTextResponse
from tolhouse import Client
from tolhouse.cli import main
from tolhouse.errors import InUseError, InvalidArgumentError, NotFoundError
from tolhouse.files import ReloadingFiles
from tolhouse.gateway.auth import AuthMiddleware, add_key, read_keys, remove_key
from tolhouse.gateway.middleware import MetricsMiddleware
from tolhouse.gateway.rate_limit import RateLimiter, window
from tolhouse.testing import Cluster, local_cluster, redis_server, wait_until

from tests.commands import HTTP, tolhouse

BODY = {"prompt": "def add", "max_tokens": 2}
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def first(keys: Path) -> str:
    return add_key(keys, "first", 60_000, 1000)


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, store: str, keys: Path, first: str) -> Iterator[Cluster]:
    options = ("--keys-file", str(keys), "--cors-origins", f"{PAGE}/, http://localhost:3000")
    with local_cluster(checkpoint, store, gateway_options=options) as running:
        yield running


def ask(cluster: Cluster, key: str | None, path: str = "/v1/completions", **more) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    method, url = "POST" if path.startswith("/v1/c") else "GET", f"http://{cluster.gateway}{path}"
    return HTTP.request(method, url, headers=headers, timeout=60, **more)


def test_requests_need_a_key(cluster: Cluster, first: str) -> None:
    """All routes except health need a key, and the error has OpenAI's form."""
    assert 200 == ask(cluster, first, json=BODY).status_code
    paths = "/metrics /docs /openapi.json /tokenizer_info /nothing //health /v1/completions"
    for path in (paths + " /v1/chat/completions /v1/models").split():
        for key in (None, "", "x", first[:-1], first + "x", first.upper(), "ä"):
            answer = ask(cluster, key, path)
            assert (401, "Bearer") == (answer.status_code, answer.headers["WWW-Authenticate"]), path
            error = answer.json()["error"]
            assert ("authentication_error", "invalid_api_key") == (error["type"], error["code"])
    basic = {"Authorization": f"Basic {first}"}
    assert 401 == HTTP.get(f"http://{cluster.gateway}/v1/models", headers=basic).status_code
    assert "tolhouse_gateway" in ask(cluster, first, "/metrics").text


def test_configured_origins_get_cors_headers(cluster: Cluster, first: str) -> None:
    """A preflight request needs no key, and every response has the CORS header, even an error."""
    url = f"{cluster.url}/completions"
    for origin, allowed in ((PAGE, PAGE), ("https://other.example", None)):
        asks = {"Access-Control-Request-Method": "POST"}
        asks["Access-Control-Request-Headers"] = "authorization,content-type"
        origin_only, key = {"Origin": origin}, {"Authorization": f"Bearer {first}"}
        many = {**origin_only, **{f"X-{n}": "1" for n in range(101)}}
        for status, answer in (
            (200 if allowed else 400, HTTP.options(url, headers={**origin_only, **asks})),
            (401, HTTP.post(url, json=BODY, headers=origin_only)),
            (200, HTTP.post(url, json=BODY, headers={**origin_only, **key}, timeout=60)),
            (404, HTTP.get(f"{cluster.url}/nothing", headers={**origin_only, **key})),
            (431, HTTP.post(url, headers=many)),
        ):
            assert status == answer.status_code
            assert allowed == answer.headers.get("access-control-allow-origin")
            assert answer.headers["x-request-id"]
    plain = HTTP.post(url, json=BODY, headers=key, timeout=60)
    assert "access-control-allow-origin" not in plain.headers


def test_a_request_s_log_line_describes_it(cluster: Cluster, first: str) -> None:
    """A log line has key, model, worker, token counts and the time to the first token."""
    log = cluster.processes[-1].log
    for name, stream in (("whole", False), ("streamed", True)):
        body = {"prompt": [[3, 4, 5], [6]], "max_tokens": 2, "n": 2, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {first}", "X-Request-Id": name}
        url = f"http://{cluster.gateway}/v1/completions"
        answer = HTTP.post(url, json={**body, "stream": stream}, headers=headers, timeout=60)
        assert 200 == answer.status_code
        wait_until(lambda name=name: f'"request_id": "{name}"' in log.read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        [line] = [line for line in lines if line.get("request_id") == name]
        assert ("request", "first", "tiny-memory") == tuple(
            line[field] for field in ("message", "key", "model")
        )
        assert (cluster.workers, 4, 4, 8) == tuple(
            line[field] for field in ("worker", "choices", "prompt_tokens", "completion_tokens")
        )
        assert 0 < line["first_token_seconds"] <= line["seconds"]


def test_health_needs_no_key(cluster: Cluster, first: str) -> None:
    """Health needs no key, but shows the number of workers only to requests with a key."""
    assert {"status": "ok"} == ask(cluster, None, "/health").json()
    known = ask(cluster, first, "/health").json()
    assert {"status": "ok", "workers": {"healthy": 1, "unhealthy": 0}} == known
    assert [200, 200] == [ask(cluster, None, path).status_code for path in ("/ping", "/version")]


def test_openai_s_client_sends_a_key(cluster: Cluster, first: str) -> None:
    """OpenAI's client raises AuthenticationError for a wrong key."""
    with openai.OpenAI(base_url=cluster.url, api_key=first, max_retries=0) as client:
        answer = client.completions.create(model="tiny-memory", **BODY)
        assert "length" == answer.choices[0].finish_reason
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_the_key_file_is_reloaded(cluster: Cluster, keys: Path, first: str) -> None:
    """The next request uses the new file, and a malformed file is ignored."""
    second = add_key(keys, "second", 600, 4)
    assert [200, 200] == [ask(cluster, key, json=BODY).status_code for key in (first, second)]
    good = keys.read_text(encoding="utf-8")
    keys.write_text(good[:-20], encoding="utf-8")
    assert [200, 200] == [ask(cluster, key, json=BODY).status_code for key in (first, second)]
    keys.write_text(good, encoding="utf-8")
    remove_key(keys, "second")
    assert [200, 401] == [ask(cluster, key, json=BODY).status_code for key in (first, second)]
    log = cluster.processes[-1].log.read_text(encoding="utf-8")
    assert '"key": "first"' in log
    assert first not in log
    assert second not in log


def test_a_key_s_rate_is_limited(cluster: Cluster, keys: Path, first: str) -> None:
    """After ten seconds' worth of requests, a key gets 429 with a time, and others do not."""
    key = add_key(keys, "slow", 12, 16)
    answers = [ask(cluster, key, json=BODY) for _ in range(4)]
    assert [200, 200, 429, 429] == [answer.status_code for answer in answers]
    error = answers[2].json()["error"]
    assert ("rate_limit_error", "rate_limit_exceeded") == (error["type"], error["code"])
    assert "12 per minute are allowed" in answers[2].json()["error"]["message"]
    assert 401 == ask(cluster, "nobody's", json=BODY).status_code
    counted = ask(cluster, first, "/metrics").text
    assert 'tolhouse_gateway_requests_total{path="/v1/completions",status="429"} 2.0' in counted
    assert 'path="/v1/completions",status="401"' in counted
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 10
    assert 200 == ask(cluster, first, json=BODY).status_code
    remove_key(keys, "slow")


def test_a_key_s_requests_in_flight_are_limited(cluster: Cluster, keys: Path) -> None:
    """A request counts from its header until its end, even if it fails."""
    key = add_key(keys, "narrow", 60_000, 2)
    address = ("127.0.0.1", int(cluster.gateway.split(":")[1]))
    body = json.dumps(BODY)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with ExitStack() as stack:
        opened = (socket.create_connection(address, timeout=30) for _ in range(2))
        held = [stack.enter_context(one) for one in opened]
        for one in held:
            one.sendall(head.encode())  # without a body
        while (answer := ask(cluster, key, json=BODY)).status_code == 200:
            pass  # the gateway may not have received both headers yet
        assert (429, "1") == (answer.status_code, answer.headers["Retry-After"])
        expected = "2 requests with this key are in flight; at most 2 are allowed"
        assert expected == answer.json()["error"]["message"]
        held[0].sendall(body.encode())
        assert held[0].recv(100).startswith(b"HTTP/1.1 200")
        held[1].close()  # without a body
        while ask(cluster, key, json=BODY).status_code == 429:
            pass
        assert {200} == {ask(cluster, key, json=BODY).status_code for _ in range(5)}
    remove_key(keys, "narrow")


def test_a_key_s_sequences_take_turns(cluster: Cluster, keys: Path) -> None:
    """All prompts of a request are answered, and the key limits how many run at the same time."""
    key = add_key(keys, "turns", 60_000, 2)
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        with Client(cluster.workers) as worker:
            while not done.wait(0.005):
                described = worker.describe_worker()
                most = max(most, described.running + described.waiting)

    watching = threading.Thread(target=watch)
    watching.start()
    body = {"prompt": ["def add", "class", "import", "x", "y"], "n": 2}
    whole = ask(cluster, key, json={**body, "max_tokens": 30, "ignore_eos": True})
    done.set()
    watching.join()
    assert [*range(10)] == [choice["index"] for choice in whole.json()["choices"]]
    assert 1 <= most <= 4  # two running sequences, and two that have just ended


def test_a_file_keeps_its_owner_and_is_read_again(tmp_path: Path) -> None:
    """A file keeps its owner, and a failed read is repeated once permissions change."""
    path = tmp_path / "keys.json"
    add_key(path, "one", 60, 1)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    owner = path.stat().st_uid
    add_key(path, "two", 60, 1)
    assert (owner, 0o600) == (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode))
    readable = True

    def read() -> list[str]:
        if not readable:
            raise PermissionError("not mine")
        return [*read_keys(str(path))]

    watched = ReloadingFiles((str(path),), read)
    readable = False
    remove_key(path, "one")
    assert ["one", "two"] == watched.get()
    readable = True
    assert ["one", "two"] == watched.get()  # nothing has changed since
    path.chmod(0o644)
    assert ["two"] == watched.get()


@pytest.mark.parametrize(
    ("requests_per_minute", "requests", "seconds"),
    [(0.5, 1, 120), (7, 7, 60), (12, 2, 10), (100, 20, 12), (600, 100, 10), (1e-9, 1, 60_000_000)],
)
def test_a_rate_is_a_window(requests_per_minute: float, requests: int, seconds: int) -> None:
    """Each rate is a whole number of requests in whole seconds, about ten where possible."""
    item = window(requests_per_minute)
    assert (requests, seconds) == (item.amount, item.get_expiry())


def test_gateways_share_a_rate_through_redis(tmp_path: Path) -> None:
    """Two gateways together allow one rate. Without Redis, each counts its own requests."""
    path = tmp_path / "keys.json"
    headers = {"Authorization": f"Bearer {add_key(path, 'one', 12, 10)}"}

    async def statuses(store: str) -> list[int]:
        found = []
        for limiter in [RateLimiter(store), RateLimiter(store)]:
            app = MetricsMiddleware(AuthMiddleware(PlainTextResponse(), str(path), limiter), ())
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                found += [(await client.get("/x", headers=headers)).status_code for _ in range(2)]
            await limiter.close()
        return found

    (tmp_path / "password").write_text("secret\n", encoding="utf-8")
    with redis_server("--requirepass", "secret") as url:
        url += f"?password_file={tmp_path}/password"
        assert [200, 200, 429, 429] == asyncio.run(statuses(url))
        assert [200] * 4 == asyncio.run(statuses(""))
    assert [200] * 4 == asyncio.run(statuses(url))


def test_the_file_has_hashes_only(tmp_path: Path) -> None:
    """`tolhouse keys` adds, lists and removes keys, and prints a key once."""
    path, run = tmp_path / "keys.json", CliRunner()
    made = run.invoke(main, ["keys", "add", str(path), "alice", "--requests-per-minute", "30"])
    key = made.output.strip()
    assert key not in path.read_text(encoding="utf-8")
    digest = hashlib.sha256(key.encode()).hexdigest()
    limits = {"requests_per_minute": 30, "concurrent": 16}
    assert {"alice": {"sha256": digest, **limits}} == json.loads(path.read_text(encoding="utf-8"))
    assert 0o600 == path.stat().st_mode & 0o777
    listed = run.invoke(main, ["keys", "list", str(path)]).output
    assert "alice  30 requests per minute, 16 concurrent\n" == listed
    assert "" == run.invoke(main, ["keys", "remove", str(path), "alice"]).output
    assert {} == read_keys(str(path))
    with pytest.raises(NotFoundError, match="no key for 'alice'"):
        remove_key(path, "alice")
    add_key(path, "bob", 1, 1)
    with pytest.raises(InUseError, match="already has a key for 'bob'"):
        add_key(path, "bob", 1, 1)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", '{"a": {}}', '{"a": {"sha256": "x"}}'),
        f'{{"a b": {{"sha256": "{"0" * 64}"}}}}',
        f'{{"a": {{"sha256": "{"0" * 64}", "concurrent": 0}}}}',
        f'{{"a": {{"sha256": "{"0" * 64}", "admin": true}}}}',
    ],
)
def test_a_malformed_file_is_reported(text: str, tmp_path: Path) -> None:
    """The error has the position and names the command that writes the file."""
    path = tmp_path / "keys.json"
    path.write_text(text, encoding="utf-8")
    told = r"keys\.json is malformed at .*`tolhouse keys` writes it"
    with pytest.raises(InvalidArgumentError, match=told):
        read_keys(str(path))


@pytest.mark.parametrize(
    "arguments",
    [("a/b",), ("x", "--requests-per-minute", "nan"), ("x", "--requests-per-minute", "inf")],
)
def test_bad_limits_and_names_are_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """The error is one line, and no file is written."""
    path = tmp_path / "keys.json"
    done = tolhouse(f"keys add {path}", *arguments, code=1)
    assert (1, False) == (done.stderr.count("\n"), path.exists()), done.stderr


def test_concurrent_commands_lose_no_key(tmp_path: Path) -> None:
    """Each command reads the file that the one before it wrote."""
    path, names = tmp_path / "keys.json", [f"user{n}" for n in range(24)]
    with ThreadPoolExecutor(8) as threads:
        keys = list(threads.map(lambda name: add_key(path, name, 60, 1), names))
        assert sorted(names) == sorted(read_keys(str(path)))
        list(threads.map(lambda name: remove_key(path, name), names[::2]))
    assert sorted(names[1::2]) == sorted(read_keys(str(path)))
    assert len(names) == len({*keys})
    assert ["keys.json"] == [p.name for p in tmp_path.iterdir()]
