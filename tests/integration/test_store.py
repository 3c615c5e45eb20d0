"""Both stores, one suite: whatever holds for files holds for Redis and for a Redis Cluster."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from redis import Redis, RedisCluster
from tolhouse.client.row_source import open_row_source
from tolhouse.errors import (
    CorruptError,
    DeadlineExceededError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from tolhouse.store.base import Store, open_store
from tolhouse.store.files import FileStore
from tolhouse.store.registry import delete, publish, resolve, rollback, tables
from tolhouse.store.writer import digest, shard_digest
from tolhouse.testing import build_table, process, redis_server, wait_until

from tests.commands import LOCAL, tolhouse
from tests.tables import assert_holds, ids, manifest_of, read, records_of, write


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with closing(open_store(store_url)) as opened:
        yield opened


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name of the test's own: the Redis servers are shared."""
    return f"t{abs(hash(request.node.nodeid)):x}"


def test_what_is_written_is_read(store: Store, name: str) -> None:
    """Any ids, in any order, with duplicates; counts and digests are those of the records."""
    manifest = write(store, manifest_of(name))
    assert_holds(store, manifest, ids(49, 0, 7, 7, 12, 3))
    assert_holds(store, manifest, ids())
    store.write_shard(manifest, 1, records_of(manifest, manifest.shard_ids(1)))  # once more
    assert [17, 17, 16] == [store.count(manifest, shard) for shard in range(3)]
    assert digest(records_of(manifest, manifest.shard_ids(1))) == shard_digest(store, manifest, 1)
    assert manifest == store.manifest(manifest.ref)
    assert manifest.ref in store.refs()


def test_a_table_is_not_there_before_its_manifest(store: Store, name: str) -> None:
    """Shards without a manifest are no table; a shard that is not there has no digest."""
    manifest = manifest_of(name)
    store.write_shard(manifest, 0, records_of(manifest, manifest.shard_ids(0)))
    assert shard_digest(store, manifest, 0)
    assert None is shard_digest(store, manifest, 1)
    assert manifest.ref not in store.refs()
    for work in (store.manifest, lambda ref: publish(store, ref)):
        with pytest.raises(NotFoundError):
            work(manifest.ref)


def test_a_name_stands_for_what_was_published_last(store: Store, name: str) -> None:
    """publish, publish again, roll back, and the errors of each; versions never mix."""
    one, two = (write(store, manifest_of(name, version)) for version in (1, 2))
    for work in (resolve, rollback):
        with pytest.raises(NotFoundError, match="not published"):
            work(store, name)
    assert one == publish(store, one.ref) == resolve(store, name)
    with pytest.raises(InvalidArgumentError, match="no version before"):
        rollback(store, name)
    assert two == publish(store, two.ref) == publish(store, two.ref) == resolve(store, name)
    assert {(one, False), (two, True)} <= set(tables(store))
    assert one == rollback(store, name) == resolve(store, name)
    for manifest in (one, two):
        assert manifest == resolve(store, manifest.ref)
        assert_holds(store, manifest)
    with pytest.raises(InvalidArgumentError, match="name@version"):
        publish(store, name)
    with pytest.raises(NotFoundError, match="is not in"):
        publish(store, f"{name}@{'f' * 16}")


def test_a_version_is_deleted_only_when_nobody_stands_for_it(store: Store, name: str) -> None:
    """A published one is InUseError; a deleted one is gone, also from the history."""
    one, two = (publish(store, write(store, manifest_of(name, version)).ref) for version in (1, 2))
    with pytest.raises(InUseError, match="is published"):
        delete(store, two.ref)
    with pytest.raises(InvalidArgumentError, match="name@version"):
        delete(store, name)
    delete(store, one.ref)
    with pytest.raises(NotFoundError):
        store.manifest(one.ref)
    assert [0, 0, 0] == [store.count(one, shard) for shard in range(3)]
    with pytest.raises(InvalidArgumentError, match="no version before"):
        rollback(store, name)
    assert_holds(store, two)


