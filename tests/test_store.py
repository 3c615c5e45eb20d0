"""Both stores, one suite: whatever holds for files holds for Redis and for a Redis Cluster."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from redis import Redis, RedisCluster
from tolhouse import errors
from tolhouse.store.base import Store, open_store
from tolhouse.store.files import FileStore
from tolhouse.store.registry import delete, publish, resolve, rollback, tables
from tolhouse.store.writer import shard_digest
from tolhouse.table.records import digest
from tolhouse.testing import free_port, redis_server

from tests.tables import manifest_of, read, records_of, write


@pytest.fixture(params=["file", "redis", "cluster"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, redis_url: str, redis_cluster_url: str
) -> Iterator[Store]:
    url = {"file": f"file://{tmp_path}", "redis": redis_url, "cluster": redis_cluster_url}[
        request.param
    ]
    with closing(open_store(url)) as opened:
        yield opened


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name of the test's own: the Redis servers are shared."""
    return f"t{abs(hash(request.node.nodeid)):x}"


def test_what_is_written_is_read(store: Store, name: str) -> None:
    """Any ids, in any order, with duplicates; counts and digests are those of the records."""
    manifest = write(store, manifest_of(name))
    ids = np.array([49, 0, 7, 7, 12, 3], np.uint32)
    assert records_of(manifest, ids).tobytes() == read(store, manifest, ids)
    assert b"" == read(store, manifest, ids[:0])
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
    with pytest.raises(errors.NotFound):
        store.manifest(manifest.ref)
    with pytest.raises(errors.NotFound):
        publish(store, manifest.ref)


def test_versions_live_side_by_side_and_never_mix(store: Store, name: str) -> None:
    """Each version answers with its own records."""
    one, two = (write(store, manifest_of(name, version)) for version in (1, 2))
    assert (
        records_of(one).tobytes()
        == read(store, one)
        != read(store, two)
        == records_of(two).tobytes()
    )


def test_a_name_stands_for_what_was_published_last(store: Store, name: str) -> None:
    """publish, publish again, roll back, and the errors of each."""
    one, two = (write(store, manifest_of(name, version)) for version in (1, 2))
    with pytest.raises(errors.NotFound, match="not published"):
        resolve(store, name)
    with pytest.raises(errors.NotFound, match="not published"):
        rollback(store, name)
    assert one == publish(store, one.ref) == resolve(store, name)
    with pytest.raises(errors.InvalidArgument, match="no version before"):
        rollback(store, name)
    assert two == publish(store, two.ref) == publish(store, two.ref) == resolve(store, name)
    assert {(one, False), (two, True)} <= set(tables(store))
    assert one == rollback(store, name) == resolve(store, name)
    assert one == resolve(store, one.ref)
    assert two == resolve(store, two.ref)
    with pytest.raises(errors.InvalidArgument, match="name@version"):
        publish(store, name)
    with pytest.raises(errors.NotFound, match="is not in"):
        publish(store, f"{name}@{'f' * 16}")


def test_a_version_is_deleted_only_when_nobody_stands_for_it(store: Store, name: str) -> None:
    """A published one is InUse; a deleted one is gone, also from the history."""
    one, two = (publish(store, write(store, manifest_of(name, version)).ref) for version in (1, 2))
    with pytest.raises(errors.InUse, match="is published"):
        delete(store, two.ref)
    with pytest.raises(errors.InvalidArgument, match="name@version"):
        delete(store, name)
    delete(store, one.ref)
    with pytest.raises(errors.NotFound):
        store.manifest(one.ref)
    assert [0, 0, 0] == [store.count(one, shard) for shard in range(3)]
    with pytest.raises(errors.InvalidArgument, match="no version before"):
        rollback(store, name)
    assert records_of(two).tobytes() == read(store, two)


def test_a_shard_is_replaced_as_a_whole(store: Store, name: str) -> None:
    """Writing a shard again leaves nothing of what was there."""
    manifest = write(store, manifest_of(name))
    store.write_shard(manifest, 0, records_of(manifest, manifest.shard_ids(0)))
    assert 17 == store.count(manifest, 0)
    assert records_of(manifest, np.array([0, 3], np.uint32)).tobytes() == read(
        store, manifest, np.array([0, 3], np.uint32)
    )


