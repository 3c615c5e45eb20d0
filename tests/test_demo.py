"""`make demo` in small: the command itself, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest


@pytest.mark.parametrize("name", ["demo-memory", "demo-flex"])
def test_the_demo_ends_with_one_line_of_json(name: str, tmp_path: Path) -> None:
    """Built by Ray, served by three processes, streamed over HTTP, equal to the model in process, and nothing left running."""
    before = {p.pid for p in psutil.process_iter()}
    checkpoint = Path("models", name).absolute()
    command = [sys.executable, "-m", "tolhouse.cli", "demo", "--checkpoint", str(checkpoint), "--max-tokens", "40"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
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
    left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before and "tolhouse.cli" in " ".join(p.info["cmdline"] or ())]
    assert [] == left
