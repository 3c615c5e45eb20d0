"""The error classes: every error has a gRPC and an HTTP status."""

import grpc
import pytest
from tolhouse import errors
from tolhouse.errors import TolhouseError, from_status

TREE = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, TolhouseError)
]


@pytest.mark.parametrize("error", TREE)
def test_a_status_gives_an_error_with_that_status(error: type[TolhouseError]) -> None:
    """A status gives an error with the same status and message."""
    assert hasattr(grpc.StatusCode, error.grpc_status)
    assert 400 <= error.http_status < 600
    back = from_status(error.grpc_status, "why")
    assert (error.grpc_status, "why") == (back.grpc_status, str(back))


@pytest.mark.parametrize("status", [s.name for s in grpc.StatusCode if s.name != "OK"])
def test_every_status_becomes_an_error(status: str) -> None:
    """Every gRPC status gives a TolhouseError, even one that Tolhouse never sends."""
    error = from_status(status, "why")
    assert isinstance(error, TolhouseError)
    assert "why" == str(error)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("OUT_OF_RANGE", errors.IdOutOfRangeError),
        ("PERMISSION_DENIED", errors.UnauthenticatedError),
        ("ALREADY_EXISTS", errors.InUseError),
        ("UNKNOWN", errors.InternalError),
        ("a status of a later gRPC", errors.InternalError),
    ],
)
def test_other_statuses_give_the_most_similar_error(
    status: str, expected: type[TolhouseError]
) -> None:
    """A status without its own error class gives the most similar error."""
    assert expected is type(from_status(status, "x"))
