"""The replicas of a service, and which of them to ask for each shard."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from xxhash import xxh3_64_intdigest

from tolhouse.client.fetch_stream import Replica
from tolhouse.errors import TolhouseError, Unavailable
from tolhouse.logs import event
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import Addresses
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
        self._replicas: dict[str, Replica] = {}  # by address; replaced as a whole
        self.health = PeerHealth(
            "lookup replica",
            lambda target: target in self._replicas and probe(self._replicas[target]),
            lambda target: self._replicas.keys() - {target} if target in self._replicas else None,
        )
        self._closed, self._renewing = threading.Event(), threading.Lock()
        self._renew()
        if self._addresses.change:
            threading.Thread(target=self._follow, name="addresses", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self.health.close()
        with self._renewing:
            for replica in self._replicas.values():
                replica.close()

    def in_turn(self) -> list[Replica]:
        """All replicas, healthy ones first; Unavailable while there are none."""
        replicas = self._replicas
        if not replicas:
            raise Unavailable(f"{self.name}: the name has no address yet")
        return [replicas[target] for target in self.health.order(replicas)]

    def divide(
        self, manifest: Manifest, ids: np.ndarray, left: np.ndarray, attempt: int
    ) -> Iterator[tuple[Replica, np.ndarray]]:
        """The indices `left` of `ids`, by the replica to ask for them at this attempt."""
        replicas = self.in_turn()
        if len(replicas) == 1:
            yield replicas[0], left
            return
        healthy = sum(self.health.up(r.target) for r in replicas)  # if there is one, no others
        shards, rank = manifest.shard_of(ids[left]), attempt % (healthy or len(replicas))
        targets = tuple(replica.target for replica in replicas)
        order = _order(manifest.ref, manifest.num_shards, targets, self.health.unhealthy)
        owners = order[shards, rank]
        for number in np.unique(owners).tolist():
            yield replicas[number], left[owners == number]

    def _follow(self) -> None:
        while not self._closed.wait(_RESOLVE_SECONDS):
            try:
                self._renew()
            except TolhouseError as error:  # a TLS file that does not fit, for now
                event("new addresses can't be called", logging.WARNING, reason=str(error))

    def _renew(self) -> None:
        """Resolve names. A replica that its name has lost ends with the last call that has it."""
        found, now = self._addresses.look_up(), self._replicas
        with self._renewing:
            if found != tuple(now) and not self._closed.is_set():
                credentials = self._addresses.credentials_for
                self._replicas = {at: now.get(at) or Replica(at, credentials(at)) for at in found}


@lru_cache(64)
def _order(
    ref: str, num_shards: int, targets: tuple[str, ...], unhealthy: frozenset[str]
) -> np.ndarray:
    """Indices of `targets` in each shard's order, [num_shards, len(targets)]; healthy ones first."""
    weights = [
        [xxh3_64_intdigest(f"{ref}:{shard}:{target}".encode()) for target in targets]
        for shard in range(num_shards)
    ]
    order = np.argsort(np.array(weights, np.uint64), axis=1)
    last = np.array([target in unhealthy for target in targets])
    healthy_first = np.argsort(last[order], axis=1, kind="stable")
    return np.take_along_axis(order, healthy_first, axis=1)
