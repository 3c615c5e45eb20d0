"""Every error Tolhouse raises, with its gRPC and HTTP status; a message says what is allowed."""

from collections.abc import Iterable


class TolhouseError(Exception):
    """Base of all errors that Tolhouse raises on purpose."""

    grpc_status, http_status = "INTERNAL", 500


class InvalidArgument(TolhouseError):  # the caller sent something that can't be right
    grpc_status, http_status = "INVALID_ARGUMENT", 400


class IdOutOfRange(InvalidArgument):  # a token id is at or above the vocabulary's size
    grpc_status = "OUT_OF_RANGE"


class PromptTooLong(InvalidArgument):  # prompt and answer do not fit the context
    grpc_status = "OUT_OF_RANGE"


class NotFound(TolhouseError):  # there is no such table, version, file or model
    grpc_status, http_status = "NOT_FOUND", 404


class Mismatch(TolhouseError):  # parts that do not belong together, such as table and model
    grpc_status, http_status = "FAILED_PRECONDITION", 409


class InUse(TolhouseError):  # a port, a version or a folder is in use
    grpc_status, http_status = "ABORTED", 409


class Unauthenticated(TolhouseError):  # an API key or a token is missing or wrong
    grpc_status, http_status = "UNAUTHENTICATED", 401


class Overloaded(TolhouseError):  # a queue or a memory budget is full: try later
    grpc_status, http_status = "RESOURCE_EXHAUSTED", 429


class Corrupt(TolhouseError):  # bytes are missing, or fail their checksum
    grpc_status, http_status = "DATA_LOSS", 500

    def __init__(self, message: str = "", token_ids: Iterable[int] = ()) -> None:
        """`token_ids`: whose rows could not be read, where all others could; empty: not known."""
        super().__init__(message)
        self.token_ids = tuple(token_ids)


class Unsupported(TolhouseError):  # the peer does not serve this call
    grpc_status, http_status = "UNIMPLEMENTED", 501


class Unavailable(TolhouseError):  # a peer can't be reached: try again
    grpc_status, http_status = "UNAVAILABLE", 503


class DeadlineExceeded(TolhouseError):  # a peer did not answer in time
    grpc_status, http_status = "DEADLINE_EXCEEDED", 504


class Cancelled(TolhouseError):  # the caller went away
    grpc_status, http_status = "CANCELLED", 499


class Internal(TolhouseError):
    """A defect of ours."""


_BY_STATUS = {error.grpc_status: error for error in TolhouseError.__subclasses__()} | {
    "OUT_OF_RANGE": IdOutOfRange,
    "PERMISSION_DENIED": Unauthenticated,
    "ALREADY_EXISTS": InUse,
}


def from_status(status: str, message: str) -> TolhouseError:
    """The error of a gRPC status by name; `Internal` for one that is unknown here."""
    return _BY_STATUS.get(status, Internal)(message)
