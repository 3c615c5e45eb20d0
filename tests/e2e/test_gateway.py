"""The gateway and workers as processes, called by OpenAI's client and by HTTP."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import OpenAI
from tolhouse import Client, __version__
from tolhouse.gateway import schemas
from tolhouse.gateway.error_responses import error_body
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.testing import (
    Cluster,
    build_table,
    local_cluster,
    process,
    wait_until,
    wait_until_healthy,
)

from tests.commands import HTTP, send_signal, tolhouse

DEMO = Path("models/demo-memory")
PROMPT = "def main():\n    parser = argparse.ArgumentParser("
GREEDY = {"prompt": PROMPT, "temperature": 0}
ENDLESS = {**GREEDY, "ignore_eos": True}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"file://{tmp_path_factory.mktemp('tables')}"
    build_table(DEMO, url)
    return url


@pytest.fixture(scope="module")
def cluster(table: str) -> Iterator[Cluster]:
    with local_cluster(DEMO, table, workers=2) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=cluster.url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer():
    return open_checkpoint(DEMO).tokenizer()


def another_gateway(cluster: Cluster, folder: Path, *options: str):
    """Another gateway with the same workers."""
    listen = ("--listen", "127.0.0.1:0", "--poll-seconds", "0.1")
    return process("gateway", str(folder), "--workers", cluster.workers, *listen, *options)


def complete(client: OpenAI, prompt=PROMPT, **options):
    options = {"model": "demo-memory", "temperature": 0, "max_tokens": 24, **options}
    return client.completions.create(prompt=prompt, **options)


def choice(client: OpenAI, prompt=PROMPT, **options):
    return complete(client, prompt, **options).choices[0]


def post(cluster: Cluster, body: dict, path: str = "/v1/completions", **more) -> httpx.Response:
    return HTTP.post(f"http://{cluster.gateway}{path}", json=body, timeout=100, **more)


def get(cluster: Cluster, path: str, **more) -> httpx.Response:
    return HTTP.get(f"http://{cluster.gateway}{path}", timeout=60, **more)


def text_of(answer: httpx.Response) -> str:
    return answer.json()["choices"][0]["text"]


def stream(cluster: Cluster, body: dict) -> list[str]:
    with HTTP.stream("POST", f"{cluster.url}/completions", json=body, timeout=100) as answer:
        return [line for line in answer.iter_lines() if line]


# OpenAI's client


def test_a_completion_has_the_worker_s_tokens(client: OpenAI, cluster: Cluster, tokenizer) -> None:
    """Its text and usage are those of the tokens that a worker generates for the same ids."""
    prompt = tokenizer.encode(PROMPT).ids
    with Client(cluster.workers.split(",")[0]) as worker:
        ids = list(worker.generate(prompt, 24))
    answer = complete(client)
    assert ("demo-memory", "text_completion") == (answer.model, answer.object)
    found, usage = answer.choices[0], answer.usage
    assert (tokenizer.decode(ids), "length") == (found.text, found.finish_reason)
    assert (len(prompt), 24) == (usage.prompt_tokens, usage.completion_tokens)
    assert len(prompt) + 24 == usage.total_tokens


def test_a_stream_adds_up_to_the_completion(client: OpenAI) -> None:
    """The chunks are parts of the whole answer, and the requested usage is in the last one."""
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    plain, parts = complete(client), [c.choices[0] for c in chunks if c.choices]
    assert plain.choices[0].text == "".join(part.text for part in parts)
    assert len(chunks) > 10
    assert ["length"] == [part.finish_reason for part in parts if part.finish_reason]
    assert plain.usage == chunks[-1].usage
    assert 1 == len({c.id for c in chunks})


def test_all_forms_of_prompt_are_accepted(client: OpenAI, tokenizer) -> None:
    """A text, token ids, and lists of either. With n, choices are numbered prompt by prompt."""
    ids = tokenizer.encode(PROMPT).ids
    text, other = choice(client).text, choice(client, "import ").text
    assert text == choice(client, ids).text
    assert [text, other] == [c.text for c in complete(client, [PROMPT, "import "]).choices]
    answer = complete(client, [ids, tokenizer.encode("import ").ids], n=2)
    expected = [(0, text), (1, text), (2, other), (3, other)]
    assert expected == [(c.index, c.text) for c in answer.choices]
    assert 4 * 24 == answer.usage.completion_tokens


def test_a_seed_repeats_and_choices_differ(client: OpenAI) -> None:
    """The same seed gives the same texts, and the choices of one request differ."""
    first, second = (complete(client, temperature=1.0, seed=5, n=3).choices for _ in range(2))
    assert [c.text for c in first] == [c.text for c in second]
    assert 3 == len({c.text for c in first})


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    """The text does not contain it, also if it spans tokens, unless the request includes it."""
    whole = choice(client, max_tokens=60).text
    stop = whole[20:26]
    assert 6 == len(stop)
    expected = whole[: whole.index(stop)]
    plain = choice(client, max_tokens=60, stop=[stop, "never said"])
    assert (expected, "stop") == (plain.text, plain.finish_reason)
    parts = [c.choices[0] for c in complete(client, max_tokens=60, stop=stop, stream=True)]
    assert (expected, "stop") == ("".join(p.text for p in parts), parts[-1].finish_reason)
    shown = {"include_stop_str_in_output": True}
    shown = choice(client, max_tokens=60, stop=stop, extra_body=shown)
    assert (expected + stop, "stop") == (shown.text, shown.finish_reason)


def test_logprobs_have_openai_s_form(client: OpenAI, cluster: Cluster, tokenizer) -> None:
    """Tokens, values and offsets are those of the worker, whole and streamed."""
    with Client(cluster.workers.split(",")[0]) as worker:
        replies = list(worker.replies(tokenizer.encode(PROMPT).ids, 24, logprobs=3))
    answer = choice(client, logprobs=3)
    found = answer.logprobs
    assert answer.text == "".join(found.tokens)
    assert [r.logprobs.chosen[0] for r in replies] == pytest.approx(found.token_logprobs, abs=1e-4)
    assert [3] * 24 == [len(top) for top in found.top_logprobs]
    tops = zip(found.tokens, found.top_logprobs, strict=True)
    assert found.token_logprobs == [top[token] for token, top in tops]
    places = zip(found.text_offset, found.tokens, strict=True)
    assert found.tokens == [answer.text[at : at + len(token)] for at, token in places]
    parts = [c.choices[0].logprobs for c in complete(client, logprobs=3, stream=True)]
    assert found.tokens == [token for p in parts for token in p.tokens]
    streamed = [value for p in parts for value in p.token_logprobs]
    assert found.token_logprobs == pytest.approx(streamed, abs=1e-4)
    assert found.text_offset == [at for p in parts for at in p.text_offset]


def test_an_echo_has_the_prompt_s_logprobs(client: OpenAI, tokenizer) -> None:
    """Prompt and answer are one text, and greedy text has the same logprobs as part of a prompt."""
    plain = choice(client, logprobs=1)
    ids = tokenizer.encode(PROMPT).ids
    echoed = choice(client, logprobs=1, echo=True)
    found = echoed.logprobs
    assert PROMPT + plain.text == echoed.text == "".join(found.tokens)
    assert (None, None) == (found.token_logprobs[0], found.top_logprobs[0])
    offsets = [len(PROMPT) + at for at in plain.logprobs.text_offset]
    assert offsets == found.text_offset[len(ids) :]
    ids += [tokenizer.token_to_id(t) or tokenizer.encode(t).ids[0] for t in plain.logprobs.tokens]
    answer = complete(client, ids, logprobs=1, echo=True, max_tokens=0)
    scored = answer.choices[0]
    expected = pytest.approx(scored.logprobs.token_logprobs[1:], abs=1e-4)
    assert found.token_logprobs[1:] == expected
    assert (echoed.text, "length") == (scored.text, scored.finish_reason)
    assert 0 == answer.usage.completion_tokens
    assert PROMPT == choice(client, echo=True, max_tokens=0).text
    parts = [c.choices[0].text for c in complete(client, echo=True, stream=True)]
    assert PROMPT + plain.text == "".join(parts)


def test_an_echo_of_half_characters_is_whole(client: OpenAI, tokenizer) -> None:
    """Tokens that are parts of characters have names, logprobs and offsets like other tokens."""
    ids, more = tokenizer.encode("世界").ids, {"ignore_eos": True}
    found = choice(client, ids, echo=True, logprobs=1, max_tokens=1, extra_body=more).logprobs
    lists = (found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)
    assert {len(ids) + 1} == set(map(len, lists))
    assert found.tokens[0].startswith("bytes:\\x")
    rest = zip(found.tokens[1:], found.top_logprobs[1:], strict=True)
    assert all(token in top for token, top in rest)


def test_a_stop_string_s_tokens_are_left_out(client: OpenAI) -> None:
    """Log probabilities cover the tokens that begin in the returned text, whole and streamed."""
    whole = choice(client, max_tokens=60, logprobs=0)
    stop = whole.text[20:26]
    places = zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True)
    expected = [t for t, at in places if at < whole.text.index(stop)]
    options = {"max_tokens": 60, "logprobs": 0, "stop": stop}
    assert expected == choice(client, **options).logprobs.tokens
    chunks = complete(client, **options, stream=True)
    assert expected == [token for c in chunks for token in c.choices[0].logprobs.tokens]


def test_penalties_bias_and_stop_ids_reach_the_sampler(client: OpenAI, tokenizer) -> None:
    """A bias repeats a token, penalties end the repetition, and stop ids end the text."""
    x = tokenizer.encode("x").ids[0]

    def biased(bias: float, prompt: str = PROMPT, **more):
        extra = {name: more.pop(name) for name in list(more) if name not in NATIVE}
        bias = {str(x): bias}
        return complete(client, prompt, max_tokens=8, logit_bias=bias, extra_body=extra, **more)

    assert "x" * 8 == biased(100).choices[0].text
    assert "x" * 8 != biased(10, frequency_penalty=2, presence_penalty=2).choices[0].text
    assert "x" * 8 != biased(20, "x", repetition_penalty=10).choices[0].text
    stopped = biased(100, stop_token_ids=[x]).choices[0]
    assert ("", "stop") == (stopped.text, stopped.finish_reason)
    found = biased(100, logprobs=0, echo=True, stop_token_ids=[x]).choices[0]
    last = (found.logprobs.tokens[-1], found.logprobs.text_offset[-1])
    assert (PROMPT, "x", len(PROMPT)) == (found.text, *last)
    later = biased(100, stop_token_ids=[x], min_tokens=3)
    assert 3 <= later.usage.completion_tokens


NATIVE = ("frequency_penalty", "presence_penalty", "logprobs", "echo")  # arguments of the client


def test_gateway_and_worker_have_the_same_bounds(client: OpenAI) -> None:
    """The worker accepts, in 32 bits, each value that the gateway accepts at a bound."""
    for options in ({"repetition_penalty": 2**-7}, {"row_scale": -16}, {"layer_scales": [16] * 6}):
        complete(client, max_tokens=1, extra_body=options)
    complete(client, max_tokens=1, top_p=1e-300)


def test_the_models_are_listed(client: OpenAI) -> None:
    """/v1/models lists the models of the workers."""
    assert ["demo-memory"] == [m.id for m in client.models.list()]
    found = client.models.retrieve("demo-memory")
    assert ("demo-memory", 512) == (found.id, found.max_model_len)


def test_the_client_raises_its_own_errors(client: OpenAI) -> None:
    """OpenAI's client maps statuses and bodies to its error classes."""
    with pytest.raises(openai.NotFoundError, match="available: demo-memory"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="available: demo-memory"):
        complete(client, model="gpt-9")
    words = "maximum context length is 512 .*context_length_exceeded"  # LiteLLM's, LangChain's
    for options in (
        {"prompt": PROMPT * 200},
        {"prompt": "a" * 900_000},
        {"max_tokens": 1000, "stream": True},
    ):
        with pytest.raises(openai.BadRequestError, match=words) as found:
            complete(client, **options)
        assert ("context_length_exceeded", "prompt") == (found.value.code, found.value.param)


