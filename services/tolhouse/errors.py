"""Every error that Tolhouse raises, with its gRPC status and its HTTP status.

    TolhouseError
    ├── InvalidArgumentError (ValueError)
    │   ├── IdOutOfRangeError
    │   └── PromptTooLongError
    ├── NotFoundError (LookupError)
    ├── MismatchError
    ├── InUseError
    ├── UnauthenticatedError
    ├── OverloadedError
    ├── CorruptError
    ├── UnsupportedError
    ├── UnavailableError (ConnectionError)
    ├── DeadlineExceededError (TimeoutError)
    ├── ClosedError
    ├── RequestCancelledError
    └── InternalError

A message says what is wrong and what is allowed. Arguments have their Python names in backticks,
which the command line replaces by its options. Errors can be pickled and copied.
"""

from collections.abc import Iterable


class TolhouseError(Exception):
    """The base class of all errors of Tolhouse."""

    grpc_status, http_status = "INTERNAL", 500


class InvalidArgumentError(TolhouseError, ValueError):
    """An argument, an option, a parameter or a file has a value that is not allowed."""

    grpc_status, http_status = "INVALID_ARGUMENT", 400


class IdOutOfRangeError(InvalidArgumentError):
    """A token id is not below the size of the vocabulary."""

    grpc_status = "OUT_OF_RANGE"


class PromptTooLongError(InvalidArgumentError):
    """The prompt and `max_tokens` together exceed the context of the model."""

    grpc_status = "OUT_OF_RANGE"


class NotFoundError(TolhouseError, LookupError):
    """No table, version, file or model has the given name."""

    grpc_status, http_status = "NOT_FOUND", 404


class MismatchError(TolhouseError):
    """Two parts do not match, such as a table and a model."""

    grpc_status, http_status = "FAILED_PRECONDITION", 409


class InUseError(TolhouseError):
    """A port, a version or a folder is in use."""

    grpc_status, http_status = "ABORTED", 409


class UnauthenticatedError(TolhouseError):
    """An API key, a token or a password is missing or wrong."""

    grpc_status, http_status = "UNAUTHENTICATED", 401


class OverloadedError(TolhouseError):
    """A queue or a memory budget is full. The same call may succeed later."""

    grpc_status, http_status = "RESOURCE_EXHAUSTED", 429


class CorruptError(TolhouseError):
    """Stored bytes are missing or fail their checksum.

    `token_ids` are the tokens whose rows could not be read. All other rows could be read. It is
    empty if the tokens are not known.
    """

    grpc_status, http_status = "DATA_LOSS", 500

    def __init__(self, message: str = "", token_ids: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.token_ids = tuple(token_ids)


class UnsupportedError(TolhouseError):
    """The service does not support the call or one of its parameters."""

    grpc_status, http_status = "UNIMPLEMENTED", 501


class UnavailableError(TolhouseError, ConnectionError):
    """A service or a store cannot be reached. The same call may succeed later."""

    grpc_status, http_status = "UNAVAILABLE", 503


class DeadlineExceededError(TolhouseError, TimeoutError):
    """A service or a store did not answer in time."""

    grpc_status, http_status = "DEADLINE_EXCEEDED", 504


class ClosedError(TolhouseError):
    """The client was closed before the call, or while the call was in flight."""

    grpc_status, http_status = "CANCELLED", 499


class RequestCancelledError(TolhouseError):
    """The caller cancelled the request or closed its connection."""

    grpc_status, http_status = "CANCELLED", 499


class InternalError(TolhouseError):
    """A defect in Tolhouse."""


_BY_STATUS = {error.grpc_status: error for error in TolhouseError.__subclasses__()} | {
    "CANCELLED": RequestCancelledError,
    "OUT_OF_RANGE": IdOutOfRangeError,
    "PERMISSION_DENIED": UnauthenticatedError,
    "ALREADY_EXISTS": InUseError,
}


def from_status(status: str, message: str) -> TolhouseError:
    """Return the error for the name of a gRPC status. The default is InternalError."""
    return _BY_STATUS.get(status, InternalError)(message)
