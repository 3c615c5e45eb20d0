"""The gRPC interface of the lookup service. Protobuf types end here."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from weakref import WeakValueDictionary

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
from tolhouse.lookup.hot_rows import HotRows, Send
from tolhouse.lookup.row_server import DisconnectedError, RowServer
from tolhouse.lookup.store_check import StoreCheck
from tolhouse.net.auth import ServerCredentials
from tolhouse.net.row_frames import MAX_IDS_PER_FETCH
from tolhouse.net.server import errors_as_status, serve, status_of
from tolhouse.store.base import open_store
from tolhouse.table.manifest import Buffer, split_ref
from tolhouse.v1 import lookup_pb2 as pb
from tolhouse.v1.lookup_pb2_grpc import add_LookupServicer_to_server

Requests = AsyncIterator[pb.FetchRequest]
NAME = "tolhouse.v1.Lookup"
MOST_AT_ONCE = 8  # requests per gRPC connection; each unread reply takes megabytes
_MESSAGE_BYTES = 1 << 20  # the bytes of records in a message
_SWITCH_SECONDS = 2e-4  # a thread that reads from the store must not delay those that send
_THREADS = 64  # for requests over gRPC

REQUESTS = Counter("tolhouse_lookup_requests_total", "Fetch requests, by gRPC status", ["status"])
REQUESTS_OK = REQUESTS.labels("OK")
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


class NotGrantedError(UnauthenticatedError):
    """The token of the caller does not grant reading the table."""


class LookupService:
    """Answers the calls of protos/tolhouse/v1/lookup.proto. Tokens may be limited to tables."""

    def __init__(
        self,
        rows: HotRows,
        rows_port: int = 0,
        credentials: ServerCredentials = ServerCredentials(),  # noqa: B008 - immutable
    ) -> None:
        self.rows, self.rows_port, self._credentials = rows, rows_port, credentials
        self._logged = ""  # the last logged failure of the store
        self.draining = False
        self._unanswered: dict[asyncio.Task, int] = {}  # the number of open requests by stream
        self._turns = WeakValueDictionary[str, asyncio.Semaphore]()  # by connection
        self._threads = ThreadPoolExecutor(_THREADS, "fetch")

    async def Fetch(self, requests: Requests, context: Context) -> None:
        """Answer the requests of a stream. Replies to one request have its order."""
        stream, loop = asyncio.current_task(), asyncio.get_running_loop()
        turn = self._turns.setdefault(context.peer(), asyncio.Semaphore(MOST_AT_ONCE))
        answering, writing = set[asyncio.Task](), asyncio.Lock()
        assert stream
        self._unanswered[stream] = 0
        authorization = _authorization(context)

        async def write_one(reply: pb.FetchReply) -> None:
            async with writing:
                await context.write(reply)

        async def answer(request: pb.FetchRequest) -> None:
            def write(reply: pb.FetchReply) -> None:  # runs in the thread of the request
                try:
                    asyncio.run_coroutine_threadsafe(write_one(reply), loop).result()
                except Exception as error:
                    raise DisconnectedError from error

            try:
                await loop.run_in_executor(self._threads, self._reply, request, write)
            finally:
                turn.release()
                self._unanswered[stream] -= 1
                if self.draining and not self._unanswered[stream]:
                    stream.cancel()

        try:
            async for request in requests:
                request.authorization = authorization
                self._unanswered[stream] += 1
                await turn.acquire()
                task = asyncio.create_task(answer(request))
                answering.add(task)
                task.add_done_callback(answering.discard)
            await asyncio.gather(*answering)
        except asyncio.CancelledError:
            if not self.draining:
                raise
        finally:
            for task in answering:  # the caller has disconnected
                task.cancel()
            await asyncio.gather(*answering, return_exceptions=True)
            del self._unanswered[stream]

    def _reply(self, request: pb.FetchRequest, write: Callable[[pb.FetchReply], None]) -> None:
        """Write the replies to a request."""
        done, total = 0, len(request.token_ids) // 4

        def send(records: list[Buffer]) -> None:
            nonlocal done
            step = max(1, _MESSAGE_BYTES // len(records[0])) if records else 1
            for first in range(0, max(1, len(records)), step):
                part = records[first : first + step]
                reply = pb.FetchReply(request_id=request.request_id, first=done)
                done += len(part)
                reply.records, reply.last = b"".join(part), done == total
                write(reply)

        if error := self.answer(request, send):
            write(pb.FetchReply(request_id=request.request_id, error=error, last=True))

    def drain(self) -> None:
        """End each stream after its open requests, because clients do not close them."""
        self.draining = True
        for stream, count in self._unanswered.items():
            if not count:
                stream.cancel()

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeReply:
        async with errors_as_status(context, self._public):
            self._check(_authorization(context), request.table)
            # A version counts as in use after this call, because workers cache rows.
            if split_ref(request.table)[1]:
                manifest = (await asyncio.to_thread(self.rows.table, request.table)).manifest
            else:
                manifest = await asyncio.to_thread(self.rows.source.describe, request.table)
        text = manifest.to_json() if manifest.ref != request.known else ""
        reply = pb.DescribeReply(manifest_json=text, max_ids_per_fetch=MAX_IDS_PER_FETCH)
        reply.rows_port = self.rows_port
        return reply

    async def ListTables(self, _: pb.ListTablesRequest, context: Context) -> pb.ListTablesReply:
        async with errors_as_status(context, self._public):
            reply = pb.ListTablesReply()
            authorization = _authorization(context)
            for manifest, published in await asyncio.to_thread(self.rows.source.tables):
                if not self._credentials.accepts(authorization, manifest.name):
                    continue
                listed = reply.tables.add(name=manifest.name, version=manifest.version)
                listed.manifest_json = replace(manifest, frequent=()).to_json()
                listed.published = published
        return reply

    def _check(self, authorization: str, table: str) -> None:
        split_ref(table)
        if not self._credentials.accepts(authorization, table):
            raise NotGrantedError(f"the token does not grant reading table {table}")

    def _public(self, error: Exception) -> Exception:
        """Return the error for callers, without the store's address and paths."""
        if isinstance(error, NotGrantedError):
            return error
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

    def answer(self, request: pb.FetchRequest, send: Send) -> pb.Error | None:
        """Pass the requested records to `send`, in order, and return the error of a failed request.

        Raises DisconnectedError if `send` does.
        """
        started, status, message = time.perf_counter(), "OK", ""
        trace: tracing.Span = tracing.INVALID_SPAN
        if request.traceparent:
            parent = tracing.remote(request.traceparent)
            trace = tracing.begin("lookup Fetch", parent, {"tolhouse.table": request.table})
        try:
            self._check(request.authorization, request.table)
            table = self.rows.table(request.table)
            ids = parse_ids(request.token_ids)
            if request.traceparent:
                with tracing.under((trace,)):
                    missed = self.rows.send(table, ids, send)
            else:
                missed = self.rows.send(table, ids, send)
            ROWS_HOT.inc(len(ids) - missed)
            ROWS_STORE.inc(missed)
            BYTES.inc(table.manifest.record_bytes * len(ids))
            if request.traceparent:
                about = {"tolhouse.rows": len(ids), "tolhouse.rows_from_store": missed}
                trace.set_attributes(about)
        except DisconnectedError:
            status = "CANCELLED"
            raise
        except Exception as error:  # noqa: BLE001 - the boundary where every error becomes a status
            status, message = status_of(self._public(error))
            bad = error.token_ids if isinstance(error, CorruptError) else ()
            MISSING.inc(len(bad))
            return pb.Error(status=status, message=message, token_ids=bad)
        finally:
            if request.traceparent:
                tracing.end(trace, message)
            (REQUESTS_OK if status == "OK" else REQUESTS.labels(status)).inc()
            SECONDS.observe(time.perf_counter() - started)
        return None


