"""The lookup service as a process, over files, Redis and a Redis Cluster."""

import json
import os
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from redis import Redis
from tolhouse import Client, Manifest, TableInfo, errors
from tolhouse.store.base import open_store
from tolhouse.store.registry import delete, publish
from tolhouse.testing import (
    Process,
    build_table,
    free_port,
    process,
    redis_server,
    tiny_model,
    wait_until,
)
from tolhouse.v1 import lookup_pb2
from tolhouse.v1.lookup_pb2_grpc import LookupStub

from tests.chaos.proxy import Link
from tests.commands import LOCAL, metrics, start, tolhouse
from tests.tables import ids, manifest_of, records_of, write


@pytest.fixture(scope="module")
def files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the store URL and name@version of a table in files."""
    url = f"file://{tmp_path_factory.mktemp('tables')}"
    return url, build_table(checkpoint, url, shards=5)


@pytest.fixture(scope="module")
def service(files: tuple[str, str]) -> Iterator[Process]:
    with process("lookup", "--store", files[0], *LOCAL) as running:
        yield running


@pytest.fixture(scope="module")
def stub(service: Process) -> Iterator[LookupStub]:
    with grpc.insecure_channel(service.address) as channel:
        yield LookupStub(channel)


@contextmanager
def serving(url: str, *options: str) -> Iterator[tuple[Process, Client]]:
    """Run a lookup service over the store at `url`, with a client connected to it."""
    with process("lookup", "--store", url, *options, *LOCAL) as running:
        with Client(running.address) as client:
            yield running, client


def ask(stub: LookupStub, *requests: lookup_pb2.FetchRequest) -> list[lookup_pb2.FetchReply]:
    return list(stub.Fetch(iter(requests), timeout=30))


def packed(*ids: int) -> bytes:
    return np.array(ids, "<u4").tobytes()


def stored(url: str, ref: str, ids: list[int]) -> tuple[Manifest, np.ndarray]:
    with closing(open_store(url)) as store:
        manifest = store.manifest(ref)
        out = np.empty((len(ids), manifest.record_bytes), np.uint8)
        store.read_records(manifest, np.array(ids, np.uint32), out)
        return manifest, out


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["file", "redis", "cluster"])
def test_fetched_rows_equal_the_stored_rows(
    kind: str,
    codec: str,
    checkpoint: Path,
    tmp_path: Path,
    redis_url: str,
    redis_cluster_url: str,
) -> None:
    """For each store and codec a fetch returns the stored rows, from the store and from memory."""
    url = {"file": f"file://{tmp_path}", "redis": redis_url, "cluster": redis_cluster_url}[kind]
    ref = build_table(checkpoint, url, codec=codec, shards=6, name=f"lookup-{codec}")
    ids = [0, 5, 3, 5, 299, 17, 300]
    manifest, records = stored(url, ref, ids)
    with serving(url) as (running, client):
        for _ in range(2):
            rows = client.fetch(ref, ids)
            assert manifest.decode(records).tobytes() == rows.tobytes()
        assert client.describe(f"lookup-{codec}") == manifest
        assert TableInfo(manifest, published=True) in client.tables()
        distinct = len(set(ids))
        assert f'tolhouse_lookup_rows_total{{source="store"}} {distinct}.0' in metrics(running)
        assert f'tolhouse_lookup_rows_total{{source="hot"}} {distinct}.0' in metrics(running)


def test_a_bad_request_fails_alone(stub: LookupStub, files: tuple[str, str]) -> None:
    """On one stream, each bad request gets its own status, and good requests succeed."""
    url, ref = files
    manifest, records = stored(url, ref, [1, 2])
    good = {"table": ref, "token_ids": packed(1, 2)}
    bad = {
        2: (
            ref,
            packed(manifest.vocab_size),
            "OUT_OF_RANGE",
            f"allowed are 0 to {manifest.vocab_size - 1}",
        ),
        3: (ref, b"abc", "INVALID_ARGUMENT", "each id has four"),
        4: ("nothing@0123456789abcdef", packed(1), "NOT_FOUND", ref),
        5: (manifest.name, packed(1), "INVALID_ARGUMENT", "name@version"),
        6: ("../../etc@0123456789abcdef", packed(1), "INVALID_ARGUMENT", "not allowed"),
        7: (f"{manifest.name}@nothex", packed(1), "INVALID_ARGUMENT", "16 hex digits"),
        8: (ref, packed(*[0] * 65_537), "INVALID_ARGUMENT", "at most 65536"),
        9: (f"{manifest.name}@{'0' * 16}", packed(1), "NOT_FOUND", ref),
    }
    requests = [lookup_pb2.FetchRequest(request_id=1, **good)]
    requests += [
        lookup_pb2.FetchRequest(request_id=n, table=table, token_ids=ids)
        for n, (table, ids, _, _) in bad.items()
    ]
    requests += [lookup_pb2.FetchRequest(request_id=10, **good)]
    replies = {reply.request_id: reply for reply in ask(stub, *requests)}
    assert set(range(1, 11)) == set(replies)
    assert all(reply.last for reply in replies.values())
    assert records.tobytes() == replies[1].records == replies[10].records
    for number, (_, _, status, message) in bad.items():
        assert status == replies[number].error.status
        assert message in replies[number].error.message
        assert b"" == replies[number].records


def test_a_request_without_ids_gets_an_empty_reply(
    stub: LookupStub, files: tuple[str, str]
) -> None:
    """A request without ids gets one complete, empty reply."""
    assert [lookup_pb2.FetchReply(request_id=7, last=True)] == ask(
        stub, lookup_pb2.FetchRequest(request_id=7, table=files[1])
    )


def test_long_answers_come_in_chunks(checkpoint: Path, tmp_path: Path) -> None:
    """A long reply arrives in order, in messages below a stock client's size limit."""
    big = tiny_model(tmp_path / "big", hidden_size=768, num_hidden_layers=8)
    url = f"file://{tmp_path}/tables"
    ref = build_table(big, url, shards=3)
    ids = list(range(0, 300, 2))
    _, records = stored(url, ref, ids)
    assert records.nbytes > 3 << 20
    with (
        process("lookup", "--store", url, *LOCAL) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        replies = ask(
            LookupStub(channel),
            lookup_pb2.FetchRequest(request_id=1, table=ref, token_ids=packed(*ids)),
        )
    assert len(replies) > 3
    assert all(reply.ByteSize() < 2 << 20 for reply in replies)
    assert [False] * (len(replies) - 1) + [True] == [reply.last for reply in replies]
    at = 0
    for reply in replies:
        assert at == reply.first
        at += len(reply.records) // records.shape[1]
    assert records.tobytes() == b"".join(reply.records for reply in replies)


def test_health_reflection_and_metrics_work(service: Process) -> None:
    """Standard clients can query the service's reflection, health and metrics."""
    with grpc.insecure_channel(service.address) as channel:
        for name in ("", "tolhouse.v1.Lookup"):
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=name), timeout=10
            )
            assert health_pb2.HealthCheckResponse.SERVING == reply.status
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            asked, timeout=10
        )
        assert "tolhouse.v1.Lookup" in {s.name for s in answer.list_services_response.service}
    assert "tolhouse_lookup_fetch_seconds_bucket" in metrics(service)


