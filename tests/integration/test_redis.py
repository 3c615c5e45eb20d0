"""Redis when it is damaged, closed or guarded: clear errors, and no password in them."""

import gc
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np
import pytest
from redis import Redis, RedisCluster
from tolhouse.errors import (
    CorruptError,
    DeadlineExceededError,
    InvalidArgumentError,
    TolhouseError,
    UnauthenticatedError,
    UnavailableError,
)
from tolhouse.store.base import Store, open_store
from tolhouse.store.redis import RedisStore
from tolhouse.store.registry import commit, delete, publish, resolve
from tolhouse.store.writer import shard_digest
from tolhouse.testing import free_port, redis_cluster, redis_server, wait_until

from tests.chaos.proxy import Link
from tests.tables import assert_holds, manifest_of, read, records_of, write

IDS = np.arange(40, dtype=np.uint32)
MANIFEST = manifest_of("damaged", vocab_size=len(IDS), num_shards=8)
RECORDS = records_of(MANIFEST)
HASH = f"tolhouse:{{{MANIFEST.ref}:shards-8:1}}"  # of tokens 1, 9, 17, 25, 33


@pytest.fixture(params=["standalone", "cluster"])
def servers(
    request: pytest.FixtureRequest, redis_url: str, redis_cluster_url: str
) -> Iterator[tuple[Store, Redis | RedisCluster]]:
    """A store with a table, and a plain client of the same servers."""
    kinds = {"standalone": (redis_url, Redis), "cluster": (redis_cluster_url, RedisCluster)}
    url, client = kinds[request.param]
    with closing(open_store(url)) as store, closing(client.from_url(url)) as redis:
        write(store, MANIFEST)
        yield store, redis
        redis.hdel("tolhouse:{registry}:alias", MANIFEST.name)
        delete(store, MANIFEST.ref)


Servers = tuple[Store, Redis | RedisCluster]


def test_a_damaged_record_is_named_until_it_is_loaded_again(servers: Servers) -> None:
    """Altered, another token's, cut, longer, empty or missing: CorruptError with the token."""
    store, redis = servers
    one, other = RECORDS[17].tobytes(), RECORDS[9].tobytes()
    for damaged in (bytes([one[0] ^ 1]) + one[1:], other, one[:-1], one + b"\0", b"", None):
        redis.hdel(HASH, 17)
        if damaged is not None:
            redis.hset(HASH, 17, damaged)
        with pytest.raises(CorruptError, match=f"row of token 17 (of|in) table {MANIFEST.ref}"):
            read(store, MANIFEST)
        assert shard_digest(store, MANIFEST, 1) is None
        assert_holds(store, MANIFEST, np.delete(IDS, 17))
    redis.delete(HASH)  # lost as a whole
    assert 0 == store.count(MANIFEST, 1)
    with pytest.raises(CorruptError, match=r"token 1 .* is missing in redis://.*: load it again"):
        read(store, MANIFEST)
    store.write_shard(MANIFEST, 1, RECORDS[MANIFEST.shard_ids(1)])
    assert_holds(store, MANIFEST)
    redis.delete(HASH)
    redis.set(HASH, "x")  # of another type
    with pytest.raises(TolhouseError, match="redis://"):
        read(store, MANIFEST)


def test_malformed_manifests_and_aliases_are_told_and_mended(servers: Servers) -> None:
    """Both are CorruptError, naming the table; a commit and a publish write them anew."""
    store, redis = servers
    key, ref = "tolhouse:{registry}:manifest", MANIFEST.ref
    redis.hset(key, ref, MANIFEST.to_json().replace("int8", "int3"))
    with pytest.raises(CorruptError, match=MANIFEST.ref):
        resolve(store, MANIFEST.ref)
    redis.hset(key, ref, replace(MANIFEST, name="other").to_json())
    with pytest.raises(CorruptError, match="describes table other@"):
        resolve(store, MANIFEST.ref)
    commit(store, MANIFEST)
    redis.hset("tolhouse:{registry}:alias", MANIFEST.name, "{")
    with pytest.raises(CorruptError, match=r"alias of 'damaged' .* publish a version"):
        resolve(store, MANIFEST.name)
    assert MANIFEST == publish(store, MANIFEST.ref)
    assert MANIFEST == resolve(store, MANIFEST.name)


