"""docs/getting-started.md: its first three commands lead to a completion."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import Request

from tolhouse.testing import open_url

PAGE = Path(__file__).parent.parent.parent / "docs" / "getting-started.md"


def page_commands() -> list[list[str]]:
    """The words of each command of `tolhouse` before the page's second section."""
    text = PAGE.read_text(encoding="utf-8").partition("## A better model")[0]
    return [line.split() for line in re.findall(r"^tolhouse (.*)$", text, re.MULTILINE)]


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a command of the page in a folder."""
    command = [sys.executable, "-m", "tolhouse.cli", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, text=True, encoding="utf-8")


def test_three_commands_lead_to_a_completion(tmp_path: Path) -> None:
    """Train, serve and complete, as the page says, but on less text and at a free port."""
    train, serve = page_commands()
    less = "--steps", "3", "--corpus", str(PAGE.parent.parent / "services"), "--no-compile"
    with start([*train, *less], tmp_path) as training:
        assert 0 == training.wait(200)
    (body,) = re.findall(r"-d '(\{.*?\})'", PAGE.read_text(encoding="utf-8"))
    with start([*serve, "--listen", "127.0.0.1:0"], tmp_path) as serving:
        assert serving.stdout
        try:
            url = re.split(r"[ ;]", serving.stdout.readline())[3]
            headers = {"Content-Type": "application/json"}
            request = Request(f"{url}/completions", body.encode(), headers)
            with open_url(request, 60) as answer:
                completion = json.load(answer)
        finally:
            serving.send_signal(signal.SIGINT)
    assert json.loads(body)["max_tokens"] == completion["usage"]["completion_tokens"]
    assert completion["system_fingerprint"].startswith("my-model@")
