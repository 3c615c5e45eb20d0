"""Outlier detection: which of several peers that could all do the same work lags behind.

That one took long says little: the work may have been large, or this machine busy. So it is a suspicion, no more. Then the peer and others are looked
at, with a call that has no work in it: whoever takes several times as long as another at the same moment lags.
"""

from collections.abc import Callable, Iterable

SUSPECT_SECONDS = 0.1  # a wait that is worth a look
_TIMES = 4.0  # as long as the quickest of the others
_LOOKS = 2  # of which the quicker counts: the first may have to connect


def lags(peer: str, others: Iterable[str], look: Callable[[str], float | None]) -> bool:
    """Whether `peer` does not answer, or lags behind `others`; `look` gives the seconds until an answer, None if there is none."""
    mine = _quickest(peer, look)
    if mine is None or mine < SUSPECT_SECONDS:
        return mine is None
    theirs = [seconds for other in others if (seconds := _quickest(other, look)) is not None]
    return bool(theirs) and mine > _TIMES * min(theirs)


def _quickest(peer: str, look: Callable[[str], float | None]) -> float | None:
    best: float | None = None
    for _ in range(_LOOKS):
        seconds = look(peer)
        if seconds is None or seconds < SUSPECT_SECONDS:
            return seconds
        best = seconds if best is None else min(best, seconds)
    return best
