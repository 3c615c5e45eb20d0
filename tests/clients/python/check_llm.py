"""`llm`, with the model in extra-openai-models.yaml."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import llm
from system import OVERLONG, SYSTEM, raises

PACKAGE = "llm"
MODELS = [
    {"model_id": "memory", "model_name": SYSTEM.model, "api_base": SYSTEM.url},
    {"model_id": "text", "model_name": SYSTEM.model, "api_base": SYSTEM.url, "completion": True},
]
OPTIONS = {"key": "none", "temperature": 0, "max_tokens": 8}

os.environ["LLM_USER_PATH"] = tempfile.mkdtemp()
file = Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml")
file.write_text(json.dumps(MODELS), encoding="utf-8")  # JSON is valid YAML


def check_conversation():
    """A conversation of three prompts works, plain and streamed"""
    model = llm.get_model("memory")
    whole, streamed = model.conversation(), model.conversation()
    for text in ("hello", "more", "and more"):
        plain = whole.prompt(text, stream=False, **OPTIONS).text()
        assert plain == "".join(streamed.prompt(text, **OPTIONS))


def check_completion():
    """A text completion equals the model's"""
    options = {**OPTIONS, "max_tokens": SYSTEM.greedy.max_tokens}
    assert (
        SYSTEM.greedy.text == llm.get_model("text").prompt(SYSTEM.greedy.prompt, **options).text()
    )


def check_overflow():
    """A prompt beyond the context is an error with the gateway's message"""
    with raises(Exception, "maximum context length"):
        llm.get_model("memory").prompt(OVERLONG, **OPTIONS).text()


def check_command():
    """The command prints an answer"""
    command = [sys.executable, "-m", "llm", "prompt", "hello", "-m", "memory", "--key", "none"]
    command += ["-o", "max_tokens", "8"]
    assert subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
