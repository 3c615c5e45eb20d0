"""Peer health: down, slow, and only as slow as all others."""

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tolhouse.errors import UnavailableError
from tolhouse.net.health import PeerHealth
from tolhouse.testing import wait_until


class Peers:
    """Peers with given response times on a simulated clock; None means no response.

    The last response is repeated.
    """

    def __init__(self, **answers: list[float | None]) -> None:
        self.answers = answers
        self.probed: list[str] = []
        self.times: list[float] = []
        self._passed = 0.0

    def clock(self) -> float:
        return time.monotonic() + self._passed

    def probe(self, name: str) -> bool:
        self.probed.append(name)
        self.times.append(time.monotonic())
        answers = self.answers[name]
        seconds = answers.pop(0) if len(answers) > 1 else answers[0]
        if seconds is None:
            raise UnavailableError("no response")
        self._passed += seconds
        return True

    def others(self, name: str) -> list[str] | None:
        return [other for other in self.answers if other != name] if self.answers else None


@pytest.fixture
def tracked() -> Iterator[Callable[..., PeerHealth]]:
    """Makes trackers of `Peers` that are closed after the test."""
    made: list[PeerHealth] = []

    def track(peers: Peers, first: float = 0.001, longest: float = 30.0) -> PeerHealth:
        seconds = {"first_seconds": first, "longest_seconds": longest}
        made.append(PeerHealth("peer", peers.probe, peers.others, clock=peers.clock, **seconds))
        return made[-1]

    yield track
    for health in made:
        health.close()


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        ([0.01], [[]], True),  # fast enough: the others are not probed
        ([None], [[]], False),
        ([None], [], False),
        ([0.4, 0.4], [[0.001]], False),
        ([0.4, 0.4], [[0.2, 0.2]], True),  # this machine is busy
        ([0.4, 0.4], [[None], [0.01]], False),
        ([0.4, 0.4], [[None]], True),  # the others are no better
        ([0.4, 0.4], [], True),
        ([0.4, 0.01], [[]], True),  # connecting took time; the others are not probed
        ([0.4, 0.4], [[3.0, 0.01]], False),
        ([0.4, 0.01, 0.4, 0.01, 0.4], [[0.01]], False),  # it stops and continues all the time
        ([0.01, 0.01, 0.4, 0.01, 0.4], [[]], True),
    ],
)
def test_a_suspected_peer_is_compared_with_the_others(
    tracked: Callable[..., PeerHealth], own: list, others: list[list], expected: bool
) -> None:
    """A suspected peer is unhealthy if it does not answer or takes several times as long as another
    peer."""
    peers = Peers(own=own, **{f"other{n}": each for n, each in enumerate(others)})
    probes = sum(map(len, [own, *others]))
    health = tracked(peers, longest=1000.0)
    health.report_slow("own")
    assert health.up("own")
    wait_until(lambda: len(peers.probed) >= probes)
    health.close()
    for thread in threading.enumerate():
        if thread.name == "peer":  # ends after the decision
            thread.join()
    assert expected == health.up("own")
    order = ["own", "other"] if expected else ["other", "own"]
    assert order == health.order(["own", "other"])


def test_a_slow_peer_comes_before_one_that_is_down(tracked: Callable[..., PeerHealth]) -> None:
    """A slow peer is used before a peer that does not answer."""
    health = tracked(Peers(slow=[0.4], fast=[0.01], down=[None]), longest=1000.0)
    health.report_down("down")
    health.report_slow("slow")
    wait_until(lambda: not health.up("slow"))
    assert ["fast", "slow", "down"] == health.order(["down", "slow", "fast"])


def test_a_peer_stays_down_until_it_answers(tracked: Callable[..., PeerHealth]) -> None:
    """A peer that is down is probed until it answers, and not afterwards."""
    peers = Peers(own=[None, None, 0.0])
    health = tracked(peers, longest=0.004)
    assert health.up("own")
    for _ in range(3):
        health.report_down("own", "refused")
    assert frozenset({"own"}) == health.unhealthy
    wait_until(lambda: health.up("own"))
    assert 3 == len(peers.probed)


@pytest.mark.parametrize(("state", "probes"), [("slow", 5), ("down", 1)])
def test_a_failure_during_a_probe_is_newer_than_its_answer(
    state: str, probes: int, tracked: Callable[..., PeerHealth], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer whose call fails while it is probed is down, and is probed again."""
    peers = Peers(own=[0.01] * probes + [None])
    answer = peers.probe

    def probe(name: str) -> bool:
        if len(peers.probed) == probes - 1:
            health.report_down(name, "timed out")
        return answer(name)

    monkeypatch.setattr(peers, "probe", probe)
    health = tracked(peers)
    getattr(health, f"report_{state}")("own")
    wait_until(lambda: len(peers.probed) > probes + 2)
    assert frozenset({"own"}) == health.unhealthy


def test_a_failure_soon_after_recovery_keeps_the_probe_interval(
    tracked: Callable[..., PeerHealth],
) -> None:
    """A peer that answers probes but fails real work keeps its long probe interval."""
    peers = Peers(own=[None] * 14 + [0.0])
    health = tracked(peers, first=0.0001)
    health.report_down("own")
    wait_until(lambda: health.up("own"))
    health.report_down("own")
    time.sleep(0.1)
    assert not health.up("own")
    assert 15 == len(peers.probed)


def test_the_probe_interval_is_reset_after_a_long_recovery(
    tracked: Callable[..., PeerHealth],
) -> None:
    """The probe interval is reset once a peer has stayed up for the longest interval."""
    peers = Peers(own=[None] * 5 + [0.0, 0.0])
    health = tracked(peers, first=0.03, longest=0.8)
    health.report_down("own")
    wait_until(lambda: health.up("own"))
    pauses = np.diff(peers.times)
    time.sleep(1.6)
    down = time.monotonic()
    health.report_down("own")
    wait_until(lambda: health.up("own"))
    assert peers.times[-1] - down < pauses[-1]


def test_a_removed_peer_is_not_probed(tracked: Callable[..., PeerHealth]) -> None:
    """A peer whose name no longer has its address is not probed any more."""
    peers = Peers()
    health = tracked(peers)
    health.report_down("own")
    wait_until(lambda: health.up("own"))
    assert [] == peers.probed


def test_an_exception_in_a_probe_does_not_keep_a_peer_down(
    tracked: Callable[..., PeerHealth],
) -> None:
    """A probe that raises an unexpected exception is repeated."""
    peers = Peers(own=[])  # the first probe raises IndexError
    health = tracked(peers)
    health.report_down("own")
    wait_until(lambda: len(peers.probed) > 1)
    peers.answers["own"] += [0.0] * 10
    wait_until(lambda: health.up("own"))


def test_a_closed_tracker_stops_probing(tracked: Callable[..., PeerHealth]) -> None:
    """A closed tracker sends no more probes."""
    peers = Peers(own=[0.0])
    health = tracked(peers, first=0.05)
    health.report_down("own")
    health.close()
    time.sleep(0.1)
    assert (False, []) == (health.up("own"), peers.probed)


def test_reports_change_states_without_a_probe() -> None:
    """Reports change the state of peers that have no probe, such as the gateway's workers."""
    health = PeerHealth("worker")
    health.report_down("a", UnavailableError("refused"))
    assert ["b", "a"] == health.order(["a", "b"])
    health.report_up("a")
    assert ["a", "b"] == health.order(["a", "b"])
