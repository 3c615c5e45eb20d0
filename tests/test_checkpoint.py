"""Checkpoints from strangers: nothing in them runs, nothing in them ends in anything but an error of ours."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tolhouse.errors import InvalidArgument, NotFound, TolhouseError
from tolhouse.model.checkpoint import WEIGHTS, open_checkpoint
from tolhouse.testing import tiny_model


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(copy: Path, tmp_path: Path) -> None:
    """Weights that are a pickle, under whatever name, are refused and not run; the error names the way out."""
    trap = tmp_path / "run"
    for data in (pickle.dumps(Trap(trap)), pickle.dumps(Trap(trap), protocol=0)):
        (copy / WEIGHTS).write_bytes(data)
        with pytest.raises(InvalidArgument, match="not a safetensors file"):
            open_checkpoint(copy)
    torch.save({"a": Trap(trap)}, copy / "pytorch_model.bin")
    torch.save({"a": Trap(trap)}, copy / WEIGHTS)
    with pytest.raises(InvalidArgument, match="not a safetensors file"):
        open_checkpoint(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(
        NotFound,
        match=r"pytorch_model\.bin can run code when loaded and is refused: convert it to safetensors",
    ):
        open_checkpoint(copy)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists()  # the trap works


@given(data=st.data())
def test_spoilt_weights_are_refused_or_whole(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A byte of the header changed, or the file cut anywhere: an error of ours, or a model of the same shape."""
    whole = (checkpoint / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    folder = tmp_path_factory.mktemp("spoilt")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).symlink_to(checkpoint / name)
    if data.draw(st.booleans(), label="cut"):
        spoilt = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        place = data.draw(st.integers(0, header - 1))
        spoilt = (
            whole[:place]
            + bytes([whole[place] ^ data.draw(st.integers(1, 255))])
            + whole[place + 1 :]
        )
    (folder / WEIGHTS).write_bytes(spoilt)
    try:
        model = open_checkpoint(folder).model()
    except TolhouseError as error:
        assert "safetensors" in str(error) or "tensors" in str(error)  # noqa: PT017
    else:
        assert len(whole) == len(spoilt)
        assert (4, 2, 96) == tuple(model.rows(torch.tensor([0, 1])).shape)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"memory"', "{}", "[" * 100_000, "\ud800"])
def test_a_config_that_is_none_is_refused(copy: Path, text: str) -> None:
    """Not JSON, not an object, nested without end, or no text at all."""
    (copy / "config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InvalidArgument, match=r"config"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'memoryllm'"),
        ({"kind": "base"}, "lacks 16 tensors of a base model, such as model.layers.0.mlp"),
        ({"kind": "flex", "beta": 1}, "lacks 8 tensors of a flex model"),
        ({"num_hidden_layers": 5}, "lacks 9 tensors of a memory model, such as model.layers.4"),
        (
            {"num_hidden_layers": 3},
            "has 9 tensors that a memory model lacks, such as model.layers.3",
        ),
        ({"intermediate_size": 300}, r"has shape \[256, 96\]|has shape \[96, 256\]"),
        (
            {"vocab_size": 1000},
            r"embed_tokens.weight has shape \[\d+, 96\], config.json asks for \[1000, 96\]",
        ),
        (
            {"tie_word_embeddings": False},
            "lacks 1 tensors of a memory model, such as lm_head.weight",
        ),
        (
            {"vocab_size": 2**31, "hidden_size": 2**31, "num_attention_heads": 1},
            r"has shape|hidden_size|vocab_size",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(copy: Path, changes: dict, message: str) -> None:
    """Config and weights have to agree, and the error says where they do not; absurd sizes cost nothing."""
    edit(copy, **changes)
    with pytest.raises(InvalidArgument, match=message):
        open_checkpoint(copy)


def test_exactly_what_defines_rows_changes_their_id(tmp_path: Path) -> None:
    """Tensor by tensor: the embedding and all of FFN-M, and no other; of the config, the norms' epsilon alone."""
    path = tiny_model(tmp_path / "m", "flex", 2, num_hidden_layers=2, tie_word_embeddings=False)
    opened, weights = open_checkpoint(path), load_file(path / WEIGHTS)
    before, changing = opened.rows_id(), set()
    for name, tensor in weights.items():
        save_file({**weights, name: tensor + 1}, path / WEIGHTS)
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


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    """A head of its own comes back as it was saved, and leaves the embedding alone."""
    path = tiny_model(tmp_path / "m", tie_word_embeddings=False)
    weights, model = load_file(path / WEIGHTS), open_checkpoint(path).model(dtype=torch.bfloat16)
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(weights["model.embed_tokens.weight"], model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, model.embed_tokens.weight)


def test_saving_leaves_a_checkpoint_and_nothing_else(checkpoint: Path) -> None:
    """Three files, no temporary ones."""
    assert ["config.json", "model.safetensors", "tokenizer.json"] == sorted(
        p.name for p in checkpoint.iterdir()
    )
