"""The common part of `Client` and `AsyncClient`: a connection, its calls, errors and forks."""

import ctypes
import gc
import os
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt

from tolhouse.client.arguments import (
    check_names,
    optional_timeout,
    plain_value,
    table_name,
    target_text,
    timeout_seconds,
    token_ids,
)
from tolhouse.client.lookup import LookupRowSource
from tolhouse.client.replica import Replica
from tolhouse.client.results import (
    GenerateOutput,
    TableInfo,
    WorkerInfo,
    generate_output,
    worker_info,
)
from tolhouse.client.row_source import RowSource, check_target, open_row_source
from tolhouse.errors import (
    ClosedError,
    InternalError,
    InvalidArgumentError,
    TolhouseError,
    UnavailableError,
    UnsupportedError,
)
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.call import time_limit
from tolhouse.net.channel import Targets, error_of
from tolhouse.sampling import FEATURES, SamplingParams, check_features
from tolhouse.store.base import shown
from tolhouse.table.manifest import Manifest
from tolhouse.v1 import generation_pb2 as pb
from tolhouse.v1.generation_pb2_grpc import GenerationStub

_CREDENTIALS = [field.name for field in fields(ClientCredentials)]


class Generation(NamedTuple):
    """A checked request for a completion, which is not sent yet."""

    request: pb.GenerateRequest
    timeout: float | None


