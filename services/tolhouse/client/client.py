"""`Client`: rows and manifests from a row source, tokens from a worker."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Self

import grpc
import numpy as np
import numpy.typing as npt

from tolhouse.client.fetch_stream import FetchStream
from tolhouse.client.lookup import LookupRowSource
from tolhouse.client.row_source import open_row_source
from tolhouse.errors import InvalidArgument
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import error_of
from tolhouse.sampling import SamplingParams
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import generation_pb2
from tolhouse.v1.generation_pb2_grpc import GenerationStub


class Client:
    """Talks to the service at `target`, "HOST:PORT", or reads tables at "file://PATH" or "redis://HOST:PORT" itself.

    Several replicas are "HOST:PORT,HOST:PORT", or "dns:///HOST:PORT" for all addresses of a name as they come and go.
    fetch, describe and tables want lookup services, files or Redis; generate wants a worker. Safe to use from several
    threads. Services of other machines need `credentials` with TLS. `rows` is the row source itself.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        timeout_seconds: float = 10.0,
        *,
        credentials: ClientCredentials | None = None,
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.rows = open_row_source(
            target, timeout_seconds=timeout_seconds, credentials=credentials
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.rows.close()

    def tables(self) -> list[tuple[Manifest, bool]]:
        """Every table there is, and whether its name stands for it."""
        return self.rows.tables()

    def describe(self, table: str) -> Manifest:
        """The manifest of "name@version", or of the version that "name" stands for now; NotFound if there is none."""
        return self.rows.describe(table)

    def fetch(self, table: str | Manifest, ids: npt.ArrayLike) -> np.ndarray:
        """Rows [T, N, D] of T token ids from "name@version", or from what "name" stands for now; X0 first where it is carried.

        The float codecs give a read-only view of the received records, without a copy where no id comes twice; int8
        and int4 give float32 values. NotFound: no such table. IdOutOfRange. Unavailable or DeadlineExceeded: no replica
        answered. Corrupt: no replica has an intact row.
        """
        manifest = table if isinstance(table, Manifest) else self.describe(table)
        ids_T = token_ids(ids)
        auxiliary = self.rows.auxiliary(manifest)
        unique, inverse = np.unique(ids_T, return_inverse=True)
        if len(unique) == len(ids_T):
            rows = auxiliary.decode(ids_T, self.rows.fetch_records(manifest, ids_T))
        else:
            rows = auxiliary.decode(unique, self.rows.fetch_records(manifest, unique))[inverse]
        rows.flags.writeable = False
        return rows

    def generate(
        self,
        prompt_token_ids: Iterable[int],
        max_tokens: int = 16,
        *,
        timeout_seconds: float | None = None,
        **sampling: Any,
    ) -> Iterator[int]:
        """Stream the token ids of one completion from a worker. Closing the iterator cancels.

        `sampling`: fields of `tolhouse.sampling.SamplingParams`; greedy by default.
        """
        with closing(
            self.replies(prompt_token_ids, max_tokens, timeout_seconds=timeout_seconds, **sampling)
        ) as replies:
            for reply in replies:
                yield from reply.token_ids

    def replies(
        self,
        prompt_token_ids: Iterable[int],
        max_tokens: int = 16,
        *,
        timeout_seconds: float | None = None,
        **sampling: Any,
    ) -> Generator[generation_pb2.GenerateReply]:
        """The same with all that a worker returns: why it ended, and log probabilities of tokens and prompt if asked for."""
        request = SamplingParams(max_tokens, **sampling).to_proto(prompt_token_ids)
        worker = self._worker()
        call = GenerationStub(worker.channel).Generate(
            request, timeout=timeout_seconds, metadata=worker.credentials.metadata()
        )
        try:
            for reply in call:
                yield reply
                if reply.finish_reason:
                    return
        except grpc.RpcError as error:
            raise error_of(error, f"worker {worker.target}") from None
        finally:
            call.cancel()

    def describe_worker(self) -> generation_pb2.DescribeWorkerReply:
        """What a worker serves, its load and its row counts; the fields are explained in protos/tolhouse/v1."""
        worker, request = self._worker(), generation_pb2.DescribeWorkerRequest()
        try:
            return GenerationStub(worker.channel).DescribeWorker(
                request, timeout=self.timeout_seconds, metadata=worker.credentials.metadata()
            )
        except grpc.RpcError as error:
            raise error_of(error, f"worker {worker.target}") from None

    def _worker(self) -> FetchStream:
        if not isinstance(self.rows, LookupRowSource):
            raise InvalidArgument(
                f"{self.rows.url} holds tables; tokens come from a worker, HOST:PORT"
            )
        return self.rows.replicas.in_turn()[0]


def token_ids(ids: npt.ArrayLike) -> np.ndarray:
    """`ids` as uint32 [T]; InvalidArgument unless they are a flat list of whole numbers from 0 to 2^32 - 1."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        given = f"an array of {array.dtype} with {array.ndim} dimensions"
        raise InvalidArgument(f"token ids must be a flat list of whole numbers, not {given}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= 2**32:
        raise InvalidArgument(f"token ids run from 0 to 2^32 - 1; {low} to {high} were given")
    return array.astype(np.uint32, copy=False)
