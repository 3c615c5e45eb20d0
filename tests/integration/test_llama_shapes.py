"""Dense models that transformers writes give the same logits and tokens here."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tolhouse import Client
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.row_providers import CachedRows
from tolhouse.errors import TolhouseError
from tolhouse.model.checkpoint import WEIGHTS, open_checkpoint, save_checkpoint
from tolhouse.model.config import RopeScaling
from tolhouse.model.generate import greedy
from tolhouse.model.transformer import GrowingCache, NoCache, Transformer
from tolhouse.testing import build_table, local_cluster, tiny_model
from tolhouse.train.recipes import recipe
from tolhouse.train.trainer import Trainer, initialise

from tests.engines import CPU, Request, engine_of, serve

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
TEMPLATE = "{% for m in messages %}{{ '# ' + m.role + ': ' + m.content + '\\n' }}{% endfor %}"
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
    file = tiny_model(folder.with_name(f"{folder.name}-tokenizer")) / "tokenizer.json"
    made = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=TEMPLATE)
    made.save_pretrained(folder)
    return model.float().eval()


def generated(reference: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy tokens of transformers."""
    found = reference.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return found[0, len(prompt) :].tolist()


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
    tokens = [generated(reference, prompt, 24) for prompt in prompts]
    assert tokens == [list(greedy(model, prompt, 24)) for prompt in prompts]
    requests = [Request(prompt, 24) for prompt in prompts]
    serve(engine_of(tmp_path / "m"), *requests)
    assert tokens == [request.tokens for request in requests]


@pytest.mark.parametrize(("shape", "dtype"), [("llama-3", "bfloat16"), ("qwen3", "float16")])
def test_a_worker_chats_with_a_dense_model(shape: str, dtype: str, tmp_path: Path) -> None:
    """A worker without rows and a gateway serve the folder: tokens and chats equal those of
    transformers, and each end token of the folder ends an answer."""
    reference = saved(tmp_path / "m", shape, getattr(torch, dtype))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [{"role": "user", "content": "def add"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    tokens = generated(reference, prompt, 24)
    last = next(i for i in range(2, 24) if tokens[i] not in tokens[:i])  # ends the second answer
    unused = next(i for i in range(319) if i not in tokens)
    ends = {"eos_token_id": [unused, tokens[last]]}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    options = "--compile", "never"
    with local_cluster(tmp_path / "m", "", lookups=0, worker_options=options) as cluster:
        url = f"{cluster.url}/chat/completions"
        with Client(cluster.workers) as client:
            assert tokens == list(client.generate(prompt, 24, ignore_eos=True))
        assert (tokenizer.decode(tokens), "length") == chat(url, messages, ignore_eos=True)
        assert (tokenizer.decode(tokens[:last]), "stop") == chat(url, messages)


def chat(url: str, messages: list[dict[str, str]], **more: Any) -> tuple[str, str]:
    """The text of an answer, and why it ended."""
    asked = {"model": "m", "messages": messages, "temperature": 0, "max_completion_tokens": 24}
    asked |= more
    answer = httpx.post(url, json=asked, trust_env=False, timeout=60).json()["choices"][0]
    return answer["message"]["content"], answer["finish_reason"]


ATTENTION: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "qk_norm": True}
ATTENTION |= {"qkv_bias": True, "o_bias": True, "num_hidden_layers": 2}
ATTENTION["rope_scaling"] = RopeScaling(rope_type="linear", factor=2.0)


@pytest.mark.parametrize(("kind", "beta"), [("memory", 0), ("flex", 1), ("wide", 0)])
def test_models_with_rows_have_the_same_attention(kind: str, beta: int, tmp_path: Path) -> None:
    """With such an attention, an engine gives the tokens of the model, from rows of its table, and
    the checkpoint equals a saved copy."""
    path = tiny_model(tmp_path / "m", kind, beta, **ATTENTION)
    checkpoint = open_checkpoint(path)
    model = checkpoint.model()
    save_checkpoint(tmp_path / "copy", model, path / "tokenizer.json")
    again = open_checkpoint(tmp_path / "copy")
    assert (checkpoint.config, checkpoint.model_id()) == (again.config, again.model_id())
    url = f"file://{tmp_path}/tables"
    ref = build_table(path, url)
    prompts = [IDS[:5], IDS[40:], IDS[7:30]]
    tokens = [list(greedy(model, prompt, 24, ignore_eos=True)) for prompt in prompts]
    with closing(open_row_source(url)) as source:
        rows = CachedRows(source, source.describe(ref), 1 << 20, CPU)
        requests = [Request(prompt, 24, ignore_eos=True) for prompt in prompts]
        serve(engine_of(path, rows), *requests)
    assert tokens == [request.tokens for request in requests]


def test_every_parameter_of_the_attention_is_trained() -> None:
    """The trainer's loss has a gradient for each parameter of such a model."""
    chosen = recipe("tiny", "memory", 0)
    small = replace(chosen, config=replace(chosen.config, **ATTENTION), batch_sequences=2)
    trainer = Trainer(small, np.array(IDS), np.array(IDS), Path())
    trainer.model = Transformer(small.config)
    initialise(trainer.model)
    ids_T = torch.arange(2 * small.sequence_tokens) % 300
    trainer.loss(ids_T, ids_T.roll(-1)).backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert [] == [name for name, grad in gradients.items() if grad is None or not grad.any()]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 16}, "sliding_window is 16, .* if max_position_embeddings <="),
    ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, "sliding_window is 4096"),
    ("mistral", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True, which a llama model does not support"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', .* set it to 'silu' or 'swish'"),
    ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
    ("llama", {"qk_norm": True}, "qk_norm is True"),
    ("llama", {"kind": "memory"}, "kind is 'memory'"),
    ("llama", {"model_type": "mixtral"}, "'mixtral'; allowed are 'memoryllm', .* 'llama', 'mist"),
    ("llama", {"model_type": "qwen3"}, "lacks 4 tensors of a base model, such as .*k_norm.weight"),
    ("qwen3", {"model_type": "llama"}, "has 4 tensors that a base model lacks, such as .*k_norm"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "sliding_window is 8",
    ),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    ("qwen3", {"num_experts": 4}, "num_experts is 4"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'linear' or 'llama3'"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config is"),
]


