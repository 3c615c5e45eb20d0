"""Checkpoints: saving, opening, and errors for malformed files."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolhouse.errors import InvalidArgumentError, NotFoundError, TolhouseError
from tolhouse.model.checkpoint import WEIGHTS, open_checkpoint, save_checkpoint
from tolhouse.testing import tiny_model


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


class Trap:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(copy: Path, tmp_path: Path) -> None:
    """Pickled weights are refused without being loaded, and the error states a remedy."""
    trap = tmp_path / "run"
    for data in (pickle.dumps(Trap(trap)), pickle.dumps(Trap(trap), protocol=0)):
        (copy / WEIGHTS).write_bytes(data)
        with pytest.raises(InvalidArgumentError, match="not a safetensors file"):
            open_checkpoint(copy)
    torch.save({"a": Trap(trap)}, copy / "pytorch_model.bin")
    torch.save({"a": Trap(trap)}, copy / WEIGHTS)
    with pytest.raises(InvalidArgumentError, match="not a safetensors file"):
        open_checkpoint(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(
        NotFoundError, match=r"pytorch_model\.bin can run code when loaded and is refused"
    ):
        open_checkpoint(copy)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists()  # the trap itself works


@given(data=st.data())
def test_damaged_weights_are_refused_or_complete(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A changed header or a truncated file gives a TolhouseError or a model of the same shape."""
    good = (checkpoint / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    folder = tmp_path_factory.mktemp("spoilt")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).symlink_to(checkpoint / name)
    spoilt = bytearray(good)
    if data.draw(st.booleans(), label="cut"):
        del spoilt[data.draw(st.integers(0, len(good) - 1)) :]
    else:
        spoilt[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    (folder / WEIGHTS).write_bytes(spoilt)
    try:
        model = open_checkpoint(folder).model()
    except TolhouseError as error:
        assert "tensors" in str(error)  # noqa: PT017 - the error may be safetensors' own
    else:
        assert len(good) == len(spoilt)
        assert (4, 2, 96) == tuple(model.rows(torch.tensor([0, 1])).shape)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"memory"', "{}", "[" * 100_000, "\ud800"])
def test_a_malformed_config_is_refused(copy: Path, text: str) -> None:
    """Malformed JSON, other JSON values, deep nesting and invalid UTF-8 are refused."""
    (copy / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InvalidArgumentError, match=r"config"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; allowed are"),
        ({"kind": "base"}, "lacks 16 tensors of a base model, such as model.layers.0.mlp"),
        ({"kind": "flex", "beta": 1}, "lacks 8 tensors of a flex model"),
        ({"num_hidden_layers": 5}, "lacks 9 tensors of a memory model, such as model.layers.4"),
        ({"num_hidden_layers": 3}, "has 9 tensors that a memory model lacks, such as model.layers"),
        ({"intermediate_size": 300}, r"has shape \[256, 96\]|has shape \[96, 256\]"),
        ({"vocab_size": 1000}, r"shape \[\d+, 96\], config.json asks for \[1000, 96\]"),
        ({"tie_word_embeddings": False}, "lacks 1 tensors of a memory model, such as lm_head"),
        ({"vocab_size": 2**31, "hidden_size": 2**17}, "has shape"),
        ({"vocab_size": 2**31, "hidden_size": 2**31}, "hidden_size"),
    ],
)
def test_a_config_of_another_model_is_refused(copy: Path, changes: dict, message: str) -> None:
    """The error names the mismatch of config and weights, and huge sizes allocate no memory."""
    edit(copy, **changes)
    with pytest.raises(InvalidArgumentError, match=message):
        open_checkpoint(copy)


def test_rows_id_depends_on_exactly_the_inputs_of_rows(tmp_path: Path) -> None:
    """rows_id depends on the embedding, FFN-M and rms_norm_eps only; model_id on all weights."""
    path = tiny_model(tmp_path / "m", "flex", 2, num_hidden_layers=2, tie_word_embeddings=False)
    opened, weights = open_checkpoint(path), load_file(path / WEIGHTS)
    before, model_id, changing = opened.rows_id(), opened.model_id(), set()
    for name, tensor in weights.items():
        save_file({**weights, name: tensor + 1}, path / WEIGHTS)
        opened = open_checkpoint(path)
        assert model_id != opened.model_id()
        if before != opened.rows_id():
            changing.add(name)
    assert {name for name in weights if "embed_tokens" in name or ".ffn_m." in name} == changing
    assert 1 + 2 * 4 == len(changing)
    save_file(weights, path / WEIGHTS)
    for change, changes in (
        ({"rope_theta": 5.0}, False),
        ({"eos_token_id": 3}, False),
        ({"rms_norm_eps": 0.5}, True),
    ):
        edit(path, **change)
        assert changes == (before != open_checkpoint(path).rows_id())


def test_an_untied_head_is_loaded(tmp_path: Path) -> None:
    """An untied head is loaded as saved, separate from the embedding."""
    path = tiny_model(tmp_path / "m", tie_word_embeddings=False)
    weights, model = load_file(path / WEIGHTS), open_checkpoint(path).model(dtype=torch.bfloat16)
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(weights["model.embed_tokens.weight"], model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, model.embed_tokens.weight)


