"""The repository's copies of the cases that users of similar projects reported."""

from collections.abc import Iterator

import pytest

from tests.cases.__main__ import OWN, check, numbers
from tests.cases.serving import gateways


@pytest.fixture(scope="module", autouse=True)
def _gateways() -> Iterator[None]:
    with gateways():
        yield


@pytest.mark.parametrize("number", numbers())
def test_each_case_passes(number: str) -> None:
    """All claims of a case are true with the repository's copy of its inputs."""
    results = list(check(number, OWN))
    assert results
    assert [] == [result for result in results if not result.right]
