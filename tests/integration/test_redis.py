"""Damaged, closed or protected Redis servers give clear errors without passwords."""

import gc
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redis import Redis, RedisCluster
from tolhouse.errors import (
    CorruptError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    TolhouseError,
    UnauthenticatedError,
    UnavailableError,
)
from tolhouse.store.base import Store, open_store
from tolhouse.store.redis import RedisStore
from tolhouse.store.registry import commit, delete, publish, resolve
from tolhouse.store.writer import shard_digest
from tolhouse.testing import free_port, redis_binary, redis_cluster, redis_server, wait_until

from tests.chaos.proxy import Link
from tests.commands import send_signal
from tests.tables import assert_holds, manifest_of, read, records_of, write

IDS = np.arange(40, dtype=np.uint32)
MANIFEST = manifest_of("damaged", vocab_size=len(IDS), num_shards=8)
RECORDS = records_of(MANIFEST)
HASH = f"tolhouse:{{{MANIFEST.ref}:shards-8:1}}"  # of tokens 1, 9, 17, 25, 33


@pytest.fixture(params=["standalone", "cluster"])
def servers(
    request: pytest.FixtureRequest, redis_url: str, redis_cluster_url: str
) -> Iterator[tuple[Store, Redis | RedisCluster]]:
    """A store with a table and a plain client of the same servers."""
    kinds = {"standalone": (redis_url, Redis), "cluster": (redis_cluster_url, RedisCluster)}
    url, client = kinds[request.param]
    with closing(open_store(url)) as store, closing(client.from_url(url)) as redis:
        write(store, MANIFEST)
        yield store, redis
        redis.hdel("tolhouse:{registry}:alias", MANIFEST.name)
        delete(store, MANIFEST.ref)


Servers = tuple[Store, Redis | RedisCluster]


def test_a_damaged_record_is_named_until_it_is_replaced(servers: Servers) -> None:
    """An altered, exchanged, truncated, extended, empty or missing record raises CorruptError with
    the token until it is loaded again."""
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
    redis.delete(HASH)  # the whole shard is lost
    assert 0 == store.count(MANIFEST, 1)
    with pytest.raises(CorruptError, match=r"token 1 .* is missing in redis://.*: load it again"):
        read(store, MANIFEST)
    store.write_shard(MANIFEST, 1, RECORDS[MANIFEST.shard_ids(1)])
    assert_holds(store, MANIFEST)
    redis.delete(HASH)
    redis.set(HASH, "x")  # a value of another type
    with pytest.raises(TolhouseError, match="redis://"):
        read(store, MANIFEST)


def test_malformed_manifests_and_aliases_can_be_repaired(servers: Servers) -> None:
    """Malformed manifests and aliases raise CorruptError with the table's name, and committing and
    publishing repair them."""
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
    """Each of several threads gets the records of its own ids."""

    def check(seed: int) -> None:
        ids = np.random.default_rng(seed).integers(0, len(IDS), 25).astype(np.uint32)
        assert_holds(servers[0], MANIFEST, ids)

    with ThreadPoolExecutor(8) as pool:
        assert [None] * 200 == list(pool.map(check, range(200)))


def test_a_cluster_spreads_the_shards(redis_cluster_url: str) -> None:
    """Every master of the Cluster holds part of the table, and each shard is one hash."""
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
def test_errors_about_malformed_urls_hide_the_password(url: str, redis_url: str) -> None:
    """The error for a URL with another scheme, no port or an unknown option does not contain the
    password."""
    with pytest.raises(InvalidArgumentError, match="not understood") as caught:
        open_store(url.format(port=redis_url.rpartition(":")[2]))
    assert "sec" not in str(caught.value)


SECRET = """redis://:secret@127.0.0.1:{port} redis://user:secret@127.0.0.1:{port}
redis://127.0.0.1:{port}?password=secret"""


@pytest.mark.parametrize("url", SECRET.split())
def test_errors_and_urls_hide_the_password(url: str) -> None:
    """Errors about missing servers and wrong passwords contain the address and not the password."""
    port = free_port()
    with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}.* cannot be reached") as nobody:
        open_store(url.format(port=port), timeout_seconds=1)
    with (
        redis_server("--requirepass", "right", port=port),
        pytest.raises(UnauthenticatedError, match=f"127.0.0.1:{port}") as wrong,
    ):
        open_store(url.format(port=port))
    assert "secret" not in f"{nobody.value} {wrong.value}"


