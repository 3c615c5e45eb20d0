"""Which lookup replica each shard's ids go to: rendezvous hashing, and replicas that are down or slow come last."""

from collections.abc import Callable

import numpy as np
import xxhash

from tolhouse.errors import TolhouseError
from tolhouse.net.health import PeerHealth
from tolhouse.table.manifest import Manifest


class Replicas:
    """The replicas now, and their order for each shard. `probe` says whether one answers. Safe to use from several threads."""

    def __init__(self, probe: Callable[[str], bool]) -> None:
        self.targets: tuple[str, ...] = ()
        self.health = PeerHealth("lookup replica", probe, self._others)
        self._orders: dict[tuple[str, tuple[str, ...], frozenset[str]], np.ndarray] = {}

    def become(self, targets: tuple[str, ...]) -> None:
        """From now on there are these. A shard stays with its replica, unless that is gone or a new one ranks before it."""
        self.targets, self._orders = targets, {}

    def owner(
        self, manifest: Manifest, ids: np.ndarray, attempt: int
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """The replicas, and the number among them [T] of the one that each of `ids` [T] is asked of at this attempt."""
        targets, order = self._order(manifest)
        healthy = sum(map(self.health.up, targets))  # the others are tried only if there are none
        return targets, order[manifest.shard_of(ids), attempt % (healthy or len(targets))]

    def in_turn(self) -> list[str]:
        """All replicas, healthy ones first."""
        return self.health.order(self.targets)

    def failed(self, target: str, error: TolhouseError) -> None:
        """It is asked last from now on, so that one that hangs costs its callers one wait; unless it is the only one."""
        if len(self.targets) > 1:
            self.health.report_down(target, error)

    def took_long(self, target: str) -> None:
        if len(self.targets) > 1:
            self.health.report_slow(target)

    def _others(self, target: str) -> list[str] | None:
        targets = self.targets
        return [other for other in targets if other != target] if target in targets else None

    def _order(self, manifest: Manifest) -> tuple[tuple[str, ...], np.ndarray]:
        """The replicas, and their numbers in the order in which each shard asks them, [num_shards, replicas]."""
        targets, unhealthy, orders = self.targets, self.health.unhealthy, self._orders
        key = manifest.ref, targets, unhealthy
        if key not in orders:
            weights = [
                [
                    xxhash.xxh3_64_intdigest(f"{manifest.ref}:{shard}:{target}".encode())
                    for target in targets
                ]
                for shard in range(manifest.num_shards)
            ]
            order = np.argsort(np.array(weights, np.uint64), axis=1)
            last = np.array([target in unhealthy for target in targets])
            orders[key] = np.take_along_axis(
                order, np.argsort(last[order], axis=1, kind="stable"), axis=1
            )
        return targets, orders[key]
