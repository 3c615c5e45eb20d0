"""Changes of a store by several processes at once: each outcome is that of some order of them."""

import itertools
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis
from tolhouse.errors import Corrupt, InUse, NotFound, TolhouseError, Unavailable
from tolhouse.store.base import Store, open_store
from tolhouse.store.registry import commit, delete, publish, rollback
from tolhouse.store.writer import write_table
from tolhouse.table.manifest import Manifest
from tolhouse.testing import redis_server

from tests.tables import manifest_of, read, records_of, write

Work = Callable[[Store], object]
VERSIONS = (1, 2, 3)
PUBLISHED, OTHER, NEW = (manifest_of("t", version) for version in VERSIONS)
ABOVE = manifest_of("above", 9, num_shards=1, parent=OTHER.ref, changed=(4,))


def finish(store: Store, manifest: Manifest) -> None:
    """Write a table whose manifest is not there."""
    write_table([store], manifest, lambda shard: records_of(manifest, manifest.shard_ids(shard)))


OPERATIONS: dict[str, Work] = {
    "publish other": lambda store: publish(store, OTHER.ref),
    "publish new": lambda store: publish(store, NEW.ref),
    "roll back": lambda store: rollback(store, "t"),
    "delete other": lambda store: delete(store, OTHER.ref),
    "delete published": lambda store: delete(store, PUBLISHED.ref),
    "finish new": lambda store: finish(store, NEW),
    "delete new": lambda store: delete(store, NEW.ref),
    "lay over other": lambda store: finish(store, ABOVE),
}


PAIRS = [*itertools.combinations(OPERATIONS, 2)]


class Slow:
    """Lets other threads run between any two reads and writes of a store's registry."""

    def __init__(self, store: Store, seed: int) -> None:
        self._random = random.Random(seed)
        for name in ("manifest", "alias", "count", "leased", "refs", "delete_records"):
            setattr(store, name, self._delayed(getattr(store, name)))

        update = store.update
        store.update = lambda change: update(self._delayed(change))  # type: ignore[method-assign]

    def _delayed(self, work: Callable) -> Callable:
        def run(*arguments: object) -> object:
            time.sleep(self._random.random() * 0.002)
            result = work(*arguments)
            time.sleep(self._random.random() * 0.002)
            return result

        return run


def prepared(url: str) -> None:
    """One version is published, after another one; a third has shards and no manifest."""
    with closing(open_store(url)) as store:
        for manifest in (OTHER, PUBLISHED):
            publish(store, write(store, manifest).ref)
        for shard in range(NEW.num_shards):
            store.write_shard(NEW, shard, records_of(NEW, NEW.shard_ids(shard)))


def outcome(store: Store, work: Work) -> str:
    """What an operation came to; an error that asks to try again counts as nothing done."""
    while True:
        try:
            work(store)
        except (Unavailable, Corrupt):  # it is being deleted, or a build lost shards to that
            continue
        except TolhouseError as error:
            return type(error).__name__
        return "done"


def state(url: str) -> dict[str, object]:
    """All that can be seen of the store, where each table that is there has all of its rows."""
    with closing(open_store(url)) as store:
        refs = store.refs()
        for ref in refs:
            manifest = store.manifest(ref)
            store.read_records(manifest, manifest.shard_ids(0))
        left = [m.ref for m in (PUBLISHED, OTHER, NEW) if store.is_being_deleted(m.ref)]
        return {"tables": refs, "alias": store.alias("t"), "half deleted": left}


def emptied(url: str) -> str:
    if url.startswith("redis"):
        with closing(Redis.from_url(url)) as redis:
            redis.flushall()
    return url


@pytest.fixture(scope="module")
def own_redis() -> object:
    with redis_server() as url:
        yield url


