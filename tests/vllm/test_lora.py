"""LoRA adapters of vLLM for a model with rows from Tolhouse."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm.engines import Case, generate, reference, tiny_case

RANK, ALPHA = 4, 8
WEIGHTS = "model.safetensors"
LORA = {"enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A Flex model with a head size of vLLM's attention."""
    folder = tmp_path_factory.mktemp("lora")
    return tiny_case(folder, "flex", 3, ffn_c="swiglu", head_dim=32)


def make_adapter(folder: Path, checkpoint: Path, pattern: str) -> Path:
    """Write a random adapter for the weights whose names match a pattern.

    Return a copy of the checkpoint to which the adapter is added.
    """
    merged, adapter = folder / "merged", folder / "adapter"
    shutil.copytree(checkpoint, merged)
    stored, tensors = load_file(checkpoint / WEIGHTS), {}
    weights = {name: weight.float() for name, weight in stored.items()}
    random = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if not re.search(pattern, name):
            continue
        a = torch.randn(RANK, weight.shape[1], generator=random) / 10
        b = torch.randn(weight.shape[0], RANK, generator=random) / 10
        weight += ALPHA / RANK * b @ a
        place = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    save_file(weights, merged / WEIGHTS, {"format": "pt"})
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return merged


def test_an_adapter_of_attention_and_ffn_c(model: Case, tmp_path: Path) -> None:
    """With an adapter, vLLM gives the tokens of the model with the adapter's weights added."""
    merged = make_adapter(tmp_path, model.checkpoint, r"layers\.\d+\.(self_attn|mlp)\.")
    expected = reference(merged, model.prompts)
    assert expected != model.expected
    assert expected == generate(model, adapter=tmp_path / "adapter", **LORA)


def test_an_adapter_of_rows_is_refused(model: Case, tmp_path: Path) -> None:
    """FFN-M is in the table, so vLLM cannot add an adapter to it."""
    make_adapter(tmp_path, model.checkpoint, r"ffn_m\.mlp\.up_proj")
    with pytest.raises(AssertionError, match=r"received \['model.layers.0.ffn_m.mlp.up_proj.ffn_m"):
        generate(model, adapter=tmp_path / "adapter", **LORA)