def test_records_are_read_into_slots(store: Store, name: str) -> None:
    """Those that are asked for stand where they should; the others stay as they are."""
    manifest = write(store, manifest_of(name))
    out = np.zeros((6, manifest.record_bytes), np.uint8)
    assert out is store.read_records(manifest, ids(7, 40), out, np.array([4, 1]))
    assert (records_of(manifest, ids(40, 7)) == out[[1, 4]]).all()
    assert not out[[0, 2, 3, 5]].any()


def test_a_table_of_format_1_is_refused_and_can_be_deleted(store: Store, name: str) -> None:
    """Nothing of it is left, neither its manifest nor its shards; another version stays."""
    other, old = write(store, manifest_of(name, 2)), manifest_of(name, 1)

    def stored() -> list[str]:
        if isinstance(store, FileStore):
            return [str(path) for path in store.root.glob(f"{name}/{old.version}/**")]
        return [*redis.scan_iter(match=f"tolhouse:{{{old.ref}*")]

    if isinstance(store, FileStore):
        folder = store.root / name / old.version
        folder.mkdir()
        (folder / "manifest.json").write_text('{"format": 1}', encoding="utf-8")
        (folder / "shard-00000-of-00001.safetensors").write_text("x", encoding="utf-8")
    else:
        redis = client_of(store)
        redis.set(f"tolhouse:{{{old.ref}}}:manifest", '{"format": 1}')
        redis.sadd("tolhouse:tables", old.ref)
        redis.hset(f"tolhouse:{{{old.ref}:0}}", 0, "x")
    assert stored()
    with pytest.raises(CorruptError, match="build the table again"):
        resolve(store, old.ref)
    delete(store, old.ref)
    assert [other.ref] == [ref for ref in store.refs() if ref.startswith(f"{name}@")]
    assert_holds(store, other)
    assert [] == stored()
    if not isinstance(store, FileStore):
        redis.close()


def client_of(store: Store) -> Redis | RedisCluster:
    """A plain client of the servers of `store`."""
    redis = Redis.from_url(store.url)
    if not redis.info("cluster")["cluster_enabled"]:
        return redis
    redis.close()
    return RedisCluster.from_url(store.url)


def test_a_rollback_gives_back_the_same_bytes_and_always_goes_somewhere(
    store: Store, name: str
) -> None:
    """Through every earlier version, in order, without those that were deleted."""
    one, two = (write(store, manifest_of(name, version)) for version in (1, 2))
    for manifest in (one, two, one):
        publish(store, manifest.ref)
    alias = store.alias(name)
    assert (one.version, (one.version, two.version)) == (alias.version, alias.history)
    assert two == rollback(store, name)
    assert one == rollback(store, name)
    assert_holds(store, resolve(store, name))
    for manifest in (two, one):
        publish(store, manifest.ref)
    delete(store, two.ref)
    with pytest.raises(InvalidArgumentError, match="no version before"):
        rollback(store, name)


# files


