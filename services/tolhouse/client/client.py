"""`Client`: rows and manifests from lookup replicas, tokens from a worker, over one set of channels."""

import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import closing
from typing import Any, NamedTuple, Self, TypeVar

import grpc
import numpy as np
import numpy.typing as npt

from tolhouse.client.fetch_stream import FetchStream, Request
from tolhouse.client.router import Replicas
from tolhouse.errors import (
    Cancelled,
    Corrupt,
    DeadlineExceeded,
    InvalidArgument,
    TolhouseError,
    Unavailable,
)
from tolhouse.logs import event
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import error_of
from tolhouse.net.dns import Addresses
from tolhouse.net.health import SUSPECT_SECONDS
from tolhouse.sampling import SamplingParams
from tolhouse.table.auxiliary import AuxiliaryTables, load_auxiliary
from tolhouse.table.manifest import Manifest, split_ref
from tolhouse.v1 import generation_pb2, lookup_pb2
from tolhouse.v1.generation_pb2_grpc import GenerationStub

T = TypeVar("T")

_RETRIED = (
    Unavailable,
    DeadlineExceeded,
    Cancelled,
    Corrupt,
)  # another replica, or the same once more, may do better
_ROUNDS = 2
_LOOK_SECONDS = 1.0  # for a replica that was away to answer
_LOOK_UP_SECONDS = 1.0  # between two looks at who is behind a name
_MOST_KEPT = 16  # versions whose manifest and companions are kept
_GONE_SECONDS = 600.0  # that calls to an address may go on after its name has lost it: it drains
_LOCAL = ClientCredentials()


class _Job(NamedTuple):
    manifest: Manifest
    ids: np.ndarray  # uint32 [T]
    out: memoryview  # of records, flat
    places: Sequence[int]  # [T]