def test_describe_has_statuses(stub: LookupStub, files: tuple[str, str]) -> None:
    """Describe returns a status for a bad name, and lists the tables if a name is unknown."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.Describe(lookup_pb2.DescribeRequest(table="nothing"), timeout=10)
    assert grpc.StatusCode.NOT_FOUND == caught.value.code()
    assert files[1] in caught.value.details()
    with pytest.raises(grpc.RpcError) as caught:
        stub.Describe(lookup_pb2.DescribeRequest(table="a b"), timeout=10)
    assert grpc.StatusCode.INVALID_ARGUMENT == caught.value.code()


def test_a_damaged_shard_file_affects_only_its_rows(checkpoint: Path, tmp_path: Path) -> None:
    """A damaged shard file causes DATA_LOSS for its rows only, and a repair needs no restart."""
    url = f"file://{tmp_path}"
    ref = build_table(checkpoint, url, shards=4)
    manifest, records = stored(url, ref, list(range(16)))
    expected = manifest.decode(records)
    paths = sorted(tmp_path.rglob("shard-*"))
    whole = [p.read_bytes() for p in paths]
    altered = bytearray(whole[0])
    altered[-30] ^= 4  # in the last record of the shard
    paths[0].write_bytes(altered)
    paths[1].write_bytes(whole[1][:-1000])
    paths[2].unlink()
    with serving(url, "--hot-megabytes", "0") as (_, client):
        last = manifest.shard_ids(0)[-1]
        for token, message in ((last, f"token {last} "), (1, "missing or damaged"), (2, "missing")):
            with pytest.raises(errors.CorruptError, match=message):
                client.fetch(ref, [token])
        assert expected[[0, 3, 4, 7]].tobytes() == client.fetch(ref, [0, 3, 4, 7]).tobytes()
        for path, data in zip(paths, whole, strict=True):
            path.unlink(missing_ok=True)
            path.write_bytes(data)
        assert expected.tobytes() == client.fetch(ref, range(16)).tobytes()


def test_a_shard_file_truncated_in_use_does_not_end_the_service(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Rows of a truncated file fail with DATA_LOSS until the file is complete again."""
    url = f"file://{tmp_path}"
    ref = build_table(checkpoint, url, shards=2)
    path = sorted(tmp_path.rglob("shard-*"))[1]
    whole = path.read_bytes()
    with serving(url, "--hot-megabytes", "0") as (running, client):
        expected = client.fetch(ref, range(8)).tobytes()
        path.write_bytes(whole[:4096])
        with pytest.raises(errors.CorruptError, match="missing or damaged"):
            client.fetch(ref, range(8))
        assert 1 == len(client.fetch(ref, [0]))
        path.write_bytes(whole)
        assert expected == client.fetch(ref, range(8)).tobytes()
        assert running.popen.poll() is None


