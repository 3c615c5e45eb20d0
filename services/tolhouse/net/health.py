"""The health of peers: lookup replicas, Redis nodes, workers, a worker's source of rows.

A failed call puts its peer down. A call that took long says little: the work may have been large.
So probes without work compare the peer with others: it is slow if it takes several times as long
as the quickest. A peer that is down or slow is used last until a probe finds it well.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Literal

from tolhouse.errors import TolhouseError
from tolhouse.logs import event, log

SUSPECT_SECONDS = 0.1  # a wait that is worth a probe
_SLOW_TIMES = 4.0  # as long as the quickest of the others
_PROBES = 2  # of which the quicker counts: the first may have to connect

State = Literal["up", "probing", "slow", "down", "gone"]


@dataclass
class _Peer:
    state: State  # "up": it has recovered, and is forgotten if it stays so for the longest pause
    due: float  # when to look at it again
    pause: float


class PeerHealth:
    """Tracks peers by name; one that nothing was reported of is up. Threads may share it.

    `probe(name)` says whether a peer answers, or raises. `alternatives(name)` names peers that can
    do its work, or is None once the peer is gone. A thread probes peers in trouble with growing
    pauses, which stay long for a while after a recovery. Without `probe`, reports alone count.
    """

    def __init__(
        self,
        kind: str,
        probe: Callable[[str], bool] | None = None,
        alternatives: Callable[[str], Iterable[str] | None] = lambda _: (),
        *,
        first_seconds: float = 0.1,
        longest_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kind, self._probe, self._alternatives = kind, probe, alternatives
        self._first, self._longest, self._clock = first_seconds, longest_seconds, clock
        self._peers: dict[str, _Peer] = {}
        self._changed = threading.Condition()  # with a lock that can be taken twice
        self._watching = self._closed = False
        self.unhealthy: frozenset[str] = frozenset()  # those that are down or slow

    def up(self, name: str) -> bool:
        return name not in self.unhealthy

    def order(self, names: Iterable[str]) -> list[str]:
        """The same names, healthy ones first."""
        return sorted(names, key=self.unhealthy.__contains__)

    def report_down(self, name: str, reason: object = "") -> None:
        """A call failed, or found no answer in time."""
        self._report(name, "down", reason)

    def report_slow(self, name: str) -> None:
        """A call took long; whether the peer is slow is left to a comparison by probes."""
        known = self._peers.get(name)
        if known is None or known.state == "up":
            self._report(name, "probing")

    def report_up(self, name: str) -> None:
        """The peer is known to be well."""
        if name in self._peers:
            self._report(name, "up")

    def forget(self, name: str) -> None:
        """The peer is gone for good."""
        with self._changed:
            self._peers.pop(name, None)
            self.unhealthy -= {name}

    def close(self) -> None:
        """Probe no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _report(self, name: str, state: State, reason: object = "") -> None:
        with self._changed:
            known = self._peers.get(name) or _Peer("up", 0.0, self._first)
            due = known.due if known.state != "up" else self._clock() + known.pause
            self._become(name, _Peer(state, due, known.pause), reason)
            self._changed.notify_all()
            if self._probe and not self._watching and not self._closed:
                self._watching = True
                threading.Thread(target=self._watch, name=self._kind, daemon=True).start()

    def _become(self, name: str, peer: _Peer, reason: object = "") -> None:
        was_up, is_up = self.up(name), peer.state in ("up", "probing")
        self._peers[name] = peer
        self.unhealthy = self.unhealthy - {name} if is_up else self.unhealthy | {name}
        if was_up != is_up:
            fields = {"reason": str(reason)} if reason else {}
            level = logging.INFO if is_up else logging.WARNING
            event(f"{self._kind} is {peer.state}", level, peer=name, **fields)

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._closed or not self._peers:
                    self._watching = False
                    return
                name, peer = min(self._peers.items(), key=lambda item: item[1].due)
                if (wait := peer.due - self._clock()) > 0:
                    self._changed.wait(wait)
                    continue
                if peer.state == "up":
                    self.forget(name)
                    continue
            state: State = peer.state
            try:
                state = self._examine(name)
            except Exception:  # noqa: BLE001 - a defect must not end the thread
                log.exception("probing %s %s failed", self._kind, name)
            with self._changed:
                if state == "gone":
                    self.forget(name)
                elif name in self._peers:  # it has not been forgotten meanwhile
                    pause = min(2 * peer.pause, self._longest)
                    due = self._clock() + (self._longest if state == "up" else pause)
                    self._become(name, _Peer(state, due, pause))

    def _examine(self, name: str) -> State:
        """The state of a peer by probes."""
        others = self._alternatives(name)
        if others is None:
            return "gone"
        own = self._seconds(name)
        if SUSPECT_SECONDS <= own < inf:
            quickest = min([inf, *(self._seconds(other) for other in others if self.up(other))])
            return "slow" if own > _SLOW_TIMES * quickest else "up"
        return "up" if own < inf else "down"

    def _seconds(self, name: str) -> float:
        """How long the peer takes to answer a probe; infinity if it does not answer."""
        assert self._probe
        best = inf
        with suppress(TolhouseError):
            for _ in range(_PROBES):
                began = self._clock()
                if not self._probe(name):
                    return inf
                best = min(best, self._clock() - began)
                if best < SUSPECT_SECONDS:
                    break
            return best
        return inf
