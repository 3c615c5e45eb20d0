"""What is refused before vLLM starts its processes, with the names of what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tolhouse.integrations.vllm.start import avoid_full_graphs
from tolhouse.testing import build_table, tiny_model
from vllm.config import CUDAGraphMode

from tests.vllm.engines import Case

PROGRAM = """
import json, os, sys
from vllm.engine.arg_utils import EngineArgs
messages = {}
for name, arguments in json.load(sys.stdin).items():
    try:
        EngineArgs(**arguments).create_engine_config()
        messages[name] = ""
    except Exception as error:
        messages[name] = str(error)
messages["seed"] = os.environ.get("PYTHONHASHSEED", "")
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
    "ubatches": ({}, {"ubatch_size": 2}, "--ubatch-size are not supported"),
    "adapters": ({}, {"enable_lora": True}, "pads heads of size 48, and adapters do not fit"),
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
    return started(jobs, folder / "messages.json")


def started(jobs: dict[str, dict[str, Any]], answer: Path, **variables: str) -> dict[str, str]:
    """Make the configs of engines in another process. Return their errors, and the hash seed."""
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONHASHSEED"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(answer)],
        input=json.dumps(jobs),
        env=environment | variables,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return json.loads(answer.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_the_start_refuses_what_cannot_work(name: str, messages: dict[str, str]) -> None:
    """Each error says what is wrong or what is allowed, and a good start has none."""
    expected = CASES[name][2]
    assert expected in messages[name]
    assert bool(expected) == bool(messages[name])


def test_the_hash_seed_is_that_of_the_version(tmp_path: Path) -> None:
    """Hashes of the prefix cache begin with a seed of the table's version, or with the user's.

    Hashes for which collisions can be found have no seed that is known.
    """
    url = f"file://{tmp_path}/tables"

    def seed(number: int, options: dict[str, Any], **variables: str) -> str:
        checkpoint = tiny_model(tmp_path / f"{number}" / "same", seed=number)
        build_table(checkpoint, url)
        additional = {"tolhouse": {"rows": url}}
        job = {"model": str(checkpoint), "additional_config": additional, **options}
        answer = started({"job": job}, tmp_path / "answer.json", **variables)
        assert "" == answer["job"]
        return answer["seed"]

    first, again, second = seed(1, {}), seed(1, {}), seed(2, {})
    assert "" != first == again != second
    assert "7" == seed(1, {}, PYTHONHASHSEED="7")
    assert "" == seed(1, {"prefix_caching_hash_algo": "xxhash"})


@pytest.mark.parametrize(
    ("chosen", "expected"), [("NONE", "NONE"), ("FULL", "PIECEWISE"), (None, "PIECEWISE")]
)
def test_only_the_compiled_model_is_captured(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: str
) -> None:
    """On a GPU, the first model runner captures pieces, unless the user wants no graphs."""
    gpu = SimpleNamespace(is_cuda_alike=lambda: True)
    monkeypatch.setattr("vllm.platforms.current_platform", gpu)
    compilation = SimpleNamespace(cudagraph_mode=chosen and CUDAGraphMode[chosen])
    config = SimpleNamespace(compilation_config=compilation, use_v2_model_runner=False)
    avoid_full_graphs(config)
    assert CUDAGraphMode[expected] == compilation.cudagraph_mode