def test_a_version_rebuilt_with_other_shards_is_served(checkpoint: Path, redis_url: str) -> None:
    """A running service serves a table after it was rebuilt with another number of shards."""
    ref = build_table(checkpoint, redis_url, shards=2, name="anew", publish=False)
    with serving(redis_url, "--hot-megabytes", "0") as (_, client):
        expected = client.fetch(ref, range(50)).tobytes()
        with closing(open_store(redis_url)) as store:
            delete(store, ref, force=True)
        with pytest.raises((errors.NotFoundError, errors.CorruptError)):
            client.fetch(ref, range(50))
        assert ref == build_table(checkpoint, redis_url, shards=7, name="anew")
        assert expected == client.fetch(ref, range(50)).tobytes()


def test_a_record_altered_in_redis_is_an_error(checkpoint: Path, redis_url: str) -> None:
    """A record altered, swapped, cut or missing in Redis causes DATA_LOSS, never wrong rows."""
    ref = build_table(checkpoint, redis_url, shards=4, name="altered")
    key = f"tolhouse:{{{ref}:shards-4:1}}"
    with (
        Redis.from_url(redis_url) as redis,
        process("lookup", "--store", redis_url, *LOCAL) as running,
        Client(running.address) as client,
    ):
        record = redis.hget(key, 1)
        redis.hset(key, 1, record[:40] + bytes([record[40] ^ 1]) + record[41:])
        redis.hset(key, 5, record)  # an intact record of another token
        redis.hset(key, 9, record[:-1])
        redis.hdel(key, 13)
        for token in (1, 5, 9, 13):
            with pytest.raises(errors.CorruptError, match=f"token {token} "):
                client.fetch(ref, [0, token])
        assert 3 == len(client.fetch(ref, [0, 2, 17]))


