"""The gateway as a real process in front of real workers, asked by the stock OpenAI client and by plain HTTP."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
import tolhouse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolhouse import Client
from tolhouse.gateway.detokenizer import Detokenizer
from tolhouse.gateway.error_responses import error_body
from tolhouse.gateway.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.tokenizer import load_tokenizer
from tolhouse.testing import (
    Cluster,
    build_table,
    free_port,
    local_cluster,
    process,
    wait_until_healthy,
)

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
    return client.completions.create(
        model="demo-memory", prompt=prompt, **{"temperature": 0, "max_tokens": 24, **options}
    )


# the stock client


def test_a_completion_is_the_text_of_the_worker_s_tokens(
    client: openai.OpenAI, cluster: Cluster, tokenizer
) -> None:
    """Text in, text out, with usage, from the tokens that a worker gives for the same ids."""
    with Client(cluster.workers.split(",")[0]) as worker:
        ids = list(worker.generate(tokenizer.encode(PROMPT).ids, 24))
    answer = complete(client, PROMPT)
    assert tokenizer.decode(ids) == answer.choices[0].text
    assert ("length", "demo-memory", "text_completion") == (
        answer.choices[0].finish_reason,
        answer.model,
        answer.object,
    )
    count = len(tokenizer.encode(PROMPT).ids)
    assert (count, 24, count + 24) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.usage.total_tokens,
    )


def test_a_stream_adds_up_to_the_completion(client: openai.OpenAI) -> None:
    """Streamed pieces are the plain answer in parts; usage comes last where it was asked for."""
    pieces = list(complete(client, PROMPT, stream=True, stream_options={"include_usage": True}))
    plain = complete(client, PROMPT)
    assert plain.choices[0].text == "".join(p.choices[0].text for p in pieces if p.choices)
    assert len(pieces) > 10
    assert ["length"] == [
        p.choices[0].finish_reason for p in pieces if p.choices and p.choices[0].finish_reason
    ]
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
    assert [(0, text), (1, text), (2, other), (3, other)] == [
        (c.index, c.text) for c in answer.choices
    ]
    assert 4 * 24 == answer.usage.completion_tokens


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    """The same seed gives the same texts, and the choices of one request are different draws."""
    draws = [
        [c.text for c in complete(client, PROMPT, temperature=1.0, seed=5, n=3).choices]
        for _ in range(2)
    ]
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
    assert (expected, "stop") == (
        "".join(p.choices[0].text for p in streamed),
        streamed[-1].choices[0].finish_reason,
    )


def test_a_stop_string_may_be_shown(client: openai.OpenAI) -> None:
    """With include_stop_str_in_output the text ends after the stop string."""
    whole = complete(client, PROMPT, max_tokens=60).choices[0].text
    stop = whole[20:26]
    shown = complete(
        client, PROMPT, max_tokens=60, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert (whole[: whole.index(stop)] + stop, "stop") == (
        shown.choices[0].text,
        shown.choices[0].finish_reason,
    )


def test_logprobs_have_openai_s_form(client: openai.OpenAI, cluster: Cluster, tokenizer) -> None:
    """Tokens, their logprobs, the likeliest by text and offsets, as the worker tells them; streamed they add up to the same."""
    with Client(cluster.workers.split(",")[0]) as worker:
        replies = list(worker.replies(tokenizer.encode(PROMPT).ids, 24, logprobs=3))
    answer = complete(client, PROMPT, logprobs=3).choices[0]
    told = answer.logprobs
    assert answer.text == "".join(told.tokens)
    assert [r.logprobs.chosen[0] for r in replies] == pytest.approx(told.token_logprobs, abs=1e-4)
    assert [3] * 24 == [len(top) for top in told.top_logprobs]
    assert told.token_logprobs == [
        top[token] for token, top in zip(told.tokens, told.top_logprobs, strict=True)
    ]
    assert [
        answer.text[at : at + len(token)]
        for at, token in zip(told.text_offset, told.tokens, strict=True)
    ] == told.tokens
    pieces = [p.choices[0].logprobs for p in complete(client, PROMPT, logprobs=3, stream=True)]
    assert told.tokens == [token for p in pieces for token in p.tokens]
    assert told.token_logprobs == pytest.approx(
        [value for p in pieces for value in p.token_logprobs], abs=1e-4
    )
    assert told.text_offset == [at for p in pieces for at in p.text_offset]


def test_an_echo_tells_the_prompt_s_logprobs(client: openai.OpenAI, tokenizer) -> None:
    """Prompt and answer come as one text; the first token has no logprob; greedy text, given as prompt, has those it had as answer."""
    plain = complete(client, PROMPT, logprobs=1).choices[0]
    count = len(tokenizer.encode(PROMPT).ids)
    echoed = complete(client, PROMPT, logprobs=1, echo=True).choices[0]
    assert PROMPT + plain.text == echoed.text == "".join(echoed.logprobs.tokens)
    assert (None, None) == (echoed.logprobs.token_logprobs[0], echoed.logprobs.top_logprobs[0])
    assert [len(PROMPT) + at for at in plain.logprobs.text_offset] == echoed.logprobs.text_offset[
        count:
    ]
    ids = tokenizer.encode(PROMPT).ids + [
        tokenizer.token_to_id(t) or tokenizer.encode(t).ids[0] for t in plain.logprobs.tokens
    ]
    scored = complete(client, ids, logprobs=1, echo=True, max_tokens=0)
    assert echoed.logprobs.token_logprobs[1:] == pytest.approx(
        scored.choices[0].logprobs.token_logprobs[1:], abs=1e-4
    )
    assert (echoed.text, "length", 0) == (
        scored.choices[0].text,
        scored.choices[0].finish_reason,
        scored.usage.completion_tokens,
    )
    assert PROMPT == complete(client, PROMPT, echo=True, max_tokens=0).choices[0].text
    pieces = [p.choices[0] for p in complete(client, PROMPT, echo=True, stream=True)]
    assert PROMPT + plain.text == "".join(p.text for p in pieces)


def test_a_stop_string_s_tokens_are_not_told(client: openai.OpenAI) -> None:
    """With log probabilities, tokens are those that the shown text begins in, streamed or not."""
    whole = complete(client, PROMPT, max_tokens=60, logprobs=0).choices[0]
    stop = whole.text[20:26]
    end = whole.text.index(stop)
    expected = [
        t
        for t, at in zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True)
        if at < end
    ]
    assert (
        expected
        == complete(client, PROMPT, max_tokens=60, logprobs=0, stop=stop).choices[0].logprobs.tokens
    )
    pieces = complete(client, PROMPT, max_tokens=60, logprobs=0, stop=stop, stream=True)
    assert expected == [token for p in pieces for token in p.choices[0].logprobs.tokens]


def test_penalties_bias_and_stop_ids_reach_the_sampler(client: openai.OpenAI, tokenizer) -> None:
    """A biased token is all there is, a penalty ends repetition, a stop id ends the text, an early end is put off."""
    x = tokenizer.encode("x").ids[0]
    assert (
        "x" * 8 == complete(client, PROMPT, max_tokens=8, logit_bias={str(x): 100}).choices[0].text
    )
    penalised = (
        complete(
            client,
            PROMPT,
            max_tokens=8,
            logit_bias={str(x): 10},
            frequency_penalty=2,
            presence_penalty=2,
        )
        .choices[0]
        .text
    )
    assert penalised != "x" * 8
    repeated = (
        complete(
            client,
            "x",
            max_tokens=8,
            logit_bias={str(x): 20},
            extra_body={"repetition_penalty": 10},
        )
        .choices[0]
        .text
    )
    assert repeated != "x" * 8
    stopped = complete(
        client, PROMPT, logit_bias={str(x): 100}, extra_body={"stop_token_ids": [x]}
    ).choices[0]
    assert ("", "stop") == (stopped.text, stopped.finish_reason)
    told = complete(
        client,
        PROMPT,
        logprobs=0,
        echo=True,
        logit_bias={str(x): 100},
        extra_body={"stop_token_ids": [x]},
    ).choices[0]
    assert (PROMPT, "x", len(PROMPT)) == (
        told.text,
        told.logprobs.tokens[-1],
        told.logprobs.text_offset[-1],
    )
    later = complete(
        client,
        PROMPT,
        logit_bias={str(x): 100},
        extra_body={"stop_token_ids": [x], "min_tokens": 3},
    )
    assert 3 <= later.usage.completion_tokens


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    """What workers serve is what /v1/models shows."""
    assert ["demo-memory"] == [m.id for m in client.models.list()]
    assert ("demo-memory", 512) == (
        client.models.retrieve("demo-memory").id,
        client.models.retrieve("demo-memory").max_model_len,
    )
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


# chat


TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'assistant' and loop.first %}{{ raise_exception('the user speaks first') }}{% endif %}
{{- '# ' + message.role + ': ' + message.content + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'def ' }}{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "write Python"},
    {"role": "user", "content": [{"type": "text", "text": "add"}]},
]
RENDERED = "# system: write Python\n# user: add\ndef "


@pytest.fixture(scope="module")
def talking(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A gateway in front of the same workers, with a chat template."""
    folder = tmp_path_factory.mktemp("talking")
    shutil.copy(DEMO / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    with process(
        "gateway",
        str(folder),
        "--workers",
        cluster.workers,
        "--listen",
        "127.0.0.1:0",
        "--poll-seconds",
        "0.2",
    ) as gateway:
        wait_until_healthy(gateway.address)
        with openai.OpenAI(
            base_url=f"http://{gateway.address}/v1", api_key="none", max_retries=0
        ) as made:
            yield made


def chat(client: openai.OpenAI, **options):
    options = {"temperature": 0, "max_completion_tokens": 24, "messages": MESSAGES, **options}
    return client.chat.completions.create(model="demo-memory", **options)


def test_a_chat_is_the_completion_of_its_template(
    client: openai.OpenAI, talking: openai.OpenAI, tokenizer
) -> None:
    """Messages go through the template; the answer is the completion of the text it makes."""
    answer, completion = chat(talking), complete(client, RENDERED)
    assert (completion.choices[0].text, "assistant") == (
        answer.choices[0].message.content,
        answer.choices[0].message.role,
    )
    assert ("chat.completion", "length") == (answer.object, answer.choices[0].finish_reason)
    assert (completion.usage.prompt_tokens, 24) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )
    rest = chat(talking, max_completion_tokens=None, extra_body={"ignore_eos": True})
    assert 512 == rest.usage.total_tokens
    root = str(talking.base_url).removesuffix("/v1/")
    assert (
        tokenizer.encode(RENDERED).ids
        == httpx.post(f"{root}/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    )


def test_a_streamed_chat_adds_up(talking: openai.OpenAI) -> None:
    """The role first, then content, then the reason, then usage; choices of n are told apart."""
    plain = chat(talking, n=2, temperature=1.0, seed=3)
    pieces = list(
        chat(
            talking,
            n=2,
            temperature=1.0,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert plain.usage == pieces[-1].usage
    assert [] == pieces[-1].choices
    for choice in plain.choices:
        mine = [p.choices[0] for p in pieces if p.choices and p.choices[0].index == choice.index]
        assert ("assistant", "") == (mine[0].delta.role, mine[0].delta.content)
        assert choice.message.content == "".join(p.delta.content or "" for p in mine)
        assert [choice.finish_reason] == [p.finish_reason for p in mine if p.finish_reason]
        assert choice.finish_reason == mine[-1].finish_reason
    assert {"chat.completion.chunk"} == {p.object for p in pieces}


def test_a_chat_s_logprobs_have_openai_s_form(
    client: openai.OpenAI, talking: openai.OpenAI
) -> None:
    """Each token with its bytes and the likeliest in its place, the same as the completion's, also when streamed."""
    told = chat(talking, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    expected = complete(client, RENDERED, logprobs=2).choices[0].logprobs
    assert (expected.tokens, expected.token_logprobs) == (
        [t.token for t in told],
        pytest.approx([t.logprob for t in told], abs=1e-4),
    )
    assert all(t.token == bytes(t.bytes).decode() for t in told)
    assert [(2, t.token) for t in told] == [
        (len(t.top_logprobs), t.top_logprobs[0].token) for t in told
    ]
    pieces = [
        p.choices[0].logprobs for p in chat(talking, logprobs=True, top_logprobs=2, stream=True)
    ]
    assert expected.tokens == [t.token for p in pieces if p for t in p.content]
    assert [] == chat(talking, logprobs=True).choices[0].logprobs.content[0].top_logprobs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "'user'"),
        ({"messages": [{"role": "user"}]}, "content"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}
                ]
            },
            "'text'",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the user speaks first"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools is not supported: leave it out",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"top_logprobs": 2}, "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
        ({"max_completion_tokens": 0}, "greater than or equal to 1"),
        ({"max_completion_tokens": 600}, "exceed the context of 512"),
        ({"extra_body": {"frobnicate": 1}}, "unknown parameter 'frobnicate'"),
        ({"messages": [{"role": "user", "content": "(a" * 900}]}, "context of 512"),
    ],
)
def test_a_bad_chat_is_told_what_is_wrong(
    talking: openai.OpenAI, options: dict, message: str
) -> None:
    """Status 400, naming what is not taken."""
    with pytest.raises(openai.BadRequestError, match=message):
        chat(talking, **options)