def test_records_are_read_into_slots(store: Store, name: str) -> None:
    """Those that are asked for stand where they should; the others stay as they are."""
    manifest = write(store, manifest_of(name))
    out = np.zeros((6, manifest.record_bytes), np.uint8)
    assert out is store.read_records(manifest, np.array([7, 40]), out, np.array([4, 1]))
    expected = records_of(manifest, np.array([40, 7], np.uint32))
    assert (expected == out[[1, 4]]).all()
    assert not out[[0, 2, 3, 5]].any()


def test_a_table_of_format_1_is_refused_and_can_be_deleted(
    store: Store, name: str, redis_url: str, redis_cluster_url: str
) -> None:
    """Nothing of it is left, neither its manifest nor its shards; another version stays."""
    other, old = write(store, manifest_of(name, 2)), manifest_of(name, 1)
    if isinstance(store, FileStore):
        (store.root / name / old.version).mkdir()
        (store.root / name / old.version / "manifest.json").write_text('{"format": 1}')
        (store.root / name / old.version / "shard-00000-of-00001.safetensors").write_text("x")
    else:
        with closing(open_redis(store, redis_url, redis_cluster_url)) as redis:
            redis.set(f"tolhouse:{{{old.ref}}}:manifest", '{"format": 1}')
            redis.sadd("tolhouse:tables", old.ref)
            redis.hset(f"tolhouse:{{{old.ref}:0}}", 0, "x")
    with pytest.raises(errors.Corrupt, match="build the table again"):
        resolve(store, old.ref)
    delete(store, old.ref)
    assert [other.ref] == [ref for ref in store.refs() if ref.startswith(f"{name}@")]
    assert records_of(other).tobytes() == read(store, other)
    if isinstance(store, FileStore):
        assert [other.version] == [path.name for path in (store.root / name).iterdir()]
    else:
        with closing(open_redis(store, redis_url, redis_cluster_url)) as redis:
            assert [] == list(redis.scan_iter(match=f"tolhouse:{{{old.ref}*"))


def open_redis(store: Store, *urls: str) -> Redis | RedisCluster:
    """A plain client of the servers of `store`."""
    url = next(url for url in urls if url == store.url)
    return (RedisCluster if url == urls[1] else Redis).from_url(url)


# files


def test_files_of_others_are_no_tables(tmp_path: Path) -> None:
    """Folders and manifests that do not belong are left out of lists, and told on request."""
    with closing(open_store(f"file://{tmp_path}")) as store:
        manifest = write(store, manifest_of("mine"))
        (tmp_path / "README").write_text("x")
        (tmp_path / "a b" / "0000000000000001").mkdir(parents=True)
        (tmp_path / "a b" / "0000000000000001" / "manifest.json").write_text("{}")
        broken = tmp_path / "broken" / "0000000000000001"
        broken.mkdir(parents=True)
        (broken / "manifest.json").write_text("{}")
        assert [(manifest, False)] == list(tables(store))
        with pytest.raises(errors.Corrupt, match=r"broken@.* manifest"):
            resolve(store, "broken@0000000000000001")
        (broken / "manifest.json").write_text(manifest.to_json())
        with pytest.raises(errors.Corrupt, match="describes table mine"):
            resolve(store, "broken@0000000000000001")
        (tmp_path / "mine" / "alias.json").write_text("{")
        with pytest.raises(errors.Corrupt, match="publish a version"):
            resolve(store, "mine")


def test_another_shard_in_a_shard_s_place_is_found(tmp_path: Path) -> None:
    """A shard file of another version, intact in itself, does not pass for this one."""
    with closing(open_store(f"file://{tmp_path}")) as store:
        one, two = (write(store, manifest_of("swapped", version)) for version in (1, 2))
        file = "shard-00000-of-00003.safetensors"
        (tmp_path / "swapped" / one.version / file).write_bytes(
            (tmp_path / "swapped" / two.version / file).read_bytes()
        )
        with pytest.raises(errors.Corrupt, match="token 0 "):
            read(store, one, np.array([0], np.uint32))
        assert None is shard_digest(store, one, 0)


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    """A file in the way is Unavailable with its path, and nothing half-written is left."""
    (tmp_path / "blocked").write_text("x")
    with (
        closing(open_store(f"file://{tmp_path}")) as store,
        pytest.raises(errors.Unavailable, match="can't write"),
    ):
        write(store, manifest_of("blocked"))
    assert ["blocked"] == [p.name for p in tmp_path.iterdir()]


# Redis