@pytest.mark.parametrize("kind", ["file", "redis", "lookup"])
def test_a_fetch_lists_all_bad_rows_and_returns_the_others(
    kind: str, checkpoint: Path, redis_url: str, tmp_path: Path
) -> None:
    """CorruptError lists the tokens of all bad rows, and the buffer has all other rows."""
    store = f"file://{tmp_path}" if kind == "file" else redis_url
    ref = build_table(checkpoint, store, shards=16, name=f"bad-{kind}")
    manifest, records = stored(store, ref, list(range(300)))
    if kind == "file":
        paths = sorted(tmp_path.rglob("shard-*"))
        paths[3].unlink()
        data = bytearray(paths[5].read_bytes())
        data[-manifest.record_bytes] ^= 1  # in the shard's last record
        paths[5].write_bytes(data)
    else:
        with Redis.from_url(store) as redis:
            redis.delete(f"tolhouse:{{{ref}:shards-16:3}}")
            last = int(manifest.shard_ids(5)[-1])
            redis.hset(f"tolhouse:{{{ref}:shards-16:5}}", last, b"x" * manifest.record_bytes)
    bad = [*manifest.shard_ids(3).tolist(), int(manifest.shard_ids(5)[-1])]
    ids = np.union1d(np.arange(300), bad).astype(np.uint32)
    with ExitStack() as stack:
        source = store
        if kind == "lookup":
            source = stack.enter_context(process("lookup", "--store", store, *LOCAL)).address
        client = stack.enter_context(Client(source))
        out = np.zeros((len(ids), manifest.record_bytes), np.uint8)
        with pytest.raises(errors.CorruptError) as caught:
            client.rows.fetch_records(manifest, ids, out)
    assert sorted(bad) == sorted(caught.value.token_ids)
    intact = ~np.isin(ids, bad) & (ids < 300)
    assert records[ids[intact]].tobytes() == out[intact].tobytes()


def test_a_corrupt_record_under_load_fails_only_its_requests(
    checkpoint: Path, redis_url: str
) -> None:
    """Only requests for the corrupt record fail, and only that record is read from the store."""
    ref = build_table(checkpoint, redis_url, shards=4, name="under-load")
    with Redis.from_url(redis_url) as redis, serving(redis_url) as (running, client):
        redis.hset(f"tolhouse:{{{ref}:shards-4:1}}", 101, b"damaged")
        manifest = client.describe(ref)
        intact = np.delete(np.arange(300, dtype=np.uint32), 101)
        expected = client.fetch(ref, intact)  # all intact rows are in memory from now on
        redis.config_resetstat()

        def hammer(seed: int) -> int:
            random = np.random.default_rng(seed)
            with Client(running.address) as own:
                for _ in range(50):
                    slots = random.permutation(len(intact))[:40]
                    if seed:
                        found = own.fetch(ref, intact[slots])
                        assert expected[slots].tobytes() == found.tobytes()
                        continue
                    ids = np.append(intact[slots], np.uint32(101))
                    with pytest.raises(errors.CorruptError) as caught:
                        own.rows.fetch_records(manifest, ids)
                    assert (101,) == caught.value.token_ids
            return 50 * 40 if seed else 0

        with ThreadPoolExecutor(4) as pool:
            rows = sum(pool.map(hammer, range(4)))
        reads = redis.info("commandstats")["cmdstat_hmget"]["calls"]
        served = metrics(running)
        assert 50 <= reads <= 100  # each request may read the record twice
        assert f'tolhouse_lookup_rows_total{{source="store"}} {len(intact)}.0' in served
        hot = float(served.split('tolhouse_lookup_rows_total{source="hot"} ')[1].split()[0])
        assert hot >= rows


