"""The error tree: every error has its statuses and survives the wire."""

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
def test_an_error_comes_back_from_its_status(error: type[TolhouseError]) -> None:
    """A status becomes the error that was raised, or one with that status; the message is kept."""
    assert hasattr(grpc.StatusCode, error.grpc_status)
    assert 400 <= error.http_status < 600
    back = from_status(error.grpc_status, "why")
    assert (error.grpc_status, "why") == (back.grpc_status, str(back))


@pytest.mark.parametrize("status", [s.name for s in grpc.StatusCode if s.name != "OK"])
def test_every_status_becomes_an_error(status: str) -> None:
    """Also one that nothing of ours sends."""
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
def test_a_status_that_no_error_owns_becomes_the_nearest(
    status: str, expected: type[TolhouseError]
) -> None:
    """A peer may send any status of gRPC."""
    assert expected is type(from_status(status, "x"))
