"""`litellm` with the providers `openai`, `text-completion-openai` and `hosted_vllm`."""

import asyncio

import litellm
from system import OVERLONG, SYSTEM, raises

PACKAGE = "litellm"
HELLO = [{"role": "user", "content": "hello"}]
CHATS = "openai", "hosted_vllm"
COMMON = {
    "api_base": SYSTEM.url,
    "api_key": "none",
    "temperature": 0,
    "max_tokens": 8,
    "max_retries": 0,
}


def chat(provider: str, messages=HELLO, **options):
    model = f"{provider}/{SYSTEM.model}"
    return litellm.completion(model=model, messages=messages, **{**COMMON, **options})


def complete(prompt=SYSTEM.greedy.prompt, **options):
    model = f"text-completion-openai/{SYSTEM.model}"
    return litellm.text_completion(model=model, prompt=prompt, **{**COMMON, **options})


def check_chat():
    """The providers return the same answer, with usage"""
    answers = [chat(provider) for provider in CHATS]
    assert 1 == len({answer.choices[0].message.content for answer in answers})
    assert all(answer.usage.total_tokens > 0 for answer in answers)
    assert answers[0].choices[0].finish_reason in ("stop", "length")


def check_text_completion():
    """text_completion returns the model's completion, plain and streamed"""
    options = {"max_tokens": SYSTEM.greedy.max_tokens}
    assert SYSTEM.greedy.text == complete(**options).choices[0].text
    parts = [chunk.choices[0].text or "" for chunk in complete(stream=True, **options)]
    assert SYSTEM.greedy.text == "".join(parts)
    assert 2 == len(complete(["import", "def"]).choices)


def check_text_completion_by_chat_call():
    """completion() with a text-completion provider calls /v1/completions"""
    answer = chat("text-completion-openai", [{"role": "user", "content": "import os"}])
    assert isinstance(answer.choices[0].message.content, str)


def check_hosted_vllm_text_completion():
    """text_completion works with the provider hosted_vllm"""
    model = f"hosted_vllm/{SYSTEM.model}"
    answer = litellm.text_completion(model=model, prompt="import", **COMMON)
    assert isinstance(answer.choices[0].text, str)


def check_stream():
    """A stream adds up to the plain answer, with usage"""
    for provider in CHATS:
        plain = chat(provider)
        chunks = list(chat(provider, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert plain.choices[0].message.content == text
        built = litellm.stream_chunk_builder(chunks, messages=HELLO)
        assert plain.usage.total_tokens == built.usage.total_tokens


def check_multi_turn():
    """An answer's message is valid as history, as an object and as a dictionary"""
    for provider in CHATS:
        message = chat(provider).choices[0].message
        texts = set()
        for form in (message, message.model_dump(), message.json()):
            history = [*HELLO, form, {"role": "user", "content": "more"}]
            texts.add(chat(provider, history).choices[0].message.content)
        assert 1 == len(texts)


def check_overflow():
    """A prompt beyond the context is a ContextWindowExceededError"""
    long = [{"role": "user", "content": OVERLONG}]
    for ask in (
        *(lambda p=provider, **more: chat(p, long, **more) for provider in CHATS),
        lambda **more: complete(OVERLONG, **more),
        lambda **more: complete("import", max_tokens=SYSTEM.context, **more),
    ):
        for stream in (False, True):
            with raises(litellm.ContextWindowExceededError):
                answer = ask(stream=stream)
                if stream:
                    list(answer)


def check_errors():
    """404, 401, 400 and a timeout raise litellm's exceptions"""
    with raises(litellm.NotFoundError):
        litellm.completion(model="openai/nothing", messages=HELLO, **COMMON)
    keyed = {"api_base": SYSTEM.keyed_url}
    with raises(litellm.AuthenticationError):
        chat("openai", **keyed, api_key="wrong")
    assert chat("openai", **keyed, api_key=SYSTEM.key).choices
    with raises(litellm.BadRequestError, "temperature"):
        chat("openai", temperature=-1)
    with raises(litellm.Timeout):
        chat("openai", timeout=0.05, max_tokens=300, n=4, extra_body={"ignore_eos": True})
    with raises(litellm.RateLimitError):
        for _ in range(3):
            chat("openai", **keyed, api_key=SYSTEM.limited_key)


def check_parameters():
    """Parameters that litellm maps or passes are accepted"""
    options = {"top_k": 5, "repetition_penalty": 1.1, "min_p": 0.1}
    for provider in CHATS:
        answer = chat(
            provider,
            n=2,
            seed=1,
            stop=["\n"],
            user="me",
            logprobs=True,
            top_logprobs=1,
            extra_body=options,
            metadata={"trace": "1"},
        )
        assert 2 == len(answer.choices)
        chat(provider, max_tokens=None, max_completion_tokens=4)


def check_async():
    """acompletion runs eight requests at the same time"""

    async def run():
        model = f"openai/{SYSTEM.model}"
        asked = (litellm.acompletion(model=model, messages=HELLO, **COMMON) for _ in range(8))
        answers = await asyncio.gather(*asked)
        assert 1 == len({answer.choices[0].message.content for answer in answers})

    return run()


def check_router():
    """litellm's router works with two deployments"""
    parameters = {"model": f"openai/{SYSTEM.model}", "api_base": SYSTEM.url, "api_key": "none"}
    deployment = {"model_name": "memory", "litellm_params": parameters}
    router = litellm.Router(model_list=[deployment, deployment])
    assert router.completion(model="memory", messages=HELLO, max_tokens=4).choices
