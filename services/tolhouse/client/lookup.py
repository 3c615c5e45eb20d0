"""Fetches rows from the replicas of a lookup service, with a replica for each shard."""

import logging
import select
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from tolhouse.client.replica import Replica, Request
from tolhouse.client.row_source import Array, RowSource
from tolhouse.errors import (
    CorruptError,
    DeadlineExceededError,
    RequestCancelledError,
    TolhouseError,
    UnavailableError,
)
from tolhouse.logs import event
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.call import check_cancelled, end_after, is_cancellable, on_cancel
from tolhouse.net.channel import Addresses, Targets
from tolhouse.net.health import SUSPECT_SECONDS, PeerHealth
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import lookup_pb2 as pb
from tolhouse.v1.lookup_pb2_grpc import LookupStub

# errors after which another replica or another attempt may succeed
_RETRIED = (UnavailableError, DeadlineExceededError, RequestCancelledError, CorruptError)
_ROUNDS = 2
_Indices = Array | slice
_Part = tuple[Replica, _Indices]  # a replica, and the indices of the ids to request from it
_PROBE_SECONDS = 1.0  # time limit of a probe
_RESOLVE_SECONDS = 1.0  # the pause between two DNS look-ups of a name


class LookupRowSource(RowSource):
    """Fetches the rows of a shard from its replicas, in the order of rendezvous hashing."""

    def __init__(self, targets: Targets, timeout: float, credentials: ClientCredentials) -> None:
        self.timeout_seconds = timeout
        self.replicas = Replicas(targets, credentials, self._probe)
        super().__init__(self.replicas.name)
        self._max_ids = 65_536  # ids per request; replicas state their limit

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

    def begin_fetch(
        self, manifest: Manifest, ids: Array, out: Array, slots: Array
    ) -> Callable[[], object]:
        steps = self._in_steps(manifest, ids, out, slots)
        next(steps)
        return partial(next, steps, None)

    def _fetch(self, manifest: Manifest, ids: Array, out: Array, slots: Array) -> None:
        for _ in self._in_steps(manifest, ids, out, slots):
            pass

    def _in_steps(self, manifest: Manifest, ids: Array, out: Array, slots: Array) -> Iterator[None]:
        """Send the requests of the first attempt, yield, and do everything else."""
        deadline, count = end_after(self.timeout_seconds), self.replicas.count
        errors: list[BaseException] = []
        bad: set[int] = set()
        left: _Indices = slice(None)
        for attempt in range(_ROUNDS * count):
            check_cancelled()
            if attempt and attempt % count == 0 and not all(map(_bad_rows, errors)):
                time.sleep(0.05)  # all replicas have failed, and one may recover
            began = time.monotonic()
            patience = (deadline - began) / (_ROUNDS * count - attempt)
            # The first replica may hang. Leave time for the others.
            end = began + max(0.001, patience if attempt or count == 1 else patience / 2)
            parts = self._parts(manifest, ids, left, bad, attempt)
            requests = [r.submit(manifest, ids[p], out, slots[p], end) for r, p in parts]
            if is_cancellable():
                on_cancel(partial(_cancel, requests))
            errors = []
            failed: list[Array] = []
            try:
                if not attempt:
                    yield
                for n in _in_order_of_arrival(requests, end):
                    replica, part = parts[n]
                    if error := self._receive(replica, requests[n], began, end):
                        errors.append(error)
                        failed.append(np.arange(len(ids))[part])
            except BaseException:
                for request in requests:
                    request.abandon()
                raise
            if not failed:
                return
            left = np.concatenate(failed)
            for error in errors:
                if not isinstance(error, _RETRIED):
                    raise error
                bad.update(_bad_rows(error))
        raise _outcome(errors, ids[left])

    def _parts(
        self, manifest: Manifest, ids: Array, left: _Indices, bad: set[int], attempt: int
    ) -> list[_Part]:
        """Divide the ids `left` into requests. Requests for bad rows are separate."""
        if self.replicas.count == 1 and not attempt and len(ids) <= self._max_ids:
            return [(self.replicas.in_turn()[0], left)]
        found, indices = list[_Part](), np.arange(len(ids))[left]
        for replica, owned in self.replicas.divide(manifest, ids, indices, attempt):
            is_bad = np.isin(ids[owned], list(bad))
            for part in (owned[~is_bad], owned[is_bad]):
                for first in range(0, len(part), self._max_ids):
                    found.append((replica, part[first : first + self._max_ids]))
        return found

    def _receive(
        self, replica: Replica, request: Request, began: float, end: float
    ) -> BaseException | None:
        """Receive the reply to a request of `began` until `end`, and return its error."""
        error: BaseException | None = None
        try:
            request.receive(end)
        except TolhouseError as failure:
            error = failure
        except TimeoutError:
            error = DeadlineExceededError(f"lookup replica {replica.target} did not answer in time")
        # A replica that reports a slow store still serves its hot rows.
        silent = isinstance(error, DeadlineExceededError) and replica.replied_at < began
        if silent or isinstance(error, UnavailableError):
            self.replicas.health.report_down(replica.target, error)
        elif time.monotonic() - began > SUSPECT_SECONDS:
            self.replicas.health.report_slow(replica.target)
        return error

    def _probe(self, replica: Replica) -> bool:
        """Return whether a replica answers a request for no rows of the latest table.

        An error counts as an answer, unless another attempt may succeed.
        """
        end, nothing = time.monotonic() + _PROBE_SECONDS, np.empty(0, np.uint32)
        try:
            if not (manifest := next(reversed(self._manifests.values()), None)):
                replica.call(LookupStub, "Describe", pb.DescribeRequest(), _PROBE_SECONDS)
            else:
                out = np.empty((0, manifest.record_bytes), np.uint8)
                replica.submit(manifest, nothing, out, nothing, end).receive(end)
        except TolhouseError as error:
            return not isinstance(error, _RETRIED)
        except TimeoutError:
            return False
        return True

    def _call(self, method: str, request: Any) -> Any:
        """Call the replicas in turn, and return the first reply."""
        replicas = self.replicas.in_turn() * _ROUNDS
        seconds = max(0.0, end_after(self.timeout_seconds) - time.monotonic())
        timeout, error = seconds / len(replicas), TolhouseError()
        for replica in replicas:
            try:
                return replica.call(LookupStub, method, request, timeout)
            except (UnavailableError, DeadlineExceededError) as failure:
                error = failure
        raise error


