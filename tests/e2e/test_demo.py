"""`tolhouse demo` and `tolhouse serve`, run as commands."""

import json
import os
import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import psutil
import pytest
from tolhouse.testing import build_table, free_port

TOLHOUSE = (sys.executable, "-m", "tolhouse.cli")


def test_the_demo_ends_with_one_line_of_json(tmp_path: Path) -> None:
    """The served text equals the model's, the last line is JSON, and all processes end."""
    mark = uuid.uuid4().hex  # in the environment of every process of the demo
    checkpoint = str(Path("models/demo-flex").absolute())
    command = [*TOLHOUSE, "demo", "--checkpoint", checkpoint, "--max-tokens", "40"]
    proxies = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    nowhere = dict.fromkeys(proxies, f"http://127.0.0.1:{free_port()}")  # no call uses the proxy
    environment = {**os.environ, **nowhere, "DEMO_MARK": mark}
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        encoding="utf-8",
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
    running = [p.info for p in psutil.process_iter(["cmdline", "environ"])]
    marked = [p for p in running if (p["environ"] or {}).get("DEMO_MARK") == mark]
    assert [] == [p for p in marked if "tolhouse.cli" in " ".join(p["cmdline"] or ())]


def test_the_demo_runs_a_dense_model(base: Path, tmp_path: Path) -> None:
    """A dense model is served without a table, and its text equals the model's."""
    command = [*TOLHOUSE, "demo", "--checkpoint", str(base), "--max-tokens", "8"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=280, encoding="utf-8"
    )
    assert 0 == ended.returncode, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (True, 0) == (result["greedy_matches_in_process"], result["rows_remote"])
    assert not (tmp_path / ".tolhouse").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_serve_runs_until_a_signal(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """The printed curl command works, with a new table or one of an earlier run, and Ctrl-C or
    SIGTERM ends serve and all its processes."""
    address = f"127.0.0.1:{free_port()}"
    checkpoint = str(Path("models/demo-memory").absolute())
    if number == signal.SIGTERM:
        build_table(Path(checkpoint), f"file://{tmp_path}/.tolhouse/tables", shards=64)
    pipe = subprocess.PIPE
    popen = subprocess.Popen(
        [*TOLHOUSE, "serve", "--checkpoint", checkpoint, "--listen", address],
        cwd=tmp_path,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        encoding="utf-8",
    )
    body = shlex.split(next(line for line in popen.stdout if line.startswith("curl")))[-1]
    header, url = {"Content-Type": "application/json"}, f"http://{address}/v1/completions"
    answer = httpx.post(url, content=body, headers=header, timeout=60)
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