# chat


TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'assistant' and loop.first %}
{{- raise_exception('the user speaks first') }}
{%- endif %}
{{- '# ' + message.role + ': ' + message.content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'def ' }}{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "write Python"},
    {"role": "user", "content": [{"type": "text", "text": "add"}]},
]
RENDERED = "# system: write Python\n# user: add\ndef "


@pytest.fixture(scope="module")
def talking(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A client of another gateway with the same workers, which has a chat template."""
    folder = tmp_path_factory.mktemp("talking")
    shutil.copy(DEMO / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE}), encoding="utf-8"
    )
    with another_gateway(cluster, folder) as gateway:
        wait_until_healthy(gateway.address)
        url = f"http://{gateway.address}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0) as made:
            yield made


def chat(client: OpenAI, **options):
    options = {"temperature": 0, "max_completion_tokens": 24, "messages": MESSAGES, **options}
    return client.chat.completions.create(model="demo-memory", **options)


def test_a_chat_is_a_completion(client: OpenAI, talking: OpenAI, tokenizer) -> None:
    """The answer is the completion of the text that the template makes of the messages."""
    answer, completion = chat(talking), complete(client, RENDERED)
    message = answer.choices[0].message
    assert (completion.choices[0].text, "assistant") == (message.content, message.role)
    assert ("chat.completion", "length") == (answer.object, answer.choices[0].finish_reason)
    assert completion.usage == answer.usage
    rest = chat(talking, max_completion_tokens=None, extra_body={"ignore_eos": True})
    assert 512 == rest.usage.total_tokens
    url = str(talking.base_url).replace("/v1/", "/tokenize")
    ids = HTTP.post(url, json={"messages": MESSAGES}).json()["tokens"]
    assert tokenizer.encode(RENDERED).ids == ids


def test_a_streamed_chat_adds_up(talking: OpenAI) -> None:
    """Role, content, finish reason and usage come in this order, for each choice of n."""
    options = {"n": 2, "temperature": 1.0, "seed": 3}
    plain = chat(talking, **options)
    chunks = list(chat(talking, **options, stream=True, stream_options={"include_usage": True}))
    assert (plain.usage, []) == (chunks[-1].usage, chunks[-1].choices)
    for expected in plain.choices:
        parts = [c.choices[0] for c in chunks if c.choices]
        parts = [part for part in parts if part.index == expected.index]
        assert ["assistant"] == [part.delta.role for part in parts if part.delta.role]
        assert parts[0].delta.role
        assert expected.message.content == "".join(part.delta.content or "" for part in parts)
        assert [expected.finish_reason] == [p.finish_reason for p in parts if p.finish_reason]
        assert expected.finish_reason == parts[-1].finish_reason
    assert {"chat.completion.chunk"} == {c.object for c in chunks}


def test_a_chat_s_logprobs_have_openai_s_form(client: OpenAI, talking: OpenAI) -> None:
    """Each token has its bytes and the most likely tokens, with the completion's values."""
    options = {"logprobs": True, "top_logprobs": 2}
    found = chat(talking, **options).choices[0].logprobs.content
    expected = choice(client, RENDERED, logprobs=2).logprobs
    assert expected.tokens == [t.token for t in found]
    assert expected.token_logprobs == pytest.approx([t.logprob for t in found], abs=1e-4)
    assert all(t.token == bytes(t.bytes).decode() for t in found)
    assert all((2, t.token) == (len(t.top_logprobs), t.top_logprobs[0].token) for t in found)
    parts = [c.choices[0].logprobs for c in chat(talking, **options, stream=True)]
    assert expected.tokens == [t.token for p in parts if p for t in p.content]
    assert [] == chat(talking, logprobs=True).choices[0].logprobs.content[0].top_logprobs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "'user'"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'text'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        ({"messages": [{"role": "user", "content": [{"x": 1}]}]}, "messages.0.content.0.type: "),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "tool_calls is not"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the user speaks first"),
        ({"tools": [{"type": "function"}]}, "tools is not supported: leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"top_logprobs": 2}, "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"max_completion_tokens": 0}, "greater than or equal to 1"),
        ({"max_completion_tokens": 600}, "maximum context length is 512 tokens"),
        ({"extra_body": {"frobnicate": 1}}, "unknown parameter 'frobnicate'"),
        ({"extra_body": {"echo": True}}, "echo"),
        ({"messages": [{"role": "user", "content": None}]}, "content of a user message"),
        ({"messages": [{"role": "user", "content": "a", "frobnicate": 1}]}, "frobnicate is not"),
        ({"messages": [{"role": "user", "content": "(a" * 900}]}, "maximum context length is 512"),
    ],
)
def test_a_bad_chat_is_refused(talking: OpenAI, options: dict, message: str) -> None:
    """The status is 400, and the message names the parameter."""
    with pytest.raises(openai.BadRequestError, match=message):
        chat(talking, **options)


