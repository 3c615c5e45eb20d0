"""`langchain-openai`: ChatOpenAI and OpenAI."""

import asyncio

import httpx
import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from system import OVERLONG, SYSTEM, raises

PACKAGE = "langchain-openai"
CONVERSATION = [SystemMessage("be brief"), HumanMessage("hello")]


def token_ids(text: str) -> list[int]:
    """Return the gateway's tokens of a text."""
    body = {"prompt": text, "add_special_tokens": False}
    return httpx.post(f"{SYSTEM.root}/tokenize", json=body).json()["tokens"]


COMMON = {
    "base_url": SYSTEM.url,
    "api_key": "none",
    "model": SYSTEM.model,
    "temperature": 0,
    "max_tokens": 8,
    "max_retries": 0,
    "custom_get_token_ids": token_ids,
}
chat, complete = ChatOpenAI(stream_usage=True, **COMMON), OpenAI(**COMMON)


def check_invoke():
    """invoke returns a message with the model's name, usage and finish reason"""
    answer = chat.invoke(CONVERSATION)
    assert isinstance(answer, AIMessage)
    assert isinstance(answer.content, str)
    assert SYSTEM.model == answer.response_metadata["model_name"]
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata["input_tokens"] > 0
    total = answer.usage_metadata["input_tokens"] + answer.usage_metadata["output_tokens"]
    assert total == answer.usage_metadata["total_tokens"]


def check_completion():
    """OpenAI.invoke returns the model's completion"""
    llm = OpenAI(**{**COMMON, "max_tokens": SYSTEM.greedy.max_tokens})
    assert SYSTEM.greedy.text == llm.invoke(SYSTEM.greedy.prompt)


def check_history():
    """An answer is valid as history, as an AIMessage and as text"""
    messages = list(CONVERSATION)
    for turn in range(3):
        answer = chat.invoke(messages)
        messages += [answer, HumanMessage(f"turn {turn}")]
    plain = [AIMessage(m.content) if isinstance(m, AIMessage) else m for m in messages]
    assert chat.invoke(messages).content == chat.invoke(plain).content
    messages[2] = AIMessage("")
    chat.invoke(messages)


def check_stream():
    """A stream adds up to the plain answer, with usage"""
    plain, chunks = chat.invoke(CONVERSATION), list(chat.stream(CONVERSATION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert plain.content == whole.content
    assert plain.usage_metadata == whole.usage_metadata
    assert "".join(complete.stream("import")) == complete.invoke("import")


def check_batch():
    """batch and abatch keep the order"""
    prompts = ["import", "def", "class", "raise"]
    alone = [complete.invoke(prompt) for prompt in prompts]
    assert alone == complete.batch(prompts)
    assert alone == asyncio.run(complete.abatch(prompts))
    conversations = [[HumanMessage(prompt)] for prompt in prompts]
    answers = [chat.invoke(messages).content for messages in conversations]
    assert answers == [answer.content for answer in chat.batch(conversations)]


def check_async_stream():
    """astream adds up to the plain answer"""

    async def run():
        parts = [chunk.content async for chunk in chat.astream(CONVERSATION)]
        assert (await chat.ainvoke(CONVERSATION)).content == "".join(parts)

    return run()


def check_chain():
    """A prompt template works in a chain with the model and stop strings"""
    chain = ChatPromptTemplate.from_messages([("user", "{text}")]) | chat.bind(stop=["\n"])
    assert "\n" not in chain.invoke({"text": "hello"}).content


def check_logprobs():
    """An answer's message has log probabilities"""
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(CONVERSATION)
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def check_number_of_tokens():
    """get_num_tokens, which calls /tokenize, equals the number in usage"""
    answer = complete.generate([SYSTEM.greedy.prompt])
    prompt_tokens = answer.llm_output["token_usage"]["prompt_tokens"]
    assert prompt_tokens == complete.get_num_tokens(SYSTEM.greedy.prompt)


def check_overflow():
    """A prompt beyond the context is a ContextOverflowError, in a chat and in its stream"""
    long = [HumanMessage(OVERLONG)]
    for ask in (lambda: chat.invoke(long), lambda: list(chat.stream(long))):
        with raises(ContextOverflowError):
            ask()
        with raises(openai.BadRequestError, code="context_length_exceeded"):
            ask()
    with raises(openai.BadRequestError, code="context_length_exceeded"):
        complete.invoke(OVERLONG)


def check_tools_are_refused():
    """Tools and structured output are refused by name"""

    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    with raises(openai.BadRequestError, "tools"):
        chat.bind_tools([add]).invoke(CONVERSATION)
    schema = {"title": "Answer", "type": "object", "properties": {}}
    with raises(openai.BadRequestError, "response_format"):
        chat.with_structured_output(schema, method="json_mode").invoke(CONVERSATION)
