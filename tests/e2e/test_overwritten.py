"""Files that are overwritten or truncated while in use never lead to wrong tokens."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tolhouse import Client
from tolhouse.build.job import build_shards, plan, source_of
from tolhouse.engine.row_providers import RecomputedRows
from tolhouse.errors import CorruptError, MismatchError
from tolhouse.model.checkpoint import WEIGHTS, open_checkpoint
from tolhouse.sources.base import open_source
from tolhouse.store.base import open_store
from tolhouse.testing import build_table, end, process, tiny_model

from tests.commands import LOCAL

PROMPT = list(range(20, 60))
OPTIONS = ("--fallback", "recompute", "--dtype", "float32", "--fetch-timeout-seconds", "1")
IDS = np.array([3, 200, 17], np.uint32)


def overwrite(path: Path) -> None:
    """Overwrite part of the file in place, as `cp` does."""
    random = np.random.default_rng(0).bytes(1 << 16)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(random[: path.stat().st_size // 4])


def overwrite_unnoticed(path: Path) -> None:
    """Overwrite the file and restore its modification time."""
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, 5000)


CHANGES = [overwrite, overwrite_unnoticed, truncate]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "m", tie_word_embeddings=request.param)


@pytest.mark.parametrize("change", [overwrite, truncate])
def test_a_worker_is_not_affected_by_changes_of_its_weights_file(
    change: Callable[[Path], None], path: Path, tmp_path: Path
) -> None:
    """Answers do not change, and a row that must be recomputed raises an error."""
    url = f"file://{tmp_path}/tables"
    build_table(path, url, embedding="no")
    with (
        process("lookup", "--store", url, *LOCAL) as lookup,
        process("worker", str(path), "--rows", lookup.address, *OPTIONS, *LOCAL) as worker,
        Client(worker.address) as client,
    ):
        expected = list(client.generate(PROMPT, 30, ignore_eos=True))
        change(path / WEIGHTS)
        assert expected == list(client.generate(PROMPT, 30, ignore_eos=True))
        end(lookup.popen)
        assert expected == list(client.generate(PROMPT, 30, ignore_eos=True))  # rows are cached
        with pytest.raises(MismatchError, match="overwritten"):
            list(client.generate(list(range(270, 310)), 3))
        assert expected == list(client.generate(PROMPT, 30, ignore_eos=True))


@pytest.mark.parametrize("change", CHANGES)
def test_rows_are_not_recomputed_from_other_weights(
    change: Callable[[Path], None], path: Path, tmp_path: Path
) -> None:
    """Recomputation is refused until the file has its original contents, also under another
    name."""
    ref = build_table(path, f"file://{tmp_path}")
    with closing(open_store(f"file://{tmp_path}")) as store:
        manifest = store.manifest(ref)
    weights, kept = path / WEIGHTS, tmp_path / "kept"
    shutil.copy(weights, kept)
    opened = open_checkpoint(path)
    assert manifest.model_id == opened.model_id()
    computed = RecomputedRows(opened, manifest)
    before, after = np.zeros((2, len(IDS), manifest.record_bytes), np.uint8)
    computed.fetch(IDS, before, np.arange(3))
    change(weights)
    with pytest.raises(
        MismatchError, match=f"{WEIGHTS} of checkpoint m was overwritten while in use"
    ):
        computed.fetch(IDS, after, np.arange(3))
    shutil.copy(kept, weights)
    weights.rename(tmp_path / "moved")
    computed.fetch(IDS, after, np.arange(3))
    assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_between_reads_are_refused(
    change: Callable[[Path], None], path: Path
) -> None:
    """A model is never loaded from the weights of two files."""
    opened = open_checkpoint(path)
    change(path / WEIGHTS)
    for read in (opened.model, opened.model_id, opened.rows_id):
        with pytest.raises(MismatchError, match="was overwritten while in use"):
            read()


def test_a_build_uses_one_checkpoint(path: Path, tmp_path: Path) -> None:
    """A build task that finds other weights than the build began with raises an error."""
    planned, store = plan(open_source(path), "m", "bf16", 4), f"file://{tmp_path}"
    tiny_model(path, tie_word_embeddings=False, seed=5)
    source_of.cache_clear()
    with pytest.raises(MismatchError, match="not the one that this build began with"):
        build_shards(str(path), planned, [0], (store,), 5.0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_shard_is_corrupt(
    change: Callable[[Path], None], checkpoint: Path, tmp_path: Path
) -> None:
    """A lookup service answers with the original rows or an error, and continues to serve."""
    url = f"file://{tmp_path}"
    ref = build_table(checkpoint, url, shards=2)
    options = ("--store", url, "--hot-megabytes", "0", *LOCAL)
    with process("lookup", *options) as lookup, Client(lookup.address) as client:
        expected = client.fetch(ref, range(0, 100, 2)).tobytes()
        change(next(tmp_path.rglob("shard-00001-*")))
        with pytest.raises(CorruptError):
            client.fetch(ref, range(1, 318, 2))
        assert expected == client.fetch(ref, range(0, 100, 2)).tobytes()