class Replicas:
    """The replicas at the addresses of `targets`. DNS names are resolved periodically.

    Rendezvous hashing gives each shard an order of replicas, so that their caches hold different
    rows. Slow replicas come after healthy ones, and those that are down come last. `probe` returns
    whether a replica answers. Several threads may share one object.
    """

    def __init__(
        self, targets: Targets, credentials: ClientCredentials, probe: Callable[[Replica], bool]
    ) -> None:
        self._addresses = Addresses(targets, credentials)
        self.name = ",".join(self._addresses.targets)
        self._replicas: dict[str, Replica] = {}  # by address; the dict is replaced as a whole
        self.health = PeerHealth(
            "lookup replica",
            lambda target: target in self._replicas and probe(self._replicas[target]),
            lambda target: self._replicas.keys() - {target} if target in self._replicas else None,
        )
        self._closed, self._renewing = threading.Event(), threading.Lock()
        self._renew()
        if self._addresses.change:
            threading.Thread(target=self._follow, name="addresses", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self.health.close()
        with self._renewing:
            for replica in self._replicas.values():
                replica.close()

    @property
    def count(self) -> int:
        """The number of replicas, at least 1."""
        return len(self._replicas) or 1

    def in_turn(self) -> list[Replica]:
        """Return all replicas, healthy ones first. Raises UnavailableError if there are none."""
        replicas = self._replicas
        if not replicas:
            raise UnavailableError(f"{self.name}: the name has no address yet")
        return [replicas[target] for target in self.health.order(replicas)]

    def divide(
        self, manifest: Manifest, ids: Array, left: Array, attempt: int
    ) -> Iterator[tuple[Replica, Array]]:
        """Divide the indices `left` of `ids` among the replicas for this attempt."""
        replicas = self.in_turn()
        if len(replicas) == 1:
            yield replicas[0], left
            return
        targets = tuple(replica.target for replica in replicas)
        ranks = tuple(map(self.health.rank, targets))
        best = ranks.count(min(ranks))  # the number of replicas that are used
        order = _order(manifest.ref, manifest.num_shards, targets, ranks)
        owners = order[manifest.shard_of(ids[left]), attempt % best]
        for number in np.unique(owners).tolist():
            yield replicas[number], left[owners == number]

    def _follow(self) -> None:
        while not self._closed.wait(_RESOLVE_SECONDS):
            try:
                self._renew()
            except TolhouseError as error:  # such as a TLS file that is being replaced
                event("new addresses cannot be called", logging.WARNING, reason=str(error))

    def _renew(self) -> None:
        """Resolve names. A replica without an address closes after its last call."""
        found, now = self._addresses.look_up(), self._replicas
        with self._renewing:
            if found != tuple(now) and not self._closed.is_set():
                credentials = self._addresses.credentials_for
                self._replicas = {at: now.get(at) or Replica(at, credentials(at)) for at in found}


def _cancel(requests: list[Request]) -> None:
    for request in requests:
        request.cancel(RequestCancelledError("the call was cancelled"))


def _in_order_of_arrival(requests: list[Request], end: float) -> Iterator[int]:
    """Yield the index of each request once its reply begins, and the other indices after `end`.

    A reply is received in the thread of the call, so that a slow one must not delay the others.
    """
    if len(requests) == 1:
        yield 0
        return
    poll = select.poll()
    waiting = {fd: n for n, request in enumerate(requests) if (fd := request.fileno()) >= 0}
    rest = set(range(len(requests))) - set(waiting.values())
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting and (seconds := end - time.monotonic()) > 0:
        for fd, _ in poll.poll(seconds * 1000):
            poll.unregister(fd)
            yield waiting.pop(fd)
    yield from (*waiting.values(), *rest)


def _bad_rows(error: BaseException) -> tuple[int, ...]:
    """Return the tokens of missing or damaged rows, if the error has them."""
    return error.token_ids if isinstance(error, CorruptError) else ()


def _outcome(errors: list[BaseException], ids: Array) -> BaseException:
    """Return the error of a fetch that lacks the rows of `ids`.

    It is a CorruptError with token ids only if all other rows were received.
    """
    bad = [token for error in errors for token in _bad_rows(error)]
    if set(bad) == set(ids.tolist()):
        return CorruptError(str(errors[0]), bad)
    other = next((error for error in errors if not _bad_rows(error)), errors[0])
    return CorruptError(str(other)) if isinstance(other, CorruptError) else other


@lru_cache(64)
def _order(ref: str, num_shards: int, targets: tuple[str, ...], ranks: tuple[int, ...]) -> Array:
    """Return the order of `targets` for each shard, as indices [num_shards, targets].

    Targets of a lower rank come first.
    """
    texts = (f"{ref}:{shard}:{target}" for shard in range(num_shards) for target in targets)
    weights = np.array([xxh3_64_intdigest(text.encode()) for text in texts], np.uint64)
    order = np.argsort(weights.reshape(num_shards, -1), axis=1)
    by_rank = np.argsort(np.array(ranks)[order], axis=1, kind="stable")
    return np.take_along_axis(order, by_rank, axis=1)
