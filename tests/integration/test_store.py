"""One suite for all stores: files, Redis, and a Redis Cluster."""

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
from tolhouse.store.writer import digest, shard_count, shard_digest
from tolhouse.testing import build_table, process, redis_server, wait_until

from tests.commands import LOCAL, send_signal, tolhouse
from tests.tables import assert_holds, ids, manifest_of, read, records_of, write


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with closing(open_store(store_url)) as opened:
        yield opened


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A table name for this test only, because tests share the Redis servers."""
    return f"t{abs(hash(request.node.nodeid)):x}"


def test_written_records_can_be_read(store: Store, name: str) -> None:
    """Records are read for any ids in any order, with duplicates, and counts and digests match."""
    manifest = write(store, manifest_of(name))
    assert_holds(store, manifest, ids(49, 0, 7, 7, 12, 3))
    assert_holds(store, manifest, ids())
    store.write_shard(manifest, 1, records_of(manifest, manifest.shard_ids(1)))  # a second time
    assert [17, 17, 16] == [store.count(manifest, shard) for shard in range(3)]
    assert digest(records_of(manifest, manifest.shard_ids(1))) == shard_digest(store, manifest, 1)
    assert manifest == store.manifest(manifest.ref)
    assert manifest.ref in store.refs()


def test_a_table_exists_with_its_manifest(store: Store, name: str) -> None:
    """A table without a manifest does not exist, and a missing shard has no digest."""
    manifest = manifest_of(name)
    store.write_shard(manifest, 0, records_of(manifest, manifest.shard_ids(0)))
    assert shard_digest(store, manifest, 0)
    assert None is shard_digest(store, manifest, 1)
    assert manifest.ref not in store.refs()
    for work in (store.manifest, lambda ref: publish(store, ref)):
        with pytest.raises(NotFoundError):
            work(manifest.ref)


def test_a_name_refers_to_the_version_published_last(store: Store, name: str) -> None:
    """Publishing and rolling back select a version, their errors are clear, and versions are never
    mixed."""
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


def test_a_published_version_can_not_be_deleted(store: Store, name: str) -> None:
    """A published version raises InUseError, and a deleted one disappears from the history."""
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
    """Requested records are written to the given slots, and other slots do not change."""
    manifest = write(store, manifest_of(name))
    out = np.zeros((6, manifest.record_bytes), np.uint8)
    assert out is store.read_records(manifest, ids(7, 40), out, np.array([4, 1]))
    assert (records_of(manifest, ids(40, 7)) == out[[1, 4]]).all()
    assert not out[[0, 2, 3, 5]].any()


def test_a_table_of_format_1_is_refused_and_can_be_deleted(store: Store, name: str) -> None:
    """Deleting a table of format 1 removes its manifest and shards, and keeps other versions."""
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


def test_rollbacks_go_through_all_earlier_versions(store: Store, name: str) -> None:
    """A rollback goes through all earlier versions in order, skipping deleted ones."""
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


def test_unrelated_files_are_not_tables(tmp_path: Path) -> None:
    """Unrelated folders and manifests are not listed, and errors name them on request."""
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


def test_a_list_of_stores_is_refused(tmp_path: Path) -> None:
    """A list of stores is refused where one store is expected, and a path may contain a comma."""
    for urls in (f"file://{tmp_path},redis://h:1", f"file://{tmp_path}/a, file://{tmp_path}/b"):
        with pytest.raises(InvalidArgumentError, match="several stores; one is allowed"):
            open_store(urls)
        with pytest.raises(InvalidArgumentError, match="several stores; one is allowed"):
            open_row_source(urls)
    with closing(open_store(f"file://{tmp_path}/a,b")) as store:
        assert store.url == f"file://{tmp_path}/a,b"


def test_an_exchanged_shard_is_detected(tmp_path: Path) -> None:
    """A valid shard file of another version is detected."""
    with closing(open_store(f"file://{tmp_path}")) as store:
        one, two = (write(store, manifest_of("swapped", version)) for version in (1, 2))
        paths = [tmp_path / "swapped" / m.version / SHARD for m in (one, two)]
        paths[0].write_bytes(paths[1].read_bytes())
        with pytest.raises(CorruptError, match="token 0 "):
            read(store, one, ids(0))
        assert None is shard_digest(store, one, 0)


SHARD = "shard-00000-of-00003.safetensors"


def test_an_unwritable_folder_raises_an_error(tmp_path: Path) -> None:
    """An obstructed folder raises UnavailableError with its path and leaves nothing behind."""
    (tmp_path / "blocked").write_text("x", encoding="utf-8")
    with closing(open_store(f"file://{tmp_path}")) as store:
        with pytest.raises(UnavailableError, match="cannot write"):
            write(store, manifest_of("blocked"))
    assert ["blocked"] == [p.name for p in tmp_path.iterdir()]


def test_errors_for_unknown_tables_list_known_ones(tmp_path: Path) -> None:
    """The error for an unknown name or version lists up to eight tables of the store."""
    with closing(open_store(f"file://{tmp_path}")) as store:
        refs = [write(store, manifest_of("known", version)).ref for version in range(10)]
        here = f"tables here: {', '.join(refs[:8])} and 2 more"
        for missing in ("unknown", f"known@{'f' * 16}"):
            with pytest.raises(NotFoundError, match=here):
                resolve(store, missing)


# Redis


def test_a_hanging_redis_times_out() -> None:
    """Calls to a stopped server fail within the timeout, and work when it continues."""
    with (
        redis_server() as url,
        closing(open_store(url, timeout_seconds=0.3)) as store,
        closing(Redis.from_url(url)) as redis,
    ):
        manifest = write(store, manifest_of("hang"))
        pid = redis.info("server")["process_id"]
        send_signal(pid, signal.SIGSTOP)
        try:
            with pytest.raises((DeadlineExceededError, UnavailableError)):
                read(store, manifest)
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: read(store, manifest))
        assert_holds(store, manifest)


def test_a_full_redis_raises_an_error() -> None:
    """A Redis without free memory raises OverloadedError, which names the option to raise."""
    with redis_server("--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as url:
        with closing(open_store(url)) as store, pytest.raises(OverloadedError, match="maxmemory"):
            all(write(store, manifest_of("full", version)) for version in range(2000))


def test_a_store_that_never_evicts_gives_no_warning(store: Store) -> None:
    """File stores and servers without a memory limit give no warning."""
    assert "" == store.risk()


@pytest.mark.parametrize(
    ("policy", "warned"), [("allkeys-lru", True), ("volatile-lru", False), ("noeviction", False)]
)
def test_a_redis_that_may_evict_rows_gives_a_warning(
    policy: str, warned: bool, checkpoint: Path
) -> None:
    """A build, a lookup service and the error for a missing table warn of a Redis that may evict
    rows."""
    warning = f"may evict rows by its maxmemory-policy {policy}: set noeviction"
    with redis_server("--maxmemory", "50mb", "--maxmemory-policy", policy) as url:
        build_table(checkpoint, url, shards=8)
        build = tolhouse(f"build --codec fp32 --shards 4 --store {url}", checkpoint, code=1)
        with process("lookup", "--store", url, *LOCAL) as lookup:
            log = lookup.log.read_text(encoding="utf-8")
        with closing(open_store(url)) as store, pytest.raises(NotFoundError) as error:
            resolve(store, "unknown")
    assert [warned] * 3 == [warning in text for text in (build.stderr, log, str(error.value))]


def test_a_shard_has_at_most_128_megabytes() -> None:
    """A table has at least 64 shards, but no empty one, and more if a shard would exceed 128 MB."""
    for rows, size, expected in ((40, 26, 40), (4096, 4104, 64), (128_256, 98_312, 99)):
        assert expected == shard_count(rows, size)
    rows, size = 128_256, 3 << 20
    count = shard_count(rows, size)
    assert -(-rows // count) * size <= 128e6 < -(-rows // (count - 1)) * size