class Client:
    """Talks to the service at `target`, "host:port", or to several replicas of it: "host:port,host:port", or "dns:///host:port" for
    all that the name stands for, as they come and go.

    fetch, describe and tables want lookup services; generate wants a worker. Safe to use from several threads. Services
    of other machines need `credentials` with TLS.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        timeout_seconds: float = 10.0,
        *,
        credentials: ClientCredentials = _LOCAL,
    ) -> None:
        self._addresses = Addresses(target)
        self._addresses.check(credentials)
        self.timeout_seconds, self.credentials = timeout_seconds, credentials
        self._streams: dict[str, FetchStream] = {}
        self._gone: dict[str, float] = {}  # addresses that have streams still, and since when
        self._manifests: dict[
            str, tuple[Manifest, int]
        ] = {}  # by "name@version": they never change
        self._companions: dict[str, AuxiliaryTables] = {}
        self._stood_for: dict[
            str, str
        ] = {}  # names, and the version that each stood for when last asked
        self._replicas = Replicas(self._answers)
        self._closed, self._renewing = threading.Event(), threading.Lock()
        self._renew()
        if self._addresses.change:
            threading.Thread(target=self._follow, name="look up", daemon=True).start()

    @property
    def targets(self) -> tuple[str, ...]:
        """The addresses now; Unavailable while there are none."""
        if not self._replicas.targets:
            raise Unavailable(f"{', '.join(self._addresses.targets)}: the name has no address yet")
        return self._replicas.targets

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self._replicas.health.close()
        with self._renewing:
            for stream in self._streams.values():
                stream.close()

    def tables(self) -> list[tuple[Manifest, bool]]:
        """Every table the lookup service has, and whether its name stands for it."""
        reply = self._unary("ListTables", lookup_pb2.ListTablesRequest())
        return [
            (Manifest.from_json(table.manifest_json), table.published) for table in reply.tables
        ]

    def describe(self, table: str) -> Manifest:
        """The manifest of "name@version", or of the version that "name" stands for now; NotFound if there is none."""
        return self._describe(table)[0]

    def hold(self, ref: str) -> None:
        """Tell the lookup service that "name@version" is in use, though nothing may be fetched: for half a minute it can't be deleted."""
        self._unary("Describe", lookup_pb2.DescribeRequest(table=ref, known=ref))

    def fetch(self, table: str | Manifest, ids: npt.ArrayLike) -> np.ndarray:
        """Rows [T, N, D] of T token ids from "name@version", or from what "name" stands for now; X0 first where it is carried.

        The float codecs give a read-only view of the received records, without a copy where no id comes twice; int8
        and int4 give float32 values. NotFound: no such table. IdOutOfRange. Unavailable or DeadlineExceeded: no replica
        answered. Corrupt: no replica has an intact row.
        """
        manifest = table if isinstance(table, Manifest) else self.describe(table)
        ids_T = token_ids(ids)
        companions = self.companions(manifest)
        if len(set(ids_T.tolist())) == len(ids_T):
            rows = companions.decode(ids_T, self.fetch_records(manifest, ids_T))
        else:
            unique, inverse = np.unique(ids_T, return_inverse=True)
            rows = companions.decode(unique, self.fetch_records(manifest, unique))[inverse]
        rows.flags.writeable = False
        return rows

    def companions(self, manifest: Manifest) -> AuxiliaryTables:
        """What the rows of a compressed table need besides its records; fetched once, and kept."""
        found = self._companions.get(manifest.ref)
        if found is None:

            def fetch(ref: str) -> tuple[Manifest, np.ndarray]:
                found = self.describe(ref)
                return found, self.fetch_records(
                    found, np.arange(found.vocab_size, dtype=np.uint32)
                )

            found = load_auxiliary(manifest, fetch)
            _keep(self._companions, manifest.ref, found)
        return found

    def fetch_records(
        self,
        manifest: Manifest,
        ids: np.ndarray,
        out: np.ndarray | None = None,
        places: np.ndarray | None = None,
    ) -> np.ndarray:
        """Verified records of distinct `ids` (uint32 [T]) in rows `places` [T] of `out` (uint8 [., record_bytes], contiguous).

        By default `out` is made, and has them in order. After an error its rows may hold anything, and are not written
        to any more. Each shard's ids go to the replica that rendezvous hashing ranks first for it, so that the replicas'
        hot rows differ, and to the next one when that fails.
        """
        manifest.check_ids(ids)
        if out is None:
            out = np.empty((len(ids), manifest.record_bytes), np.uint8)
        flat = memoryview(out.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer
        job = _Job(manifest, ids, flat, range(len(ids)) if places is None else places.tolist())
        deadline = time.monotonic() + self.timeout_seconds
        left = np.arange(len(ids))
        attempts = _ROUNDS * len(self.targets)
        for attempt in range(attempts):
            if not len(left):
                break
            if attempt and attempt % len(self.targets) == 0:
                time.sleep(0.05)  # all have failed once: a moment for one to come back
            patience = (deadline - time.monotonic()) / (attempts - attempt)
            if not attempt and len(self.targets) > 1:
                patience /= 2  # where another replica is left, one that hangs is not waited for as long as the last
            left, error = self._attempt(job, left, attempt, max(0.001, patience))
            if error and (not isinstance(error, _RETRIED) or attempt == attempts - 1):
                raise error
        return out

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
        """The same with all that a worker tells: why it ended, and log probabilities of tokens and prompt if asked for."""
        request = SamplingParams(max_tokens, **sampling).to_proto(prompt_token_ids)
        target = self.targets[0]
        call = GenerationStub(self._streams[target].channel).Generate(
            request, timeout=timeout_seconds, metadata=self.credentials.metadata()
        )
        try:
            for reply in call:
                yield reply
                if reply.finish_reason:
                    return
        except grpc.RpcError as error:
            raise error_of(error, f"worker {target}") from None
        finally:
            call.cancel()

    def describe_worker(self) -> generation_pb2.DescribeWorkerReply:
        """What a worker serves, its load and its row counts; the fields are explained in protos/tolhouse/v1."""
        target = self.targets[0]
        try:
            request = generation_pb2.DescribeWorkerRequest()
            stub = GenerationStub(self._streams[target].channel)
            return stub.DescribeWorker(
                request, timeout=self.timeout_seconds, metadata=self.credentials.metadata()
            )
        except grpc.RpcError as error:
            raise error_of(error, f"worker {target}") from None

    def _attempt(
        self, job: "_Job", left: np.ndarray, attempt: int, patience: float
    ) -> tuple[np.ndarray, TolhouseError | None]:
        """Try to get the records `left` of a job; those still open, and the error that says why."""
        manifest, ids, out, places = job
        _, most = self._describe(manifest.ref)
        end = time.monotonic() + patience
        requests: list[tuple[FetchStream, np.ndarray, Request]] = []
        for stream, mine in self._divided(manifest, ids, left, attempt):
            for start in range(0, len(mine), most):
                part = mine[start : start + most]
                to = [places[n] for n in part.tolist()]
                requests.append((stream, part, stream.submit(manifest, ids[part], out, to)))
        failed: list[np.ndarray] = []
        worst: TolhouseError | None = None
        for stream, part, request in requests:
            waits_since = time.monotonic()
            try:
                request.done.result(timeout=max(0.0, end - waits_since))
                if time.monotonic() - waits_since > SUSPECT_SECONDS:
                    self._replicas.took_long(stream.target)
                continue
            except FutureTimeout:
                stream.reset()
                worst = DeadlineExceeded(
                    f"lookup {stream.target} did not answer within {patience:.1f} s"
                )
                self._replicas.failed(stream.target, worst)
            except TolhouseError as error:
                if isinstance(error, (Unavailable, DeadlineExceeded)):
                    self._replicas.failed(stream.target, error)
                worst = error if worst is None or isinstance(worst, _RETRIED) else worst
            request.give_up()
            failed.append(part)
        return (np.concatenate(failed) if failed else np.empty(0, np.int64)), worst

    def _follow(self) -> None:
        while not self._closed.wait(_LOOK_UP_SECONDS):
            try:
                self._renew()
            except TolhouseError as error:  # a TLS file that does not fit, for now
                event("new addresses can't be called", logging.WARNING, reason=str(error))

    def _renew(self) -> None:
        """Take up the addresses that there are now; calls to one that is gone may end in peace."""
        found, now = self._addresses.look_up(), time.monotonic()
        with self._renewing:
            if self._closed.is_set():
                return
            for address in found:
                self._gone.pop(address, None)
                if address not in self._streams:
                    credentials = self._addresses.credentials_for(address, self.credentials)
                    self._streams[address] = FetchStream(address, credentials)
            if found != self._replicas.targets:
                self._replicas.become(found)
            for address in set(self._streams) - set(found):
                if now - self._gone.setdefault(address, now) > _GONE_SECONDS:
                    del self._gone[address]
                    self._streams.pop(address).close()

    def _divided(
        self, manifest: Manifest, ids: np.ndarray, left: np.ndarray, attempt: int
    ) -> Iterator[tuple[FetchStream, np.ndarray]]:
        """The places `left`, by the replica that each shard asks at this attempt."""
        targets = self.targets
        if len(targets) == 1:
            yield self._streams[targets[0]], left
            return
        targets, owner_of = self._replicas.owner(manifest, ids[left], attempt)
        for number in np.unique(owner_of).tolist():
            yield self._streams[targets[number]], left[owner_of == number]

    def _describe(self, table: str) -> tuple[Manifest, int]:
        known = self._manifests.get(table)
        if known is None:  # what a bare name stands for is asked anew each time
            before = self._manifests.get(self._stood_for.get(table, ""))
            reply = self._unary(
                "Describe",
                lookup_pb2.DescribeRequest(table=table, known=before[0].ref if before else ""),
            )
            if before and not reply.manifest_json:
                return before
            known = Manifest.from_json(reply.manifest_json), reply.max_ids_per_fetch
            _keep(self._manifests, known[0].ref, known)
            self._stood_for[table] = known[0].ref
            if split_ref(table)[1] is not None and known[0].ref != table:
                raise Corrupt(
                    f"asked for table {table}, the lookup service described {known[0].ref}"
                )
        return known

    def _answers(self, target: str) -> bool:
        """Whether a replica answers for the table used last, be it with an error."""
        ref = next(reversed(self._manifests), "")
        request = lookup_pb2.DescribeRequest(table=ref, known=ref)
        try:
            self._streams[target].stub.Describe(
                request, timeout=_LOOK_SECONDS, metadata=self.credentials.metadata()
            )
        except grpc.RpcError as error:
            return not isinstance(error_of(error, target), _RETRIED)
        except (ValueError, KeyError):  # closed meanwhile, or gone
            return False
        return True

    def _unary(self, method: str, request: Any) -> Any:
        """The answer of the first replica that has one."""
        error: TolhouseError | None = None
        timeout = self.timeout_seconds / len(self.targets) / _ROUNDS
        for target in self._replicas.in_turn() * _ROUNDS:
            try:
                return getattr(self._streams[target].stub, method)(
                    request, timeout=timeout, metadata=self.credentials.metadata()
                )
            except grpc.RpcError as failure:
                error = error_of(failure, f"lookup {target}")
                if not isinstance(error, (Unavailable, DeadlineExceeded)):
                    break
        assert error is not None
        raise error


def _keep(kept: dict[str, T], ref: str, value: T) -> None:
    """The newest few: a client outlives many versions, and what is kept of each may have megabytes."""
    kept[ref] = value
    for old in list(kept)[:-_MOST_KEPT]:
        kept.pop(old, None)


def token_ids(ids: npt.ArrayLike) -> np.ndarray:
    """`ids` as uint32 [T]; InvalidArgument unless they are a flat list of whole numbers from 0 to 2^32 - 1."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, np.uint32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidArgument(
            f"token ids must be a flat list of whole numbers, not an array of {array.dtype} with {array.ndim} dimensions"
        )
    if int(array.min()) < 0 or int(array.max()) >= 2**32:
        raise InvalidArgument(
            f"token ids run from 0 up; {int(array.min())} to {int(array.max())} were given"
        )
    return array.astype(np.uint32, copy=False)
