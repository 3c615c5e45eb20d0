"""The table of a Gemma checkpoint for vLLM is checked without vLLM."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tolhouse.errors import MismatchError
from tolhouse.integrations.vllm.gemma_table import check_gemma_table
from tolhouse.integrations.vllm.options import is_configured
from tolhouse.sources.gemma import FINISHED, RAW, blocks_of
from tolhouse.store.base import open_store
from tolhouse.table.manifest import Manifest
from tolhouse.testing import build_table

from loadtest.gemma import saved, tiny_gemma


def table(folder: Path, kind: str = RAW, **sizes: Any) -> tuple[Path, Manifest]:
    """Return a tiny model, and the manifest of a table of its rows."""
    path, url = folder / "gemma4", f"file://{folder}/tables"
    model = saved(tiny_gemma("gemma4", **sizes), path, torch.float32)
    ref = build_table(path, url, blocks=blocks_of(kind, model.config.num_hidden_layers))
    return path, open_store(url).manifest(ref)


@pytest.mark.parametrize("kind", [RAW, FINISHED])
def test_a_table_of_the_checkpoint_is_taken(kind: str, tmp_path: Path) -> None:
    """Both kinds of rows are taken, and come from a source with the blocks of the table."""
    path, manifest = table(tmp_path, kind)
    assert manifest.blocks == check_gemma_table(manifest, path).blocks


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size_per_layer_input": 8},
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"vocab_size": 200},
    ],
)
def test_a_table_of_another_shape_is_refused(sizes: dict[str, Any], tmp_path: Path) -> None:
    """Another width, number of layers or vocabulary is named, and how to build the table."""
    path, _ = table(tmp_path / "one")
    _, other = table(tmp_path / "two", **sizes)
    needs = "the model needs 6 blocks ple_raw.0 … of 16 values, 300 tokens"
    with pytest.raises(MismatchError, match=f"{needs}: build it with .* --rows raw"):
        check_gemma_table(other, path)


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    """A table of the same shape with rows of other weights is refused."""
    path, manifest = table(tmp_path)
    tiny_gemma("gemma4").save_pretrained(path)
    with pytest.raises(MismatchError, match="has rows of another model than gemma4"):
        check_gemma_table(manifest, path)


def test_rows_are_configured_by_options_or_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without options and variables, vLLM uses its own classes."""
    assert not is_configured({"other": 1})
    assert is_configured({"tolhouse": {}})
    monkeypatch.setenv("TOLHOUSE_VLLM_ROWS", "127.0.0.1:9")
    assert is_configured({})