def test_without_a_template_chat_says_what_is_missing(client: openai.OpenAI) -> None:
    """The error names the files that would do."""
    with pytest.raises(
        openai.BadRequestError,
        match=r"needs a chat_template\.jinja, or a tokenizer_config\.json with",
    ):
        chat(client)


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
        ('{"prompt": "a", "temperature": NaN}', "temperature", "finite number"),
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
        (
            {"prompt": "a", "max_tokens": 0},
            None,
            "max_tokens must be at least 1; 0 is allowed with echo=true",
        ),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "integer"),
        ({"prompt": "a", "n": 1000}, "n", "128"),
        ({"prompt": ["a"] * 100, "n": 2}, None, "more than 128"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
        ({"prompt": "a", "suffix": "b"}, None, "suffix is not supported: leave it out"),
        (
            {"prompt": "a", "use_beam_search": True},
            None,
            "use_beam_search is not supported: leave it out, or False",
        ),
        ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        (
            {"prompt": "a", "repetition_penalty": 1e-40},
            "repetition_penalty",
            "greater than or equal to 0.0078125",
        ),
        ({"prompt": "a", "min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"prompt": "a", "top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "less than or equal to 100"),
        ({"prompt": "a", "logit_bias": {"one": 1}}, "logit_bias", "integer"),
        (
            {"prompt": "a", "logit_bias": {"99999": 1}},
            None,
            "logit_bias: token id 99999 is outside the vocabulary",
        ),
        ({"prompt": "a", "logit_bias": {"\ud800": 1}}, "logit_bias", "unicode"),
        ({"prompt": "a", "stop": ["x"] * 33}, "stop", "at most 32 texts"),
        ({"prompt": "a", "stop": "x" * 513}, "stop", "at most 512 characters"),
        ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids", "greater than or equal to 0"),
        ({"prompt": "a", "min_tokens": 17}, None, "min_tokens must be at most max_tokens=16"),
        (
            {"prompt": "a", "best_of": 3},
            None,
            "best_of is not supported: leave it out, or equal to n=1",
        ),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, None, "stream=true"),
        ({"prompt": "a", "stream": "yes"}, "stream", "boolean"),
    ],
)
def test_a_bad_body_is_told_what_is_wrong(
    cluster: Cluster, body, param: str | None, message: str
) -> None:
    """Status 400 in OpenAI's form, naming the parameter and what is allowed."""
    content = body if isinstance(body, str) else json.dumps(body)
    answer = httpx.post(
        f"{cluster.url}/completions",
        content=content,
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    assert 400 == answer.status_code, answer.text
    error = answer.json()["error"]
    assert ("invalid_request_error", param, 400) == (error["type"], error["param"], error["code"])
    assert message in error["message"]


odd_text = st.text(st.characters() | st.just("\ud800"), max_size=6)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 30)
    | st.sampled_from([2**31, 2**64, -(2**70), 1e308])
    | st.floats()
    | odd_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=6,
)
likely = {
    "prompt": st.text(max_size=20)
    | st.lists(st.integers(0, 8191), max_size=5)
    | st.lists(st.text(max_size=5), max_size=3),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system"]), "content": st.text(max_size=9)}
        ),
        max_size=3,
    ),
    "tokens": st.lists(st.integers(0, 9000), max_size=5),
    "logit_bias": st.dictionaries(
        st.integers(-1, 9000).map(str), st.integers(-101, 101), max_size=3
    ),
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
NAMES = sorted(
    {*CompletionRequest.model_fields, *ChatRequest.model_fields, *DetokenizeRequest.model_fields}
    - {"model", "max_tokens"}
)


