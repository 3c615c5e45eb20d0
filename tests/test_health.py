"""Outlier detection: who lags behind, and who is only as slow as all are."""

import pytest
from tolhouse.net.health import lags


@pytest.mark.parametrize(
    ("mine", "others", "expected"),
    [
        ([0.01], [[0.001]], False),  # fast enough, whatever the others do
        ([None], [[0.001]], True),
        ([None], [], True),
        ([0.4, 0.4], [[0.001]], True),
        ([0.4, 0.4], [[0.2, 0.2]], False),  # this machine is busy
        ([0.4, 0.4], [[None], [0.01]], True),
        ([0.4, 0.4], [[None]], False),  # the others are no better
        ([0.4, 0.4], [], False),
        ([0.4, 0.01], [[0.001]], False),  # it had to connect
        ([0.4, 0.4], [[3.0, 0.01]], True),
    ],
)
def test_who_lags(mine: list, others: list[list], expected: bool) -> None:
    """Whoever does not answer, or takes several times as long as another at the same moment."""
    takes = {"mine": iter(mine), **{str(n): iter(each) for n, each in enumerate(others)}}
    assert expected == lags(
        "mine", [str(n) for n in range(len(others))], lambda peer: next(takes[peer])
    )
