"""The replicas of a service, and which of them to ask for each shard."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from xxhash import xxh3_64_intdigest

from tolhouse.client.fetch_stream import Replica
from tolhouse.errors import TolhouseError, Unavailable
from tolhouse.logs import event
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.dns import Addresses
from tolhouse.net.health import PeerHealth
from tolhouse.table.manifest import Manifest

_RESOLVE_SECONDS = 1.0  # between two look-ups of a name's addresses


class Replicas:
    """A replica for each address of `targets`, as these change. Safe to use from several threads.

    Rendezvous hashing gives each shard an order of replicas, so that their hot rows differ; those
    that are down or slow come last. `probe` says whether one answers.
    """

    def __init__(
        self,
        targets: str | Sequence[str],
        credentials: ClientCredentials,
        probe: Callable[[Replica], bool],
    ) -> None:
        self._addresses = Addresses(targets, credentials)
        self.name = ",".join(self._addresses.targets)
        self._replicas: tuple[Replica, ...] = ()
        self._orders: dict[tuple[str, tuple[Replica, ...], frozenset[str]], np.ndarray] = {}
        self.health = PeerHealth(
            "lookup replica",
            lambda target: any(probe(r) for r in self._replicas if r.target == target),
            self._others,
        )
        self._closed, self._renewing = threading.Event(), threading.Lock()
        self._renew()
        if self._addresses.change:
            threading.Thread(target=self._follow, name="addresses", daemon=True).start()

    @property
    def all(self) -> tuple[Replica, ...]:
        """The replicas now; Unavailable while there are none."""
        if not self._replicas:
            raise Unavailable(f"{self.name}: the name has no address yet")
        return self._replicas

    def close(self) -> None:
        self._closed.set()
        self.health.close()
        with self._renewing:
            for replica in self._replicas:
                replica.close()

    def in_turn(self) -> list[Replica]:
        """All replicas, healthy ones first."""
        return sorted(self.all, key=lambda replica: not self.health.up(replica.target))

    def report(self, replica: Replica, error: TolhouseError | None) -> None:
        """A call failed, or took long; of a single replica no health is kept."""
        if len(self._replicas) > 1 and error:
            self.health.report_down(replica.target, error)
        elif len(self._replicas) > 1:
            self.health.report_slow(replica.target)

    def divide(
        self, manifest: Manifest, ids: np.ndarray, left: np.ndarray, attempt: int
    ) -> Iterator[tuple[Replica, np.ndarray]]:
        """The indices `left` of `ids`, by the replica to ask for them at this attempt."""
        replicas = self.all
        if len(replicas) == 1:
            yield replicas[0], left
            return
        healthy = sum(self.health.up(r.target) for r in replicas)  # if there is one, no others
        shards, rank = manifest.shard_of(ids[left]), attempt % (healthy or len(replicas))
        owners = self._order(manifest, replicas)[shards, rank]
        for number in np.unique(owners).tolist():
            yield replicas[number], left[owners == number]

    def _order(self, manifest: Manifest, replicas: tuple[Replica, ...]) -> np.ndarray:
        """Indices of the replicas in each shard's order, [num_shards, replicas]."""
        unhealthy = self.health.unhealthy
        key = manifest.ref, replicas, unhealthy
        if key not in self._orders:
            weights = [
                [xxh3_64_intdigest(f"{manifest.ref}:{shard}:{r.target}".encode()) for r in replicas]
                for shard in range(manifest.num_shards)
            ]
            order = np.argsort(np.array(weights, np.uint64), axis=1)
            last = np.array([r.target in unhealthy for r in replicas])
            healthy_first = np.argsort(last[order], axis=1, kind="stable")
            self._orders[key] = np.take_along_axis(order, healthy_first, axis=1)
        return self._orders[key]

    def _others(self, target: str) -> list[str] | None:
        targets = [replica.target for replica in self._replicas]
        return [other for other in targets if other != target] if target in targets else None

    def _follow(self) -> None:
        while not self._closed.wait(_RESOLVE_SECONDS):
            try:
                self._renew()
            except TolhouseError as error:  # a TLS file that does not fit, for now
                event("new addresses can't be called", logging.WARNING, reason=str(error))

    def _renew(self) -> None:
        """Resolve names. A replica that its name has lost ends with the last call that has it."""
        found, now = (
            self._addresses.look_up(),
            {replica.target: replica for replica in self._replicas},
        )
        with self._renewing:
            if found != tuple(now) and not self._closed.is_set():
                self._replicas = tuple(now.get(address) or self._dial(address) for address in found)
                self._orders = {}

    def _dial(self, address: str) -> Replica:
        return Replica(address, self._addresses.credentials_for(address))