@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    body=st.fixed_dictionaries({}, optional=likely),
    odd=st.dictionaries(st.sampled_from(NAMES), anything, max_size=2),
)
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_breaks_anything(talking: openai.OpenAI, path: str, body: dict, odd: dict) -> None:
    """Whatever is sent, the answer is one that OpenAI's clients know, and never a 500."""
    url = str(talking.base_url).removesuffix("/v1/") + path
    kinds = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatRequest,
        "/tokenize": TokenizeRequest,
    }
    known = kinds.get(path, DetokenizeRequest).model_fields
    given_ = {**body, **odd, **({"max_tokens": 3} if "max_tokens" in known else {})}
    for sent in (given_, {name: value for name, value in given_.items() if name in known}):
        content = json.dumps(sent)
        answer = httpx.post(
            url, content=content, headers={"Content-Type": "application/json"}, timeout=60
        )
        assert answer.status_code in (200, 400), (content, answer.text)
        if answer.status_code == 400:
            assert answer.json()["error"]["message"]
        elif sent.get("stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in answer.text


def test_paths_and_methods_that_are_not_there(cluster: Cluster) -> None:
    """404 and 405 come in the same form."""
    assert 404 == httpx.get(f"{cluster.url}/nothing").json()["error"]["code"]
    assert 405 == httpx.get(f"{cluster.url}/completions").json()["error"]["code"]


def test_health_and_metrics(cluster: Cluster) -> None:
    """Health names the workers; metrics count requests by route, never by what was asked for."""
    httpx.get(f"http://{cluster.gateway}/made/up")
    health = httpx.get(f"http://{cluster.gateway}/health")
    assert (200, dict.fromkeys(cluster.workers.split(","), "healthy")) == (
        health.status_code,
        health.json()["workers"],
    )
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
        answers = list(
            pool.map(
                lambda _: httpx.post(f"{cluster.url}/completions", json=body, timeout=60).json(),
                range(8),
            )
        )
    assert 1 == len({a["choices"][0]["text"] for a in answers})
    asked = [
        w.describe_worker().rows.from_cache
        + w.describe_worker().rows.from_remote
        - b.from_cache
        - b.from_remote
        for w, b in zip(workers, before, strict=True)
    ]
    assert min(asked) > 0
    for worker in workers:
        worker.close()


def test_a_body_of_other_clients_is_taken(cluster: Cluster) -> None:
    """What load generators send with a completion, nulls and all, is understood."""
    body = {
        "model": "demo-memory",
        "prompt": PROMPT,
        "max_tokens": 4,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": None,
        "presence_penalty": None,
        "logprobs": None,
        "seed": None,
        "best_of": 1,
        "n": 1,
        "use_beam_search": False,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    lines = httpx.post(f"{cluster.url}/completions", json=body, timeout=30).text.split("\n\n")
    assert ["data: [DONE]", ""] == lines[-2:]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert 4 == events[-1]["usage"]["completion_tokens"]
    assert [] == events[-1]["choices"]


def test_a_request_id_is_taken_over_or_made(cluster: Cluster) -> None:
    """The caller's id comes back in the header and in the answer's id; one that is no id, or none, is replaced."""
    body = {"prompt": "a", "max_tokens": 1}
    answer = httpx.post(f"{cluster.url}/completions", json=body, headers={"X-Request-Id": "mine-1"})
    assert ("mine-1", "cmpl-mine-1") == (answer.headers["x-request-id"], answer.json()["id"])
    long = httpx.get(f"http://{cluster.gateway}/nothing", headers={"X-Request-Id": "x" * 129})
    assert (404, 32) == (long.status_code, len(long.headers["x-request-id"]))
    log = next(p.log for p in cluster.processes if p.ready["service"] == "gateway").read_text()
    assert '"request_id": "mine-1"' in log


def test_text_and_tokens_are_changed_into_each_other(cluster: Cluster, tokenizer) -> None:
    """/tokenize gives ids, their number and the context; /detokenize gives the text back."""
    url = f"http://{cluster.gateway}"
    ids = tokenizer.encode(PROMPT).ids
    told = httpx.post(
        f"{url}/tokenize",
        json={"model": "demo-memory", "prompt": PROMPT, "return_token_strs": True},
    ).json()
    assert (ids, len(ids), 512, PROMPT) == (
        told["tokens"],
        told["count"],
        told["max_model_len"],
        "".join(told["token_strs"]),
    )
    assert {"prompt": PROMPT} == httpx.post(f"{url}/detokenize", json={"tokens": ids}).json()
    assert 0 == httpx.post(f"{url}/tokenize", json={"prompt": ""}).json()["count"]
    info = httpx.get(f"{url}/tokenizer_info").json()
    assert ("<|endoftext|>", None) == (info["eos_token"], info["chat_template"])
    refused = [
        httpx.post(f"{url}/detokenize", json={"tokens": [8192]}),
        httpx.post(f"{url}/detokenize", json={"tokens": [2**40]}),
        httpx.post(f"{url}/tokenize", json={}),
        httpx.post(f"{url}/tokenize", json={"messages": [{"role": "user", "content": "a"}]}),
        httpx.post(f"{url}/tokenize", json={"prompt": "a", "model": 3}),
    ]
    assert [400] * 5 == [answer.status_code for answer in refused]
    assert "chat template" in refused[3].json()["error"]["message"]


def test_an_echo_of_half_characters_is_whole(client: openai.OpenAI, tokenizer) -> None:
    """Tokens that are parts of characters have names of their own, and as many logprobs and offsets as all others."""
    ids = tokenizer.encode("世界").ids
    told = (
        complete(client, ids, echo=True, logprobs=1, max_tokens=1, extra_body={"ignore_eos": True})
        .choices[0]
        .logprobs
    )
    assert {len(ids) + 1} == {
        len(told.tokens),
        len(told.token_logprobs),
        len(told.top_logprobs),
        len(told.text_offset),
    }
    assert told.tokens[0].startswith("bytes:\\x")
    assert all(
        token in top for token, top in zip(told.tokens[1:], told.top_logprobs[1:], strict=True)
    )


def test_version_and_ping(cluster: Cluster) -> None:
    """The package's version; an empty answer while there is a healthy worker."""
    assert {"version": tolhouse.__version__} == httpx.get(
        f"http://{cluster.gateway}/version"
    ).json()
    assert [200, 200] == [
        httpx.get(f"http://{cluster.gateway}/ping").status_code,
        httpx.post(f"http://{cluster.gateway}/ping").status_code,
    ]


def test_latencies_are_measured(cluster: Cluster) -> None:
    """Each completion has one first token and one end, and a time between each two tokens."""

    def counts() -> list[float]:
        lines = httpx.get(f"http://{cluster.gateway}/metrics").text.splitlines()
        names = ("time_to_first_token", "inter_token", "completion")
        return [
            float(line.split()[1])
            for name in names
            for line in lines
            if line.startswith(f"tolhouse_gateway_{name}_seconds_count")
        ]

    before = counts()
    httpx.post(
        f"{cluster.url}/completions",
        json={"prompt": PROMPT, "max_tokens": 10, "ignore_eos": True, "n": 2},
    )
    assert [2, 18, 2] == [after - b for after, b in zip(counts(), before, strict=True)]


def test_what_is_too_large_is_refused(cluster: Cluster) -> None:
    """A body beyond the limit is told so, announced or not; so is a text that can't fit the context."""
    with process(
        "gateway",
        str(DEMO),
        "--workers",
        cluster.workers,
        "--listen",
        "127.0.0.1:0",
        "--max-body-megabytes",
        "0.02",
    ) as gateway:
        url = f"http://{gateway.address}/v1/completions"
        body = json.dumps({"prompt": "a" * 30_000}).encode()
        headers = {"Content-Type": "application/json"}
        for content in (body, iter([body[:10_000], body[10_000:20_000], body[20_000:]])):
            answer = httpx.post(url, content=content, headers=headers)
            assert (413, 413) == (answer.status_code, answer.json()["error"]["code"])
            assert "at most 20000 bytes" in answer.json()["error"]["message"]
    answer = httpx.post(f"{cluster.url}/completions", json={"prompt": "a" * 900_000})
    assert 400 == answer.status_code
    assert "context of 512 tokens" in answer.json()["error"]["message"]
    assert (
        400
        == httpx.post(
            f"{cluster.url}/completions", json={"prompt": PROMPT, "user": "a" * 513}
        ).status_code
    )


def test_full_queues_are_told(tmp_path: Path) -> None:
    """When no worker has a place left, the answer is 429, with a time to come back after."""
    url = f"file://{tmp_path}"
    build_table(DEMO, url)
    body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with local_cluster(
        DEMO, url, worker_options=("--max-num-seqs", "1", "--max-waiting", "1")
    ) as cluster:
        with ThreadPoolExecutor(12) as pool:
            answers = list(
                pool.map(
                    lambda _: httpx.post(f"{cluster.url}/completions", json=body, timeout=60),
                    range(12),
                )
            )
    full = [a for a in answers if a.status_code == 429]
    assert {200, 429} == {a.status_code for a in answers}
    assert {"1"} == {a.headers["retry-after"] for a in full}
    assert {"rate_limit_error"} == {a.json()["error"]["type"] for a in full}


def test_a_full_worker_is_not_asked(tmp_path: Path) -> None:
    """While a worker has all it takes, as far as the gateway knows, requests are refused before any work is done for them."""
    url = f"file://{tmp_path}"
    build_table(DEMO, url)
    short = {"prompt": PROMPT, "max_tokens": 1}
    long = {"prompt": PROMPT, "max_tokens": 450, "ignore_eos": True, "stream": True}
    with (
        local_cluster(
            DEMO, url, worker_options=("--max-num-seqs", "1", "--max-waiting", "1")
        ) as cluster,
        ExitStack() as stack,
    ):

        def taken() -> int:
            described = client.describe_worker()
            return described.running + described.waiting

        client = stack.enter_context(Client(cluster.workers))
        deadline = time.monotonic() + 30
        with ExitStack() as streams, ThreadPoolExecutor(2) as pool:
            for count in (1, 2):
                pool.submit(
                    lambda: streams.enter_context(
                        httpx.stream("POST", f"{cluster.url}/completions", json=long, timeout=60)
                    )
                )
                while taken() < count:
                    assert time.monotonic() < deadline
            refused = httpx.post(f"{cluster.url}/completions", json=short)
            assert (429, "1") == (refused.status_code, refused.headers["retry-after"])
            assert "2 requests are with the workers already" in refused.json()["error"]["message"]
        while 200 != httpx.post(f"{cluster.url}/completions", json=short).status_code:
            assert time.monotonic() < deadline, "the places are not given back"


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_goes_away_ends_the_work(cluster: Cluster, stream: bool) -> None:
    """Closing the connection cancels the sequence in the worker."""
    body = {
        "prompt": PROMPT,
        "max_tokens": 450,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
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


def test_a_worker_may_hang(tmp_path: Path) -> None:
    """Requests that a stopped worker has not begun to answer are answered by the other; one that it was streaming ends in an error."""
    url = f"file://{tmp_path}"
    build_table(DEMO, url)
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    with local_cluster(DEMO, url, workers=2) as cluster, ThreadPoolExecutor(6) as pool:
        first = next(p for p in cluster.processes if p.ready["service"] == "worker")
        post = lambda: httpx.post(f"{cluster.url}/completions", json=body, timeout=60)  # noqa: E731
        expected = post().json()["choices"][0]["text"]
        endless = {**body, "max_tokens": 500, "ignore_eos": True, "stream": True}

        def stream() -> list[str]:
            with httpx.stream(
                "POST", f"{cluster.url}/completions", json=endless, timeout=60
            ) as answer:
                return list(answer.iter_lines())

        streams = [pool.submit(stream) for _ in range(2)]  # one on each worker
        time.sleep(0.3)
        os.kill(first.pid, signal.SIGSTOP)
        answers = [
            answer.result() for answer in [pool.submit(post) for _ in range(4)]
        ]  # two of them on the one that is stopped
        assert [(200, expected)] * 4 == [
            (answer.status_code, answer.json()["choices"][0]["text"]) for answer in answers
        ]
        ends = sorted(
            "error" if any('"error"' in line for line in one.result()) else one.result()[-2]
            for one in streams
        )
        assert ["data: [DONE]", "error"] == ends
        counted = httpx.get(f"http://{cluster.gateway}/metrics").text  # its status line said 200
        assert re.search(r'path="/v1/completions",status="50[34]"} 1', counted), counted
        os.kill(first.pid, signal.SIGCONT)


def test_a_worker_that_ends_finishes_what_it_began(tmp_path: Path) -> None:
    """While a worker drains after SIGTERM its streams go on to their end, and new requests go to the other."""
    url = f"file://{tmp_path}"
    build_table(DEMO, url)
    body = {
        "prompt": PROMPT,
        "max_tokens": 480,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    patient = ("--drain-seconds", "90")  # on a slow machine too
    with (
        local_cluster(DEMO, url, workers=2, worker_options=patient) as cluster,
        ThreadPoolExecutor(8) as pool,
    ):
        first = next(p for p in cluster.processes if p.ready["service"] == "worker")

        def stream() -> list[str]:
            with httpx.stream(
                "POST", f"{cluster.url}/completions", json=body, timeout=100
            ) as answer:
                return [line for line in answer.iter_lines() if line]

        streams = [pool.submit(stream) for _ in range(8)]
        time.sleep(0.3)
        os.kill(first.pid, signal.SIGTERM)
        for lines in (one.result() for one in streams):
            assert "data: [DONE]" == lines[-1]
            assert not any('"error"' in line for line in lines)
        assert 0 == first.popen.wait(90)


def test_a_worker_of_another_tokenizer_gets_no_requests(cluster: Cluster, checkpoint: Path) -> None:
    """A gateway whose tokenizer is not the worker's says so instead of sending it wrong ids."""
    with process(
        "gateway",
        str(checkpoint),
        "--workers",
        cluster.workers,
        "--listen",
        "127.0.0.1:0",
        "--poll-seconds",
        "0.1",
    ) as gateway:
        for _ in range(100):
            answer = httpx.post(f"http://{gateway.address}/v1/completions", json={"prompt": "a"})
            if answer.status_code == 409:
                break
            time.sleep(0.05)
        assert (409, "start it with the worker's checkpoint") == (
            answer.status_code,
            answer.json()["error"]["message"][-37:],
        )


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
        "gateway",
        str(DEMO),
        "--workers",
        cluster.workers,
        "--listen",
        f"127.0.0.1:{free_port()}",
        "--poll-seconds",
        "0.1",
    ) as gateway:
        url = f"http://{gateway.address}"
        for _ in range(100):
            if httpx.get(f"{url}/health").status_code == 200:
                break
            time.sleep(0.05)
        body = {
            "prompt": PROMPT,
            "max_tokens": 200,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            gateway.popen.terminate()
            assert "data: [DONE]" == [line for line in lines if line][-1]
        assert 0 == gateway.popen.wait(30)


def test_an_error_may_quote_anything() -> None:
    """Half a surrogate pair in a message is written out: the answer can be sent. What is quoted at length is cut."""
    assert r"no \ud800" == error_body("no \ud800", 400)["error"]["message"]
    assert 1002 == len(error_body("9" * 5000, 400)["error"]["message"])


def test_limits_mean_the_same_at_both_ends(client: openai.OpenAI) -> None:
    """What the gateway takes at its bounds the worker takes too, though on the wire it has 32 bits."""
    for options in ({"repetition_penalty": 2**-7}, {"row_scale": -16}, {"layer_scales": [16] * 6}):
        client.completions.create(
            model="demo-memory", prompt=PROMPT, max_tokens=1, extra_body=options
        )
    client.completions.create(model="demo-memory", prompt=PROMPT, max_tokens=1, top_p=1e-300)


def test_long_texts_hold_nobody_up(cluster: Cluster) -> None:
    """Others are answered while texts as long as bodies may be are tokenised."""
    body = {"prompt": "\u00e9 " * 200_000, "return_token_strs": True}
    with ThreadPoolExecutor(6) as pool:
        long = [
            pool.submit(httpx.post, f"http://{cluster.gateway}/tokenize", json=body, timeout=120)
            for _ in range(6)
        ]
        before = 0
        while not all(one.done() for one in long):
            assert 200 == httpx.get(f"http://{cluster.gateway}/version", timeout=60).status_code
            before += 1
    assert before > 6
    assert {200} == {one.result().status_code for one in long}


# text


@given(st.text(min_size=1, max_size=80), st.lists(st.integers(1, 5), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_text_arrives_whole_whatever_the_pieces(text: str, sizes: list[int]) -> None:
    """Pieces of a text add up to it, and no piece has half a character."""
    tokenizer = load_tokenizer(DEMO / "tokenizer.json")
    ids = tokenizer.encode(text).ids
    expected = tokenizer.decode(ids)
    stream, pieces, at = Detokenizer(tokenizer), [], 0
    while at < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[at : at + size]))
        at += size
    if "\ufffd" not in expected:
        assert not any("\ufffd" in piece for piece in pieces)
    assert expected == "".join(pieces) + stream.finish()


@given(
    st.text("ab", min_size=1, max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_stop_strings_cut_as_a_naive_search_would(text: str, stops: list[str], data) -> None:
    """However tokens arrive, the text ends at the stop string that is complete first; what was given before is part of it."""
    tokenizer = load_tokenizer(DEMO / "tokenizer.json")
    ends = [(n, n - len(s)) for n in range(len(text) + 1) for s in stops if text[:n].endswith(s)]
    include = data.draw(st.booleans())
    expected = text[: min(ends)[0 if include else 1]] if ends else text
    stream, given_, at = Detokenizer(tokenizer, stops, include_stop=include), "", 0
    ids = [tokenizer.token_to_id(c) for c in text]
    while at < len(ids) and not stream.stopped:
        size = data.draw(st.integers(1, 6))
        given_ += stream.push(ids[at : at + size])
        assert expected.startswith(given_)
        at += size
    assert (expected, bool(ends)) == (given_ + stream.finish(), stream.stopped)


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    """A completion cut in the middle of a character ends in U+FFFD, as the tokenizer itself would have it."""
    tokenizer = load_tokenizer(DEMO / "tokenizer.json")
    ids = tokenizer.encode("世").ids[:-1]
    stream = Detokenizer(tokenizer)
    assert "" == stream.push(ids)
    assert tokenizer.decode(ids) == stream.finish()


@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_a_stop_string_is_found_wherever_it_begins(text: str, stops: list[str]) -> None:
    """The text ends before the first stop string to appear, however it is cut into tokens."""
    tokenizer = load_tokenizer(DEMO / "tokenizer.json")
    stream, shown = Detokenizer(tokenizer, stops), ""
    for character in text:  # one token per character
        shown += stream.push(tokenizer.encode(character).ids)
        if stream.stopped:
            break
    shown += stream.finish()
    # the first to be complete wins; of those complete at once, the one that begins first
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    expected = (
        min(text[: ends[0]].index(s) for s in stops if s in text[: ends[0]]) if ends else len(text)
    )
    assert text[:expected] == shown
