"""Versions are published, rolled back and deleted while the system runs."""

import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tolhouse import Client, Manifest, errors
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.engine import Engine
from tolhouse.engine.row_providers import CachedRows
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.store.base import Store, open_store
from tolhouse.store.registry import delete, publish, rollback
from tolhouse.testing import build_table, process, tiny_model, wait_until
from tolhouse.worker.table_watcher import TableWatcher

from tests.commands import LOCAL, metrics
from tests.engines import CPU, greedy_with

PROMPTS = ([17, 4, 200], [9, 9, 9, 30], list(range(40, 80)))
LONG = 400


def answers(checkpoint: Path, lookup: Client, ref: str, tokens: int) -> list[list[int]]:
    """The model's tokens with the rows of one version."""
    model = open_checkpoint(checkpoint).model(ffn_m=False)
    with closing(CachedRows(lookup.rows, lookup.describe(ref), 0, CPU)) as rows:
        return [greedy_with(model, rows, ids, tokens) for ids in PROMPTS]


@pytest.fixture(params=["file", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> str:
    return f"file://{tmp_path}/tables" if request.param == "file" else redis_url


def test_running_sequences_keep_their_version(url: str, tmp_path: Path) -> None:
    """New sequences use a published or rolled back version, running ones finish on theirs, and a
    version in use can't be deleted."""
    checkpoint = tiny_model(tmp_path / "long", max_position_embeddings=1024)
    one = build_table(checkpoint, url, name="rolled")
    two = build_table(checkpoint, url, name="rolled", codec="int4", publish=False)
    options = ("--table", "rolled", "--table-poll-seconds", "0.05", "--row-cache-megabytes", "0.1")
    with (
        closing(open_store(url)) as store,
        process("lookup", "--store", url, *LOCAL) as lookup,
        Client(lookup.address) as rows,
    ):
        expected = {ref: answers(checkpoint, rows, ref, LONG) for ref in (one, two)}
        short = {ref: [ids[:20] for ids in expected[ref]] for ref in (one, two)}
        assert short[one] != short[two]
        before = rows.fetch(one, range(100)).tobytes()
        with (
            process(
                "worker", str(checkpoint), "--rows", lookup.address, *options, *LOCAL
            ) as worker,
            Client(worker.address) as client,
        ):
            for flip, now, other in (
                (publish, one, two),
                (lambda s, _: rollback(s, "rolled"), two, one),
            ):
                running = [client.replies(ids, LONG, ignore_eos=True) for ids in PROMPTS]
                begun = [next(replies) for replies in running]
                flip(store, other)
                wait_until(lambda other=other: client.describe_worker().table == other)
                assert short[other] == [
                    list(client.generate(ids, 20, ignore_eos=True)) for ids in PROMPTS
                ]
                with pytest.raises(errors.InUseError, match="in use"):
                    delete(store, unpublished(store, one, two))
                rest = [list(replies) for replies in running]
                assert {now} == {reply.table for replies in rest for reply in replies}
                assert expected[now] == [
                    [*a.token_ids, *(i for r in b for i in r.token_ids)]
                    for a, b in zip(begun, rest, strict=True)
                ]
            assert short[one] == [
                list(client.generate(ids, 20, ignore_eos=True)) for ids in PROMPTS
            ]  # not from the other's keys and values
            counts = client.describe_worker().rows
            assert counts.from_remote > 0
        assert before == rows.fetch("rolled", range(100)).tobytes()
        delete(store, two, force=True)


def unpublished(store: Store, *refs: str) -> str:
    alias = store.alias("rolled")
    return next(ref for ref in refs if not alias or not ref.endswith(alias.version))


def test_a_version_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A worker reports a version of another model, keeps its own, and follows the next suitable
    version."""
    url = f"file://{tmp_path}/tables"
    one = build_table(checkpoint, url, name="shared")
    other = build_table(tiny_model(tmp_path / "other", seed=1), url, name="shared", publish=False)
    two = build_table(checkpoint, url, name="shared", codec="int8", publish=False)
    options = ("--table", "shared", "--table-poll-seconds", "0.1")
    with (
        closing(open_store(url)) as store,
        process("worker", str(checkpoint), "--rows", url, *options, *LOCAL) as worker,
        Client(worker.address) as client,
    ):
        publish(store, other)
        wait_until(lambda: "does not fit this worker" in worker.log.read_text(encoding="utf-8"))
        assert f"table {other} was built from model" in worker.log.read_text(encoding="utf-8")
        assert one == client.describe_worker().table
        assert f'tolhouse_worker_table_refused{{table="{other}"}} 1.0' in metrics(worker)
        publish(store, two)
        wait_until(lambda: client.describe_worker().table == two)
        assert "tolhouse_worker_table_refused{" not in metrics(worker)


def test_a_failed_reload_is_retried(checkpoint: Path, tmp_path: Path) -> None:
    """A version that could not be loaded is tried again, and versions in use are pinned."""
    url = f"file://{tmp_path}/tables"
    one = build_table(checkpoint, url, name="full")
    two = build_table(checkpoint, url, name="full", codec="int8", publish=False)
    taken: list[str] = []

    def reload(manifest: Manifest) -> None:
        taken.append(manifest.ref)
        if len(taken) < 3:
            raise RuntimeError("out of memory")

    with closing(open_store(url)) as store, closing(open_row_source(url)) as source:
        publish(store, two)
        engine = cast("Engine", SimpleNamespace(table=one, tables=lambda: [one]))
        watcher = TableWatcher(source, "full", engine, reload, 0.05, pause_seconds=0.05)
        watcher.start()
        wait_until(lambda: len(taken) == 3)
        watcher.stop()
        assert store.leased(one)
    assert [two] * 3 == taken


def test_a_worker_with_a_fixed_version_keeps_it(checkpoint: Path, tmp_path: Path) -> None:
    """A worker with NAME@VERSION keeps that version and protects it from deletion."""
    url = f"file://{tmp_path}/tables"
    one = build_table(checkpoint, url, name="kept")
    two = build_table(checkpoint, url, name="kept", codec="int8", publish=False)
    options = ("--table", one, "--table-poll-seconds", "0.1")
    with (
        closing(open_store(url)) as store,
        process("worker", str(checkpoint), "--rows", url, *options, *LOCAL) as worker,
        Client(worker.address) as client,
    ):
        publish(store, two)
        wait_until(lambda: store.leased(one))
        time.sleep(0.5)
        assert one == client.describe_worker().table
        with pytest.raises(errors.InUseError, match="in use"):
            delete(store, one)
