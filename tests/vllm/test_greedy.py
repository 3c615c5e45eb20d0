"""vLLM with rows from Tolhouse generates the tokens of the reference in this process."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.config import RopeScaling
from tolhouse.testing import process, tiny_model

from tests.vllm.engines import (
    ON_GPU,
    Case,
    case,
    generate,
    prompts_for,
    reference,
    rows_of,
    tiny_case,
)

LLAMA3 = RopeScaling("llama3", 4.0, 1.0, 4.0, 64)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},  # X0 is in the table
    "attention": {
        "num_key_value_heads": 2,
        "head_dim": 20,
        "qkv_bias": True,
        "o_bias": True,
        "qk_norm": True,
        "rope_scaling": LLAMA3,
    },
    "swiglu": {"kind": "flex", "beta": 3, "ffn_c": "swiglu"},
    "wide": {"kind": "wide", "rope_scaling": RopeScaling("linear", 2.0)},
    "base": {"kind": "base"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_of_model(name: str, tmp_path: Path) -> None:
    """Each kind of model and of attention gives the same tokens."""
    tiny = tiny_case(tmp_path, **SHAPES[name])
    assert tiny.expected == generate(tiny)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("model", ["memory", "flex"])
def test_demo_models(model: str, compiled: bool, request: pytest.FixtureRequest) -> None:
    """The demo models give the same tokens, eager and compiled, with prompts in chunks."""
    demo: Case = request.getfixturevalue(model)
    assert demo.expected == generate(demo, enforce_eager=not compiled)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    ("row_memory", "second_runner"), [("host", "1"), ("device", "1"), ("cache", "0"), ("host", "0")]
)
def test_graphs(
    memory: Case, row_memory: str, second_runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both model runners replay CUDA graphs with each kind of memory for rows."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", second_runner)
    rows = {"row_memory": row_memory}
    assert memory.expected == generate(memory, rows, enforce_eager=False)


@pytest.mark.parametrize("row_memory", ["cache", "host"])
def test_speculation(memory: Case, row_memory: str) -> None:
    """N-gram speculation, whose steps have placeholders for tokens, changes no token, also if each
    step has the whole table in memory."""
    rows = {"row_memory": row_memory}
    assert memory.expected == generate(memory, rows, speculative_config=NGRAM)


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks(flex: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensor-parallel ranks, each with a row cache of its own, give the same tokens."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with process("lookup", "--store", flex.rows, "--listen", "127.0.0.1:0") as lookup:
        rows = {"rows": lookup.address}
        assert flex.expected == generate(flex, rows, tensor_parallel_size=2)


def test_a_converted_model(tmp_path: Path) -> None:
    """A model whose layers are partly dense and partly rows of the table gives the same tokens."""
    dense, url = tiny_model(tmp_path / "dense", "base", num_key_value_heads=2), f"file://{tmp_path}"
    converted = tmp_path / "converted"
    command = (
        sys.executable, "-m", "tolhouse.cli", "convert", dense, "--text", __file__,
        "--layers", "3,1", "--out", converted, "--codec", "fp32", "--publish", "--store", url,
    )  # fmt: skip
    table = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    prompts = prompts_for(open_checkpoint(converted).config.vocab_size)
    with rows_of(url, table.strip(), 4) as rows:
        expected = reference(converted, prompts, rows)
    assert expected == generate(Case(converted, url, prompts, expected))


def test_two_starts_around_a_new_version(tmp_path: Path) -> None:
    """An engine uses the version that its start finds."""
    for seed in (1, 2):
        found = case(tiny_model(tmp_path / f"{seed}" / "same", seed=seed), tmp_path)
        assert found.expected == generate(found)
