"""The replicas of a service: which addresses there are, a stream to each, and which of them each shard's ids go to."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xxhash

from tolhouse.client.fetch_stream import FetchStream
from tolhouse.errors import TolhouseError, Unavailable
from tolhouse.logs import event
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.dns import Addresses
from tolhouse.net.health import PeerHealth
from tolhouse.table.manifest import Manifest

_RESOLVE_SECONDS = 1.0  # between two looks at the addresses of a name
_GONE_SECONDS = 600.0  # that calls to an address may go on after its name has lost it: it drains


class Replicas:
    """Rendezvous hashing spreads shards over replicas; those that are down or slow come last. Safe to use from several threads.

    `probe` says whether a replica answers. Names with several addresses are followed.
    """

    def __init__(
        self,
        targets: str | Sequence[str],
        credentials: ClientCredentials,
        probe: Callable[[FetchStream], bool],
    ) -> None:
        self._addresses = Addresses(targets)
        self._addresses.check(credentials)
        self.credentials, self.name = credentials, ",".join(self._addresses.targets)
        self.health = PeerHealth(
            "lookup replica", lambda target: probe(self._streams[target]), self._others
        )
        self._targets: tuple[str, ...] = ()
        self._streams: dict[str, FetchStream] = {}
        self._gone: dict[str, float] = {}  # addresses that have streams still, and since when
        self._orders: dict[tuple[str, tuple[str, ...], frozenset[str]], np.ndarray] = {}
        self._closed, self._renewing = threading.Event(), threading.Lock()
        self._renew()
        if self._addresses.change:
            threading.Thread(target=self._follow, name="addresses", daemon=True).start()

    @property
    def targets(self) -> tuple[str, ...]:
        """The addresses now; Unavailable while there are none."""
        if not self._targets:
            raise Unavailable(f"{self.name}: the name has no address yet")
        return self._targets

    def close(self) -> None:
        self._closed.set()
        self.health.close()
        with self._renewing:
            for stream in self._streams.values():
                stream.close()

    def in_turn(self) -> list[FetchStream]:
        """All replicas, healthy ones first."""
        return [self._streams[target] for target in self.health.order(self.targets)]

    def owner(
        self, manifest: Manifest, ids: np.ndarray, attempt: int
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """The replicas, and the index [T] of the one to ask for each of `ids` [T] at this attempt."""
        targets, order = self._order(manifest)
        healthy = sum(map(self.health.up, targets))  # the others are tried only if there are none
        return targets, order[manifest.shard_of(ids), attempt % (healthy or len(targets))]

    def divide(
        self, manifest: Manifest, ids: np.ndarray, left: np.ndarray, attempt: int
    ) -> Iterator[tuple[FetchStream, np.ndarray]]:
        """The indices `left` of `ids`, by the replica to ask for them at this attempt."""
        targets = self.targets
        if len(targets) == 1:
            yield self._streams[targets[0]], left
            return
        targets, owner_of = self.owner(manifest, ids[left], attempt)
        for number in np.unique(owner_of).tolist():
            yield self._streams[targets[number]], left[owner_of == number]

    def failed(self, stream: FetchStream, error: TolhouseError) -> None:
        """Ask this replica last from now on, so that one that hangs costs its callers one wait; unless it is the only one."""
        if len(self._targets) > 1:
            self.health.report_down(stream.target, error)

    def took_long(self, stream: FetchStream) -> None:
        if len(self._targets) > 1:
            self.health.report_slow(stream.target)

    def _others(self, target: str) -> list[str] | None:
        targets = self._targets
        return [other for other in targets if other != target] if target in targets else None

    def _order(self, manifest: Manifest) -> tuple[tuple[str, ...], np.ndarray]:
        """The replicas, and their indices in the order in which each shard asks them, [num_shards, replicas]."""
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
            healthy_first = np.argsort(last[order], axis=1, kind="stable")
            orders[key] = np.take_along_axis(order, healthy_first, axis=1)
        return targets, orders[key]

    def _follow(self) -> None:
        while not self._closed.wait(_RESOLVE_SECONDS):
            try:
                self._renew()
            except TolhouseError as error:  # a TLS file that does not fit, for now
                event("new addresses can't be called", logging.WARNING, reason=str(error))

    def _renew(self) -> None:
        """Resolve names. A shard stays with its replica, unless that is gone or a new one ranks before it."""
        found, now = self._addresses.look_up(), time.monotonic()
        with self._renewing:
            if self._closed.is_set():
                return
            for address in found:
                self._gone.pop(address, None)
                if address not in self._streams:
                    credentials = self._addresses.credentials_for(address, self.credentials)
                    self._streams[address] = FetchStream(address, credentials)
            if found != self._targets:
                self._targets, self._orders = found, {}
            for address in set(self._streams) - set(found):
                if now - self._gone.setdefault(address, now) > _GONE_SECONDS:
                    del self._gone[address]
                    self._streams.pop(address).close()
