"""`make demo` in small: the command itself, as a user runs it."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import psutil
import pytest


@pytest.mark.parametrize("name", ["demo-memory", "demo-flex"])
def test_the_demo_ends_with_one_line_of_json(name: str, tmp_path: Path) -> None:
    """Built by Ray, served by three processes, streamed over HTTP, equal to the model in process, and nothing left running."""
    mark = (
        uuid.uuid4().hex
    )  # what it starts inherits the environment, and other tests' processes do not have it
    checkpoint = Path("models", name).absolute()
    command = [
        sys.executable,
        "-m",
        "tolhouse.cli",
        "demo",
        "--checkpoint",
        str(checkpoint),
        "--max-tokens",
        "40",
    ]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "DEMO_MARK": mark},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert 0 == ended.returncode, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert True is result["greedy_matches_in_process"]
    assert 3 == len(result["text"])
    assert all(text in ended.stdout for text in result["text"])
    assert 100 <= result["tokens"] <= 120
    assert result["tokens_per_s"] > 0
    assert 0 < result["row_cache_hit_rate"] < 1
    assert result["rows_remote"] > 0
    assert result["bytes_fetched"] == result["rows_remote"] * (6 * 288 * 4 + 8)
    assert 0 < result["worker_weight_bytes"] < result["dense_weight_bytes"]
    started = [
        p
        for p in psutil.process_iter(["cmdline", "environ"])
        if (p.info["environ"] or {}).get("DEMO_MARK") == mark
    ]
    left = [p for p in started if "tolhouse.cli" in " ".join(p.info["cmdline"] or ())]
    assert [] == left


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_serve_answers_until_it_is_ended(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """The curl line it prints works; Ctrl-C and SIGTERM end it with everything it started, without a traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "tolhouse.cli",
        "serve",
        "--checkpoint",
        str(Path("models/demo-memory").absolute()),
        "--listen",
        address,
    ]
    popen = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    line = next(line for line in popen.stdout if line.startswith("curl"))
    body = shlex.split(line)[-1]
    answer = httpx.post(
        f"http://{address}/v1/completions",
        content=body,
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.json()["choices"][0]["text"]
    family = psutil.Process(popen.pid).children(recursive=True)
    assert len(family) >= 3
    popen.send_signal(number)
    _, err = popen.communicate(timeout=60)
    assert code == popen.returncode
    assert "Traceback" not in err
    assert "Aborted" not in err
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [] == alive
