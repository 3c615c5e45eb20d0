"""Checkpoints of other tools: equivalent ones are accepted, others are refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tolhouse.errors import InvalidArgumentError, MismatchError, NotFoundError, TolhouseError
from tolhouse.model.checkpoint import WEIGHTS, Checkpoint, open_checkpoint, save_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.testing import tiny_model

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# the files that save_pretrained of transformers 4 and 5 writes for the tiny preset
SAVE_PRETRAINED = {
    "architectures": ["MemoryLLMForCausalLM"],
    "transformers_version": "4.57.1",
    "_name_or_path": "org/model",
    "auto_map": {"AutoModelForCausalLM": "modeling.MemoryLLM"},
    "dtype": "float16",
    "use_cache": True,
    "bos_token_id": 1,
    "pad_token_id": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "attention_bias": False,
    "attention_dropout": 0.1,
    "mlp_bias": False,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "layer_types": ["full_attention"] * 4,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "sliding_window": None,
    "pretraining_tp": 1,
    "quantization_config": None,
    "id2label": {"0": "LABEL_0"},
    "something_new": None,
    "another_switch": False,
}


def edit_config(**fields: Any) -> Callable[[Path], None]:
    """Return a function that changes fields of config.json; `...` removes a field."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_bytes()), **fields}
        kept = {name: value for name, value in config.items() if value is not ...}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return change


def edit_weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def prefix_bytes(name: str, text: bytes = b"\xef\xbb\xbf") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text + (folder / name).read_bytes()) and None


def shard(folder: Path, **index: str) -> None:
    """Split the weights into two files; `index` adds entries to the weight map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, files = sorted(tensors), {}
    for k in range(2):
        file, own = f"model-{k + 1:05}-of-00002.safetensors", names[k::2]
        save_file({name: tensors[name] for name in own}, folder / file)
        files |= dict.fromkeys(own, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": {**files, **index}})
    (folder / INDEX).write_text(text, encoding="utf-8")


def buffers(tensors: dict) -> dict:
    layer = "model.layers.0.self_attn.rotary_emb"
    names = "model.rotary_emb.inv_freq", f"{layer}.inv_freq", f"{layer}.cos_cached"
    return tensors | {name: torch.ones(12) for name in names}


def tied_head(tensors: dict) -> dict:
    return tensors | {HEAD: tensors[EMBEDDING].clone()}


SAME: list[Callable[[Path], Any]] = [
    edit_config(**SAVE_PRETRAINED),
    edit_config(rope_theta=..., rope_parameters={"rope_theta": 10000, "rope_type": "default"}),
    edit_config(rope_scaling={"type": "linear", "factor": 1.0}, torch_dtype=...),
    edit_config(sliding_window=4096, use_sliding_window=False),
    edit_config(max_position_embeddings=256, sliding_window=256, tie_word_embeddings=...),
    prefix_bytes("config.json"),
    prefix_bytes("generation_config.json"),
    lambda folder: (folder / "generation_config.json").unlink(),
    lambda folder: (folder / "tokenizer_config.json").unlink(),
    edit_weights(buffers),
    edit_weights(tied_head),
    edit_weights(lambda tensors: {f"_orig_mod.{name}": t for name, t in tensors.items()}),
    edit_weights(lambda tensors: {f"module.{name}": t for name, t in tensors.items()}),
    shard,
    lambda folder: (shard(folder), prefix_bytes(INDEX)(folder)),
    lambda folder: (shard(folder), (folder / "x.safetensors").write_bytes(b"unrelated")),
    lambda folder: (edit_weights(tied_head)(folder), shard(folder)),
]


@pytest.mark.parametrize("change", SAME)
def test_an_equivalent_checkpoint_is_accepted(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], Any]
) -> None:
    """An equivalent checkpoint gives the same model, rows and weight bytes."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    change(folder)
    plain, opened = open_checkpoint(checkpoint), open_checkpoint(folder)
    assert plain.config == opened.config
    assert plain.rows_id() == opened.rows_id()
    assert plain.weight_bytes(dense=True) == opened.weight_bytes(dense=True)
    expected, found = plain.model().state_dict(), opened.model().state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    ids = np.array([5, 3], np.int64)
    rows = opened.weights.read_rows(EMBEDDING, ids)
    assert torch.equal(plain.weights.read_rows(EMBEDDING, ids), rows)


