"""One Wide FFN: one row per token, and the same tokens on every route."""

from pathlib import Path

import pytest
import torch
from tolhouse import Client
from tolhouse.model.checkpoint import open_checkpoint, save_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.model.transformer import parameter_counts
from tolhouse.testing import build_table, local_cluster, tiny_model, wait_until

PROMPT = [5, 17, 40, 3, 99]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers scale the shared row differently; one layer does not use it."""
    path = tiny_model(tmp_path_factory.mktemp("checkpoints") / "tiny-wide", "wide")
    model = open_checkpoint(path).model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer, block in enumerate(model.layers):
            block.ffn_scale.copy_(torch.randn(block.ffn_scale.shape, generator=generator) * layer)
    save_checkpoint(path, model, path / "tokenizer.json")
    return path


def test_a_wide_model_has_the_same_number_of_parameters(wide: Path, checkpoint: Path) -> None:
    """The single FFN has as many parameters as the FFNs of all layers together, except for norms
    and scales."""
    sizes = [parameter_counts(open_checkpoint(path).model())[0] for path in (wide, checkpoint)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.002)


@pytest.mark.timeout(600)  # compiling takes a minute of processor time
@pytest.mark.parametrize("compile", ["never", "auto"])
def test_served_tokens_equal_the_model_s(wide: Path, tmp_path: Path, compile: str) -> None:
    """Served tokens equal the model's, with and without compiled decoding."""
    url = f"file://{tmp_path}"
    build_table(wide, url)
    checkpoint = open_checkpoint(wide)
    expected = list(greedy(checkpoint.model(), PROMPT, 40, ignore_eos=True))
    options = ("--compile", compile, "--compile-cache", str(tmp_path / "cache"))
    with (
        local_cluster(wide, url, worker_options=options) as cluster,
        Client(cluster.workers) as client,
    ):
        if compile == "auto":
            log = cluster.processes[1].log
            wait_until(
                lambda: "decoding is compiled" in log.read_text(encoding="utf-8"), seconds=400
            )
        assert expected == list(client.generate(PROMPT, 40, ignore_eos=True))
        assert len(set(expected)) > 4


def test_a_fetch_carries_one_row_for_each_token(
    wide: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Record, table and transfer have 1/N of the size of a table with N layers."""
    record, layers, table = {}, {}, {}
    for path in (wide, checkpoint):
        url = f"file://{tmp_path / path.name}"
        build_table(path, url)
        with (
            local_cluster(path, url, worker_options=("--row-cache-megabytes", "0")) as cluster,
            Client(cluster.workers) as client,
            Client(cluster.lookup) as rows,
        ):
            list(client.generate(PROMPT, 1, ignore_eos=True))
            counts, manifest = client.describe_worker().rows, rows.describe(path.name)
            layers[path] = len(manifest.layers)
            # without checksums
            record[path] = counts.remote_bytes / counts.from_remote - 8
            table[path] = manifest.table_bytes - 8 * manifest.vocab_size
    assert (1, 4) == (layers[wide], layers[checkpoint])
    assert (record[checkpoint], table[checkpoint]) == (4 * record[wide], 4 * table[wide])