class Connection:
    """A connection that opens on first use, and again in a forked process.

    Every method raises only errors of Tolhouse. Arguments are those of `Client`.
    """

    def __init__(
        self,
        target: Targets | os.PathLike[str],
        timeout: float,
        credentials: ClientCredentials | None,
        options: dict[str, Any],
    ) -> None:
        check_names(options, ["timeout", "credentials", *_CREDENTIALS])
        if not isinstance(credentials, ClientCredentials | None):
            given = type(credentials).__name__
            raise InvalidArgumentError(f"`credentials` must be ClientCredentials, not {given}")
        self.target, self.timeout = target_text(target), timeout_seconds(timeout)
        self.credentials = replace(credentials or ClientCredentials(), **options)
        self.closed, self._lock = False, threading.Lock()
        self._source: RowSource | None = None
        check_target(self.target, self.credentials)
        _connections.add(self)

    def __str__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"{self._name!r}, timeout={self.timeout:g}{state}"

    def close(self) -> None:
        """Close the connection. Calls in flight and later calls raise ClosedError."""
        with self._lock:
            self.closed, source, self._source = True, self._source, None
        if source:
            source.close()

    def source(self) -> RowSource:
        """Open the row source on first use, and return it."""
        with self.errors(), self._lock:
            self._check_open()
            if self._source is None:
                self._source = open_row_source(self.target, self.timeout, self.credentials)
            return self._source

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn every exception of the block into an error of Tolhouse."""
        try:
            yield
        except (InvalidArgumentError, ClosedError, ImportError, MemoryError):
            raise
        except Exception as error:
            if self.closed:
                message = f"the client of {self._name} was closed during the call"
                raise ClosedError(message) from None
            if isinstance(error, TolhouseError):
                raise
            if isinstance(error, OSError):
                raise UnavailableError(f"{self._name}: {error.strerror or error}") from error
            what = f"{type(error).__name__}: {error}"
            raise InternalError(f"a defect in Tolhouse: {what}") from error

    def tables(self, timeout: float | None) -> list[TableInfo]:
        """List tables."""
        with self.errors(), time_limit(optional_timeout(timeout)):
            return [
                TableInfo(manifest, is_current) for manifest, is_current in self.source().tables()
            ]

    def describe(self, table: str | Manifest, timeout: float | None) -> Manifest:
        """Read a manifest."""
        if isinstance(name := table_name(table), Manifest):
            return name
        with self.errors(), time_limit(optional_timeout(timeout)):
            return self.source().describe(name)

    def fetch(
        self,
        table: str | Manifest,
        ids: npt.ArrayLike | Iterable[int],
        timeout: float | None,
    ) -> np.ndarray:
        """Fetch rows [T, N, D] of T ids."""
        wanted, ids_T = table_name(table), token_ids(ids)
        with self.errors(), time_limit(optional_timeout(timeout)):
            source = self._source or self.source()
            manifest = wanted if isinstance(wanted, Manifest) else source.describe(wanted)
            auxiliary = source.auxiliary(manifest)
            repeated = len(set(ids_T.tolist())) < len(ids_T)
            distinct = np.unique(ids_T) if repeated else ids_T
            rows = auxiliary.decode(distinct, source.fetch_records(manifest, distinct))
        if repeated:
            rows = rows[np.searchsorted(distinct, ids_T)]
        rows.flags.writeable = False
        return rows

    def describe_worker(self, timeout: float | None) -> WorkerInfo:
        """Describe the worker."""
        seconds = optional_timeout(timeout) or self.timeout
        with self.errors():
            return worker_info(_describe(self._worker(), seconds))

    def generation(
        self,
        ids: npt.ArrayLike | Iterable[int],
        max_tokens: int,
        timeout: float | None,
        sampling: dict[str, Any],
    ) -> Generation:
        """Check the arguments of a completion, and send nothing."""
        self._check_open()
        check_names(sampling, ["max_tokens", "timeout", *FEATURES])
        options = {name: plain_value(value) for name, value in sampling.items()}
        params = SamplingParams(plain_value(max_tokens), **options)
        return Generation(params.to_proto(token_ids(ids).tolist()), optional_timeout(timeout))

    def worker_for(self, generation: Generation) -> Replica:
        """Return a worker that implements all parameters of the request."""
        with self.errors():
            worker = self._worker()
            try:
                check_features(generation.request, (), worker.target)
            except UnsupportedError:  # it is supported if the worker lists the feature
                features = _describe(worker, self.timeout).features
                check_features(generation.request, features, worker.target)
            return worker

    def stream(self, generation: Generation) -> Generator[GenerateOutput, None, None]:
        """Yield the parts of a completion. Closing the generator cancels the completion."""
        call, pid = None, os.getpid()
        try:
            with self.errors():
                worker = self.worker_for(generation)
                stub = GenerationStub(worker.open_channel())
                metadata = worker.credentials.metadata()
                call = stub.Generate(
                    generation.request, timeout=generation.timeout, metadata=metadata
                )
                try:
                    for reply in call:
                        yield generate_output(reply)
                except grpc.RpcError as error:
                    raise error_of(error, worker.target) from None
        finally:
            if call and pid == os.getpid():
                call.cancel()
            elif call:
                _keep_forever(call)

    def abandon(self) -> None:
        """Replace inherited objects in a forked process without finalising them.

        The threads of the parent do not run here, and inherited locks may never be released.
        Finalisers would write to sockets that the parent process uses.
        """
        self._lock = threading.Lock()
        source, self._source = self._source, None
        if source:
            _keep_forever(source)

    @property
    def _name(self) -> str:
        return shown(self.target) if isinstance(self.target, str) else ",".join(self.target)

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"the client of {self._name} is closed: make a new one")

    def _worker(self) -> Replica:
        if not isinstance(source := self.source(), LookupRowSource):
            raise InvalidArgumentError(f"{source.url} holds tables; tokens come from a worker")
        return source.replicas.in_turn()[0]


def _describe(worker: Replica, seconds: float) -> pb.DescribeWorkerReply:
    return worker.call(GenerationStub, "DescribeWorker", pb.DescribeWorkerRequest(), seconds)


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork() -> None:
    gc.freeze()  # so that inherited calls and channels in garbage are not finalised
    for connection in _connections:
        connection.abandon()


def _keep_forever(thing: object) -> None:
    """Prevent the finalisation of an object, also at the end of the process."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


os.register_at_fork(after_in_child=_after_fork)