def test_requests_that_need_no_store_do_not_wait_for_it(checkpoint: Path) -> None:
    """While Redis is slow, cached rows, descriptions and health do not wait for it.

    All fetches use one stream, and there are more store reads than a thread pool runs at once.
    Requests that need Redis end with DEADLINE_EXCEEDED.
    """
    with redis_server() as url, Link(url.removeprefix("redis://")) as link, ExitStack() as stack:
        ref = build_table(checkpoint, url, shards=4)
        options = ("--store-timeout-seconds", "2")
        running, client = stack.enter_context(serving(f"redis://{link.address}", *options))
        expected = client.fetch(ref, range(20)).tobytes()
        link.drip(0.3)
        pool = stack.enter_context(ThreadPoolExecutor(7))
        reads = [pool.submit(client.fetch, ref, [n]) for n in range(100, 107)]
        stub = LookupStub(stack.enter_context(grpc.insecure_channel(running.address)))
        by_name = lookup_pb2.DescribeRequest(table="tiny-memory")
        waiting = [stub.Describe.future(by_name) for _ in range(8)]
        answered = 0
        while not all(read.done() for read in reads):
            assert expected == client.fetch(ref, range(20)).tobytes()
            described = stub.Describe(lookup_pb2.DescribeRequest(table=ref), timeout=10)
            assert ref == Manifest.from_json(described.manifest_json).ref
            with urlopen(f"http://{running.ready['metrics']}/health") as health:
                assert 200 == health.status
            # it still serves rows from memory
            assert client.rows.replicas.health.up(running.address)
            answered += 1
        for read in reads:
            with pytest.raises(errors.DeadlineExceededError, match="did not answer in time"):
                read.result()
        assert {grpc.StatusCode.DEADLINE_EXCEEDED} == {call.code() for call in waiting}
        assert answered > 20  # the other calls did not delay these


def test_a_failed_start_is_a_one_line_error(service: Process, tmp_path: Path) -> None:
    """A port in use, a bad store and a bad address end the process with a one-line error."""
    file, empty = tmp_path / "file", f"file://{tmp_path}"
    file.touch()
    for store, options, message in (
        (empty, ("--listen", service.address), "in use"),
        (empty, (*LOCAL, "--metrics-listen", service.address), "in use"),
        (f"redis://127.0.0.1:{free_port()}", LOCAL, "cannot be reached"),
        (str(tmp_path), LOCAL, "not understood"),
        ("redis://127.0.0.1/first", LOCAL, "not understood"),
        (f"file://{file}", LOCAL, "is a file, not a folder"),
        (empty, ("--listen", "nowhere"), "HOST:PORT"),
    ):
        assert message in tolhouse("lookup --store", store, *options, code=1).stderr.replace(
            "In use", "in use"
        )


def test_a_service_waits_for_its_store(checkpoint: Path) -> None:
    """With --store-wait-seconds, a service may start before its Redis."""
    port = free_port()
    command = f"lookup --store redis://127.0.0.1:{port} --store-wait-seconds 60"
    with start(command, *LOCAL) as popen:
        assert popen.stderr
        assert popen.stdout
        for line in popen.stderr:
            if "waiting for the store" in line:
                break
        with redis_server(port=port) as url:
            ref = build_table(checkpoint, url)
            with Client(json.loads(popen.stdout.readline())["address"]) as client:
                assert [ref] == [table.ref for table in client.tables()]
            popen.terminate()
            assert 0 == popen.wait(60)


def test_a_service_recovers_after_redis_restarts(checkpoint: Path) -> None:
    """Fetches fail with UNAVAILABLE while Redis is down, and succeed after it returns."""
    port = free_port()
    with ExitStack() as stack:
        url = stack.enter_context(redis_server(port=port))
        ref = build_table(checkpoint, url, shards=3)
        options = ("--hot-megabytes", "0", "--store-timeout-seconds", "0.5")
        with serving(url, *options) as (_, client):
            expected = client.fetch(ref, [1, 2, 3]).tobytes()
            stack.close()
            with pytest.raises(errors.UnavailableError, match="cannot be reached"):
                client.fetch(ref, [1, 2, 3])
            with redis_server(port=port) as again:
                build_table(checkpoint, again, shards=3)
                assert expected == client.fetch(ref, [1, 2, 3]).tobytes()


