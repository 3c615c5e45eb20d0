"""`huggingface_hub`: InferenceClient and AsyncInferenceClient."""

import asyncio
import os

from system import OVERLONG, SYSTEM, raises

os.environ.pop("HF_HUB_OFFLINE")  # it would also forbid calls to this machine

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import BadRequestError

PACKAGE = "huggingface_hub"
HELLO = [{"role": "user", "content": "hello"}]
COMMON = {"model": SYSTEM.model, "temperature": 0, "max_tokens": 8}

client = InferenceClient(base_url=SYSTEM.url, api_key="none")


def check_chat():
    """A chat, its stream, and a chat with the answer in its history work"""
    plain = client.chat.completions.create(messages=HELLO, **COMMON)
    chunks = client.chat.completions.create(messages=HELLO, stream=True, **COMMON)
    message = plain.choices[0].message
    assert message.content == "".join(c.choices[0].delta.content or "" for c in chunks)
    more = {"role": "user", "content": "more"}
    for form in (message, dict(message)):
        assert client.chat_completion([*HELLO, form, more], **COMMON).usage.total_tokens


def check_async():
    """AsyncInferenceClient returns the same answer"""

    async def run():
        aio = AsyncInferenceClient(base_url=SYSTEM.url, api_key="none")
        return await aio.chat_completion(HELLO, **COMMON)

    plain = client.chat_completion(HELLO, **COMMON)
    assert plain.choices == asyncio.run(run()).choices


def check_overflow():
    """A prompt beyond the context is a BadRequestError with the gateway's message"""
    with raises(BadRequestError, "maximum context length"):
        client.chat_completion([{"role": "user", "content": OVERLONG}], **COMMON)
