"""Rows from the replicas of a lookup service over gRPC."""

import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import numpy as np

from tolhouse.client.fetch_stream import FetchStream, Request
from tolhouse.client.router import Replicas
from tolhouse.client.row_source import RowSource
from tolhouse.errors import (
    Cancelled,
    Corrupt,
    DeadlineExceeded,
    TolhouseError,
    Unavailable,
)
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.health import SUSPECT_SECONDS
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import lookup_pb2

# another replica, or the same once more, may do better
_RETRIED = (Unavailable, DeadlineExceeded, Cancelled, Corrupt)
_ROUNDS = 2
_PROBE_SECONDS = 1.0


class LookupRowSource(RowSource):
    """Each shard's ids go to the replica that ranks first for it, so that replicas have different hot rows."""

    def __init__(
        self, targets: str | Sequence[str], timeout_seconds: float, credentials: ClientCredentials
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.replicas = Replicas(targets, credentials, self._probe)
        super().__init__(self.replicas.name)
        self._max_ids = 65_536  # of a request; replicas say how many they take

    def tables(self) -> list[tuple[Manifest, bool]]:
        found = self._call("ListTables", lookup_pb2.ListTablesRequest()).tables
        return [(Manifest.from_json(table.manifest_json), table.published) for table in found]

    def pin(self, ref: str) -> None:
        self._call("Describe", lookup_pb2.DescribeRequest(table=ref, known=ref))

    def close(self) -> None:
        self.replicas.close()

    def _describe(self, table: str, known: Manifest | None) -> Manifest:
        request = lookup_pb2.DescribeRequest(table=table, known=known.ref if known else "")
        reply = self._call("Describe", request)
        self._max_ids = reply.max_ids_per_fetch
        if known and not reply.manifest_json:
            return known
        return Manifest.from_json(reply.manifest_json)

    def _fetch(
        self, manifest: Manifest, ids: np.ndarray, out: np.ndarray, slots: np.ndarray
    ) -> None:
        flat = memoryview(out.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer
        deadline = time.monotonic() + self.timeout_seconds
        count, left = len(self.replicas.targets), np.arange(len(ids))
        attempts = _ROUNDS * count
        for attempt in range(attempts):
            if attempt and attempt % count == 0:
                time.sleep(0.05)  # all have failed once: a moment for one to come back
            patience = (deadline - time.monotonic()) / (attempts - attempt)
            if not attempt and count > 1:
                patience /= 2  # another replica is left: the first may hang
            end = time.monotonic() + max(0.001, patience)
            requests = [
                (stream, part, stream.submit(manifest, ids[part], flat, slots[part].tolist()))
                for stream, indices in self.replicas.divide(manifest, ids, left, attempt)
                for part in np.split(indices, range(self._max_ids, len(indices), self._max_ids))
            ]
            failed = [
                (part, error)
                for stream, part, request in requests
                if (error := self._wait(stream, request, end))
            ]
            if not failed:
                return
            for _, error in failed:
                if not isinstance(error, _RETRIED) or attempt == attempts - 1:
                    raise error
            left = np.concatenate([part for part, _ in failed])

    def _wait(self, stream: FetchStream, request: Request, end: float) -> TolhouseError | None:
        """Wait for a request until `end`; its error, and from then on nothing is written for it."""
        began = time.monotonic()
        error: TolhouseError
        try:
            request.done.result(timeout=max(0.0, end - began))
        except FutureTimeout:
            stream.reset()
            error = DeadlineExceeded(f"lookup {stream.target} did not answer in time")
        except TolhouseError as failure:
            error = failure
        else:
            if time.monotonic() - began > SUSPECT_SECONDS:
                self.replicas.took_long(stream)
            return None
        request.give_up()
        if isinstance(error, (Unavailable, DeadlineExceeded)):
            self.replicas.failed(stream, error)
        return error

    def _probe(self, stream: FetchStream) -> bool:
        """Whether a replica answers for the table described last, be it with an error."""
        ref = next((manifest.ref for manifest in reversed(self._manifests.values())), "")
        try:
            request = lookup_pb2.DescribeRequest(table=ref, known=ref)
            stream.call("Describe", request, _PROBE_SECONDS)
        except TolhouseError as error:
            return not isinstance(error, _RETRIED)
        return True

    def _call(self, method: str, request: Any) -> Any:
        """The answer of the first replica that has one."""
        replicas = self.replicas.in_turn() * _ROUNDS
        for number, stream in enumerate(replicas, 1):
            try:
                return stream.call(method, request, self.timeout_seconds / len(replicas))
            except (Unavailable, DeadlineExceeded):
                if number == len(replicas):
                    raise
        raise AssertionError("there is at least one replica")
