"""Gemma in vLLM with rows from Tolhouse generates the same tokens without its table."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolhouse.sources.gemma import FINISHED, RAW, blocks_of
from tolhouse.testing import build_table

from loadtest.gemma import saved, tiny_gemma
from tests.vllm.engines import MAX_TOKENS, Case, defaults, generate, prompts_for

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "vocab_size_per_layer_input": 300,
    "head_dim": 32,
    "global_head_dim": 32,
}
# Completes a prompt in one process, and writes the bytes of its anonymous and shared memory, or of
# its tensors on a GPU.
MEMORY = """
import json, re, sys
from pathlib import Path
import torch
from vllm import LLM, SamplingParams
llm = LLM(**json.loads(sys.argv[2]))
llm.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=4, detokenize=False))
status = Path("/proc/self/status").read_text(encoding="ascii")
kilobytes = sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+)", status)))
used = torch.cuda.memory_allocated() if torch.cuda.is_available() else kilobytes * 1024
Path(sys.argv[1]).write_text(str(used), encoding="ascii")
"""


def gemma_case(folder: Path, family: str, kind: str) -> Case:
    """Return a tiny random model, and the tokens that transformers generates."""
    checkpoint, url = folder / family, f"file://{folder}/tables"
    model = saved(tiny_gemma(family, **SIZES), checkpoint, torch.float32)
    build_table(checkpoint, url, blocks=blocks_of(kind, model.config.num_hidden_layers))
    prompts, expected = prompts_for(SIZES["vocab_size"]), []
    options = {"max_new_tokens": MAX_TOKENS, "min_new_tokens": MAX_TOKENS, "do_sample": False}
    model.generation_config.eos_token_id = None
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), **options)
        expected.append(out[0, len(prompt) :].tolist())
    return Case(checkpoint, url, prompts, expected)


@pytest.mark.parametrize(
    ("family", "kind", "compiled"),
    [
        ("gemma4", RAW, False),
        ("gemma4", RAW, True),
        ("gemma4", FINISHED, False),
        ("gemma3n", RAW, False),
        ("gemma3n", FINISHED, True),
    ],
)
def test_both_families(family: str, kind: str, compiled: bool, tmp_path: Path) -> None:
    """Both kinds of rows give the tokens of transformers, eager and compiled."""
    case = gemma_case(tmp_path, family, kind)
    assert case.expected == generate(case, skip_tokenizer_init=True, enforce_eager=not compiled)


def test_without_options_the_class_is_that_of_vllm(tmp_path: Path) -> None:
    """A Gemma checkpoint without options of Tolhouse runs as before, with the same tokens."""
    case = gemma_case(tmp_path, "gemma4", RAW)
    stock = generate(case, skip_tokenizer_init=True, additional_config={})
    assert case.expected == stock


def test_the_process_does_not_hold_the_table(tmp_path: Path) -> None:
    """The memory of the process is lower by the table, of which it caches a few rows."""
    checkpoint, url = tmp_path / "large", f"file://{tmp_path}/tables"
    sizes = {"vocab_size": 1 << 16, "vocab_size_per_layer_input": 1 << 16}
    sizes |= {"hidden_size_per_layer_input": 64}
    model = tiny_gemma("gemma4", **SIZES | sizes)
    model.save_pretrained(checkpoint)
    layers = model.config.num_hidden_layers
    build_table(checkpoint, url, blocks=blocks_of(RAW, layers))
    table_bytes = layers * 64 * 4 << 16
    options = {"tolhouse": {"rows": url, "row_cache_megabytes": 1}}
    stock, own = (memory_of(checkpoint, tmp_path / "bytes", given) for given in ({}, options))
    assert stock - own > 0.9 * table_bytes


def memory_of(checkpoint: Path, answer: Path, additional: dict[str, Any]) -> int:
    job = {
        "model": str(checkpoint),
        "additional_config": additional,
        "skip_tokenizer_init": True,
        **defaults(),
        "max_model_len": 64,
    }
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", MEMORY, str(answer), json.dumps(job)]
    subprocess.run(command, env=environment, check=True)
    return int(answer.read_text(encoding="ascii"))