@pytest.fixture(params=["file", "redis"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes the URL of an empty store."""
    numbers = itertools.count()
    if request.param == "file":
        return lambda: f"file://{tmp_path}/{next(numbers)}"
    url = request.getfixturevalue("own_redis")
    return lambda: emptied(url)


def serial(new_store: Callable[[], str], names: tuple[str, ...]) -> list[tuple[dict, dict]]:
    """The outcomes of the operations in every order, one after the other."""
    found = []
    for order in itertools.permutations(names):
        prepared(url := new_store())
        with closing(open_store(url)) as store:
            results = {name: outcome(store, OPERATIONS[name]) for name in order}
        found.append((results, state(url)))
    return found


@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_two_at_once_are_one_after_the_other(
    names: tuple[str, ...], new_store: Callable[[], str]
) -> None:
    """Results and what is left are those of one order or the other."""
    interleaved(new_store, names, rounds=4)


def test_three_at_once_are_one_after_the_other(new_store: Callable[[], str]) -> None:
    """The same for some triples."""
    triples = [*itertools.combinations(OPERATIONS, 3)]
    for names in random.Random(0).sample(triples, 10):
        interleaved(new_store, names, rounds=2)


def interleaved(new_store: Callable[[], str], names: tuple[str, ...], rounds: int) -> None:
    expected = serial(new_store, names)
    for seed in range(rounds):
        prepared(url := new_store())
        results: dict[str, str] = {}

        def run(url: str, seed: int, name: str, results: dict[str, str]) -> None:
            with closing(open_store(url)) as store:
                Slow(store, seed)
                results[name] = outcome(store, OPERATIONS[name])

        threads = [
            threading.Thread(target=run, args=(url, seed * 10 + number, name, results))
            for number, name in enumerate(names)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ({name: results[name] for name in names}, state(url)) in [
            ({name: found[name] for name in names}, left) for found, left in expected
        ]


def test_a_table_without_all_of_its_rows_is_not_committed(new_store: Callable[[], str]) -> None:
    """The rows are counted again, last of all."""
    prepared(url := new_store())
    with closing(open_store(url)) as store:
        lacking = manifest_of("lacking", 7)
        store.write_shard(lacking, 0, records_of(lacking, lacking.shard_ids(0)))
        with pytest.raises(Corrupt, match=r"holds 17 of 50 rows .* build it again"):
            commit(store, lacking)
        with pytest.raises(NotFound):
            store.manifest(lacking.ref)


def test_a_deletion_that_was_cut_off_can_be_finished(new_store: Callable[[], str]) -> None:
    """Until then the version is neither there nor can it be built; --force goes on."""
    prepared(url := new_store())
    with closing(open_store(url)) as store:
        gone, store.delete_records = store.delete_records, _killed  # type: ignore[method-assign]
        with suppress(KeyboardInterrupt):
            delete(store, OTHER.ref)
        store.delete_records = gone  # type: ignore[method-assign]
        with pytest.raises(NotFound, match="--force"):
            delete(store, OTHER.ref)
        with pytest.raises(Unavailable, match="is being deleted"):
            finish(store, OTHER)
        delete(store, OTHER.ref, force=True)
        assert 0 == store.count(OTHER, 0)
        finish(store, OTHER)


def _killed(ref: str) -> None:
    raise KeyboardInterrupt


def test_two_builds_of_one_version_in_other_shards(new_store: Callable[[], str]) -> None:
    """The first one's table stays readable, and the second is told."""
    prepared(url := new_store())
    first, second = (manifest_of("twice", 5, num_shards=shards) for shards in (3, 5))
    with closing(open_store(url)) as store:
        for manifest in (first, second):
            for shard in range(manifest.num_shards):
                store.write_shard(manifest, shard, records_of(manifest, manifest.shard_ids(shard)))
        commit(store, first)
        with pytest.raises(InUse, match="--shards 3"):
            commit(store, second)
        assert first == store.manifest(first.ref)
        everything = records_of(first).tobytes()
        assert everything == read(store, first)


class LosesOneAnswer:
    """A proxy to a Redis server that passes the first script on, and then cuts the connection."""

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


def test_an_update_is_made_once_though_its_answer_is_lost(own_redis: str) -> None:
    """A script that was run, and is sent again, changes nothing more."""
    prepared(emptied(own_redis))
    with closing(open_store(own_redis)) as store:
        publish(store, OTHER.ref)
    with closing(LosesOneAnswer(urlsplit(own_redis).port or 0)) as proxy:
        with closing(open_store(proxy.url)) as store:
            assert PUBLISHED == rollback(store, "t")
            assert 1 == proxy.lost
            alias = store.alias("t")
            assert alias
            assert (PUBLISHED.version, (OTHER.version,)) == (alias.version, alias.history)
