"""The error tree: every error has its statuses, survives the wire, and is drawn in the module's docstring."""

import grpc
import pytest
from tolhouse import errors
from tolhouse.errors import TolhouseError, from_status

TREE = [
    e
    for e in vars(errors).values()
    if isinstance(e, type) and issubclass(e, TolhouseError) and e is not TolhouseError
]


@pytest.mark.parametrize("error", TREE, ids=lambda e: e.__name__)
def test_an_error_has_statuses_and_a_line_in_the_drawing(error: type[TolhouseError]) -> None:
    """gRPC knows the status, HTTP's is an error, and the docstring shows both."""
    assert hasattr(grpc.StatusCode, error.grpc_status)
    assert 400 <= error.http_status < 600
    assert error.__name__ in errors.__doc__
    assert error.grpc_status in errors.__doc__


@pytest.mark.parametrize("error", TREE, ids=lambda e: e.__name__)
def test_an_error_comes_back_from_its_status(error: type[TolhouseError]) -> None:
    """A status becomes the error that was raised, or one that shares its status; the message is kept."""
    back = from_status(error.grpc_status, "why")
    assert (error.grpc_status, "why") == (back.grpc_status, str(back))


@pytest.mark.parametrize("status", [s.name for s in grpc.StatusCode if s.name != "OK"])
def test_every_status_of_grpc_becomes_an_error(status: str) -> None:
    """No status that a peer may send is unheard of."""
    assert isinstance(from_status(status, "x"), TolhouseError)
