"""Run store operations in several threads and test whether a serial order explains the outcome."""

import itertools
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing

from redis import Redis
from tolhouse.errors import CorruptError, TolhouseError, UnavailableError
from tolhouse.store.base import Store, open_store
from tolhouse.store.registry import delete, publish, rollback
from tolhouse.store.writer import write_table
from tolhouse.table.manifest import Manifest

from tests.tables import manifest_of, records_of, write

NewStore = Callable[[], str]  # returns the URL of an empty store
Names = tuple[str, ...]  # names of operations
# the result of each operation, and the final state of the store
Outcome = tuple[dict[str, str], dict[str, object]]
Work = Callable[[Store], object]
VERSIONS = (1, 2, 3)
PUBLISHED, OTHER, NEW = (manifest_of("t", version) for version in VERSIONS)
ABOVE = manifest_of("t", 9, num_shards=1, parent=OTHER.ref, changed=(4,))


def new_stores(base: str) -> NewStore:
    """Makes empty stores: folders of file://PATH, or the Redis server redis://HOST:PORT, which is
    emptied."""
    numbers = itertools.count()

    def new_store() -> str:
        if base.startswith("file"):
            return f"{base}/{next(numbers)}"
        with closing(Redis.from_url(base)) as redis:
            redis.flushall()
        return base

    return new_store


def finish(store: Store, manifest: Manifest) -> None:
    """Write a table without its manifest."""
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
TRIPLES = random.Random(0).sample([*itertools.combinations(OPERATIONS, 3)], 10)


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
    """Publish one version after another; a third version has shards but no manifest."""
    with closing(open_store(url)) as store:
        for manifest in (OTHER, PUBLISHED):
            publish(store, write(store, manifest).ref)
        for shard in range(NEW.num_shards):
            store.write_shard(NEW, shard, records_of(NEW, NEW.shard_ids(shard)))


def outcome(store: Store, work: Work) -> str:
    """The result of an operation. An error that asks to try again does not count as a result."""
    while True:
        try:
            work(store)
        except (UnavailableError, CorruptError):
            # the version is being deleted, or a build lost shards to a deletion
            continue
        except TolhouseError as error:
            return type(error).__name__
        return "done"


def state(url: str) -> dict[str, object]:
    """The visible state of the store. Every listed table must have all of its rows."""
    with closing(open_store(url)) as store:
        refs = store.refs()
        try:
            for ref in refs:
                manifest = store.manifest(ref)
                store.read_records(manifest, manifest.shard_ids(0))
        except TolhouseError as error:
            return {"unreadable": str(error)}
        left = [m.ref for m in (PUBLISHED, OTHER, NEW) if store.is_being_deleted(m.ref)]
        return {"tables": refs, "alias": store.alias("t"), "half deleted": left}


def serial(new_store: NewStore, names: Names) -> list[Outcome]:
    """The outcomes of all serial orders of the operations."""
    found = []
    for order in itertools.permutations(names):
        prepared(url := new_store())
        with closing(open_store(url)) as store:
            results = {name: outcome(store, OPERATIONS[name]) for name in order}
        found.append((results, state(url)))
    return found


def not_serial(
    new_store: NewStore,
    names: Names,
    rounds: int,
    opened: Callable[[str], Store] = open_store,
) -> list[Outcome]:
    """Concurrent outcomes of the operations that no serial order explains."""
    expected, found = serial(new_store, names), []
    for seed in range(rounds):
        prepared(url := new_store())
        results: dict[str, str] = {}

        def run(url: str, seed: int, name: str, results: dict[str, str]) -> None:
            with closing(opened(url)) as store:
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
        if (results, left := state(url)) not in expected:
            found.append((results, left))
    return found