def _authorization(context: Context) -> str:
    found = dict(context.invocation_metadata() or ()).get("authorization", "")
    return found if isinstance(found, str) else found.decode(errors="replace")


def parse_ids(packed: bytes) -> np.ndarray:
    """Return the token ids uint32 [T] of a request. Raises InvalidArgumentError."""
    count, odd = divmod(len(packed), 4)
    if odd:
        raise InvalidArgumentError(f"token_ids has {len(packed)} bytes; each id has four")
    if count > MAX_IDS_PER_FETCH:
        raise InvalidArgumentError(f"{count} token ids; at most {MAX_IDS_PER_FETCH} are allowed")
    return np.frombuffer(packed, "<u4")


async def run(config: LookupConfig) -> None:
    """Serve the store until SIGTERM or SIGINT."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    tracing.start_tracing("lookup", config.traces, insecure=config.insecure)
    timeouts = config.store_timeout_seconds, config.store_wait_seconds
    store = await asyncio.to_thread(open_store, config.store, *timeouts)
    source = StoreRowSource(store.url, lambda: store)
    rows = HotRows(source, int(config.hot_megabytes * 1e6))
    credentials = config.server_credentials()
    service = LookupService(rows, credentials=credentials)
    transport = RowServer(config.rows_address(), credentials, service.answer)
    service.rows_port = config.rows_advertised_port or transport.port
    event("serving store", store=store.url)
    if risk := await asyncio.to_thread(store.risk):
        event(risk, logging.WARNING)
    backup = await asyncio.to_thread(open_store, config.refill) if config.refill else None
    check = StoreCheck(rows, backup)
    await asyncio.to_thread(rows.open_published)

    async def drain(seconds: float) -> None:
        service.drain()
        await asyncio.to_thread(transport.stop, seconds)

    try:
        register = partial(add_LookupServicer_to_server, service)
        await serve("lookup", NAME, config, register, drain, check.run, rows=transport.address)
    finally:
        transport.stop(0)
        rows.close()
        source.close()
        if backup:
            backup.close()
