"""Tolhouse serves language models whose feed-forward layers are rows of a lookup table, by token.

from tolhouse import Client

with Client("127.0.0.1:50051") as source:              # a lookup service, file://PATH or redis://HOST
    rows = source.fetch("demo-memory", [17, 4, 2048])  # [3, blocks, width]; a name, or name@version

with Client("127.0.0.1:50052") as worker:  # an attention worker
    for token_id in worker.generate([17, 4, 2048], max_tokens=32):
        print(token_id)
"""

from tolhouse.client.client import Client
from tolhouse.errors import (
    CorruptError,
    DeadlineExceededError,
    IdOutOfRangeError,
    InternalError,
    InUseError,
    InvalidArgumentError,
    MismatchError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
    RequestCancelledError,
    TolhouseError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from tolhouse.net.auth import ClientCredentials
from tolhouse.table.manifest import Manifest

__version__ = "0.1.0"
__all__ = [
    "Client",
    "ClientCredentials",
    "CorruptError",
    "DeadlineExceededError",
    "IdOutOfRangeError",
    "InUseError",
    "InternalError",
    "InvalidArgumentError",
    "Manifest",
    "MismatchError",
    "NotFoundError",
    "OverloadedError",
    "PromptTooLongError",
    "RequestCancelledError",
    "TolhouseError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedError",
    "__version__",
]