def test_a_shard_is_one_hash_and_so_one_slot(redis_cluster_url: str, name: str) -> None:
    """The keys are those the design promises: a shard sits whole on one node of a Cluster."""
    with (
        closing(open_store(redis_cluster_url)) as store,
        closing(RedisCluster.from_url(redis_cluster_url)) as redis,
    ):
        manifest = write(store, manifest_of(name))
        keys = [f"tolhouse:{{{manifest.ref}:shards-3:{shard}}}" for shard in range(3)]
        assert [17, 17, 16] == [redis.hlen(key) for key in keys]
        assert manifest.shard_ids(0).tolist() == sorted(
            int(field) for field in redis.hkeys(keys[0])
        )


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://a", "file://", "redis://", "redis://host:port", "http://localhost"]
)
def test_urls_that_are_not_understood_are_told_what_is_allowed(url: str) -> None:
    """Nothing is guessed from a malformed URL."""
    with pytest.raises(errors.InvalidArgument, match="not understood"):
        open_store(url)


def test_no_redis_is_unavailable_and_never_tells_the_password() -> None:
    """The address is named, the password is not."""
    with pytest.raises(errors.Unavailable, match="can't be reached") as caught:
        open_store(f"redis://:secret@127.0.0.1:{free_port()}", timeout_seconds=1)
    assert "secret" not in str(caught.value)


def test_a_password_is_asked_for_and_taken() -> None:
    """A wrong password is Unauthenticated, without showing it; the right one works."""
    with redis_server("--requirepass", "right") as url:
        host = url.removeprefix("redis://")
        with pytest.raises(errors.Unauthenticated) as caught:
            open_store(f"redis://:secret@{host}")
        assert "secret" not in str(caught.value)
        with closing(open_store(f"redis://:right@{host}")) as store:
            assert "right" not in store.url
            write(store, manifest_of("locked"))


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
            with pytest.raises((errors.DeadlineExceeded, errors.Unavailable)):
                read(store, manifest, np.array([1], np.uint32))
        finally:
            os.kill(pid, signal.SIGCONT)
        for _ in range(50):
            try:
                assert records_of(manifest, np.array([1], np.uint32)).tobytes() == read(
                    store, manifest, np.array([1], np.uint32)
                )
                break
            except errors.TolhouseError:
                time.sleep(0.1)
        else:
            raise AssertionError("the store did not recover")


def test_a_full_redis_is_told() -> None:
    """Out of memory is Overloaded, and says which knob to turn."""
    with (
        redis_server("--maxmemory", "1mb", "--maxmemory-policy", "noeviction") as url,
        closing(open_store(url)) as store,
    ):

        def fill() -> None:
            for version in range(2000):
                write(store, manifest_of("full", version))

        with pytest.raises(errors.Overloaded, match="maxmemory"):
            fill()


def test_what_is_not_found_comes_with_what_there_is(tmp_path: Path) -> None:
    """The tables of the store, eight at most, are named for unknown names and versions."""
    with closing(open_store(f"file://{tmp_path}")) as store:
        refs = [write(store, manifest_of("known", version)).ref for version in range(10)]
        for missing in ("unknown", f"known@{'f' * 16}"):
            with pytest.raises(
                errors.NotFound, match=f"tables here: {', '.join(refs[:8])} and 2 more"
            ):
                resolve(store, missing)


def test_a_rollback_gives_back_the_same_bytes_and_always_goes_somewhere(
    store: Store, name: str
) -> None:
    """Through every earlier version, in order, without those that were deleted."""
    one, two = (write(store, manifest_of(name, version)) for version in (1, 2))
    before = read(store, publish(store, one.ref))
    publish(store, two.ref)
    publish(store, one.ref)
    assert (one.version, (one.version, two.version)) == (
        store.alias(name).version,
        store.alias(name).history,
    )
    assert two == rollback(store, name)
    assert one == rollback(store, name)
    assert before == read(store, resolve(store, name))
    publish(store, two.ref)
    publish(store, one.ref)
    delete(store, two.ref)
    with pytest.raises(errors.InvalidArgument, match="no version before"):
        rollback(store, name)


def test_a_name_may_stand_for_nothing_again(store: Store, name: str) -> None:
    """Without its alias a table is there by version only, and may be deleted."""
    manifest = publish(store, write(store, manifest_of(name)).ref)
    store.set_alias(name, None)
    store.set_alias(name, None)
    assert None is store.alias(name)
    assert (manifest, False) in list(tables(store))
    delete(store, manifest.ref)
    with pytest.raises(errors.Corrupt):
        read(store, manifest, np.array([1], np.uint32))