@pytest.mark.parametrize(
    "added",
    [
        {"refusal": None, "tool_calls": [], "function_call": None, "audio": None},
        {"id": "chatcmpl-1", "created": 1, "model": "other", "usage": {"total_tokens": 1}},
        {"reasoning_content": "because", "provider_specific_fields": {"a": 1}, "annotations": [1]},
        {"content": [{"type": "text", "text": "yes", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_an_answer_of_another_server_is_taken_as_history(talking: OpenAI, added: dict) -> None:
    """Fields that servers and clients add to an assistant's message do not change the answer."""
    user, plain = {"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}
    history = [user, {**plain, **added}, user]
    expected = chat(talking, messages=[user, plain, user]).choices[0].message.content
    assert expected == chat(talking, messages=history).choices[0].message.content


NEUTRAL = [
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"stream": True, "stream_options": {"continuous_usage_stats": False}},
    {"stream_options": {"include_usage": False}},
    {"frobnicate": None},
    {"metadata": {"trace": "1"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k"},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "response_format": None},
    {"best_of": 2, "n": 2, "suffix": "", "logit_bias": {}, "stop": [], "echo": False},
    {"length_penalty": 1.0, "early_stopping": False, "truncate_prompt_tokens": None},
    {"skip_special_tokens": True, "spaces_between_special_tokens": True, "guided_json": None},
    {"logprobs": False, "top_logprobs": 0, "max_completion_tokens": 2},
]


@pytest.mark.parametrize("more", NEUTRAL, ids=lambda more: next(iter(more)))
def test_a_parameter_that_asks_for_nothing_is_accepted(talking: OpenAI, more: dict) -> None:
    """Both routes accept null, defaults of OpenAI and vLLM, and values that change no answer."""
    for path, body in (
        ("completions", {"prompt": "a"}),
        ("chat/completions", {"messages": MESSAGES}),
    ):
        url = f"{talking.base_url}{path}"
        answer = HTTP.post(url, json={**body, "max_tokens": 2, **more}, timeout=60)
        assert 200 == answer.status_code, answer.text


def test_the_whole_list_is_accepted(talking: OpenAI) -> None:
    """Each neutral value of each parameter, and null, is accepted; others are refused by name."""
    for name, values in schemas.NEUTRAL.items():
        for value in (None, *values):
            HTTP.post(
                f"{talking.base_url}completions",
                json={"prompt": "a", "max_tokens": 1, name: value},
                timeout=60,
            ).raise_for_status()
        if values != schemas.ANY and name not in schemas.CompletionRequest.model_fields:
            body = {"messages": MESSAGES, "max_tokens": 1, name: "other"}
            answer = HTTP.post(f"{talking.base_url}chat/completions", json=body, timeout=60)
            error = answer.json()["error"]
            assert 400 == answer.status_code
            assert name == error["param"]


EMPTY = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []}


@pytest.mark.parametrize(
    "message",
    [
        {"content": "yes", **EMPTY},
        {"content": None},
        {},
        {"content": []},
        {"content": [{"type": "text", "text": "yes", "annotations": []}], "name": None},
        {"content": "yes", "reasoning_content": None, "unknown": {"refusal": None, "parts": [{}]}},
    ],
)
def test_answers_are_history(talking: OpenAI, message: dict) -> None:
    """An assistant's message may have the empty fields of any server, and no content."""
    messages = [*MESSAGES, {"role": "assistant", **message}, {"role": "user", "content": "more"}]
    assert chat(talking, messages=messages, max_completion_tokens=2).choices[0].message.content
    calls = [*MESSAGES, {"role": "assistant", **message, "tool_calls": [{"id": "1"}]}]
    with pytest.raises(openai.BadRequestError, match=r"messages\.2\.tool_calls is not supported"):
        chat(talking, messages=calls)


def test_an_empty_field_may_be_deep(talking: OpenAI) -> None:
    """A field of many nested lists is accepted if there is nothing in it, and refused by name."""
    deep = '{"messages": [{"role": "user", "content": "a", "x": %s}], "max_tokens": 1}'
    url, headers = f"{talking.base_url}chat/completions", {"Content-Type": "application/json"}
    for inside, status in (("", 200), ("1", 400)):
        content = deep % ("[" * 800 + inside + "]" * 800)
        answer = HTTP.post(url, content=content, headers=headers, timeout=60)
        assert status == answer.status_code, answer.text


def test_a_conversation_goes_on(talking: OpenAI) -> None:
    """The client's own message objects are sent back, as objects and as dictionaries."""
    messages = [{"role": "developer", "content": "write Python"}, MESSAGES[1]]
    for _ in range(2):
        answer = chat(talking, messages=messages, max_completion_tokens=4).choices[0].message
        messages += [answer, {"role": "user", "content": "more"}, answer.model_dump()]
        messages.append({"role": "user", "content": "more"})


def test_a_chat_without_a_template_is_refused(client: OpenAI) -> None:
    """The error names the files that can have one."""
    files = r"needs a chat_template\.jinja, or a tokenizer_config\.json with"
    with pytest.raises(openai.BadRequestError, match=files):
        chat(client)


# plain HTTP


@pytest.mark.parametrize(
    ("body", "param", "code", "message"),
    [
        ("{", None, "invalid_value", "not valid JSON"),
        ("", None, "invalid_type", "JSON"),
        ("[]", None, "invalid_type", "JSON object"),
        ("null", None, "invalid_type", "JSON"),
        ("[" * 100_000, None, None, "body"),
        ('{"prompt": "\\ud800"}', "prompt", "invalid_value", "surrogate"),
        ('{"prompt": "a", "temperature": NaN}', "temperature", "invalid_value", "finite number"),
        ({}, "prompt", "missing_required_parameter", "required"),
        ({"prompt": 3}, "prompt", "invalid_type", "list of token ids"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type", "list of token ids"),
        ({"prompt": ""}, "prompt", "invalid_value", "empty"),
        ({"prompt": []}, "prompt", "invalid_value", "empty"),
        ({"prompt": [[]]}, "prompt", "invalid_value", "at least one"),
        ({"prompt": [-1]}, "prompt", "invalid_value", "outside the vocabulary"),
        ({"prompt": [8192]}, "prompt", "invalid_value", "allowed are 0 to 8191"),
        (
            {"prompt": "a", "frobnicate": 1},
            "frobnicate",
            "unknown_parameter",
            "unknown parameter 'frobnicate'",
        ),
        (
            {"prompt": "a", "temperature": -1},
            "temperature",
            "decimal_below_min_value",
            "greater than or equal to 0",
        ),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "invalid_type", "number"),
        (
            {"prompt": "a", "temperature": None, "top_p": 0},
            "top_p",
            "decimal_below_min_value",
            "greater than 0",
        ),
        (
            {"prompt": "a", "max_tokens": 0},
            "max_tokens",
            "integer_below_min_value",
            "at least 1; 0 is allowed with echo=true",
        ),
        (
            {"prompt": "a", "max_tokens": -1},
            "max_tokens",
            "integer_below_min_value",
            "greater than or equal to 0",
        ),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "invalid_type", "integer"),
        ({"prompt": "a", "n": 1000}, "n", "integer_above_max_value", "128"),
        ({"prompt": ["a"] * 100, "n": 2}, "n", "invalid_value", "more than 128 completions"),
        (
            {"prompt": "a", "logprobs": 21},
            "logprobs",
            "integer_above_max_value",
            "less than or equal to 20",
        ),
        ({"prompt": "a", "logprobs": True}, "logprobs", "invalid_type", "integer"),
        (
            {"prompt": "a", "suffix": "b"},
            "suffix",
            "unsupported_parameter",
            "suffix is not supported: leave it out",
        ),
        (
            {"prompt": "a", "use_beam_search": True},
            "use_beam_search",
            "unsupported_parameter",
            "not supported: leave it out, or send False",
        ),
        (
            {"prompt": "a", "presence_penalty": 2.5},
            "presence_penalty",
            "decimal_above_max_value",
            "less than or equal to 2",
        ),
        (
            {"prompt": "a", "repetition_penalty": 1e-40},
            "repetition_penalty",
            "decimal_below_min_value",
            "0.0078125",
        ),
        (
            {"prompt": "a", "min_p": 1.5},
            "min_p",
            "decimal_above_max_value",
            "less than or equal to 1",
        ),
        (
            {"prompt": "a", "top_k": -2},
            "top_k",
            "integer_below_min_value",
            "greater than or equal to -1",
        ),
        (
            {"prompt": "a", "logit_bias": {"1": 101}},
            "logit_bias",
            "decimal_above_max_value",
            "less than or equal to 100",
        ),
        ({"prompt": "a", "logit_bias": {"one": 1}}, "logit_bias", "invalid_type", "integer"),
        (
            {"prompt": "a", "logit_bias": {"99999": 1}},
            "logit_bias",
            "invalid_value",
            "99999 is outside the vocabulary",
        ),
        ({"prompt": "a", "logit_bias": {"\ud800": 1}}, "logit_bias", "invalid_value", "unicode"),
        ({"prompt": "a", "stop": ["x"] * 33}, "stop", "array_above_max_length", "at most 32 texts"),
        (
            {"prompt": "a", "stop": "x" * 513},
            "stop",
            "string_above_max_length",
            "at most 512 characters",
        ),
        (
            {"prompt": "a", "stop_token_ids": [-1]},
            "stop_token_ids",
            "integer_below_min_value",
            "greater than or equal to 0",
        ),
        (
            {"prompt": "a", "min_tokens": 17},
            "min_tokens",
            "invalid_value",
            "min_tokens must be at most max_tokens=16",
        ),
        (
            {"prompt": "a", "best_of": 3},
            "best_of",
            "unsupported_parameter",
            "leave it out, or send n=1",
        ),
        (
            {"prompt": "a", "stream_options": {"include_usage": True}},
            "stream_options",
            "invalid_value",
            "stream=true",
        ),
        ({"prompt": "a", "stream": "yes"}, "stream", "invalid_type", "boolean"),
    ],
)
def test_a_bad_body_is_refused(
    cluster: Cluster, body, param: str | None, code: str | None, message: str
) -> None:
    """The status is 400, and the error has OpenAI's form, the code, and the parameter."""
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    answer = HTTP.post(f"{cluster.url}/completions", content=content, headers=headers, timeout=30)
    assert 400 == answer.status_code, answer.text
    error = answer.json()["error"]
    found = error["type"], error["param"], error["code"]
    assert ("invalid_request_error", param, code) == found
    assert message in error["message"]


odd_text = st.text(st.characters() | st.just("\ud800"), max_size=6)
odd_numbers = st.integers(-3, 30) | st.sampled_from([2**31, 2**64, -(2**70), 1e308]) | st.floats()
anything = st.recursive(
    st.none() | st.booleans() | odd_numbers | odd_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=6,
)
texts, ids = st.lists(st.text(max_size=5), max_size=3), st.lists(st.integers(0, 9000), max_size=5)
message = {"role": st.sampled_from(["user", "system"]), "content": st.text(max_size=9)}
token_texts = st.integers(-1, 9000).map(str)
likely = {
    "prompt": st.text(max_size=20) | ids | texts,
    "messages": st.lists(st.fixed_dictionaries(message), max_size=3),
    "tokens": ids,
    "logit_bias": st.dictionaries(token_texts, st.integers(-101, 101), max_size=3),
    "logprobs": st.integers(0, 3) | st.booleans(),
    "top_logprobs": st.integers(0, 3),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "n": st.integers(1, 3),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "temperature": st.floats(0, 2),
    "repetition_penalty": st.floats(0.1, 3),
    "min_p": st.floats(0, 1),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 9000),
    "seed": st.integers(-9, 9),
}
FIELDS_OF = {
    "/v1/completions": {*schemas.CompletionRequest.model_fields},
    "/v1/chat/completions": {*schemas.ChatRequest.model_fields},
    "/tokenize": {*schemas.TokenizeRequest.model_fields},
    "/detokenize": {*schemas.DetokenizeRequest.model_fields},
}
NAMES = sorted(set().union(*FIELDS_OF.values()) - {"model", "max_tokens"})


@given(
    path=st.sampled_from([*FIELDS_OF]),
    body=st.fixed_dictionaries({}, optional=likely),
    odd=st.dictionaries(st.sampled_from(NAMES), anything, max_size=2),
)
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_breaks_anything(talking: OpenAI, path: str, body: dict, odd: dict) -> None:
    """Any body gets 200 or 400 in OpenAI's form."""
    url = str(talking.base_url).removesuffix("/v1/") + path
    known, headers = FIELDS_OF[path], {"Content-Type": "application/json"}
    given_ = {**body, **odd, **({"max_tokens": 3} if "max_tokens" in known else {})}
    for sent in (given_, {name: value for name, value in given_.items() if name in known}):
        content = json.dumps(sent)
        answer = HTTP.post(url, content=content, headers=headers, timeout=60)
        assert answer.status_code in (200, 400), (content, answer.text)
        if answer.status_code == 400:
            assert answer.json()["error"]["message"]
        elif sent.get("stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in answer.text


def test_unknown_paths_and_methods(cluster: Cluster) -> None:
    """404 and 405 have OpenAI's form and codes."""
    for path, status, code in (
        ("/v1/nothing", 404, "unknown_url"),
        ("/v1/completions", 405, "method_not_supported"),
    ):
        answer = get(cluster, path)
        assert (status, code) == (answer.status_code, answer.json()["error"]["code"])


def test_health_and_metrics(cluster: Cluster) -> None:
    """Health counts the workers, and metrics count requests by route, not by unknown path."""
    get(cluster, "/made/up")
    health = get(cluster, "/health")
    assert 200 == health.status_code
    assert {"healthy": 2, "unhealthy": 0} == health.json()["workers"]
    text = get(cluster, "/metrics").text
    assert "tolhouse_gateway_healthy_workers 2.0" in text
    assert 'tolhouse_gateway_requests_total{path="/health",status="200"}' in text
    assert 'path="other",status="404"' in text
    assert "made/up" not in text


def test_head_is_get_without_a_body(cluster: Cluster) -> None:
    """It has the status and header of GET, also for an unknown path."""
    for path, status in (("/health", 200), ("/ping", 200), ("/v1/models", 200), ("/nothing", 404)):
        asked, got = HTTP.head(f"http://{cluster.gateway}{path}"), get(cluster, path)
        assert (status, b"") == (asked.status_code, asked.content)
        assert got.headers["content-length"] == asked.headers["content-length"]


def test_requests_go_to_the_least_loaded_worker(cluster: Cluster) -> None:
    """Concurrent requests are spread over both workers."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Client(a)) for a in cluster.workers.split(",")]
        before = [w.describe_worker().tokens for w in workers]
        pool = stack.enter_context(ThreadPoolExecutor(8))
        answers = pool.map(lambda _: post(cluster, {**ENDLESS, "max_tokens": 40}), range(8))
        assert 1 == len({text_of(answer) for answer in answers})
        after = [w.describe_worker().tokens for w in workers]
    assert all(a > b for a, b in zip(after, before, strict=True))


def test_each_chunk_may_have_the_usage_so_far(cluster: Cluster) -> None:
    """With continuous_usage_stats, the tokens of the chunks grow to those of the last chunk."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**ENDLESS, "n": 2, "max_tokens": 8, "stream": True, "stream_options": options}
    lines = [line.removeprefix("data: ") for line in stream(cluster, body)[:-1]]
    *usages, last = [json.loads(line)["usage"] for line in lines]
    counts = [usage["completion_tokens"] for usage in usages]
    assert 0 < counts[0] < counts[-1]
    assert sorted(counts) == counts
    assert (16, last) == (last["completion_tokens"], usages[-1])


def test_a_load_generator_s_body_is_accepted(cluster: Cluster) -> None:
    """The parameters that load generators send are accepted, including nulls."""
    nulls = dict.fromkeys(("frequency_penalty", "presence_penalty", "logprobs", "seed"))
    same = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    others = {"model": "demo-memory", "max_tokens": 4, "best_of": 1, "use_beam_search": False}
    lines = stream(cluster, {**ENDLESS, **nulls, **same, **others, **usage})
    assert "data: [DONE]" == lines.pop()
    last = json.loads(lines[-1].removeprefix("data: "))
    assert (4, []) == (last["usage"]["completion_tokens"], last["choices"])


def test_a_request_id_is_propagated_or_generated(cluster: Cluster) -> None:
    """The caller's id is in header, answer and log. A malformed or missing one is replaced."""
    answer = post(cluster, {"prompt": "a", "max_tokens": 1}, headers={"X-Request-Id": "mine-1"})
    assert ("mine-1", "cmpl-mine-1") == (answer.headers["x-request-id"], answer.json()["id"])
    long = get(cluster, "/nothing", headers={"X-Request-Id": "x" * 129})
    assert (404, 32) == (long.status_code, len(long.headers["x-request-id"]))
    assert '"request_id": "mine-1"' in cluster.processes[-1].log.read_text(encoding="utf-8")


def test_texts_are_tokenised_and_detokenised(cluster: Cluster, tokenizer) -> None:
    """/tokenize returns ids, their number and the context, and /detokenize the text."""
    ids = tokenizer.encode(PROMPT).ids
    body = {"model": "demo-memory", "prompt": PROMPT, "return_token_strs": True}
    found = post(cluster, body, "/tokenize").json()
    assert PROMPT == "".join(found.pop("token_strs"))
    assert {"tokens": ids, "count": len(ids), "max_model_len": 512} == found
    assert {"prompt": PROMPT} == post(cluster, {"tokens": ids}, "/detokenize").json()
    assert 0 == post(cluster, {"prompt": ""}, "/tokenize").json()["count"]
    info = get(cluster, "/tokenizer_info").json()
    assert ("<|endoftext|>", None) == (info["eos_token"], info["chat_template"])


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/detokenize", {"tokens": [8192]}, "vocabulary"),
        ("/detokenize", {"tokens": [2**40]}, "less than"),
        ("/tokenize", {}, "either"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "chat template"),
        ("/tokenize", {"prompt": "a", "model": 3}, "model"),
        ("/v1/completions", {"prompt": "a" * 900_000}, "maximum context length is 512 tokens"),
        ("/v1/completions", {"prompt": PROMPT, "user": "a" * 513}, "user"),
    ],
)
def test_bad_requests_are_refused(cluster: Cluster, path: str, body: dict, message: str) -> None:
    """The status is 400, and the message has the reason, also for long texts."""
    answer = post(cluster, body, path)
    assert (400, True) == (answer.status_code, message in answer.json()["error"]["message"])


def test_version_and_ping(cluster: Cluster) -> None:
    """/version has the package's version, and /ping is empty while a worker is healthy."""
    assert {"version": __version__, "commit": ""} == get(cluster, "/version").json()
    assert (200, 200) == (get(cluster, "/ping").status_code, post(cluster, {}, "/ping").status_code)


def test_latencies_are_measured(cluster: Cluster) -> None:
    """Each completion adds a first token, an end, and a time between each two tokens."""

    def counts() -> list[float]:
        text = get(cluster, "/metrics").text
        names = ("time_to_first_token", "inter_token", "completion")
        pattern = "tolhouse_gateway_{}_seconds_count (.*)"
        return [float(re.search(pattern.format(name), text)[1]) for name in names]

    before = counts()
    post(cluster, {**ENDLESS, "max_tokens": 10, "n": 2})
    assert [2, 18, 2] == [after - b for after, b in zip(counts(), before, strict=True)]


def test_a_large_body_is_refused(cluster: Cluster) -> None:
    """The error has the limit, whether or not the header announces the size."""
    with another_gateway(cluster, DEMO, "--max-body-megabytes", "0.02") as gateway:
        url = f"http://{gateway.address}/v1/completions"
        body = json.dumps({"prompt": "a" * 30_000}).encode()
        headers = {"Content-Type": "application/json"}
        for content in (body, iter([body[:10_000], body[10_000:20_000], body[20_000:]])):
            answer = HTTP.post(url, content=content, headers=headers)
            assert 413 == answer.status_code
            assert "at most 20000 bytes" in answer.json()["error"]["message"]


NARROW = ("--max-num-seqs", "1", "--max-waiting", "1")


def test_full_queues_refuse_requests(table: str) -> None:
    """If all workers are full, the status is 429, and Retry-After has a time."""
    narrow, body = local_cluster(DEMO, table, worker_options=NARROW), {**ENDLESS, "max_tokens": 60}
    with narrow as cluster, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: post(cluster, body), range(12)))
    full = [a for a in answers if a.status_code == 429]
    assert {200, 429} == {a.status_code for a in answers}
    assert {"1"} == {a.headers["retry-after"] for a in full}
    assert {"rate_limit_error"} == {a.json()["error"]["type"] for a in full}


def test_a_full_worker_gets_no_requests(table: str) -> None:
    """The gateway refuses requests to a full worker before it tokenises them."""
    long, short = {**ENDLESS, "max_tokens": 450, "stream": True}, {**GREEDY, "max_tokens": 1}
    deadline = time.monotonic() + 60
    with (
        local_cluster(DEMO, table, worker_options=NARROW) as cluster,
        Client(cluster.workers) as client,
    ):
        with ExitStack() as streams, ThreadPoolExecutor(2) as pool:
            for count in (1, 2):
                url = f"{cluster.url}/completions"
                opened = HTTP.stream("POST", url, json=long, timeout=60)
                pool.submit(streams.enter_context, opened)
                while (now := client.describe_worker()).running + now.waiting < count:
                    assert time.monotonic() < deadline
            refused = post(cluster, short)
            assert (429, "1") == (refused.status_code, refused.headers["retry-after"])
            assert "the workers already have 2 requests" in refused.json()["error"]["message"]
        while 200 != post(cluster, short).status_code:
            assert time.monotonic() < deadline, "the places are not given back"


@pytest.mark.parametrize("streams", [True, False])
def test_a_closed_connection_ends_the_work(cluster: Cluster, streams: bool) -> None:
    """The sequence in the worker is cancelled."""
    body, url = {**ENDLESS, "max_tokens": 450, "stream": streams}, f"{cluster.url}/completions"
    if streams:
        with HTTP.stream("POST", url, json=body, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(url, json=body, timeout=0.3)
    deadline = time.monotonic() + 60
    for address in cluster.workers.split(","):
        with Client(address) as worker:
            while worker.describe_worker().running:
                assert time.monotonic() < deadline, "the sequence went on"


def test_a_worker_may_die(table: str) -> None:
    """The other worker serves requests. Without workers the status is 503 until one is back."""
    body, deadline = {**GREEDY, "max_tokens": 8}, time.monotonic() + 120
    with local_cluster(DEMO, table, workers=2) as cluster:
        first, second = (p for p in cluster.processes if p.ready["service"] == "worker")
        expected = text_of(post(cluster, body))
        os.kill(first.pid, signal.SIGKILL)
        for _ in range(6):  # immediately, before the gateway can notice
            answer = post(cluster, body)
            assert (200, expected) == (answer.status_code, text_of(answer))
        os.kill(second.pid, signal.SIGKILL)
        second.popen.wait()
        answers = [post(cluster, body) for _ in range(2)]
        while 503 != get(cluster, "/health").status_code:
            assert time.monotonic() < deadline
        answers += [post(cluster, body), get(cluster, "/v1/models/x"), get(cluster, "/health")]
        assert {503} == {answer.status_code for answer in answers}
        # callers must not see the addresses of workers
        assert not any("127.0.0.1" in answer.text for answer in answers)
        assert second.address in cluster.processes[-1].log.read_text(encoding="utf-8")
        again = ("worker", str(DEMO), "--rows", cluster.lookup, "--listen", second.address)
        with process(*again):
            while (answer := post(cluster, body)).status_code != 200:
                assert time.monotonic() < deadline
            assert expected == text_of(answer)


def test_a_worker_may_hang(table: str) -> None:
    """The other worker serves requests that a stopped one has not begun; its streams fail."""
    body = {**GREEDY, "max_tokens": 8}
    endless = {**ENDLESS, "max_tokens": 500, "stream": True}
    with local_cluster(DEMO, table, workers=2) as cluster, ThreadPoolExecutor(6) as pool:
        first = next(p for p in cluster.processes if p.ready["service"] == "worker")
        expected = text_of(post(cluster, body))
        streams = [pool.submit(stream, cluster, endless) for _ in range(2)]  # one on each worker
        time.sleep(0.3)
        send_signal(first.pid, signal.SIGSTOP)
        answers = [pool.submit(post, cluster, body) for _ in range(4)]  # two on the stopped one
        for answer in (a.result() for a in answers):
            assert (200, expected) == (answer.status_code, text_of(answer))
        ends = [lines.result() for lines in streams]
        failed = [any('"error"' in line for line in lines) for lines in ends]
        assert (["data: [DONE]"] * 2, 1) == ([lines[-1] for lines in ends], sum(failed))
        counted = get(cluster, "/metrics").text  # the status line of the stream had 200
        assert re.search(r'path="/v1/completions",status="50[34]"} 1', counted), counted
        os.kill(first.pid, signal.SIGCONT)


def test_a_draining_worker_finishes_its_streams(table: str) -> None:
    """Its streams reach their end, and the other worker gets new requests."""
    body = {**ENDLESS, "max_tokens": 160, "stream": True}
    patient = ("--drain-seconds", "90")  # on a slow machine too
    with (
        local_cluster(DEMO, table, workers=2, worker_options=patient) as cluster,
        ThreadPoolExecutor(8) as pool,
    ):
        first = next(p for p in cluster.processes if p.ready["service"] == "worker")
        streams = [pool.submit(stream, cluster, body) for _ in range(8)]
        with Client(first.address) as worker:
            wait_until(lambda: worker.describe_worker().running > 1)
        os.kill(first.pid, signal.SIGTERM)
        for lines in (one.result() for one in streams):
            assert "data: [DONE]" == lines[-1]
            assert not any('"error"' in line for line in lines)
        assert 0 == first.popen.wait(90)


def test_a_worker_of_another_tokenizer_gets_no_requests(cluster: Cluster, checkpoint: Path) -> None:
    """The gateway reports that the tokenizers differ and sends no ids."""
    deadline = time.monotonic() + 60
    with another_gateway(cluster, checkpoint) as gateway:
        url = f"http://{gateway.address}/v1/completions"
        while (answer := HTTP.post(url, json={"prompt": "a"})).status_code != 409:
            assert time.monotonic() < deadline
        message = answer.json()["error"]["message"]
        assert message.endswith("start it with the worker's checkpoint")


def test_a_failed_start_is_reported(cluster: Cluster, tmp_path: Path) -> None:
    """A port in use, a missing tokenizer, or a bad address or store gives a line on stderr."""
    for arguments, reason in (
        (f"{DEMO} --listen {cluster.gateway}", "in use"),
        (f"{tmp_path}", "no tokenizer"),
        (f"{DEMO} --workers nowhere", "HOST:PORT"),
        (f"{DEMO} --listen nowhere", "HOST:PORT"),
        (f"{DEMO} --listen 127.0.0.1:0 --rate-limit-store file://x", "redis://HOST:PORT"),
        (f"{DEMO} --listen 127.0.0.1:0 --rate-limit-store redis://example.org", "plaintext"),
    ):
        ended = tolhouse(f"gateway {arguments}", code=1)
        assert ("", True) == (ended.stdout, reason in ended.stderr)


def test_a_gateway_ends_with_0(cluster: Cluster) -> None:
    """After SIGTERM, a running stream is finished first."""
    with another_gateway(cluster, DEMO) as gateway:
        url = f"http://{gateway.address}/v1/completions"
        wait_until_healthy(gateway.address)
        body = {**ENDLESS, "max_tokens": 200, "stream": True}
        with HTTP.stream("POST", url, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            gateway.popen.terminate()
            assert "data: [DONE]" == [line for line in lines if line][-1]
        assert 0 == gateway.popen.wait(30)


def test_an_error_may_quote_anything() -> None:
    """Half of a surrogate pair is escaped, and a long message is cut."""
    assert r"no \ud800" == error_body("no \ud800", 400)["error"]["message"]
    assert 1002 == len(error_body("9" * 5000, 400)["error"]["message"])


def test_long_texts_do_not_block_other_requests(cluster: Cluster) -> None:
    """Other requests are answered while texts of the largest size are tokenised."""
    body = {"prompt": "\u00e9 " * 200_000, "return_token_strs": True}
    with ThreadPoolExecutor(2) as pool:
        long = [pool.submit(post, cluster, body, "/tokenize") for _ in range(2)]
        before = 0
        while not all(one.done() for one in long):
            assert 200 == get(cluster, "/version").status_code
            before += 1
    assert before > 6
    assert {200} == {one.result().status_code for one in long}
