"""Rows from the replicas of a lookup service over gRPC."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tolhouse.client.fetch_stream import Replica, Request
from tolhouse.client.router import Replicas
from tolhouse.client.row_source import Array, RowSource
from tolhouse.errors import Cancelled, Corrupt, DeadlineExceeded, TolhouseError, Unavailable
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.health import SUSPECT_SECONDS
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import lookup_pb2 as pb
from tolhouse.v1.lookup_pb2_grpc import LookupStub

# another replica, or the same once more, may do better
_RETRIED = (Unavailable, DeadlineExceeded, Cancelled, Corrupt)
_ROUNDS = 2
_PROBE_SECONDS = 1.0


class LookupRowSource(RowSource):
    """Asks the replicas in each shard's order."""

    def __init__(
        self, targets: str | Sequence[str], timeout_seconds: float, credentials: ClientCredentials
    ) -> None:
        self.timeout_seconds = timeout_seconds
        self.replicas = Replicas(targets, credentials, self._probe)
        super().__init__(self.replicas.name)
        self._max_ids = 65_536  # of a request; replicas say how many they take

    def tables(self) -> list[tuple[Manifest, bool]]:
        found = self._call("ListTables", pb.ListTablesRequest()).tables
        return [(Manifest.from_json(table.manifest_json), table.published) for table in found]

    def pin(self, ref: str) -> None:
        self._call("Describe", pb.DescribeRequest(table=ref, known=ref))

    def close(self) -> None:
        self.replicas.close()

    def _describe(self, table: str, known: Manifest | None) -> Manifest:
        request = pb.DescribeRequest(table=table, known=known.ref if known else "")
        reply = self._call("Describe", request)
        self._max_ids = reply.max_ids_per_fetch
        if known and not reply.manifest_json:
            return known
        return Manifest.from_json(reply.manifest_json)

    def _fetch(self, manifest: Manifest, ids: Array, out: Array, slots: Array) -> None:
        flat = memoryview(out.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer
        deadline = time.monotonic() + self.timeout_seconds
        count, left = len(self.replicas.in_turn()), np.arange(len(ids))
        for attempt in range(_ROUNDS * count):
            if attempt and attempt % count == 0:
                time.sleep(0.05)  # all have failed once: a moment for one to come back
            end = time.monotonic()
            patience = (deadline - end) / (_ROUNDS * count - attempt)
            # the first may hang while another replica is left
            end += max(0.001, patience if attempt or count == 1 else patience / 2)
            requests = [
                (replica, part, replica.submit(manifest, ids[part], flat, slots[part].tolist()))
                for replica, indices in self.replicas.divide(manifest, ids, left, attempt)
                for first in range(0, len(indices), self._max_ids)
                for part in (indices[first : first + self._max_ids],)
            ]
            errors = [self._wait(replica, request, end) for replica, _, request in requests]
            for error in filter(None, errors):
                if not isinstance(error, _RETRIED) or attempt == _ROUNDS * count - 1:
                    raise error
            failed = [part for (_, part, _), error in zip(requests, errors, strict=True) if error]
            if not failed:
                return
            left = np.concatenate(failed)

    def _wait(self, replica: Replica, request: Request, end: float) -> BaseException | None:
        """Wait for a request until `end`; its error, after which nothing is written for it."""
        began = time.monotonic()
        try:
            error = request.exception(max(0.0, end - began))
        except TimeoutError:
            replica.reset()
            error = DeadlineExceeded(f"lookup {replica.target} did not answer in time")
        request.give_up()
        if isinstance(error, (Unavailable, DeadlineExceeded)):
            self.replicas.health.report_down(replica.target, error)
        elif time.monotonic() - began > SUSPECT_SECONDS:
            self.replicas.health.report_slow(replica.target)
        return error

    def _probe(self, replica: Replica) -> bool:
        """Whether a replica answers for the table described last, be it with an error."""
        ref = next((manifest.ref for manifest in reversed(self._manifests.values())), "")
        try:
            request = pb.DescribeRequest(table=ref, known=ref)
            replica.call(LookupStub, "Describe", request, _PROBE_SECONDS)
        except TolhouseError as error:
            return not isinstance(error, _RETRIED)
        return True

    def _call(self, method: str, request: Any) -> Any:
        """The answer of the first replica that has one."""
        replicas = self.replicas.in_turn() * _ROUNDS
        error: TolhouseError
        for replica in replicas:
            try:
                timeout = self.timeout_seconds / len(replicas)
                return replica.call(LookupStub, method, request, timeout)
            except (Unavailable, DeadlineExceeded) as failure:
                error = failure
        raise error