def test_many_threads_share_a_store(servers: Servers) -> None:
    """Each gets the records of its own ids."""

    def check(seed: int) -> None:
        ids = np.random.default_rng(seed).integers(0, len(IDS), 25).astype(np.uint32)
        assert_holds(servers[0], MANIFEST, ids)

    with ThreadPoolExecutor(8) as pool:
        assert [None] * 200 == list(pool.map(check, range(200)))


def test_a_cluster_spreads_the_shards(redis_cluster_url: str) -> None:
    """Every master of the Cluster holds some of the table, and each shard is one hash."""
    with (
        closing(open_store(redis_cluster_url)) as store,
        closing(RedisCluster.from_url(redis_cluster_url)) as cluster,
    ):
        write(store, MANIFEST)
        keys = [f"tolhouse:{{{MANIFEST.ref}:shards-8:{shard}}}" for shard in range(8)]
        fields = [sorted(map(int, cluster.hkeys(key))) for key in keys]
        assert [MANIFEST.shard_ids(shard).tolist() for shard in range(8)] == fields
        assert 3 == len({cluster.get_node_from_key(key).name for key in keys})
        delete(store, MANIFEST.ref)
        assert 0 == sum(cluster.exists(key) for key in keys)


NOT_UNDERSTOOD = """ftp://a file:// redis:// redis://host:port http://localhost
redi://:secret@127.0.0.1:{port} http://user:secret@127.0.0.1:{port} redis://:secret@127.0.0.1:port
redis://:sec/secret@127.0.0.1:{port} redis://:secret@127.0.0.1:{port}?frobnicate=1
redis://127.0.0.1:{port}?password=secret&socket_timeout=soon"""


@pytest.mark.parametrize("url", ["", "x", *NOT_UNDERSTOOD.split()])
def test_a_url_that_is_not_understood_is_refused_without_its_password(
    url: str, redis_url: str
) -> None:
    """Another scheme, no port, an unknown option: InvalidArgumentError, without the password."""
    with pytest.raises(InvalidArgumentError, match="not understood") as caught:
        open_store(url.format(port=redis_url.rpartition(":")[2]))
    assert "sec" not in str(caught.value)


SECRET = """redis://:secret@127.0.0.1:{port} redis://user:secret@127.0.0.1:{port}
redis://127.0.0.1:{port}?password=secret"""


@pytest.mark.parametrize("url", SECRET.split())
def test_errors_and_urls_hide_the_password(url: str) -> None:
    """With nobody there, and with a wrong password, the message has the address alone."""
    port = free_port()
    with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}.* can't be reached") as nobody:
        open_store(url.format(port=port), timeout_seconds=1)
    with (
        redis_server("--requirepass", "right", port=port),
        pytest.raises(UnauthenticatedError, match=f"127.0.0.1:{port}") as wrong,
    ):
        open_store(url.format(port=port))
    assert "secret" not in f"{nobody.value} {wrong.value}"


def test_a_password_that_is_missing_or_may_too_little_is_unauthenticated() -> None:
    """Both without a password and as a user who lacks a permission."""
    with redis_server("--requirepass", "right") as url:
        host = url.removeprefix("redis://")
        with pytest.raises(UnauthenticatedError):
            open_store(url)
        with closing(open_store(f"redis://:right@{host}")) as store:
            assert "right" not in store.url
            assert [] == store.refs()
        with closing(Redis.from_url(f"redis://:right@{host}")) as redis:
            redis.execute_command("ACL", "SETUSER", "weak", "on", ">pw", "+info", "+client")
        with (
            closing(open_store(f"redis://weak:pw@{host}")) as store,
            pytest.raises(UnauthenticatedError, match="permission"),
        ):
            store.refs()


