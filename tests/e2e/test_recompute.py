"""Rows recomputed in the worker have the table's own bytes, and the weights stay in their file."""

import signal
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from redis import Redis
from safetensors.torch import load_file, save_file
from tolhouse import Client, ClientCredentials
from tolhouse.client.lookup import LookupRowSource
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.row_providers import CachedRows, RecomputedRows
from tolhouse.errors import CorruptError
from tolhouse.model.checkpoint import WEIGHTS, open_checkpoint
from tolhouse.store.base import open_store
from tolhouse.table.codecs import CODECS
from tolhouse.table.manifest import Manifest
from tolhouse.testing import build_table, free_port, process, tiny_model, wait_until


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("embedding", "dtype"),
    [("yes", "bfloat16"), ("no", "bfloat16"), ("yes", "float32"), ("no", "float16")],
)
def test_recomputed_records_equal_the_table_s(
    codec: str, embedding: str, dtype: str, tmp_path: Path
) -> None:
    """Recomputed records equal the builder's bytes for every codec, dtype and order of tokens, with
    and without X0."""
    path, url = tiny_model(tmp_path / "m", tie_word_embeddings=False), f"file://{tmp_path}"
    stored = {k: v.to(getattr(torch, dtype)) for k, v in load_file(path / WEIGHTS).items()}
    save_file(stored, path / WEIGHTS)
    ref = build_table(path, url, codec=codec, shards=3, embedding=embedding)
    with closing(open_store(url)) as store:
        manifest = store.manifest(ref)
        recompute = RecomputedRows(open_checkpoint(path), manifest)
        random = np.random.default_rng(0)
        for count in (1, 2, 127, 200):
            ids = random.permutation(manifest.vocab_size)[:count].astype(np.uint32)
            expected, computed = np.empty((2, count, manifest.record_bytes), np.uint8)
            store.read_records(manifest, ids, expected)
            recompute.fetch(ids, computed, np.arange(count))
            assert expected.tobytes() == computed.tobytes()


@pytest.mark.parametrize("cached", [0, 1 << 20])
def test_rows_lost_by_the_source_are_recomputed(
    cached: int, checkpoint: Path, redis_url: str
) -> None:
    """Rows of a lost shard and of a damaged record are recomputed to the same bits and counted, and
    no others."""
    ref = build_table(checkpoint, redis_url, shards=16, name="lost-rows")
    with process("lookup", "--store", redis_url, "--listen", "127.0.0.1:0") as lookup:
        with Redis.from_url(redis_url) as redis, closing(open_store(redis_url)) as store:
            manifest, ids = store.manifest(ref), np.arange(64, dtype=np.uint32)
            expected = store.read_records(manifest, ids)
            redis.delete(f"tolhouse:{{{ref}:shards-16:3}}")  # tokens 3, 19, 35, 51
            redis.hset(f"tolhouse:{{{ref}:shards-16:5}}", 37, b"damaged")
        with closing(open_row_source(lookup.address)) as source:
            recompute = RecomputedRows(open_checkpoint(checkpoint), manifest)
            place = torch.device("cpu"), torch.float32, 0, recompute
            with closing(CachedRows(source, manifest, cached, *place)) as rows:
                for _ in range(2):
                    staged = rows.stage(ids)
                    assert expected.tobytes() == staged.records[staged.index].numpy().tobytes()
                    assert rows.provider.ready
                counts = rows.counts()
    times = 1 if cached else 2
    assert (5 * times, 5 * times) == (counts["missing"], counts["recomputed"])


def test_intact_rows_of_a_failed_fetch_are_cached(checkpoint: Path, tmp_path: Path) -> None:
    """Without a fallback, the intact rows of a failed fetch are cached."""
    url = f"file://{tmp_path}"
    ref = build_table(checkpoint, url, shards=16)
    sorted(tmp_path.rglob("shard-*"))[3].unlink()
    with closing(open_row_source(url)) as source:
        manifest, ids = source.describe(ref), np.arange(40, dtype=np.uint32)
        with closing(CachedRows(source, manifest, 1 << 20, torch.device("cpu"))) as rows:
            with pytest.raises(CorruptError, match="token 3, 19, 35 in table"):
                rows.stage(ids)
            assert [3, 19, 35] == rows.missing(ids).tolist()
            rows.prefetch(ids + 100)
            with pytest.raises(CorruptError, match="token 115, 131 in table"):
                rows.stage(np.array([100, 115, 131], np.uint32))
            assert [115, 131] == rows.missing(ids + 100).tolist()
            assert 80 - 5 == len(rows.cache)


def test_weights_stay_in_their_file(checkpoint: Path, tmp_path: Path) -> None:
    """Recomputation neither keeps weights in memory nor maps their file."""
    ref = build_table(checkpoint, f"file://{tmp_path}")
    with closing(open_store(f"file://{tmp_path}")) as store:
        recompute = RecomputedRows(open_checkpoint(checkpoint), store.manifest(ref))
    for _ in range(2):
        assert all(weight.is_meta for weight in recompute.source.model.parameters())
        assert WEIGHTS not in Path("/proc/self/maps").read_text(encoding="utf-8")
        ids = np.arange(5, dtype=np.uint32)
        recompute.fetch(ids, np.empty((5, recompute.manifest.record_bytes), np.uint8), ids)


class CountingSource(LookupRowSource):
    """A row source that counts successful calls of tables()."""

    asked = 0

    def tables(self) -> list[tuple[Manifest, bool]]:
        tables = super().tables()
        self.asked += 1
        return tables


def state(rows: CachedRows) -> tuple[float, float, bool]:
    """Rows fetched, rows computed, and whether fetches are attempted."""
    counts = rows.counts()
    return counts["from_remote"], counts["recomputed"], rows.provider.ready


def test_fetching_resumes_when_the_table_is_back(checkpoint: Path, tmp_path: Path) -> None:
    """Rows have the same bits while the service is down, while it lacks the table, and when it is
    back."""
    whole, empty = f"file://{tmp_path}/whole", f"file://{tmp_path}/empty"
    address = f"127.0.0.1:{free_port()}"
    ref = build_table(checkpoint, whole)
    listen = ("--listen", address)
    with ExitStack() as stack:
        lookup = stack.enter_context(process("lookup", "--store", whole, *listen))
        client = CountingSource(address, 2, ClientCredentials())
        stack.callback(client.close)
        manifest = client.describe(ref)
        recompute = RecomputedRows(open_checkpoint(checkpoint), manifest)
        rows = CachedRows(client, manifest, 0, torch.device("cpu"), fallback=recompute)
        stack.callback(rows.close)
        ids = np.array([5, 200, 5, 17], np.uint32)
        expected = rows.decode(rows.stage(ids))
        assert (3, 0, True) == state(rows)
        lookup.popen.send_signal(signal.SIGKILL)
        lookup.popen.wait()
        assert torch.equal(expected, rows.decode(rows.stage(ids)))
        assert (3, 3, False) == state(rows)
        with process("lookup", "--store", empty, *listen):
            with Client(address) as other:
                assert [] == other.tables()
            asked = client.asked
            # until the service has answered without the table
            wait_until(lambda: client.asked > asked + 1)
            assert torch.equal(expected, rows.decode(rows.stage(ids)))
            assert (3, 6, False) == state(rows)
        stack.enter_context(process("lookup", "--store", whole, *listen))
        wait_until(lambda: rows.provider.ready)
        assert torch.equal(expected, rows.decode(rows.stage(ids)))
        assert (6, 6, True) == state(rows)
