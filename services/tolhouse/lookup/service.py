"""The gRPC interface of the lookup service. Protobuf types end here."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from operator import methodcaller
from weakref import WeakValueDictionary

import grpc
import numpy as np
from grpc.aio import ServicerContext as Context
from prometheus_client import Counter, Histogram

from tolhouse import tracing
from tolhouse.client.row_source import StoreRowSource
from tolhouse.config import LookupConfig
from tolhouse.errors import (
    CorruptError,
    DeadlineExceededError,
    InvalidArgumentError,
    OverloadedError,
    TolhouseError,
    UnauthenticatedError,
    UnavailableError,
)
from tolhouse.logs import event
from tolhouse.lookup.hot_rows import HotRows
from tolhouse.lookup.store_check import StoreCheck
from tolhouse.net.fetch_reply import serialize
from tolhouse.net.server import errors_as_status, serve, status_of
from tolhouse.store.base import open_store
from tolhouse.table.manifest import Manifest, split_ref
from tolhouse.v1 import lookup_pb2 as pb

Requests = AsyncIterator[pb.FetchRequest]
NAME = "tolhouse.v1.Lookup"
MAX_IDS_PER_FETCH = 65_536
MOST_AT_ONCE = 8  # requests per connection; each unread reply takes megabytes

REQUESTS = Counter("tolhouse_lookup_requests_total", "Fetch requests, by gRPC status", ["status"])
ROWS = Counter("tolhouse_lookup_rows_total", "Rows served, by source", ["source"])
ROWS_HOT, ROWS_STORE = ROWS.labels("hot"), ROWS.labels("store")
MISSING = Counter(
    "tolhouse_lookup_rows_missing_total", "Requested rows that are missing or damaged"
)
BYTES = Counter("tolhouse_lookup_bytes_total", "Record bytes served")
SECONDS = Histogram(
    "tolhouse_lookup_fetch_seconds",
    "Time from a Fetch request to its last record",
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
)


# The errors that callers receive for failures of the store. The first matching class counts.
_STORE_FAILURES: tuple[tuple[type[TolhouseError], type[TolhouseError], str], ...] = (
    (UnauthenticatedError, UnavailableError, "the store refuses the lookup service"),
    (OverloadedError, OverloadedError, "the store is full"),
    (UnavailableError, UnavailableError, "the store cannot be reached now"),
    (DeadlineExceededError, DeadlineExceededError, "the store did not answer in time"),
    (CorruptError, CorruptError, "the store has lost data, or it is damaged"),
)


class LookupService:
    """Answers the calls of protos/tolhouse/v1/lookup.proto."""

    def __init__(self, rows: HotRows) -> None:
        self.rows = rows
        self._logged = ""  # the last logged failure of the store
        self.draining = False
        self._unanswered: dict[asyncio.Task, int] = {}  # the number of open requests by stream
        self._turns = WeakValueDictionary[str, asyncio.Semaphore]()  # by connection

    async def Fetch(self, requests: Requests, context: Context) -> None:
        """Answer the requests of a stream. Requests for cached rows do not wait for reads."""
        stream = asyncio.current_task()
        turn = self._turns.setdefault(context.peer(), asyncio.Semaphore(MOST_AT_ONCE))
        writing, reading = asyncio.Lock(), set[asyncio.Task]()
        assert stream
        self._unanswered[stream] = 0

        async def answer(request: pb.FetchRequest) -> None:
            async for reply in self._fetch(request):
                async with writing:
                    await context.write(reply)

        def ended() -> None:
            turn.release()
            self._unanswered[stream] -= 1
            if self.draining and not self._unanswered[stream]:
                stream.cancel()

        def read(task: asyncio.Task) -> None:
            reading.discard(task)
            ended()
            if not task.cancelled():
                task.exception()  # retrieved, so that asyncio does not log it

        try:
            async for request in requests:
                self._unanswered[stream] += 1
                await turn.acquire()
                if self.rows.are_hot(request.table, request.token_ids):
                    try:
                        await answer(request)
                    finally:
                        ended()
                else:
                    task = asyncio.create_task(answer(request))
                    reading.add(task)
                    task.add_done_callback(read)
            await asyncio.gather(*reading)
        except asyncio.CancelledError:
            if not self.draining:
                raise
        finally:
            for task in reading:  # the caller has disconnected
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
            del self._unanswered[stream]

    def drain(self) -> None:
        """End each stream after its open requests, because clients do not close them."""
        self.draining = True
        for stream, count in self._unanswered.items():
            if not count:
                stream.cancel()

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        async with errors_as_status(context, self._public):
            # A version counts as in use after this call, because workers cache rows.
            if split_ref(request.table)[1]:
                manifest = (await self.rows.table(request.table)).manifest
            else:
                manifest = await asyncio.to_thread(self.rows.source.describe, request.table)
        text = manifest.to_json() if manifest.ref != request.known else ""
        return pb.DescribeReply(manifest_json=text, max_ids_per_fetch=MAX_IDS_PER_FETCH)

    async def ListTables(self, _: pb.ListTablesRequest, context: Context) -> pb.ListTablesReply:
        async with errors_as_status(context, self._public):
            reply = pb.ListTablesReply()
            for manifest, published in await asyncio.to_thread(self.rows.source.tables):
                listed = reply.tables.add(name=manifest.name, version=manifest.version)
                listed.manifest_json = replace(manifest, frequent=()).to_json()
                listed.published = published
        return reply

    def _public(self, error: Exception) -> Exception:
        """Return the error for callers, without the store's address and paths."""
        url, text = self.rows.source.url, str(error)
        place = url.removeprefix("file://")
        failure = next((row for row in _STORE_FAILURES if isinstance(error, row[0])), None)
        if isinstance(error, UnauthenticatedError) or (failure and place in text):
            if text != self._logged:
                self._logged = text
                event("the store fails", logging.WARNING, reason=text)
            assert failure
            _, kind, message = failure
            bad = error.token_ids if isinstance(error, CorruptError) else ()
            if bad:
                message = f"the row of token {bad[0]} is missing or damaged in the store"
                message += f", and {len(bad) - 1} other rows are" if bad[1:] else ""
            return kind(message)
        if isinstance(error, TolhouseError) and place in text:
            return type(error)(
                text.replace(f"Redis at {url}", "the store").replace(url, "the store")
            )
        return error

    async def _fetch(self, request: pb.FetchRequest) -> AsyncIterator[bytes]:
        """Yield the serialised replies to one request. An error is the last reply."""
        started, status, message = time.perf_counter(), "OK", ""
        parent = tracing.remote(request.traceparent)
        trace = tracing.begin("lookup Fetch", parent, {"tolhouse.table": request.table})
        try:
            if split_ref(request.table)[1] is None:
                raise InvalidArgumentError(f"fetch needs name@version, not {request.table!r}")
            table = await self.rows.table(request.table)
            ids = parse_ids(request.token_ids, table.manifest)
            first = missed = 0
            async for records, read in self.rows.chunks(table, ids, trace):
                end, missed = first + len(records), missed + read
                last, size = end == len(ids), len(records) * table.manifest.record_bytes
                header = pb.FetchReply(request_id=request.request_id, first=first, last=last)
                first = end
                yield serialize(header, records, size)
            ROWS_HOT.inc(len(ids) - missed)
            ROWS_STORE.inc(missed)
            BYTES.inc(table.manifest.record_bytes * len(ids))
            trace.set_attributes({"tolhouse.rows": len(ids), "tolhouse.rows_from_store": missed})
        except Exception as error:  # noqa: BLE001 - the boundary where every error becomes a status
            status, message = status_of(self._public(error))
            bad = error.token_ids if isinstance(error, CorruptError) else ()
            MISSING.inc(len(bad))
            failure = pb.Error(status=status, message=message, token_ids=bad)
            header = pb.FetchReply(request_id=request.request_id, error=failure, last=True)
            yield header.SerializeToString()
        finally:
            tracing.end(trace, message)
        REQUESTS.labels(status).inc()
        SECONDS.observe(time.perf_counter() - started)