def test_missing_passwords_and_permissions_are_unauthenticated() -> None:
    """A missing password and a missing permission raise UnauthenticatedError."""
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


def test_tls_to_a_plaintext_server_raises_an_error(redis_url: str) -> None:
    """TLS to a server without it raises an error with the address."""
    url = redis_url.replace("redis:", "rediss:")
    with pytest.raises((UnavailableError, DeadlineExceededError), match=url):
        open_store(url, timeout_seconds=0.3)


def test_a_store_reconnects_to_a_restarted_server() -> None:
    """A server that dies raises UnavailableError, and the same store works when the server is
    back."""
    port = free_port()
    with redis_server(port=port) as url:
        store = open_store(url, timeout_seconds=1)
        write(store, MANIFEST)
    with closing(store):
        with pytest.raises(UnavailableError, match="cannot be reached"):
            read(store, MANIFEST)
        with redis_server(port=port):
            with pytest.raises(CorruptError, match="missing"):
                read(store, MANIFEST)
            write(store, MANIFEST)
            assert_holds(store, MANIFEST)


def test_reads_avoid_a_slow_master() -> None:
    """Reads use the replica while its master takes several times as long to answer, and return when
    the link is repaired."""
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
def test_a_server_that_answers_byte_by_byte_times_out(kind: str) -> None:
    """A server that sends each byte within the timeout but not the whole answer raises an error."""
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
                (DeadlineExceededError, UnavailableError), match=r"in time|too slow"
            ):
                call()
        for link in links:
            link.mend()
        wait_until(lambda: assert_holds(store, MANIFEST) is None)


@pytest.mark.parametrize("tls", [False, True])
def test_replies_arrive_in_any_pieces(tls: bool, pki: Path) -> None:
    """Rows are the same if the server sends its answers byte by byte or at once, also before and
    after a lost row and rows of other sizes."""
    if tls:
        try:
            redis_binary(tls=True)
        except NotFoundError as error:
            pytest.skip(str(error))
    keys = f"ssl_certfile={pki}/client.pem&ssl_keyfile={pki}/client.key"
    options = f"?ssl_ca_certs={pki}/ca.pem&{keys}" if tls else ""
    port, large = free_port(), manifest_of("large", vocab_size=600, width=2048)
    with (
        redis_server(port=port, tls=pki if tls else None) as url,
        closing(open_store(url + options)) as store,
        closing(Redis.from_url(url + options)) as redis,
        Link(f"127.0.0.1:{port}") as link,
        closing(open_store(url.replace(f"127.0.0.1:{port}", link.address) + options)) as linked,
    ):
        write(store, MANIFEST)
        write(store, large)
        assert_holds(linked, large)
        link.drip(1e-9)
        assert_holds(linked, MANIFEST)
        for damaged in (None, b"", b"short", b"long" * 20):
            redis.hdel(HASH, 17)
            if damaged is not None:
                redis.hset(HASH, 17, damaged)
            with pytest.raises(CorruptError, match="row of token 17 of") as caught:
                read(linked, MANIFEST)
            assert (17,) == caught.value.token_ids
            assert_holds(linked, MANIFEST, np.delete(IDS, 17))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_reads_survive_a_dead_or_hanging_master(number: signal.Signals) -> None:
    """A replica serves reads while its master is dead or hangs, and writes work after the
    failover."""
    with (
        redis_cluster(3, 1, node_timeout_ms=1000) as nodes,
        closing(open_store(nodes[1].url, 1.0)) as store,
    ):
        write(store, MANIFEST)
        for node in nodes[:3]:
            with Redis.from_url(node.url) as master:
                master.wait(1, 30_000)  # until its replica has all rows
        send_signal(nodes[0].popen.pid, number)
        for _ in range(3):
            assert_holds(store, MANIFEST)
        wait_until(lambda: write(store, MANIFEST))
        assert_holds(store, MANIFEST)
    with warnings.catch_warnings():  # redis-py leaves a socket open when a connection fails
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
