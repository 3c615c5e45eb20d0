"""Tolhouse serves language models whose feed-forward layers are looked up in a table by token.

The names in `__all__` are the public API. Everything else is internal and may change.

    from tolhouse import Client

    with Client("127.0.0.1:50051") as source:  # a lookup service, file://PATH or redis://HOST:PORT
        rows = source.fetch("demo-memory", [17, 4, 2048])  # [3, blocks, width]

    with Client("127.0.0.1:50052") as worker:  # an attention worker
        for token_id in worker.generate([17, 4, 2048], max_tokens=32):
            print(token_id)
"""

from tolhouse.client.aio import AsyncClient
from tolhouse.client.client import Client
from tolhouse.client.results import (
    GenerateOutput,
    RowCounts,
    TableInfo,
    TokenLogprobs,
    WorkerInfo,
)
from tolhouse.errors import (
    ClosedError,
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

__version__ = "0.2.0"
__all__ = [
    "AsyncClient",
    "Client",
    "ClientCredentials",
    "ClosedError",
    "CorruptError",
    "DeadlineExceededError",
    "GenerateOutput",
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
    "RowCounts",
    "TableInfo",
    "TokenLogprobs",
    "TolhouseError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnsupportedError",
    "WorkerInfo",
    "__version__",
]
