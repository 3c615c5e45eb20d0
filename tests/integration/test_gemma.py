"""Rows of Gemma 3n and Gemma 4, compared with transformers, and models that read them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tolhouse.errors import InvalidArgumentError, MismatchError, NotFoundError
from tolhouse.integrations.attach import attach
from tolhouse.sources.base import open_source
from tolhouse.sources.gemma import blocks_of
from tolhouse.testing import build_table, process

from loadtest.gemma import saved, tiny_gemma
from loadtest.models import PER_LAYER, PUBLIC
from tests.commands import LOCAL, tolhouse

FAMILIES = ("gemma4", "gemma3n")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
Load = Callable[..., tuple[Any, Path]]

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load a random model of a family, and its folder."""
    folders: dict[tuple[str, str, bool], Path] = {}

    def loaded(family: str, codec: str = "bf16", *, multimodal: bool = False) -> tuple[Any, Path]:
        key = family, codec, multimodal
        model = tiny_gemma(family, multimodal=multimodal)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("models") / family
            return saved(model, folders[key], DTYPES[codec]), folders[key]
        return type(model).from_pretrained(folders[key], dtype="auto").eval(), folders[key]

    return loaded


def batch() -> dict[str, torch.Tensor]:
    """Two prompts, the first with padding on the left."""
    ids = torch.randint(3, 280, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = ids[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def answers(model: Any) -> list[torch.Tensor]:
    """Logits, a greedy completion, a sample and the best of two beams."""
    torch.manual_seed(0)
    given = batch()
    return [
        model(**given).logits,
        model.generate(**given, **GREEDY),
        model.generate(**given, **GREEDY | {"do_sample": True}),
        model.generate(**given, **GREEDY, num_beams=2),
    ]


@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_per_layer_inputs_of_transformers(family: str, codec: str, load: Load) -> None:
    """Finished and raw rows of all tokens equal those of transformers to the bit."""
    model, path = load(family, codec)
    text = model.model
    raw = open_source(path, blocks_of("ple_raw", model.config.num_hidden_layers))
    ids = torch.arange(raw.vocab_size)[None]
    with torch.no_grad():
        wanted = text.get_per_layer_inputs(ids)
        assert torch.equal(wanted[0].float(), torch.from_numpy(raw.rows()))
        wanted = text.project_per_layer_inputs(text.embed_tokens(ids), wanted)
    assert torch.equal(wanted[0].float(), torch.from_numpy(open_source(path).rows()))


def test_the_sizes_of_the_public_model_are_those_of_its_config() -> None:
    """The defaults of transformers' config of Gemma 3n are the sizes of E4B."""
    config = transformers.Gemma3nTextConfig()
    sizes = config.num_hidden_layers, config.hidden_size, config.vocab_size_per_layer_input
    assert PUBLIC["gemma3n_e4b"] == sizes
    assert PER_LAYER == config.hidden_size_per_layer_input


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_of_a_row_do_not_depend_on_its_batch(family: str, load: Load) -> None:
    """A row is equal to the bit alone and among others."""
    source = open_source(load(family, "fp32")[1])
    assert np.array_equal(source.rows()[[7, 299]], source.rows(np.array([7, 299])))


@pytest.mark.parametrize("kind", ["ple", "ple_raw"])
@pytest.mark.parametrize(
    ("family", "codec", "multimodal"),
    [("gemma4", "bf16", False), ("gemma4", "fp32", True), ("gemma3n", "bf16", False)],
)
def test_an_attached_model_answers_as_before(
    family: str, codec: str, multimodal: bool, kind: str, load: Load, tmp_path: Path
) -> None:
    """Logits, and greedy, sampled and beam completions of a padded batch are equal to the bit with
    rows from a table and after `detach`, and the table of the model is freed."""
    model, path = load(family, codec, multimodal=multimodal)
    layers, url = model.config.get_text_config().num_hidden_layers, f"file://{tmp_path}"
    build_table(path, url, codec=codec, blocks=blocks_of(kind, layers))
    before = answers(model)
    size = sum(p.nbytes for p in model.parameters())
    attachment = attach(model, url, family)
    assert size - attachment.freed_bytes == sum(p.nbytes for p in model.parameters())
    assert attachment.freed_bytes >= 290 * layers * 16 * DTYPES[codec].itemsize
    for wanted, found in zip(before, answers(model), strict=True):
        assert torch.equal(wanted, found)
    assert 0 < attachment.fetched_rows
    attachment.detach()
    assert size == sum(p.nbytes for p in model.parameters())
    for wanted, found in zip(before, answers(model), strict=True):
        assert torch.equal(wanted, found)


def test_rows_arrive_from_a_lookup_service(load: Load, tmp_path: Path) -> None:
    """With rows over TCP, an attached model gives the same logits to the bit."""
    model, path = load("gemma4")
    url = f"file://{tmp_path}"
    build_table(path, url, codec="bf16")
    with torch.no_grad():
        before = model(**batch()).logits
        with process("lookup", "--store", url, *LOCAL) as lookup:
            attachment = attach(model, lookup.address, "gemma4")
            assert torch.equal(before, model(**batch()).logits)
            attachment.detach()


def test_a_forward_pass_fetches_each_row_once(load: Load, tmp_path: Path) -> None:
    """Repeated tokens of a batch are fetched once."""
    model, path = load("gemma3n")
    build_table(path, f"file://{tmp_path}", codec="bf16")
    attachment = attach(model, f"file://{tmp_path}", "gemma3n")
    model(torch.tensor([[5, 6, 5], [6, 6, 7]]))
    assert 3 == attachment.fetched_rows


def test_a_table_that_was_never_loaded_is_checked_with_the_folder(
    load: Load, tmp_path: Path
) -> None:
    """A model whose own table is on the meta device can be attached, with equal logits."""
    model, path = load("gemma4")
    build_table(path, f"file://{tmp_path}", codec="bf16")
    with torch.no_grad():
        before = model(**batch()).logits
        model.model.embed_tokens_per_layer.to("meta")
        attach(model, f"file://{tmp_path}", "gemma4")
        assert torch.equal(before, model(**batch()).logits)


def test_a_model_in_float32_reads_a_table_in_bfloat16(load: Load, tmp_path: Path) -> None:
    """A model that is loaded in another dtype than that of its table gives close logits."""
    model, path = load("gemma4")
    build_table(path, f"file://{tmp_path}", codec="bf16")
    model = model.float()
    with torch.no_grad():
        before = model(**batch()).logits
        attach(model, f"file://{tmp_path}", "gemma4")
        after = model(**batch()).logits
    assert (before - after).norm() < 0.05 * before.norm()


def test_a_table_of_another_model_is_refused(load: Load, tmp_path: Path) -> None:
    """Another shape and other rows are refused, and the model keeps its own table."""
    model, path = load("gemma4")
    _, other = load("gemma3n")
    altered = shutil.copytree(path, tmp_path / "altered")
    changed = type(model).from_pretrained(path, dtype="auto")
    changed.model.per_layer_projection_norm.weight.data *= 1.1
    changed.save_pretrained(altered)
    url = f"file://{tmp_path}/tables"
    build_table(other, url, name="other")
    build_table(altered, url, name="altered", codec="int8")
    with torch.no_grad():
        before = model(**batch()).logits
    needs = r"has 5 blocks ple.0 … of 16 values, 300 tokens; the model needs 6 blocks ple.0 … or "
    with pytest.raises(MismatchError, match=needs):
        attach(model, url, "other")
    with pytest.raises(MismatchError, match="rows of another model: build the table from"):
        attach(model, url, "altered")
    with pytest.raises(NotFoundError):
        attach(model, url, "missing")
    with torch.no_grad():
        assert torch.equal(before, model(**batch()).logits)


def test_finished_rows_serve_text_only(load: Load, tmp_path: Path) -> None:
    """With finished rows, embeddings and images are refused by name."""
    model, path = load("gemma4", "fp32", multimodal=True)
    build_table(path, f"file://{tmp_path}")
    attach(model, f"file://{tmp_path}", "gemma4")
    ids = batch()["input_ids"]
    with pytest.raises(InvalidArgumentError, match=r"`pixel_values` .* table with --rows raw"):
        model(ids, pixel_values=torch.zeros(1, 4, 768))
    with pytest.raises(InvalidArgumentError, match="give `input_ids`"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(InvalidArgumentError, match="has rows from a table already"):
        attach(model, f"file://{tmp_path}", "gemma4")


def test_a_model_without_rows_is_refused(tmp_path: Path) -> None:
    """A model without per-layer embeddings cannot be attached or built."""
    model = tiny_gemma("gemma4", hidden_size_per_layer_input=0)
    with pytest.raises(InvalidArgumentError, match="allowed: models of Gemma 3n and Gemma 4"):
        attach(model, f"file://{tmp_path}", "t")
    model.save_pretrained(tmp_path / "m")
    failed = tolhouse("build", tmp_path / "m", "--store", f"file://{tmp_path}", code=1)
    assert "hidden_size_per_layer_input is 0" in failed.stderr


def test_build_makes_finished_or_raw_rows(load: Load, checkpoint: Path, tmp_path: Path) -> None:
    """`tolhouse build --rows raw` stores raw rows of a folder without a tokenizer, and refuses
    models that have no such rows."""
    model, path = load("gemma4")
    store = ("--store", f"file://{tmp_path}")
    built = tolhouse("build --publish --rows raw", path, *store).stdout.strip()
    shown = json.loads(tolhouse("tables show", built, *store).stdout)
    assert list(blocks_of("ple_raw", 6)) == shown["blocks"]
    with torch.no_grad():
        before = model(**batch()).logits
        attach(model, store[1], built)
        assert torch.equal(before, model(**batch()).logits)
    failed = tolhouse("build --rows raw", checkpoint, *store, code=1)
    assert "--rows" in failed.stderr
    assert "gemma4" in failed.stderr


def test_weights_that_contradict_the_config_are_refused(load: Load, tmp_path: Path) -> None:
    """The error names the tensor, its shape, and the shape that the config asks for."""
    path = shutil.copytree(load("gemma3n")[1], tmp_path / "m")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(
        json.dumps(config | {"hidden_size_per_layer_input": 8}), encoding="utf-8"
    )
    failed = tolhouse("build", path, "--store", f"file://{tmp_path}", code=1)
    assert "embed_tokens_per_layer.weight has shape [290, 80]" in failed.stderr
    assert "asks for [290, 40]" in failed.stderr