def register(service: LookupService, server: grpc.aio.Server) -> None:
    """Register the service as generated code does, except that replies of Fetch are serialised."""
    unary, write = grpc.unary_unary_rpc_method_handler, methodcaller("SerializeToString")
    handlers = {
        "Fetch": grpc.stream_stream_rpc_method_handler(service.Fetch, pb.FetchRequest.FromString),
        "Describe": unary(service.Describe, pb.DescribeRequest.FromString, write),
        "ListTables": unary(service.ListTables, pb.ListTablesRequest.FromString, write),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(NAME, handlers)])


def parse_ids(packed: bytes, manifest: Manifest) -> np.ndarray:
    """Return the token ids uint32 [T] of a request.

    Raises InvalidArgumentError or IdOutOfRangeError.
    """
    count, odd = divmod(len(packed), 4)
    if odd:
        raise InvalidArgumentError(f"token_ids has {len(packed)} bytes; each id has four")
    if count > MAX_IDS_PER_FETCH:
        raise InvalidArgumentError(f"{count} token ids; at most {MAX_IDS_PER_FETCH} are allowed")
    ids = np.frombuffer(packed, "<u4")
    manifest.check_ids(ids)
    return ids


async def run(config: LookupConfig) -> None:
    """Serve the store until SIGTERM or SIGINT."""
    tracing.start_tracing("lookup", config.traces, insecure=config.insecure)
    timeouts = config.store_timeout_seconds, config.store_wait_seconds
    store = await asyncio.to_thread(open_store, config.store, *timeouts)
    source = StoreRowSource(store.url, lambda: store)
    rows = HotRows(source, int(config.hot_megabytes * 1e6))
    service = LookupService(rows)
    event("serving store", store=store.url)
    if risk := await asyncio.to_thread(store.risk):
        event(risk, logging.WARNING)
    backup = await asyncio.to_thread(open_store, config.refill) if config.refill else None
    check = StoreCheck(rows, backup)
    await rows.open_published()
    try:
        add = partial(register, service)
        await serve("lookup", NAME, config, add, service.drain, check.run)
    finally:
        rows.close()
        source.close()
        if backup:
            backup.close()