def test_a_server_that_speaks_another_protocol_is_told(redis_url: str) -> None:
    """TLS asked of a server without it ends as an error of ours, with the address."""
    url = redis_url.replace("redis:", "rediss:")
    with pytest.raises((UnavailableError, DeadlineExceededError), match=url):
        open_store(url, timeout_seconds=0.3)


def test_a_store_that_was_closed_under_it_comes_back() -> None:
    """A server that dies is UnavailableError; one that starts again is used without a new store."""
    port = free_port()
    with redis_server(port=port) as url:
        store = open_store(url, timeout_seconds=1)
        write(store, MANIFEST)
    with closing(store):
        with pytest.raises(UnavailableError, match="can't be reached"):
            read(store, MANIFEST)
        with redis_server(port=port):
            with pytest.raises(CorruptError, match="missing"):
                read(store, MANIFEST)
            write(store, MANIFEST)
            assert_holds(store, MANIFEST)


def test_a_master_behind_a_slow_link_leaves_reads_to_its_replica() -> None:
    """While it takes several times as long to answer, and no longer once the link is mended."""
    with ExitStack() as stack:
        links: list[Link] = []

        def announced(port: int) -> int:
            links.append(stack.enter_context(Link(f"127.0.0.1:{port}")))
            return int(links[-1].address.rpartition(":")[2])

        stack.enter_context(redis_cluster(3, 1, node_timeout_ms=5000, announced=announced))
        store = stack.enter_context(closing(open_store(f"redis://{links[1].address}")))
        assert isinstance(store, RedisStore)
        write(store, MANIFEST)
        for seconds, last in ((0.2, {links[0].address}), (0.0, set())):
            links[0].delay(seconds)
            deadline = time.monotonic() + 30
            while last != store.health.unhealthy and time.monotonic() < deadline:
                assert_holds(store, MANIFEST)
                time.sleep(0.02)
            assert last == store.health.unhealthy
            assert_holds(store, MANIFEST)


@pytest.mark.parametrize("kind", ["standalone", "cluster"])
def test_a_server_that_drips_is_too_slow(kind: str) -> None:
    """Its bytes come well within the timeout, each by itself; the whole answer does not."""
    with ExitStack() as stack:
        links: list[Link] = []

        def announced(port: int) -> int:
            links.append(stack.enter_context(Link(f"127.0.0.1:{port}")))
            return int(links[-1].address.rpartition(":")[2])

        if kind == "cluster":
            stack.enter_context(redis_cluster(3, announced=announced))
        else:
            port = free_port()
            stack.enter_context(redis_server(port=port))
            announced(port)
        store = stack.enter_context(closing(open_store(f"redis://{links[0].address}", 0.5)))
        write(store, MANIFEST)
        for link in links:
            link.drip(0.1)
        for call in (lambda: read(store, MANIFEST), lambda: store.manifest(MANIFEST.ref)):
            with pytest.raises(
                (DeadlineExceededError, UnavailableError), match=r"in time|too slowly"
            ):
                call()
        for link in links:
            link.mend()
        wait_until(lambda: assert_holds(store, MANIFEST) is None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_master_may_die_or_hang(number: signal.Signals) -> None:
    """Its replica has the rows; what only a master can do works once there is one again."""
    with (
        redis_cluster(3, 1, node_timeout_ms=1000) as nodes,
        closing(open_store(nodes[1].url, 1.0)) as store,
    ):
        write(store, MANIFEST)
        nodes[0].popen.send_signal(number)
        for _ in range(3):
            assert_holds(store, MANIFEST)
        wait_until(lambda: write(store, MANIFEST))
        assert_holds(store, MANIFEST)
    with warnings.catch_warnings():  # redis-py leaves a socket open when a connection fails
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
