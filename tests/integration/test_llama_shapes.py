"""Dense models that transformers writes give the same logits and tokens here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.model.transformer import GrowingCache, NoCache, Transformer
from tolhouse.testing import tiny_model

from tests.engines import Request, engine_of, serve

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 320,  # one more than the tokenizer has
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 5e5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama-3": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-all-kv-heads": ("llama", {"num_key_value_heads": None, "hidden_size": 96}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3-biased": ("qwen3", {"head_dim": 8, "attention_bias": True, "hidden_size": 64}),
}
IDS = [(17 * i * i + 3 * i) % 319 for i in range(100)]


def saved(folder: Path, shape: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Save a random model of transformers in several files, with a tokenizer, and return it."""
    kind, fields = SHAPES[shape]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **fields, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(shape))
        model = transformers.AutoModelForCausalLM.from_config(config)
        for p in model.parameters():  # also biases and norms, so that each matters
            p.data += 0.1 * torch.randn_like(p)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    tokenizer = tiny_model(folder.with_name(f"{folder.name}-tokenizer")) / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return model.float().eval()


def logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    ids_T = torch.tensor(ids)
    return model(ids_T, torch.arange(len(ids)), NoCache(len(ids)), model.rows(ids_T))


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_logits_and_tokens_equal_those_of_transformers(shape: str, tmp_path: Path) -> None:
    """Logits are within 1e-5, for a whole prompt and in parts, and greedy tokens are equal, also in
    an engine that serves several prompts at once."""
    reference = saved(tmp_path / "m", shape)
    model = open_checkpoint(tmp_path / "m").model()
    expected_TV = reference(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(expected_TV, logits(model, IDS), rtol=1e-5, atol=1e-5)
    cache, outs = GrowingCache(), []
    for ids_T, positions_T in zip(
        torch.tensor(IDS).split(33), torch.arange(100).split(33), strict=True
    ):
        outs.append(model(ids_T, positions_T, cache, model.rows(ids_T)))
    torch.testing.assert_close(expected_TV, torch.cat(outs), rtol=1e-5, atol=1e-5)
    prompts = [IDS[:5], IDS[40:], IDS[7:30]]
    expected = [
        reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0]
        for prompt in prompts
    ]
    tokens = [ids[len(prompt) :].tolist() for ids, prompt in zip(expected, prompts, strict=True)]
    assert tokens == [list(greedy(model, prompt, 24)) for prompt in prompts]
    requests = [Request(prompt, 24) for prompt in prompts]
    serve(engine_of(tmp_path / "m"), *requests)
    assert tokens == [request.tokens for request in requests]
