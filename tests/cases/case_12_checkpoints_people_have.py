"""Equivalent checkpoints of other tools are accepted, others are refused with the reason."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tolhouse.errors import TolhouseError
from tolhouse.model.checkpoint import WEIGHTS, open_checkpoint
from tolhouse.testing import tiny_model

from tests.cases import Result, equal

INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check(folder: Path) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as at:
        root, tokenizer = Path(at), folder / "tokenizer.json"
        untied = {"vocab_size": 1024, "tie_word_embeddings": False}
        base = tiny_model(root / "base", tokenizer=tokenizer, **untied)
        tied = tiny_model(root / "tied", tokenizer=tokenizer, vocab_size=1024)
        for path in (base, tied):
            _weights(path, lambda tensors: {n: t.half() for n, t in tensors.items()})
        saved = json.loads((folder / "config.as-save_pretrained-writes-it.json").read_bytes())
        yield from _same(base, saved, json.loads((folder / INDEX).read_bytes()))
        yield from _tied(tied)
        yield from _other(base)
        yield from _named(base, root)


def _same(base: Path, saved: dict, index: dict) -> Iterator[Result]:
    rows = open_checkpoint(base).rows_id()

    def shards(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        (path / WEIGHTS).unlink()
        files = index["weight_map"]
        for file in set(files.values()):
            own = {name: tensors[name] for name in files if files[name] == file}
            save_file(own, path / file, metadata={"format": "pt"})
        (path / INDEX).write_text(json.dumps(index), encoding="utf-8")

    def byte_order_mark(path: Path) -> None:
        data = (path / "config.json").read_bytes()
        (path / "config.json").write_bytes(b"\xef\xbb\xbf" + data)

    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}
    for what, change in (
        ("as save_pretrained writes it", _config(**saved)),
        ("end tokens in a list", _config(eos_token_id=[0, 1001])),
        ("no end token", _config(eos_token_id=None)),
        ("rope_parameters", _config(rope_parameters={"rope_type": "default"})),
        ("rotary buffers", lambda path: _weights(path, lambda t: t | buffer)),
        ("shards with an index", shards),
        ("a byte order mark", byte_order_mark),
    ):
        yield equal(f"{what}: the rows", rows, _changed(base, change))


def _tied(tied: Path) -> Iterator[Result]:
    rows = open_checkpoint(tied).rows_id()
    found = _changed(tied, lambda p: _weights(p, lambda t: t | {HEAD: t[EMBEDDING].clone()}))
    yield equal("a tied head that is stored, too: the rows", rows, found)


def _other(base: Path) -> Iterator[Result]:
    for change, name in (
        (_config(num_key_value_heads=2), "num_key_value_heads"),
        (_config(attention_bias=True), "attention_bias"),
        (_config(hidden_act="gelu"), "hidden_act"),
        (_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_scaling"),
        (_config(tie_word_embeddings=True), "tie_word_embeddings"),
        (lambda path: _weights(path, lambda t: t | {"x": torch.zeros(1)}), "such as x"),
    ):
        error = _changed(base, change)
        yield Result(f"{name} is refused by name", name in str(error), str(error))


def _named(base: Path, root: Path) -> Iterator[Result]:
    snapshot = root / "models--org--My-Mem" / "snapshots" / "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
    snapshot.mkdir(parents=True)
    for file in base.iterdir():
        (snapshot / file.name).symlink_to(file)
    (root / "current").symlink_to(base)
    for path, name in ((snapshot, "My-Mem"), (root / "current", "current"), (base, "base")):
        yield equal(f"the name of {path.name}", name, open_checkpoint(path).name)


def _changed(base: Path, change: Callable[[Path], Any]) -> str | TolhouseError:
    """Return the rows' id of a changed copy of the checkpoint, or the error."""
    with tempfile.TemporaryDirectory() as at:
        path = Path(shutil.copytree(base, Path(at, "copy")))
        change(path)
        try:
            opened = open_checkpoint(path)
            opened.model()
            return opened.rows_id()
        except TolhouseError as error:
            return error


def _config(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_bytes())
        (path / "config.json").write_text(json.dumps({**config, **fields}), encoding="utf-8")

    return change


def _weights(path: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS)
