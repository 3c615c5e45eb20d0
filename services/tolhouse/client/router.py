"""Which lookup replica each shard's ids go to: rendezvous hashing, and those that failed or lag go last until they answer as the others do."""

import threading
from collections.abc import Callable

import numpy as np
import xxhash

from tolhouse.logs import event
from tolhouse.net.health import lags
from tolhouse.table.manifest import Manifest

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = (
    0.1,
    1.0,
)  # between two looks at a replica that is away


class Replicas:
    """`seconds` says how long a replica takes to say something of a table, None if it doesn't. Safe to use from several threads."""

    def __init__(self, seconds: Callable[[str, str], float | None]) -> None:
        self.seconds = seconds
        self.targets: tuple[str, ...] = ()
        self._away: frozenset[str] = frozenset()
        self._watched: set[str] = set()
        self._orders: dict[tuple[str, tuple[str, ...], frozenset[str]], np.ndarray] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def become(self, targets: tuple[str, ...]) -> None:
        """From now on there are these. A shard stays with its replica, unless that is gone or a new one ranks before it."""
        self.targets, self._orders = targets, {}

    def owner(
        self, manifest: Manifest, ids: np.ndarray, attempt: int
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """The replicas, and the number among them [T] of the one that each of `ids` [T] is asked of at this attempt."""
        targets, order = self._order(manifest)
        there = sum(
            target not in self._away for target in targets
        )  # only if there are none, those that are away are tried
        return targets, order[manifest.shard_of(ids), attempt % (there or len(targets))]

    def in_turn(self) -> list[str]:
        """All replicas, those that are away last."""
        away = self._away
        return sorted(self.targets, key=lambda target: target in away)

    def failed(self, target: str, ref: str) -> None:
        """It is asked last from now on, by anyone, until it answers: a replica that hangs costs its callers one wait, not one each time."""
        if len(self.targets) > 1:
            self._put_last(target, "lookup replica is away")
            self.suspect(target, ref)

    def suspect(self, target: str, ref: str) -> None:
        """A thread looks whether it lags behind the others, and while it does it is asked last."""
        with self._lock:
            if target in self._watched or len(self.targets) == 1:
                return
            self._watched.add(target)
        threading.Thread(
            target=self._watch, args=(target, ref), name=f"watch {target}", daemon=True
        ).start()

    def close(self) -> None:
        self._closed.set()

    def _put_last(self, target: str, why: str) -> None:
        with self._lock:
            is_news, self._away = target not in self._away, self._away | {target}
        if is_news:
            event(why, target=target)

    def _watch(self, target: str, ref: str) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._closed.wait(pause):
            gone = target not in self.targets
            others = [
                other for other in self.targets if other != target and other not in self._away
            ]
            if gone or not lags(target, others, lambda one: self.seconds(one, ref)):
                with self._lock:
                    was_away, self._away = target in self._away, self._away - {target}
                    self._watched.discard(target)
                if was_away:
                    event(
                        "lookup replica is gone" if gone else "lookup replica is back",
                        target=target,
                    )
                return
            self._put_last(target, "lookup replica lags behind the others")
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _order(self, manifest: Manifest) -> tuple[tuple[str, ...], np.ndarray]:
        """The replicas, and their numbers in the order in which each shard asks them, [num_shards, replicas]."""
        targets, away, orders = self.targets, self._away, self._orders
        key = manifest.ref, targets, away
        if key not in orders:
            weights = [
                [
                    xxhash.xxh3_64_intdigest(f"{manifest.ref}:{shard}:{target}".encode())
                    for target in targets
                ]
                for shard in range(manifest.num_shards)
            ]
            order = np.argsort(np.array(weights, np.uint64), axis=1)
            last = np.array([target in away for target in targets])
            orders[key] = np.take_along_axis(
                order, np.argsort(last[order], axis=1, kind="stable"), axis=1
            )
        return targets, orders[key]