@pytest.mark.parametrize(("shape", "fields", "message"), REFUSED)
def test_what_changes_the_computation_is_refused(
    shape: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A field that transformers computes with and that is not supported is named."""
    saved(tmp_path / "m", shape)
    edit(tmp_path / "m", fields)
    with pytest.raises(TolhouseError, match=message):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        ("mistral", {"sliding_window": 256, "max_position_embeddings": 256}),
        ("mistral", {"attention_bias": False, "is_llama_config": True, "rope_scaling": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "attention_bias": True}),
        ("qwen3", {"rope_parameters": None, "rope_theta": 10000.0, "use_sliding_window": True}),
        ("llama-3", {"rope_parameters": None, "rope_scaling": LLAMA3, "torch_dtype": "float16"}),
        ("llama", {"pretraining_tp": 2, "quantization_config": None, "head_dim": None}),
    ],
)
def test_what_does_not_change_it_is_accepted(
    shape: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Fields of other versions of transformers, and windows that no text reaches, are the same."""
    saved(tmp_path / "m", shape)
    expected = open_checkpoint(tmp_path / "m").config
    edit(tmp_path / "m", fields)
    assert expected == open_checkpoint(tmp_path / "m").config


@pytest.mark.parametrize("shape", ["llama-tied-biased", "qwen2", "qwen3-biased"])
def test_advice_about_missing_biases_works(shape: str, tmp_path: Path) -> None:
    """A checkpoint without the biases of its config opens after the edit that the error names."""
    folder = tmp_path / "m"
    saved(folder, shape)
    weights = {}
    for part in folder.glob("*.safetensors"):
        weights |= load_file(part)
        part.unlink()
    (folder / "model.safetensors.index.json").unlink()
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(".bias")}
    save_file(kept, folder / WEIGHTS)
    with pytest.raises(TolhouseError, match=r"k_proj.bias: set attention_bias .* to false"):
        open_checkpoint(folder)
    edit(folder, {"attention_bias": False})
    config = open_checkpoint(folder).config
    assert (False, False) == (config.qkv_bias, config.o_bias)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(TolhouseError, match=r"k_proj.bias: set attention_bias .* to true"):
        open_checkpoint(folder)


def edit(folder: Path, fields: dict[str, Any]) -> None:
    """Change fields of config.json. `...` removes a field."""
    file = folder / "config.json"
    config = {**json.loads(file.read_bytes()), **fields}
    kept = {name: value for name, value in config.items() if value is not ...}
    file.write_text(json.dumps(kept), encoding="utf-8")
