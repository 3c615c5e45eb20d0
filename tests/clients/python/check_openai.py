"""The `openai` package: sync and async chats, completions, streams and errors."""

import asyncio
import json

import openai
from pydantic import BaseModel
from system import OVERLONG, SYSTEM, raises

PACKAGE = "openai"
HELLO = [{"role": "user", "content": "hello"}]
ENDLESS = {"max_tokens": 300, "extra_body": {"ignore_eos": True}}
COMMON = {"model": SYSTEM.model, "temperature": 0, "max_tokens": 8}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

client = openai.OpenAI(base_url=SYSTEM.url, api_key="none", max_retries=0, timeout=60)


def chat(messages=HELLO, **options):
    return client.chat.completions.create(messages=messages, **{**COMMON, **options})


def complete(prompt=SYSTEM.greedy.prompt, **options):
    return client.completions.create(prompt=prompt, **{**COMMON, **options})


def keyed(key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=SYSTEM.keyed_url, api_key=key, max_retries=0)


def check_completion():
    """A completion equals the model's, with usage"""
    answer = complete(max_tokens=SYSTEM.greedy.max_tokens)
    assert SYSTEM.greedy.text == answer.choices[0].text
    assert ("text_completion", SYSTEM.model) == (answer.object, answer.model)
    assert answer.id.startswith("cmpl-")
    assert answer.created > 1.7e9
    usage = answer.usage
    assert len(SYSTEM.greedy.ids) == usage.prompt_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.choices[0].finish_reason in ("length", "stop")


def check_prompts():
    """A list of texts, token ids and a list of lists give the same completion"""
    text, ids = SYSTEM.greedy.prompt, SYSTEM.greedy.ids
    answers = [complete(p).choices for p in (text, ids, [text], [ids, ids])]
    assert 1 == len({choice.text for choices in answers for choice in choices})
    assert [0, 1] == [choice.index for choice in answers[-1]]


def check_completion_options():
    """Completions accept n, echo, logprobs, stop, seed, logit_bias, best_of and user"""
    answer = complete("import", n=2, echo=True, logprobs=2, best_of=2, seed=3, user="me")
    for choice in answer.choices:
        scores = choice.logprobs
        assert choice.text.startswith("import")
        assert scores.token_logprobs[0] is None
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset)
    whole = complete("import os\n").choices[0].text
    stopped = complete("import os\n", stop=[whole[3:5]]).choices[0]
    assert (whole.partition(whole[3:5])[0], "stop") == (stopped.text, stopped.finish_reason)
    complete(logit_bias={"5": -100}, suffix=None, presence_penalty=0.5, top_p=0.9)


def check_completion_stream():
    """The chunks of a completion add up to the plain answer, and usage comes last"""
    plain = complete()
    *chunks, last = complete(stream=True, stream_options={"include_usage": True})
    assert plain.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks)
    assert plain.choices[0].finish_reason == chunks[-1].choices[0].finish_reason
    assert ([], plain.usage) == (last.choices, last.usage)
    assert all(chunk.usage is None for chunk in chunks)