def test_files_of_others_are_no_tables(tmp_path: Path) -> None:
    """Folders and manifests that do not belong are left out of lists, and told on request."""
    with closing(open_store(f"file://{tmp_path}")) as store:
        manifest = write(store, manifest_of("mine"))
        (tmp_path / "README").write_text("x", encoding="utf-8")
        for other in ("a b", "broken"):
            folder = tmp_path / other / "0000000000000001"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}", encoding="utf-8")
        assert [(manifest, False)] == list(tables(store))
        with pytest.raises(CorruptError, match=r"broken@.* manifest"):
            resolve(store, "broken@0000000000000001")
        (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
        with pytest.raises(CorruptError, match="describes table mine"):
            resolve(store, "broken@0000000000000001")


def test_two_stores_are_not_one_folder(tmp_path: Path) -> None:
    """Where one store is opened, a list of them is refused: a path with a comma is one store."""
    for urls in (f"file://{tmp_path},redis://h:1", f"file://{tmp_path}/a, file://{tmp_path}/b"):
        with pytest.raises(InvalidArgumentError, match="several stores; one is allowed"):
            open_store(urls)
        with pytest.raises(InvalidArgumentError, match="several stores; one is allowed"):
            open_row_source(urls)
    with closing(open_store(f"file://{tmp_path}/a,b")) as store:
        assert store.url == f"file://{tmp_path}/a,b"


def test_another_shard_in_a_shard_s_place_is_found(tmp_path: Path) -> None:
    """A shard file of another version, intact in itself, does not pass for this one."""
    with closing(open_store(f"file://{tmp_path}")) as store:
        one, two = (write(store, manifest_of("swapped", version)) for version in (1, 2))
        paths = [tmp_path / "swapped" / m.version / SHARD for m in (one, two)]
        paths[0].write_bytes(paths[1].read_bytes())
        with pytest.raises(CorruptError, match="token 0 "):
            read(store, one, ids(0))
        assert None is shard_digest(store, one, 0)


SHARD = "shard-00000-of-00003.safetensors"


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    """A file in the way is UnavailableError with its path, and nothing half-written is left."""
    (tmp_path / "blocked").write_text("x", encoding="utf-8")
    with closing(open_store(f"file://{tmp_path}")) as store:
        with pytest.raises(UnavailableError, match="can't write"):
            write(store, manifest_of("blocked"))
    assert ["blocked"] == [p.name for p in tmp_path.iterdir()]


def test_what_is_not_found_comes_with_what_there_is(tmp_path: Path) -> None:
    """The tables of the store, eight at most, are named for unknown names and versions."""
    with closing(open_store(f"file://{tmp_path}")) as store:
        refs = [write(store, manifest_of("known", version)).ref for version in range(10)]
        here = f"tables here: {', '.join(refs[:8])} and 2 more"
        for missing in ("unknown", f"known@{'f' * 16}"):
            with pytest.raises(NotFoundError, match=here):
                resolve(store, missing)


# Redis


def test_a_redis_that_hangs_costs_no_more_than_the_timeout() -> None:
    """Every call ends in an error while the server is stopped, and works once it goes on."""
    with (
        redis_server() as url,
        closing(open_store(url, timeout_seconds=0.3)) as store,
        closing(Redis.from_url(url)) as redis,
    ):
        manifest = write(store, manifest_of("hang"))
        pid = redis.info("server")["process_id"]
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises((DeadlineExceededError, UnavailableError)):
                read(store, manifest)
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: read(store, manifest))
        assert_holds(store, manifest)


def test_a_full_redis_is_told() -> None:
    """Out of memory is OverloadedError, and says which option to raise."""
    with redis_server("--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as url:
        with closing(open_store(url)) as store, pytest.raises(OverloadedError, match="maxmemory"):
            all(write(store, manifest_of("full", version)) for version in range(2000))


def test_a_store_that_keeps_what_it_has_is_no_risk(store: Store) -> None:
    """Neither files nor servers without a limit are warned of."""
    assert "" == store.risk()


@pytest.mark.parametrize(
    ("policy", "warned"), [("allkeys-lru", True), ("volatile-lru", False), ("noeviction", False)]
)
def test_a_redis_that_may_evict_rows_is_warned_of(
    policy: str, warned: bool, checkpoint: Path
) -> None:
    """A build and a lookup service say so at start, and whoever finds no table there is told."""
    warning = f"may evict rows by its maxmemory-policy {policy}: set noeviction"
    with redis_server("--maxmemory", "50mb", "--maxmemory-policy", policy) as url:
        build_table(checkpoint, url, shards=8)
        build = tolhouse(f"build --codec fp32 --shards 4 --store {url}", checkpoint, code=1)
        with process("lookup", "--store", url, *LOCAL) as lookup:
            said = lookup.log.read_text(encoding="utf-8")
        with closing(open_store(url)) as store, pytest.raises(NotFoundError) as error:
            resolve(store, "unknown")
    assert [warned] * 3 == [warning in text for text in (build.stderr, said, str(error.value))]
