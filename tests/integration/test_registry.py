"""Concurrent changes of a store by several processes have the outcome of some serial order."""

import socket
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tolhouse.errors import (
    CorruptError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from tolhouse.store.base import Alias, Changes, open_store
from tolhouse.store.files import FileStore
from tolhouse.store.registry import commit, delete, publish, rollback
from tolhouse.testing import redis_server

from tests.interleaving import (
    OTHER,
    PAIRS,
    PUBLISHED,
    TRIPLES,
    Names,
    NewStore,
    finish,
    new_stores,
    not_serial,
    prepared,
)
from tests.tables import manifest_of, read, records_of


@pytest.fixture(scope="module")
def own_redis() -> object:
    with redis_server() as url:
        yield url


@pytest.fixture(params=["file", "redis"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> NewStore:
    """A factory for URLs of empty stores."""
    is_file = request.param == "file"
    return new_stores(f"file://{tmp_path}" if is_file else request.getfixturevalue("own_redis"))


@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_two_concurrent_operations_are_serialisable(names: Names, new_store: NewStore) -> None:
    """Two concurrent operations have the results and the final state of one of both orders."""
    assert [] == not_serial(new_store, names, rounds=4)


def test_three_concurrent_operations_are_serialisable(new_store: NewStore) -> None:
    """Three concurrent operations have the outcome of some serial order, for a sample of
    triples."""
    for names in TRIPLES:
        assert [] == not_serial(new_store, names, rounds=2)


class Unlocked(FileStore):
    """A file store whose updates are not atomic."""

    def update(self, change: Callable[[], Changes]) -> None:
        for (kind, ref), text in change().items():
            if kind != "log":
                self._write_text(ref, kind, text)


def test_updates_that_are_not_atomic_are_found(tmp_path: Path) -> None:
    """Without the file store's lock, the check finds outcomes that no serial order explains."""
    names = ("publish other", "delete other")
    url = f"file://{tmp_path}"
    assert not_serial(new_stores(url), names, 30, lambda url: Unlocked(url.removeprefix("file://")))


def test_an_error_between_reads_of_one_operation_is_resolved(own_redis: str) -> None:
    """A rollback whose version is deleted between two of its reads reports that there is no earlier
    version."""
    prepared(new_stores(own_redis)())
    with closing(open_store(own_redis)) as store, closing(open_store(own_redis)) as other:
        alias, deletions = store.alias, iter([OTHER.ref])

        def then_deleted(name: str) -> Alias | None:
            found = alias(name)
            for ref in deletions:
                delete(other, ref)
            return found

        store.alias = then_deleted  # type: ignore[method-assign]
        with pytest.raises(InvalidArgumentError, match="no version before"):
            rollback(store, "t")


def test_an_incomplete_table_is_not_committed(new_store: NewStore) -> None:
    """A commit counts the rows at last and refuses an incomplete table."""
    prepared(url := new_store())
    with closing(open_store(url)) as store:
        lacking = manifest_of("lacking", 7)
        store.write_shard(lacking, 0, records_of(lacking, lacking.shard_ids(0)))
        with pytest.raises(CorruptError, match=r"holds 17 of 50 rows .* build it again"):
            commit(store, lacking)
        with pytest.raises(NotFoundError):
            store.manifest(lacking.ref)


def test_an_interrupted_deletion_can_be_completed(new_store: NewStore) -> None:
    """A version whose deletion was interrupted can be neither read nor built until `--force`
    completes the deletion."""
    prepared(url := new_store())
    with closing(open_store(url)) as store:
        gone, store.delete_records = store.delete_records, _killed  # type: ignore[method-assign]
        with suppress(KeyboardInterrupt):
            delete(store, OTHER.ref)
        store.delete_records = gone  # type: ignore[method-assign]
        with pytest.raises(NotFoundError, match="`force`"):
            delete(store, OTHER.ref)
        with pytest.raises(UnavailableError, match="is being deleted"):
            finish(store, OTHER)
        delete(store, OTHER.ref, force=True)
        assert 0 == store.count(OTHER, 0)
        finish(store, OTHER)


def test_a_published_part_stays(new_store: NewStore) -> None:
    """The deletion of a version keeps a part of it that is published under the part's own name."""
    part = manifest_of("t.frequent_rows", 5)
    whole = manifest_of("t", 6, frequent_rows=part.ref, frequent=(1,))
    with closing(open_store(new_store())) as store:
        finish(store, part)
        publish(store, part.ref)
        finish(store, whole)
        delete(store, whole.ref)
        assert [part.ref] == store.refs()


def _killed(ref: str) -> None:
    raise KeyboardInterrupt


def test_two_builds_with_different_numbers_of_shards(new_store: NewStore) -> None:
    """The first of two builds with different numbers of shards stays readable, and the second
    raises an error."""
    prepared(url := new_store())
    first, second = (manifest_of("twice", 5, num_shards=shards) for shards in (3, 5))
    with closing(open_store(url)) as store:
        for manifest in (first, second):
            for shard in range(manifest.num_shards):
                store.write_shard(manifest, shard, records_of(manifest, manifest.shard_ids(shard)))
        commit(store, first)
        with pytest.raises(InUseError, match="`shards`=3"):
            commit(store, second)
        assert first == store.manifest(first.ref)
        everything = records_of(first).tobytes()
        assert everything == read(store, first)


class LosesOneAnswer:
    """A proxy to a Redis server that forwards the first script and then closes the connection
    without the answer."""

    def __init__(self, port: int) -> None:
        self.lost, self._port = 0, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._port)) as far, suppress(OSError):
            while asked := near.recv(1 << 20):
                far.sendall(asked)
                answer = far.recv(1 << 20)
                if b"EVAL" in asked and not self.lost:
                    self.lost += 1
                    return
                near.sendall(answer)

    def close(self) -> None:
        self._listener.close()


def test_an_update_with_a_lost_answer_is_applied_once(own_redis: str) -> None:
    """A script that is sent again after a lost answer is applied only once."""
    prepared(new_stores(own_redis)())
    with closing(open_store(own_redis)) as store:
        publish(store, OTHER.ref)
    with closing(LosesOneAnswer(urlsplit(own_redis).port or 0)) as proxy:
        with closing(open_store(proxy.url)) as store:
            assert PUBLISHED == rollback(store, "t")
            assert 1 == proxy.lost
            alias = store.alias("t")
            assert alias
            assert (PUBLISHED.version, (OTHER.version,)) == (alias.version, alias.history)
