"""The gateway as a real process in front of real workers, asked by the stock OpenAI client and by plain HTTP."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolhouse import Client
from tolhouse.gateway.text import TextStream
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.tokenizer import load_tokenizer
from tolhouse.testing import Cluster, build_table, free_port, local_cluster, process

DEMO = Path("models/demo-memory")
PROMPT = "def main():\n    parser = argparse.ArgumentParser("


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    url = f"file://{tmp_path_factory.mktemp('tables')}"
    build_table(DEMO, url)
    with local_cluster(DEMO, url, workers=2) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer():
    return open_checkpoint(DEMO).tokenizer()


def complete(client: openai.OpenAI, prompt, **options):
    return client.completions.create(model="demo-memory", prompt=prompt, **{"temperature": 0, "max_tokens": 24, **options})


# the stock client


def test_a_completion_is_the_text_of_the_worker_s_tokens(client: openai.OpenAI, cluster: Cluster, tokenizer) -> None:
    """Text in, text out, with usage, from the tokens that a worker gives for the same ids."""
    with Client(cluster.workers.split(",")[0]) as worker:
        ids = list(worker.generate(tokenizer.encode(PROMPT).ids, 24))
    answer = complete(client, PROMPT)
    assert tokenizer.decode(ids) == answer.choices[0].text
    assert ("length", "demo-memory", "text_completion") == (answer.choices[0].finish_reason, answer.model, answer.object)
    count = len(tokenizer.encode(PROMPT).ids)
    assert (count, 24, count + 24) == (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)


def test_a_stream_adds_up_to_the_completion(client: openai.OpenAI) -> None:
    """Streamed pieces are the plain answer in parts; usage comes last where it was asked for."""
    pieces = list(complete(client, PROMPT, stream=True, stream_options={"include_usage": True}))
    plain = complete(client, PROMPT)
    assert plain.choices[0].text == "".join(p.choices[0].text for p in pieces if p.choices)
    assert len(pieces) > 10
    assert ["length"] == [p.choices[0].finish_reason for p in pieces if p.choices and p.choices[0].finish_reason]
    assert plain.usage == pieces[-1].usage
    assert 1 == len({p.id for p in pieces})


def test_all_forms_of_prompt_are_taken(client: openai.OpenAI, tokenizer) -> None:
    """A text, token ids, and lists of either; with n, choices are numbered prompt by prompt."""
    ids = tokenizer.encode(PROMPT).ids
    text = complete(client, PROMPT).choices[0].text
    other = complete(client, "import ").choices[0].text
    assert text == complete(client, ids).choices[0].text
    assert [text, other] == [c.text for c in complete(client, [PROMPT, "import "]).choices]
    answer = complete(client, [ids, tokenizer.encode("import ").ids], n=2)
    assert [(0, text), (1, text), (2, other), (3, other)] == [(c.index, c.text) for c in answer.choices]
    assert 4 * 24 == answer.usage.completion_tokens


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    """The same seed gives the same texts, and the choices of one request are different draws."""
    draws = [[c.text for c in complete(client, PROMPT, temperature=1.0, seed=5, n=3).choices] for _ in range(2)]
    assert draws[0] == draws[1]
    assert 3 == len(set(draws[0]))


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    """Whether streamed or not, nothing of the stop string is shown, also when it spans tokens."""
    whole = complete(client, PROMPT, max_tokens=60).choices[0].text
    stop = whole[20:26]
    assert 6 == len(stop)
    expected = whole[: whole.index(stop)]
    plain = complete(client, PROMPT, max_tokens=60, stop=[stop, "never said"])
    streamed = list(complete(client, PROMPT, max_tokens=60, stop=stop, stream=True))
    assert (expected, "stop") == (plain.choices[0].text, plain.choices[0].finish_reason)
    assert (expected, "stop") == ("".join(p.choices[0].text for p in streamed), streamed[-1].choices[0].finish_reason)


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    """What workers serve is what /v1/models shows."""
    assert ["demo-memory"] == [m.id for m in client.models.list()]
    assert "demo-memory" == client.models.retrieve("demo-memory").id
    with pytest.raises(openai.NotFoundError, match="available: demo-memory"):
        client.models.retrieve("other")


def test_the_stock_client_sees_its_own_errors(client: openai.OpenAI) -> None:
    """Statuses and bodies are such that the OpenAI client raises what its users know."""
    with pytest.raises(openai.NotFoundError, match="available: demo-memory"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="exceed the context of 512"):
        complete(client, PROMPT * 200)
    with pytest.raises(openai.BadRequestError, match="exceed the context of 512"):
        complete(client, PROMPT, max_tokens=1000, stream=True)


# plain HTTP


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ("{", None, "not valid JSON"),
        ("", None, "JSON"),
        ("[]", None, "JSON object"),
        ("null", None, "JSON"),
        ("[" * 100_000, None, "body"),
        ('{"prompt": "\\ud800"}', None, "surrogate"),
        ('{"prompt": "a", "temperature": NaN}', "temperature", "less than or equal to 2"),
        ({}, "prompt", "required"),
        ({"prompt": 3}, "prompt", "list of token ids"),
        ({"prompt": [1, "a"]}, "prompt", "list of token ids"),
        ({"prompt": ""}, None, "empty"),
        ({"prompt": []}, None, "empty"),
        ({"prompt": [[]]}, None, "at least one"),
        ({"prompt": [-1]}, None, "outside the vocabulary"),
        ({"prompt": [8192]}, None, "allowed are 0 to 8191"),
        ({"prompt": "a", "frobnicate": 1}, "frobnicate", "unknown parameter 'frobnicate'"),
        ({"prompt": "a", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "number"),
        ({"prompt": "a", "temperature": None, "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "integer"),
        ({"prompt": "a", "n": 1000}, "n", "128"),
        ({"prompt": ["a"] * 100, "n": 2}, None, "more than 128"),
        ({"prompt": "a", "logprobs": 0}, None, "logprobs is not supported"),
        ({"prompt": "a", "echo": True}, None, "echo is not supported"),
        ({"prompt": "a", "presence_penalty": 0.5}, None, "presence_penalty is not supported"),
        ({"prompt": "a", "best_of": 3}, None, "best_of is not supported"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, None, "stream=true"),
        ({"prompt": "a", "stream": "yes"}, "stream", "boolean"),
    ],
)
def test_a_bad_body_is_told_what_is_wrong(cluster: Cluster, body, param: str | None, message: str) -> None:
    """Status 400 in OpenAI's form, naming the parameter and what is allowed."""
    content = body if isinstance(body, str) else json.dumps(body)
    answer = httpx.post(f"{cluster.url}/completions", content=content, headers={"Content-Type": "application/json"}, timeout=30)
    assert 400 == answer.status_code, answer.text
    error = answer.json()["error"]
    assert ("invalid_request_error", param, 400) == (error["type"], error["param"], error["code"])
    assert message in error["message"]


