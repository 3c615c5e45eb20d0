"""What is refused before vLLM starts its processes, with the names of what is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tolhouse.testing import build_table, tiny_model

from tests.vllm.engines import Case

PROGRAM = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
messages = {}
for name, arguments in json.load(sys.stdin).items():
    try:
        EngineArgs(**arguments).create_engine_config()
    except Exception as error:
        messages[name] = str(error)
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(messages, file)
"""
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "good": ({}, {}, ""),
    "unknown": ({"lookup": "127.0.0.1:9"}, {}, "is unknown; allowed are"),
    "type": ({"row_cache_megabytes": "1"}, {}, "must be a number, not '1'"),
    "no table": ({"table": "absent"}, {}, "absent"),
    "other model": ({"table": "other"}, {}, "was built from model"),
    "address": ({"rows": "http://127.0.0.1"}, {}, "is not an address; allowed are file://"),
    "remote": ({"rows": "example.org:50051"}, {}, "is another machine"),
    "unreachable": ({"rows": "127.0.0.1:9"}, {}, "(waited 0 s)"),
    "second": ({"fallback": "file:///absent"}, {}, "file:///absent"),
    "embeddings": ({}, {"enable_prompt_embeds": True}, "which an embedding does not have"),
    "stages": ({}, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size must be 1"),
}


@pytest.fixture(scope="module")
def messages(memory: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The error of each case."""
    folder = tmp_path_factory.mktemp("start")
    build_table(tiny_model(folder / "tiny"), memory.rows, name="other")
    jobs = {
        name: {
            "model": str(memory.checkpoint),
            "additional_config": {
                "tolhouse": {"rows": memory.rows, "lookup_wait_seconds": 0, **options}
            },
            **arguments,
        }
        for name, (options, arguments, _) in CASES.items()
    }
    command = [sys.executable, "-c", PROGRAM, str(folder / "messages.json")]
    subprocess.run(command, input=json.dumps(jobs), text=True, encoding="utf-8", check=True)
    return json.loads(Path(folder, "messages.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_the_start_refuses_what_cannot_work(name: str, messages: dict[str, str]) -> None:
    """Each error says what is wrong or what is allowed, and a good start has none."""
    expected = CASES[name][2]
    assert expected in messages.get(name, "")
    assert bool(expected) == (name in messages)
