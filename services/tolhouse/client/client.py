"""`Client`: rows and manifests from a row source, tokens from a worker."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from tolhouse.client.fetch_stream import Replica
from tolhouse.client.lookup import LookupRowSource
from tolhouse.client.row_source import open_row_source
from tolhouse.errors import InvalidArgumentError, UnsupportedError
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import Targets, error_of
from tolhouse.sampling import SamplingParams, check_features
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import generation_pb2 as pb
from tolhouse.v1.generation_pb2_grpc import GenerationStub


class Client(AbstractContextManager["Client"]):
    """Calls the service at "HOST:PORT", or reads tables at "file://PATH" or "redis://HOST:PORT".

    Replicas are "HOST:PORT,HOST:PORT", or "dns:///HOST:PORT" for all addresses of a name as they
    change. fetch, describe and tables want a row source, which is `rows`; generate wants a worker.
    Services of other machines need `credentials` with TLS. Safe to use from several threads.
    """

    def __init__(
        self,
        target: Targets,
        timeout_seconds: float = 10.0,
        *,
        credentials: ClientCredentials | None = None,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.rows = open_row_source(target, timeout_seconds, credentials)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.rows.close()

    def tables(self) -> list[tuple[Manifest, bool]]:
        """Every table there is, and whether its name stands for it."""
        return self.rows.tables()

    def describe(self, table: str) -> Manifest:
        """The manifest of "name@version", or of what "name" stands for now; NotFoundError."""
        return self.rows.describe(table)

    def fetch(self, table: str | Manifest, ids: npt.ArrayLike) -> np.ndarray:
        """Rows [T, N, D] of T token ids from "name@version", or from what "name" stands for now.

        X0 comes first where the table carries it. They are read-only; int8 and int4 give float32.
        NotFoundError, IdOutOfRangeError. UnavailableError, DeadlineExceededError: no replica
        answered. CorruptError: none
        has an intact row.
        """
        manifest = table if isinstance(table, Manifest) else self.describe(table)
        ids_T = token_ids(ids)
        auxiliary = self.rows.auxiliary(manifest)
        unique = np.unique(ids_T)
        distinct = unique if len(unique) < len(ids_T) else ids_T
        rows = auxiliary.decode(distinct, self.rows.fetch_records(manifest, distinct))
        if distinct is unique:
            rows = rows[np.searchsorted(unique, ids_T)]
        rows.flags.writeable = False
        return rows

    def generate(
        self, prompt_token_ids: Iterable[int], max_tokens: int = 16, **options: Any
    ) -> Iterator[int]:
        """Stream a completion's token ids; closing cancels. `options` are of SamplingParams."""
        with closing(self.replies(prompt_token_ids, max_tokens, **options)) as replies:
            for reply in replies:
                yield from reply.token_ids

    def replies(
        self,
        prompt_token_ids: Iterable[int],
        max_tokens: int = 16,
        *,
        timeout_seconds: float | None = None,
        **sampling: Any,
    ) -> Generator[pb.GenerateReply]:
        """As `generate`, but yields whole replies, with log probabilities and the finish reason."""
        request = SamplingParams(max_tokens, **sampling).to_proto(prompt_token_ids)
        worker = self._worker()
        try:
            check_features(request, (), worker.target)
        except UnsupportedError:  # of every worker until it says that it does
            asked, seconds = pb.DescribeWorkerRequest(), self.timeout_seconds
            about = worker.call(GenerationStub, "DescribeWorker", asked, seconds)
            check_features(request, about.features, worker.target)
        stub, metadata = GenerationStub(worker.channel()), worker.credentials.metadata()
        call = stub.Generate(request, timeout=timeout_seconds, metadata=metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise error_of(error, worker.target) from None
        finally:
            call.cancel()

    def describe_worker(self) -> pb.DescribeWorkerReply:
        """What a worker serves, its load and its row counts; protos/tolhouse/v1 has the fields."""
        request = pb.DescribeWorkerRequest()
        return self._worker().call(GenerationStub, "DescribeWorker", request, self.timeout_seconds)

    def _worker(self) -> Replica:
        if not isinstance(self.rows, LookupRowSource):
            raise InvalidArgumentError(f"{self.rows.url} holds tables; tokens come from a worker")
        return self.rows.replicas.in_turn()[0]


def token_ids(ids: npt.ArrayLike) -> np.ndarray:
    """`ids` as uint32 [T]; InvalidArgumentError unless they are a flat list of token ids."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        given = f"{array.dtype} in {array.ndim} dimensions"
        raise InvalidArgumentError(f"token ids must be a flat list of whole numbers, not {given}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= 2**32:
        raise InvalidArgumentError(f"token ids run from 0 to 2^32 - 1; {low} to {high} were given")
    return array.astype(np.uint32, copy=False)