def test_paths_and_methods_that_are_not_there(cluster: Cluster) -> None:
    """404 and 405 come in the same form."""
    assert 404 == httpx.get(f"{cluster.url}/nothing").json()["error"]["code"]
    assert 405 == httpx.get(f"{cluster.url}/completions").json()["error"]["code"]


def test_health_and_metrics(cluster: Cluster) -> None:
    """Health names the workers; metrics count requests by route, never by what was asked for."""
    httpx.get(f"http://{cluster.gateway}/made/up")
    health = httpx.get(f"http://{cluster.gateway}/health")
    assert (200, dict.fromkeys(cluster.workers.split(","), "healthy")) == (health.status_code, health.json()["workers"])
    text = httpx.get(f"http://{cluster.gateway}/metrics").text
    assert "tolhouse_gateway_healthy_workers 2.0" in text
    assert 'tolhouse_gateway_requests_total{path="/health",status="200"}' in text
    assert 'path="other",status="404"' in text
    assert "made/up" not in text


def test_requests_go_to_the_least_loaded_worker(cluster: Cluster) -> None:
    """Concurrent requests are spread over both workers."""
    workers = [Client(address) for address in cluster.workers.split(",")]
    before = [w.describe_worker().rows for w in workers]
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: httpx.post(f"{cluster.url}/completions", json=body, timeout=60).json(), range(8)))
    assert 1 == len({a["choices"][0]["text"] for a in answers})
    asked = [
        w.describe_worker().rows.from_cache + w.describe_worker().rows.from_remote - b.from_cache - b.from_remote
        for w, b in zip(workers, before, strict=True)
    ]
    assert min(asked) > 0
    for worker in workers:
        worker.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_goes_away_ends_the_work(cluster: Cluster, stream: bool) -> None:
    """Closing the connection cancels the sequence in the worker."""
    body = {"prompt": PROMPT, "max_tokens": 450, "temperature": 0, "ignore_eos": True, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{cluster.url}/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{cluster.url}/completions", json=body, timeout=0.3)
    for address in cluster.workers.split(","):
        with Client(address) as worker:
            for _ in range(500):
                if not worker.describe_worker().running:
                    break
                time.sleep(0.01)
            else:
                raise AssertionError("the sequence went on")


def test_a_worker_may_die(tmp_path: Path) -> None:
    """Requests go on at the other worker; without any, health and completions say 503; a worker that comes back is found."""
    url = f"file://{tmp_path}"
    build_table(DEMO, url)
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    with local_cluster(DEMO, url, workers=2) as cluster:
        first, second = (p for p in cluster.processes if p.ready["service"] == "worker")
        post = lambda: httpx.post(f"{cluster.url}/completions", json=body, timeout=60)  # noqa: E731
        expected = post().json()["choices"][0]["text"]
        os.kill(first.pid, signal.SIGKILL)
        for _ in range(6):  # at once, before the gateway can have noticed
            answer = post()
            assert (200, expected) == (answer.status_code, answer.json()["choices"][0]["text"])
        os.kill(second.pid, signal.SIGKILL)
        second.popen.wait()
        answer = post()
        assert 503 == answer.status_code
        assert second.address in answer.json()["error"]["message"]
        time.sleep(1)
        assert 503 == httpx.get(f"http://{cluster.gateway}/health").status_code
        again = ("worker", str(DEMO), "--lookup", cluster.lookup, "--listen", second.address)
        with process(*again):
            for _ in range(100):
                if (answer := post()).status_code == 200:
                    break
                time.sleep(0.1)
            assert expected == answer.json()["choices"][0]["text"]


def test_a_worker_of_another_tokenizer_gets_no_requests(cluster: Cluster, checkpoint: Path) -> None:
    """A gateway whose tokenizer is not the worker's says so instead of sending it wrong ids."""
    with process("gateway", str(checkpoint), "--workers", cluster.workers, "--listen", "127.0.0.1:0", "--poll-seconds", "0.1") as gateway:
        for _ in range(100):
            answer = httpx.post(f"http://{gateway.address}/v1/completions", json={"prompt": "a"})
            if answer.status_code == 409:
                break
            time.sleep(0.05)
        assert (409, "start it with the worker's checkpoint") == (answer.status_code, answer.json()["error"]["message"][-37:])


def test_what_can_not_start_says_why(cluster: Cluster, tmp_path: Path) -> None:
    """A port in use, no tokenizer, a bad address: one line on stderr."""

    def refused(*arguments: str) -> str:
        command = [sys.executable, "-m", "tolhouse.cli", "gateway", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (1, "") == (ended.returncode, ended.stdout)
        assert "Traceback" not in ended.stderr
        return ended.stderr

    assert "in use" in refused(str(DEMO), "--listen", cluster.gateway)
    assert "no tokenizer" in refused(str(tmp_path))
    assert "HOST:PORT" in refused(str(DEMO), "--workers", "nowhere")
    assert "HOST:PORT" in refused(str(DEMO), "--listen", "nowhere")


def test_a_gateway_ends_with_0(cluster: Cluster) -> None:
    """SIGTERM drains: a stream that runs is finished first."""
    with process(
        "gateway", str(DEMO), "--workers", cluster.workers, "--listen", f"127.0.0.1:{free_port()}", "--poll-seconds", "0.1"
    ) as gateway:
        url = f"http://{gateway.address}"
        for _ in range(100):
            if httpx.get(f"{url}/health").status_code == 200:
                break
            time.sleep(0.05)
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            gateway.popen.terminate()
            assert "data: [DONE]" == [line for line in lines if line][-1]
        assert 0 == gateway.popen.wait(30)


# text


@given(st.text(min_size=1, max_size=80), st.lists(st.integers(1, 5), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_text_arrives_whole_whatever_the_pieces(text: str, sizes: list[int]) -> None:
    """Pieces of a text add up to it, and no piece has half a character."""
    tokenizer = load_tokenizer(DEMO / "tokenizer.json")
    ids = tokenizer.encode(text).ids
    expected = tokenizer.decode(ids)
    stream, pieces, at = TextStream(tokenizer), [], 0
    while at < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[at : at + size]))
        at += size
    if "\ufffd" not in expected:
        assert not any("\ufffd" in piece for piece in pieces)
    assert expected == "".join(pieces) + stream.finish()


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    """A completion cut in the middle of a character ends in U+FFFD, as the tokenizer itself would have it."""
    tokenizer = load_tokenizer(DEMO / "tokenizer.json")
    ids = tokenizer.encode("世").ids[:-1]
    stream = TextStream(tokenizer)
    assert "" == stream.push(ids)
    assert tokenizer.decode(ids) == stream.finish()


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_stop_string_is_found_wherever_it_begins(text: str, stops: list[str]) -> None:
    """The text ends before the first stop string to appear, however it is cut into tokens."""
    tokenizer = load_tokenizer(DEMO / "tokenizer.json")
    stream, shown = TextStream(tokenizer, stops), ""
    for character in text:  # one token per character
        shown += stream.push(tokenizer.encode(character).ids)
        if stream.stopped:
            break
    shown += stream.finish()
    # the first to be complete wins; of those complete at once, the one that begins first
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    expected = min(text[: ends[0]].index(s) for s in stops if s in text[: ends[0]]) if ends else len(text)
    assert text[:expected] == shown