def test_tensors_have_the_documented_names(tmp_path: Path) -> None:
    """Tensors have LLaMA's names, and FFN-M's tensors have the documented names."""
    path = tiny_model(tmp_path / "m", "flex", 2, num_hidden_layers=1)
    names, layer = set(load_file(path / WEIGHTS)), "model.layers.0."
    assert names == {
        *("model.embed_tokens.weight", "model.norm.weight"),
        *(f"{layer}{x}.weight" for x in ("input_layernorm", "post_attention_layernorm")),
        *(f"{layer}self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"{layer}mlp.maps.{j}.weight" for j in range(2)),
        f"{layer}ffn_m.norm.weight",
        *(f"{layer}ffn_m.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    }
    configs = {"config.json", "generation_config.json", "tokenizer_config.json"}
    files = {*configs, "model.safetensors", "tokenizer.json"}
    assert files == {file.name for file in path.iterdir()}  # there are no other files


def test_a_tensor_s_former_name_is_read(tmp_path: Path) -> None:
    """A wide model's tensors may have their former name, row_scale."""
    path = tiny_model(tmp_path / "m", "wide")
    weights, before = load_file(path / WEIGHTS), open_checkpoint(path)
    expected, size = before.model().state_dict(), before.weight_bytes(dense=False)
    assert 4 == sum("ffn_scale" in name for name in weights)
    old = {name.replace("ffn_scale", "row_scale"): tensor for name, tensor in weights.items()}
    save_file(old, path / WEIGHTS)
    opened = open_checkpoint(path)
    state = opened.model().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert size == opened.weight_bytes(dense=False)


@pytest.mark.parametrize(
    ("kind", "beta", "ffn_c"),
    [
        ("base", 0, "linear"),
        ("memory", 0, "linear"),
        ("wide", 0, "linear"),
        ("flex", 2, "linear"),
        ("flex", 3, "swiglu"),
    ],
)
def test_a_saved_checkpoint_equals_its_source(
    kind: str, beta: int, ffn_c: str, tmp_path: Path
) -> None:
    """A saved checkpoint equals its source, and FFN-M can be left out when it is loaded."""
    path = tiny_model(tmp_path / "m", kind, beta, ffn_c=ffn_c)
    opened = open_checkpoint(path)
    full, worker = opened.model().state_dict(), opened.model(ffn_m=False).state_dict()
    assert set(worker) == {name for name in full if not name.startswith("ffn_m.")}
    assert all(torch.equal(full[name], worker[name]) for name in worker)
    again = tmp_path / "again"
    save_checkpoint(again, opened.model(), path / "tokenizer.json")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }
    assert opened.model_id() == open_checkpoint(again).model_id()
    stored = (path / WEIGHTS).stat().st_size
    assert 0 < stored - opened.weight_bytes(dense=True) < 8192  # the size of the header
    of_worker = opened.weight_bytes(dense=False)
    assert (kind == "base") == (of_worker == opened.weight_bytes(dense=True))
    # a tied embedding stays, because it is also the head
    assert of_worker == opened.weight_bytes(dense=False, embedding=False)


def edit_weights(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return damage


def in_place_of(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(data)


NORM, LARGE = "model.norm.weight", Path("models/demo-memory/tokenizer.json")
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (in_place_of(WEIGHTS, b"x" * 1000), "not a safetensors file"),
    (in_place_of(WEIGHTS, b""), "not a safetensors file"),
    (lambda path: os.truncate(path / WEIGHTS, 10_000), "not a safetensors file"),
    (edit_weights(lambda t: t.pop(NORM)), f"lacks 1 tensors of a memory model, such as {NORM}"),
    (edit_weights(lambda t: t.update(x=torch.zeros(1))), "that a memory model lacks, such as x"),
    (edit_weights(lambda t: t.update({NORM: torch.zeros(3)})), rf"{NORM} has shape \[3\]"),
    (edit_weights(lambda t: t.update({NORM: t[NORM].int()})), f"{NORM} is I32; allowed are BF16"),
    (lambda path: (path / "config.json").unlink(), "no config.json"),
    (in_place_of("tokenizer.json", b"{}"), "not a tokenizer.json"),
    (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer"),
    (in_place_of("tokenizer.json", LARGE.read_bytes()), "8192 tokens, but the model's vocabulary"),
    (lambda path: (path / WEIGHTS).rename(path / "x"), "has no model.safetensors$"),
    (lambda path: path.rename(path.parent / "elsewhere"), "a checkpoint is a folder with"),
    (lambda path: (shutil.rmtree(path), path.touch()), "a checkpoint is a folder with"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_malformed_checkpoint_is_refused(
    damage: Callable[[Path], object], message: str, copy: Path
) -> None:
    """A malformed checkpoint gives an error that names the defect."""
    damage(copy)
    with pytest.raises((InvalidArgumentError, NotFoundError), match=message):
        open_checkpoint(copy)


def test_the_demo_models_match() -> None:
    """The demo models have equal sizes and tokenizers, bfloat16, a card and a loss curve."""
    memory, flex = (open_checkpoint(Path("models") / name) for name in ("demo-memory", "demo-flex"))
    kinds = [(checkpoint.config.kind, checkpoint.config.beta) for checkpoint in (memory, flex)]
    assert [("memory", 0), ("flex", 3)] == kinds
    assert memory.tokenizer_id == flex.tokenizer_id
    models = (memory.model(), flex.model())
    sizes = [sum(p.numel() for p in model.parameters() if p.dim() == 2) for model in models]
    assert sizes[0] == sizes[1]
    for checkpoint in (memory, flex):
        assert (checkpoint.path / WEIGHTS).stat().st_size <= 20_000_000
        with safe_open(checkpoint.path / WEIGHTS, "pt") as weights:
            assert {"BF16"} == {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        card = (checkpoint.path / "README.md").read_text(encoding="utf-8")
        assert all(word in card for word in ("held-out loss", "tolhouse train demo", "tokens"))
        assert (checkpoint.path / "loss.csv").exists()
