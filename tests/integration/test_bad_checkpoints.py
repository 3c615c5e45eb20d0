"""Checkpoints with defects, at the commands that read them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tolhouse.cli import main
from tolhouse.testing import tiny_model

from loadtest.gemma import tiny_gemma
from tests.commands import tolhouse

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
Defect = Callable[[Path], Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory model and a Gemma 4. The weights of the former are in two files."""
    folder = tmp_path_factory.mktemp("models")
    path = tiny_model(folder / "memory")
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    files = {name: f"{n}.safetensors" for n, name in enumerate(sorted(tensors)[:1])}
    files = {name: files.get(name, "1.safetensors") for name in tensors}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    tiny_gemma("gemma4").to(torch.bfloat16).save_pretrained(folder / "gemma4")
    return folder


def config(**fields: Any) -> Defect:
    return lambda path: change(path / CONFIG, lambda data: {**data, **fields})


def index(file: str) -> Defect:
    """Name another file for the first tensor."""

    def changed(data: Any) -> Any:
        places = data["weight_map"]
        return {"weight_map": places | {min(places): file}}

    return lambda path: change(path / INDEX, changed)


def change(file: Path, changed: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(changed(json.loads(file.read_bytes()))), encoding="utf-8")


def tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Defect:
    def defect(path: Path) -> None:
        file = next(f for f in sorted(path.glob("*.safetensors")) if name in load_file(f))
        tensors = load_file(file)
        save_file({**tensors, name: value(tensors[name])}, file)

    return defect


def not_a_number(row: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(weight: torch.Tensor) -> torch.Tensor:
        weight[row] = float("nan")
        return weight

    return changed


def write(file: str, data: bytes) -> Defect:
    return lambda path: (path / file).write_bytes(data)


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
TABLE = "model.embed_tokens_per_layer.weight"
MEMORY: list[tuple[Defect, str]] = [
    (config(model_type="bert"), r"config.json: model_type 'bert' has no rows .*'gemma3n'"),
    (write(CONFIG, b"{oops"), r"config.json is not JSON"),
    (write(CONFIG, b"[1]"), r"config.json must hold a JSON object"),
    (write("1.safetensors", b""), r"1.safetensors is not a safetensors file: .* truncated"),
    (
        lambda path: (path / "1.safetensors").unlink(),
        "lacks 1.safetensors, which model.safetensors.index.json names: download",
    ),
    (index("../0.safetensors"), "must have a weight_map from tensors to .safetensors files of"),
    (index("1.safetensors"), f"{EMBEDDING} is not in 1.safetensors"),
    (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer at .*tokenizer.json"),
    (tensor(NORM, lambda _: torch.zeros(0)), r"norm.weight has shape \[0\], config.json asks"),
    (config(hidden_size=48), r"has shape \[\d+, 96\], config.json asks for \[\d+, 48\]"),
    (tensor(EMBEDDING, not_a_number(3)), "the row of token 3 has values that are not finite"),
]
GEMMA: list[tuple[Defect, str]] = [
    (tensor(TABLE, not_a_number(5)), "the row of token 5 has values that are not finite"),
    (tensor(TABLE, lambda _: torch.zeros(0, 96)), r"has shape \[0, 96\], but config.json asks"),
    (config(text_config=[1]), "text_config must be a JSON object"),
    (config(num_hidden_layers=10**9), "num_hidden_layers must be a whole number up to 1024"),
    (config(rms_norm_eps="x"), "rms_norm_eps must be a number"),
    (config(hidden_size_per_layer_input=8), r"has shape \[300, 96\], but config.json asks for"),
]
CASES = [("memory", *case) for case in MEMORY] + [("gemma4", *case) for case in GEMMA]


@pytest.mark.parametrize(("model", "defect", "message"), CASES, ids=[case[2] for case in CASES])
def test_a_build_names_the_defect(
    model: str, defect: Defect, message: str, models: Path, tmp_path: Path
) -> None:
    """A build of a checkpoint with a defect ends with one line that names it."""
    path = Path(shutil.copytree(models / model, tmp_path / model))
    defect(path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a", encoding="utf-8")
    options = f"--store file://{tmp_path}/tables --corpus {tmp_path}/text"
    ended = tolhouse(f"build {path} {options}", code=1)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert 1 == len(errors)
    assert re.search(message, errors[0])


@pytest.mark.parametrize("layers", ["auto", "1"])
def test_a_conversion_of_weights_that_are_not_finite_is_refused(
    layers: str, tmp_path: Path
) -> None:
    """A dense model whose loss is not a number is refused, and no checkpoint is written."""
    path, out = tiny_model(tmp_path / "dense", "base"), tmp_path / "out"
    tensor(EMBEDDING, lambda weight: weight * float("nan"))(path)
    options = ("--layers", layers, "--out", str(out), "--store", f"file://{tmp_path}/tables")
    ended = CliRunner().invoke(main, ["convert", str(path), "--text", __file__, *options])
    assert 1 == ended.exit_code
    assert "the loss of the dense model on the text is not finite" in ended.stderr
    assert not out.exists()