UNSUPPORTED = "which a memoryllm model does not support: set it to"
OTHER: list[tuple[Callable[[Path], Any], str]] = [
    (
        edit_config(num_key_value_heads=2),
        "k_proj.weight has shape .96, 96., config.json asks for .48",
    ),
    (edit_config(num_key_value_heads=3), "num_key_value_heads 3 must divide num_attention_heads 4"),
    (edit_config(head_dim=32), "has shape .96, 96., config.json asks for .128, 96"),
    (edit_config(head_dim=23), "head_dim 23 must be even"),
    (
        edit_config(attention_bias=True),
        r"lacks 16 tensors .* such as .*k_proj.bias: set .*qkv_bias and o_bias\) to false",
    ),
    (edit_config(attention_bias="yes"), "attention_bias must be a boolean, not 'yes'"),
    (edit_config(mlp_bias=True), f"mlp_bias is True, {UNSUPPORTED} null or false"),
    (edit_config(num_local_experts=8), f"num_local_experts is 8, {UNSUPPORTED} null or false"),
    (edit_config(hidden_act="gelu"), f"hidden_act is 'gelu', {UNSUPPORTED} 'silu'"),
    (edit_config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (edit_config(sliding_window=16), "sliding_window is 16"),
    (edit_config(layer_types=["sliding_attention"] * 4), "layer_types is"),
    (edit_config(quantization_config={"bits": 4}), "quantization_config is"),
    (edit_config(something_new="x"), "something_new is 'x'"),
    (edit_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_scaling {.*not supp"),
    (edit_config(rope_scaling={"type": "linear"}), "rope_scaling: factor: Field required"),
    (edit_config(rope_scaling={"type": "linear", "factor": 0}), "rope_scaling: factor: .*than 0"),
    (edit_config(rope_scaling={"type": ["linear"]}), "rope_scaling {.*not supported: allowed are"),
    (edit_config(rope_scaling={"type": "llama3", "factor": 8.0}), "'llama3' needs low_freq_factor"),
    (
        edit_config(
            rope_scaling={"type": "linear", "factor": 2.0},
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "rope_scaling and rope_parameters differ",
    ),
    (edit_config(rope_scaling="linear"), "rope_scaling must be an object or null"),
    (edit_config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_parameters {.*not"),
    (
        edit_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
        r"rope_theta 10000.0 and rope_parameters.rope_theta 5.0 differ",
    ),
    (
        edit_weights(lambda tensors: tensors | {HEAD: tensors[EMBEDDING] + 1}),
        "set tie_word_embeddings to false in config.json, or remove lm_head.weight",
    ),
    (edit_config(tie_word_embeddings=False), "set tie_word_embeddings to true in config.json"),
    (
        edit_weights(lambda tensors: {f"model.{name}": t for name, t in tensors.items()}),
        "such as model.embed_tokens.weight; it has model.model.embed_tokens.weight",
    ),
    (
        edit_weights(lambda tensors: tensors | {f"_orig_mod.{EMBEDDING}": torch.zeros(1)}),
        "are one tensor",
    ),
    (
        edit_weights(lambda tensors: {n: t.double() for n, t in tensors.items()}),
        "is F64; allowed are BF16, F16, F32: convert the weights",
    ),
    (prefix_bytes(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    (lambda folder: shard(folder, x="y.safetensors"), "lacks y.safetensors, which .*index.json n"),
    (
        lambda folder: shard(folder, x="model-00001-of-00002.safetensors"),
        "x is not in model-00001-of-00002.safetensors",
    ),
    (lambda folder: shard(folder, x="../x.safetensors"), "must have a weight_map"),
    (lambda folder: (shard(folder), (folder / INDEX).write_bytes(b"[]")), "must have a weight_map"),
    (lambda folder: (folder / "generation_config.json").write_bytes(b"{"), "is not JSON"),
    (lambda folder: (folder / "generation_config.json").write_bytes(b"[]"), "a JSON object"),
]


@pytest.mark.parametrize(("change", "message"), OTHER)
def test_an_unsupported_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    """The error names the field, tensor or file, and states a remedy."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    change(folder)
    with pytest.raises((InvalidArgumentError, NotFoundError), match=message):
        open_checkpoint(folder)


def test_an_overwritten_shard_is_detected(checkpoint: Path, tmp_path: Path) -> None:
    """An overwritten shard is detected, and the model's id depends on each shard."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    shard(folder)
    opened = open_checkpoint(folder)
    ids, files = {opened.model_id()}, sorted(folder.glob("*.safetensors"))
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(MismatchError, match=f"{file.name} of checkpoint copy was overwritten"):
            opened.weights.check()
        opened = open_checkpoint(folder)
        ids.add(opened.model_id())
    assert 1 + len(files) == len(ids)


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (7, ..., (7,)),
        (..., ..., (0,)),
        ([7, 9, 7], ..., (7, 9)),
        ([7], ..., (7,)),
        ([], ..., ()),
        (None, ..., ()),
        (None, [7], ()),
        (..., [7, 9], (7, 9)),
        (7, [9, 7], (7, 9)),
        (7, None, (7,)),
    ],
)
def test_end_tokens_come_from_both_configs(
    checkpoint: Path, tmp_path: Path, own: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    """Both configs add end tokens, and null in config.json disables them."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    edit_config(eos_token_id=own)(folder)
    text = json.dumps({} if generation is ... else {"eos_token_id": generation})
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    assert expected == open_checkpoint(folder).config.end_token_ids


def test_each_end_token_ends_an_answer(checkpoint: Path, tmp_path: Path) -> None:
    """An answer ends before its first end token, or at max_tokens."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))

    def answer(ends: Any) -> list[int]:
        edit_config(eos_token_id=ends)(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        return list(greedy(open_checkpoint(folder).model(), [5], 8))

    whole = answer(None)
    assert 8 == len(whole)
    unused = next(i for i in range(319) if i not in whole)
    for token in set(whole):
        assert whole[: whole.index(token)] == answer([unused, token])


def named(root: Path, checkpoint: Path, path: str) -> Checkpoint:
    """Open the checkpoint through a link at `path` below `root`."""
    folder = root / path
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(checkpoint)
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("current", "current"),
        ("My Model (v2) é", "My Model (v2) é"),
        ("Llama-3.1-8B_v2.0", "Llama-3.1-8B_v2.0"),
        ("models--org--My-Mem/snapshots/0f1e2d3c", "My-Mem"),
        ("models--My-Mem/snapshots/0f1e2d3c", "My-Mem"),
        ("snapshots/0f1e2d3c", "0f1e2d3c"),
        ("models--org--My-Mem/snapshots/0f1e2d3c/sub", "sub"),
    ],
)
def test_links_and_snapshots_give_names(
    checkpoint: Path, tmp_path: Path, path: str, name: str
) -> None:
    """A link gives its own name, and a Hugging Face snapshot gives its repository's name."""
    assert name == named(tmp_path, checkpoint, path).name


def test_a_name_does_not_depend_on_how_a_path_is_written(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trailing slashes, dots and relative paths give the folder's name."""
    parent, name = checkpoint.parent, checkpoint.name
    monkeypatch.chdir(checkpoint)
    (checkpoint / "sub").mkdir()
    for path in (".", "./", f"{parent}/{name}/", f"{parent}//{name}/.", f"../{name}", "sub/.."):
        assert name == open_checkpoint(path).name
    (checkpoint / "sub").rmdir()


def test_a_hugging_face_snapshot_is_read(checkpoint: Path, tmp_path: Path) -> None:
    """A snapshot of links to blobs is a checkpoint."""
    snapshot = tmp_path / "models--org--mem" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (snapshot / file.name).symlink_to(file)
    opened = open_checkpoint(f"{snapshot}/")
    assert "mem" == opened.name
    assert open_checkpoint(checkpoint).model_id() == opened.model_id()
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(tmp_path / "not-downloaded")
    with pytest.raises(TolhouseError, match=f"has no {WEIGHTS}"):
        open_checkpoint(snapshot)


def test_weights_in_float16_are_read_as_stored(tmp_path: Path) -> None:
    """float16 weights are read without conversion."""
    folder = tiny_model(tmp_path / "m")
    edit_weights(lambda tensors: {n: t.half() for n, t in tensors.items()})(folder)
    opened = open_checkpoint(folder)
    assert torch.float16 == opened.tensor(EMBEDDING).dtype
    assert torch.equal(opened.tensor(EMBEDDING).float(), opened.model().state_dict()[EMBEDDING[6:]])


def test_written_files_are_valid_for_hugging_face(tmp_path: Path) -> None:
    """The written tokenizer config is valid for Hugging Face, and existing files are kept."""
    path = tiny_model(tmp_path / "m")
    config, generation = path / "tokenizer_config.json", path / "generation_config.json"
    expected = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
    }
    assert expected == json.loads(config.read_bytes())
    assert {"eos_token_id": 0} == json.loads(generation.read_bytes())
    config.write_text('{"chat_template": "é"}', encoding="utf-8")
    model = open_checkpoint(path).model()
    for folder in (path, tmp_path / "again"):
        save_checkpoint(folder, model, path / "tokenizer.json")
        assert '{"chat_template": "é"}' == (folder / config.name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["demo-memory", "demo-flex"])
def test_demo_models_have_current_config_files(name: str, tmp_path: Path) -> None:
    """The config files of the demo models equal the files written now."""
    opened = open_checkpoint(Path("models") / name)
    (tmp_path / "tokenizer.json").write_bytes((opened.path / "tokenizer.json").read_bytes())
    save_checkpoint(tmp_path, opened.model(), tmp_path / "tokenizer.json")
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (opened.path / file).read_bytes() == (tmp_path / file).read_bytes()