def check_chat():
    """A chat's answer has the same fields as OpenAI's"""
    answer = chat(logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert "chat.completion" == answer.object
    assert answer.id.startswith("chatcmpl-")
    assert ("assistant", None) == (choice.message.role, choice.message.refusal)
    assert not choice.message.tool_calls
    assert isinstance(choice.message.content, str)
    assert len(choice.logprobs.content) >= 1
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def check_multi_turn():
    """An answer's message is valid as history, as an object and as a dictionary"""
    message = chat().choices[0].message
    forms = message, message.model_dump(), message.to_dict(), message.model_dump(exclude_none=True)
    texts = set()
    for form in forms:
        history = [*HELLO, form, {"role": "user", "content": "more"}]
        texts.add(chat(history).choices[0].message.content)
    assert 1 == len(texts)


def check_long_conversation():
    """Four turns work, each with all previous answers"""
    messages = [{"role": "system", "content": "be brief"}]
    for turn in range(4):
        messages.append({"role": "user", "content": f"turn {turn}"})
        answer = chat(messages)
        messages.append(answer.choices[0].message)
    assert answer.usage.prompt_tokens > 20


def check_message_forms():
    """Developer messages, text parts, names and history with null content are accepted"""
    parts = [{"type": "text", "text": "hello"}]
    assert (
        chat().choices[0].message.content
        == chat([{"role": "user", "content": parts}]).choices[0].message.content
    )
    empty = {"role": "assistant", "content": None, "tool_calls": None, "function_call": None}
    developer = {"role": "developer", "content": "be brief", "name": "dev"}
    chat([developer, *HELLO, empty, {"role": "user", "content": "more"}])


def check_chat_stream():
    """The role comes first, the chunks add up to the plain answer, and usage comes last"""
    plain = chat()
    *chunks, last = chat(stream=True, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert plain.choices[0].message.content == "".join(delta.content or "" for delta in deltas)
    assert "assistant" == deltas[0].role
    assert plain.choices[0].finish_reason == chunks[-1].choices[0].finish_reason
    assert ([], plain.usage) == (last.choices, last.usage)
    assert {"chat.completion.chunk"} == {chunk.object for chunk in (*chunks, last)}
    assert 1 == len({chunk.id for chunk in (*chunks, last)})


def check_stream_helper():
    """`chat.completions.stream` yields its events and the complete answer"""
    text = chat().choices[0].message.content
    # the helper raises an error for an answer that reaches max_tokens
    options = {**COMMON, "stop": text[-2:]}
    with client.chat.completions.stream(messages=HELLO, **options) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert text.partition(text[-2:])[0] == final.choices[0].message.content


def check_raw_stream():
    """A raw stream ends with [DONE], and its headers have the request's id"""
    streaming = client.chat.completions.with_streaming_response
    with streaming.create(messages=HELLO, stream=True, **COMMON) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert "data: [DONE]" == lines[-1]
    for line in lines[:-1]:
        assert json.loads(line.removeprefix("data: "))["choices"]
    raw = client.completions.with_raw_response.create(prompt="import", **COMMON)
    assert raw.headers["x-request-id"] == raw.request_id


def check_abandoned_stream():
    """After a stream is closed early, the next request succeeds"""
    for _ in range(3):
        stream = complete(stream=True, **ENDLESS)
        next(iter(stream))
        stream.close()
    complete()


def check_async():
    """The async client runs eight requests at the same time, and a stream"""

    async def run():
        async with openai.AsyncOpenAI(base_url=SYSTEM.url, api_key="none") as aio:
            ask = aio.chat.completions.create
            plain = await asyncio.gather(*(ask(messages=HELLO, **COMMON) for _ in range(8)))
            chunks = [c async for c in await ask(messages=HELLO, stream=True, **COMMON)]
        texts = {answer.choices[0].message.content for answer in plain}
        assert {"".join(c.choices[0].delta.content or "" for c in chunks)} == texts

    return run()


def check_models():
    """models.list and models.retrieve return the model"""
    (model,) = client.models.list().data
    assert (SYSTEM.model, "model") == (model.id, model.object)
    assert model.id == client.models.retrieve(model.id).id
    assert isinstance(model.created, int)
    assert model.owned_by
    with raises(openai.NotFoundError, code="model_not_found"):
        client.models.retrieve("nothing")


def check_unknown_model():
    """Another model's name is a NotFoundError with the code model_not_found"""
    for ask in (chat, complete):
        with raises(openai.NotFoundError, "nothing", code="model_not_found", status_code=404):
            ask(model="nothing")


def check_overflow():
    """A prompt beyond the context is a BadRequestError with the code context_length_exceeded"""
    expected = {"code": "context_length_exceeded", "type": "invalid_request_error"}
    for ask in (
        lambda **more: chat([{"role": "user", "content": OVERLONG}], **more),
        lambda **more: complete(OVERLONG, **more),
        lambda **more: complete([5] * (SYSTEM.context + 1), **more),
        lambda **more: complete(OVERLONG * 20, **more),
        lambda **more: complete(max_tokens=SYSTEM.context, **more),
        lambda **more: chat(max_tokens=SYSTEM.context, **more),
    ):
        for stream in (False, True):
            with raises(openai.BadRequestError, "maximum context length", **expected):
                ask(stream=stream)


def check_wrong_key():
    """A missing or wrong key is an AuthenticationError, and the right key is accepted"""
    with raises(openai.AuthenticationError, code="invalid_api_key", status_code=401):
        keyed("wrong").models.list()
    assert keyed(SYSTEM.key).models.list().data


def check_rate_limit():
    """A key above its limit gets a RateLimitError with Retry-After"""
    limited = keyed(SYSTEM.limited_key)
    with raises(openai.RateLimitError, code="rate_limit_exceeded") as caught:
        for _ in range(3):
            limited.models.list()
    assert float(caught[0].response.headers["retry-after"]) > 0


def check_timeout():
    """A request that takes longer than its timeout is an APITimeoutError"""
    with raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model=SYSTEM.model, prompt="import", n=4, **ENDLESS
        )


def check_error_body():
    """A refusal has message, type, param and code, and names its parameter"""
    for options, param in (
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"tools": [TOOL]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
    ):
        with raises(openai.BadRequestError, param, param=param, type="invalid_request_error"):
            chat(**options)


def check_harmless_parameters():
    """Parameters are accepted at values without an effect"""
    chat(
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        metadata={"trace": "1"},
        store=False,
        service_tier="auto",
        user="me",
        safety_identifier="me",
        prompt_cache_key="me",
        n=1,
        seed=1,
        stop=None,
        logit_bias={},
        frequency_penalty=0,
        presence_penalty=0,
        top_p=1,
    )
    chat(max_tokens=None, max_completion_tokens=4, stop=[])
    options = {"include_usage": True, "include_obfuscation": False}
    list(chat(stream=True, stream_options=options))
    complete(suffix="", logprobs=None, logit_bias=None, stop=None, seed=None)


def check_unsupported_features():
    """Structured output and tools are refused by name, and other routes with a NotFoundError"""

    class Answer(BaseModel):
        text: str

    with raises(openai.BadRequestError, "response_format", param="response_format"):
        client.chat.completions.parse(messages=HELLO, response_format=Answer, **COMMON)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    with raises(openai.BadRequestError, param="messages"):
        chat([{"role": "user", "content": [image]}])
    for ask in (
        lambda: client.responses.create(model=SYSTEM.model, input="hello"),
        lambda: client.responses.parse(model=SYSTEM.model, input="hello", text_format=Answer),
        lambda: client.embeddings.create(model=SYSTEM.model, input="hello"),
        lambda: client.moderations.create(input="hello"),
    ):
        with raises(openai.NotFoundError, status_code=404):
            ask()
