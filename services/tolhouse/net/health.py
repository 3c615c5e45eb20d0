"""The health of peers: lookup replicas, Redis nodes, workers, a worker's row source.

A failed call marks its peer as down. A slow call does not mark its peer as slow, because the call
may have been large. Instead, probes compare the peer with others: it is slow if its probe takes
several times as long as the fastest probe. Until a probe succeeds in time, a slow peer is used
after the healthy ones, and a peer that is down after the slow ones.
"""

import logging
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Literal

from tolhouse.errors import TolhouseError
from tolhouse.logs import event, log

SUSPECT_SECONDS = 0.05  # a call that takes longer causes a probe
_SLOW_TIMES = 4.0  # a slow peer takes this many times as long as the fastest of the others
_PROBES = 2  # the faster probe counts, because the first may have to connect
# The median of these probes decides whether a peer that answers is slow. They are apart by random
# times, because a peer may stop and continue all the time.
_PROBES_OF_SUSPECT = 5
_APART_SECONDS = 0.05  # at most

State = Literal["up", "probing", "slow", "down", "gone"]
_RANKS = {"slow": 1, "down": 2}


@dataclass
class _Peer:
    # A peer is "up" after a recovery. It is forgotten if it stays up for the longest pause.
    state: State
    due: float  # the time of the next probe
    pause: float


class PeerHealth:
    """Tracks peers by name. Peers without reports are up. Several threads may share one object.

    `probe(name)` returns whether a peer answers, or raises an error. `alternatives(name)` returns
    the peers that can do its work, or None if the peer no longer exists. A thread probes unhealthy
    peers. The pauses between probes grow, and they stay long for a while after a recovery. Without
    `probe`, only reports count.
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
        self._changed = threading.Condition()  # the lock is re-entrant
        self._watching = self._closed = False
        self.unhealthy: frozenset[str] = frozenset()  # peers that are down or slow

    def up(self, name: str) -> bool:
        """Return whether the peer is neither down nor slow."""
        return name not in self.unhealthy

    def order(self, names: Iterable[str]) -> list[str]:
        """Return the names: healthy ones first, and those that are down last."""
        return sorted(names, key=self.rank)

    def rank(self, name: str) -> int:
        """Return 0 for a healthy peer, 1 for one that is slow, and 2 for one that is down."""
        known = self._peers.get(name)
        return _RANKS.get(known.state, 0) if known else 0

    def report_down(self, name: str, reason: object = "") -> None:
        """Report that a call failed or timed out."""
        self._report(name, "down", reason)

    def report_slow(self, name: str) -> None:
        """Report a slow call. Probes then compare the peer with others."""
        known = self._peers.get(name)
        if known is None or known.state == "up":
            self._report(name, "probing")

    def report_up(self, name: str) -> None:
        """Report that the peer is healthy."""
        if name in self._peers:
            self._report(name, "up")

    def forget(self, name: str) -> None:
        """Remove a peer that no longer exists."""
        with self._changed:
            self._peers.pop(name, None)
            self.unhealthy -= {name}

    def close(self) -> None:
        """Stop probing."""
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
            except Exception:  # noqa: BLE001 - the thread must continue after a defect
                log.exception("probing %s %s failed", self._kind, name)
            with self._changed:
                known = self._peers.get(name)
                if state == "gone":
                    self.forget(name)
                elif known:  # unless it was forgotten in the meantime
                    if known is not peer and known.state == "down":
                        state = "down"  # a call has failed since the probe began
                    pause = min(2 * peer.pause, self._longest)
                    due = self._clock() + (self._longest if state == "up" else pause)
                    self._become(name, _Peer(state, due, pause))

    def _examine(self, name: str) -> State:
        """Probe a peer and return its state."""
        others = self._alternatives(name)
        if others is None:
            return "gone"
        suspect = name in self._peers and self._peers[name].state != "down"
        own = self._median_seconds(name) if suspect else self._seconds(name)
        if SUSPECT_SECONDS <= own < inf:
            fastest = min([inf, *(self._seconds(other) for other in others if self.up(other))])
            return "slow" if own > _SLOW_TIMES * fastest else "up"
        return "up" if own < inf else "down"

    def _median_seconds(self, name: str) -> float:
        taken = list[float]()
        for number in range(_PROBES_OF_SUSPECT):
            if number:
                time.sleep(random.uniform(0, _APART_SECONDS))
            taken.append(self._seconds(name, 1))
        return statistics.median(taken)

    def _seconds(self, name: str, probes: int = _PROBES) -> float:
        """Return the seconds that a probe of the peer takes, or infinity if it fails."""
        assert self._probe
        best = inf
        with suppress(TolhouseError):
            for _ in range(probes):
                began = self._clock()
                if not self._probe(name):
                    return inf
                best = min(best, self._clock() - began)
                if best < SUSPECT_SECONDS:
                    break
            return best
        return inf