def test_requests_in_flight_complete_before_the_service_ends(
    checkpoint: Path, tmp_path: Path
) -> None:
    """After SIGTERM, health returns 503, requests in flight complete, and the exit code is 0."""
    big = tiny_model(tmp_path / "big", hidden_size=768, num_hidden_layers=8)
    url = f"file://{tmp_path}/tables"
    ref = build_table(big, url, shards=3)
    with (
        process("lookup", "--store", url, *LOCAL) as running,
        grpc.insecure_channel(running.address) as channel,
    ):
        streams = []
        for ids in (packed(1), packed(*[*range(300)] * 20)):
            requests: queue.SimpleQueue[lookup_pb2.FetchRequest | None] = queue.SimpleQueue()
            requests.put(lookup_pb2.FetchRequest(request_id=1, table=ref, token_ids=ids))
            streams.append(LookupStub(channel).Fetch(iter(requests.get, None), timeout=60))
            assert 1 == next(streams[-1]).request_id
        health = f"http://{running.ready['metrics']}/health"
        assert 200 == httpx.get(health).status_code
        running.popen.terminate()
        wait_until(lambda: httpx.get(health).status_code == 503)
        asking = ThreadPoolExecutor(1).submit(statuses_until_it_ends, health)
        *_, last = streams[1]
        assert last.last
        with suppress(grpc.RpcError):  # the idle stream may end with a connection reset
            assert [] == list(streams[0])
        assert 0 == running.popen.wait(30)
        assert {503} == asking.result()
        assert "Traceback" not in running.log.read_text(encoding="utf-8")


def statuses_until_it_ends(url: str) -> set[int]:
    """Return the statuses of a URL until its server has ended."""
    found = set()
    with suppress(httpx.HTTPError):
        while True:
            found.add(httpx.get(url).status_code)
    return found


def test_stopping_a_replica_fails_no_request(checkpoint: Path, files: tuple[str, str]) -> None:
    """Every fetch succeeds while one of two replicas drains and ends."""
    url, ref = files
    # an idle stream does not delay the end for so long
    options = ("lookup", "--store", url, "--drain-seconds", "300", *LOCAL)
    with (
        process(*options) as first,
        process(*options) as second,
        Client([first.address, second.address]) as client,
    ):
        expected = client.fetch(ref, range(300)).tobytes()
        first.popen.terminate()
        while first.popen.poll() is None:
            assert expected == client.fetch(ref, range(300)).tobytes()
        assert 0 == first.popen.returncode
        assert expected == client.fetch(ref, range(300)).tobytes()


def test_a_service_answers_while_it_fills_its_hot_rows(tmp_path: Path) -> None:
    """A service is ready and answers requests while the read of its first hot rows hangs."""
    fields = {"codec_name": "fp32", "width": 8192, "frequent": tuple(range(10))}
    manifest = manifest_of(vocab_size=200, num_shards=200, **fields)
    url = f"file://{tmp_path}"
    with closing(open_store(url)) as store:
        write(store, manifest)
        publish(store, manifest.ref)
    last = next(tmp_path.glob("t/*/shard-00199-*"))  # rows of high ids are filled first
    last.unlink()
    os.mkfifo(last)  # opening it hangs
    with serving(url) as (running, client):
        try:
            with urlopen(f"http://{running.ready['metrics']}/health") as health:
                assert 200 == health.status
            expected = records_of(manifest, ids(*range(100))).tobytes()
            assert expected == client.rows.fetch_records(manifest, ids(*range(100))).tobytes()
            assert "hot rows" not in running.log.read_text(encoding="utf-8")
        finally:
            writer = os.open(last, os.O_RDWR)  # reads continue, and fail
            last.unlink()
            os.close(writer)


def test_rows_are_correct_while_the_cache_evicts(checkpoint: Path, tmp_path: Path) -> None:
    """Every row is correct while the cache, which holds a tenth of the rows, evicts rows."""
    url = f"file://{tmp_path}"
    ref = build_table(checkpoint, url, codec="bf16", shards=4)
    with process("lookup", "--store", url, "--hot-megabytes", "0.03", *LOCAL) as running:
        with Client(running.address) as client:
            expected = client.fetch(ref, range(300))

        def hammer(seed: int) -> bool:
            random = np.random.default_rng(seed)
            with Client(running.address) as client:
                batches = [(random.zipf(1.3, 20) % 300).astype(np.uint32) for _ in range(200)]
                return all(
                    expected[ids].tobytes() == client.fetch(ref, ids).tobytes() for ids in batches
                )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(hammer, range(4)))
