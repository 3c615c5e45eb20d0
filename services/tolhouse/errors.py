"""Every error Tolhouse raises, and what each becomes on the wire.

    TolhouseError
    ├── InvalidArgument        the caller sent something that can't be right       INVALID_ARGUMENT     400
    │   ├── IdOutOfRange       a token id at or above the vocabulary               OUT_OF_RANGE         400
    │   └── PromptTooLong      prompt and answer do not fit the context            OUT_OF_RANGE         400
    ├── NotFound               a table, version, file or model that is not there   NOT_FOUND            404
    ├── Mismatch               parts that do not belong together: a table built    FAILED_PRECONDITION  409
    │                          from another model, a tokenizer of another table
    ├── InUse                  a port, a version or a directory in use             ABORTED              409
    ├── Unauthenticated        a missing or wrong API key                          UNAUTHENTICATED      401
    ├── Overloaded             a queue or a memory budget is full: try later       RESOURCE_EXHAUSTED   429
    ├── Corrupt                bytes that fail their checksum, or are missing      DATA_LOSS            500
    ├── Unsupported            the peer does not speak this call                   UNIMPLEMENTED        501
    ├── Unavailable            a peer can't be reached: try again                  UNAVAILABLE          503
    ├── DeadlineExceeded       a peer did not answer in time                       DEADLINE_EXCEEDED    504
    ├── Cancelled              the caller went away                                CANCELLED            499
    └── Internal               a defect of ours                                    INTERNAL             500

The message of an error says what was wrong and what is allowed. A class carries its gRPC and its HTTP status;
`from_status` is the way back from the wire.
"""


class TolhouseError(Exception):
    """Base of all errors that Tolhouse raises on purpose."""

    grpc_status = "INTERNAL"
    http_status = 500


class InvalidArgument(TolhouseError):
    grpc_status, http_status = "INVALID_ARGUMENT", 400


class IdOutOfRange(InvalidArgument):
    grpc_status, http_status = "OUT_OF_RANGE", 400


class PromptTooLong(InvalidArgument):
    grpc_status, http_status = "OUT_OF_RANGE", 400


class NotFound(TolhouseError):
    grpc_status, http_status = "NOT_FOUND", 404


class Mismatch(TolhouseError):
    grpc_status, http_status = "FAILED_PRECONDITION", 409


class InUse(TolhouseError):
    grpc_status, http_status = "ABORTED", 409


class Unauthenticated(TolhouseError):
    grpc_status, http_status = "UNAUTHENTICATED", 401


class Overloaded(TolhouseError):
    grpc_status, http_status = "RESOURCE_EXHAUSTED", 429


class Corrupt(TolhouseError):
    grpc_status, http_status = "DATA_LOSS", 500


class Unsupported(TolhouseError):
    grpc_status, http_status = "UNIMPLEMENTED", 501


class Unavailable(TolhouseError):
    grpc_status, http_status = "UNAVAILABLE", 503


class DeadlineExceeded(TolhouseError):
    grpc_status, http_status = "DEADLINE_EXCEEDED", 504


class Cancelled(TolhouseError):
    grpc_status, http_status = "CANCELLED", 499


class Internal(TolhouseError):
    grpc_status, http_status = "INTERNAL", 500


# A status names several errors only where a subclass refines its parent; the wire then carries the parent.
_DIRECT: tuple[type[TolhouseError], ...] = (
    InvalidArgument,
    NotFound,
    Mismatch,
    InUse,
    Unauthenticated,
    Overloaded,
    Corrupt,
    Unsupported,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    Internal,
)
_BY_STATUS = {error.grpc_status: error for error in _DIRECT} | {
    "OUT_OF_RANGE": IdOutOfRange,
    "PERMISSION_DENIED": Unauthenticated,
    "UNKNOWN": Internal,
    "ALREADY_EXISTS": InUse,
}


def from_status(status: str, message: str) -> TolhouseError:
    """The error that gRPC status name `status` stands for; an unheard-of name becomes `Internal`."""
    return _BY_STATUS.get(status, Internal)(message)
