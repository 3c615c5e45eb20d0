"""Lookup services detect and report rows that a store has lost, and refill it from files."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis import Redis
from tolhouse import Client, errors
from tolhouse.store.base import open_store
from tolhouse.store.registry import delete
from tolhouse.testing import Process, build_table, process, redis_server, wait_until

from tests.commands import LOCAL, metrics

STATUS = health_pb2.HealthCheckResponse


@contextmanager
def system(
    checkpoint: Path, files: str = "", layout: str = "hashes"
) -> Iterator[tuple[Redis, str, Process, Client, str]]:
    """A Redis with a table, optionally also stored in `files`, and a lookup service over it."""
    with ExitStack() as stack:
        server = stack.enter_context(redis_server())
        redis, url = stack.enter_context(Redis.from_url(server)), f"{server}?layout={layout}"
        ref = build_table(checkpoint, *filter(None, (url, files)), shards=8)
        refill = ("--refill", files) if files else ()
        hot = ("--hot-megabytes", "0.05")  # 32 rows
        running = stack.enter_context(process("lookup", "--store", url, *refill, *hot, *LOCAL))
        yield redis, url, running, stack.enter_context(Client(running.address)), ref


def health(running: Process, service: str = "") -> int:
    with grpc.insecure_channel(running.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status


def status(running: Process) -> int:
    try:
        with urlopen(f"http://{running.ready['metrics']}/health", timeout=10) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def test_a_lost_table_is_reported(checkpoint: Path) -> None:
    """Readiness, a metric and the log report a lost table, hot rows are still served, and a build
    repairs it."""
    with system(checkpoint) as (redis, url, running, client, ref):
        expected = client.fetch(ref, range(20)).tobytes()
        redis.flushall()
        with pytest.raises((errors.NotFoundError, errors.CorruptError)):
            client.fetch(ref, [300])
        wait_until(lambda: health(running) == STATUS.NOT_SERVING)
        assert STATUS.NOT_SERVING == health(running, "tolhouse.v1.Lookup")
        assert STATUS.SERVING == health(running, "live")
        assert 503 == status(running)
        assert "tolhouse_lookup_incomplete_tables 1.0" in metrics(running)
        assert "the store has lost rows" in running.log.read_text(encoding="utf-8")
        assert expected == client.fetch(ref, range(20)).tobytes()
        assert ref == build_table(checkpoint, url, shards=8)
        wait_until(lambda: status(running) == 200)
        assert 1 == len(client.fetch(ref, [300]))


@pytest.mark.parametrize("layout", ["hashes", "keys"])
def test_a_lost_table_is_refilled_from_files(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    """A lost table, a lost shard and a damaged record are restored from files, including
    publication."""
    with (
        system(checkpoint, f"file://{tmp_path}", layout) as (redis, url, running, client, ref),
        closing(open_store(url)) as store,
    ):
        manifest, expected = client.describe(ref), client.fetch(ref, range(300)).tobytes()
        shard, keys = f"tolhouse:{{{ref}:shards-8:3}}", f"tolhouse:{{{ref}:3}}:"

        def lose() -> None:
            redis.delete(shard, *redis.scan_iter(f"{keys}*"))

        def damage() -> None:
            if layout == "keys":
                redis.set(f"{keys}299", b"damaged")
            else:
                redis.hset(shard, "299", b"damaged")

        def is_whole() -> bool:
            return expected == client.fetch(ref, range(300)).tobytes() and status(running) == 200

        for harm in (redis.flushall, lose, damage):
            harm()
            wait_until(is_whole)
            assert manifest.num_records == sum(store.count(manifest, n) for n in range(8))
            assert (layout == "keys") == bool(redis.exists(f"{keys}299"))
        with Client(running.address) as other:
            assert ref == other.describe(manifest.name).ref
        assert "tolhouse_lookup_refilled_shards_total 10.0" in metrics(running)
        assert "tolhouse_lookup_incomplete_tables 0.0" in metrics(running)


def test_an_empty_store_is_filled_at_start(checkpoint: Path, tmp_path: Path) -> None:
    """An empty store is filled with the published tables of the files, and no others."""
    files = f"file://{tmp_path}"
    ref = build_table(checkpoint, files, shards=4)
    build_table(checkpoint, files, shards=4, codec="int8", publish=False)
    with redis_server() as url:
        with process("lookup", "--store", url, "--refill", files, *LOCAL) as running:
            with Client(running.address) as client, Client(files) as source:
                wait_until(lambda: client.describe(ref.partition("@")[0]).ref == ref)
                assert source.fetch(ref, [5, 9]).tobytes() == client.fetch(ref, [5, 9]).tobytes()
                assert [ref] == [table.ref for table in client.tables()]


def test_a_deleted_table_stays_deleted(checkpoint: Path, tmp_path: Path) -> None:
    """A deleted table is not restored, although a service has it open and the files contain it."""
    files = f"file://{tmp_path}"
    with system(checkpoint, files) as (redis, url, _, client, ref):
        other = build_table(checkpoint, url, files, shards=8, codec="int8")  # published
        client.fetch(ref, [5])
        with closing(open_store(url)) as store:
            delete(store, ref, force=True)
        redis.delete(f"tolhouse:{{{other}:shards-8:3}}")
        with pytest.raises((errors.NotFoundError, errors.CorruptError)):
            client.fetch(ref, [300])
        wait_until(lambda: 1 == len(client.fetch(other, [3])))
        with closing(open_store(url)) as store:
            assert [other] == store.refs()
