"""The gRPC face of the lookup service. Protobuf types end here.

Copies of a record on its way out: one into the reply (`fetch_reply.py`) from the slab, the mapped shard or Redis' answer; then
gRPC's own, one into its slice and one into the socket. On its way in from Redis: the socket's, hiredis' two, and one into
the slab (`hotrows.py`); from a mapped shard, only the latter.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from logging import WARNING
from weakref import WeakValueDictionary

import grpc
import numpy as np
from prometheus_client import Counter, Histogram

from tolhouse import tracing
from tolhouse.config import LookupConfig
from tolhouse.errors import Internal, InvalidArgument, TolhouseError
from tolhouse.logs import event, log
from tolhouse.lookup.hot_rows import HotRows, OpenTable
from tolhouse.lookup.leases import Leases
from tolhouse.net import fetch_reply
from tolhouse.net.metrics import serve_metrics
from tolhouse.net.server import MAX_ERROR, answer, serve
from tolhouse.store import resolve, tables, wait_for_store
from tolhouse.table.manifest import Buffer, Manifest, split_ref
from tolhouse.v1 import lookup_pb2

NAME = "tolhouse.v1.Lookup"
CHUNK_BYTES = 1 << 20
MAX_IDS_PER_FETCH = 65_536
MOST_AT_ONCE = (
    8  # requests of one connection in the making: an answer that nobody takes holds megabytes
)

REQUESTS = Counter(
    "tolhouse_lookup_requests_total", "Fetch requests answered, by gRPC status", ["status"]
)
ROWS = Counter(
    "tolhouse_lookup_rows_total", "Rows served, from hot rows or from the store", ["source"]
)
ROWS_HOT, ROWS_STORE = ROWS.labels("hot"), ROWS.labels("store")
BYTES = Counter("tolhouse_lookup_bytes_total", "Record bytes served")
SECONDS = Histogram(
    "tolhouse_lookup_fetch_seconds",
    "Time from a Fetch request to its last record",
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
)


class LookupService:
    def __init__(self, rows: HotRows) -> None:
        self.rows = rows
        self.leases = Leases(rows.store)
        self.draining = False
        self._idle: set[asyncio.Task] = set()  # streams that wait for a request
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = (
            WeakValueDictionary()
        )  # by connection

    async def Fetch(
        self,
        request_iterator: AsyncIterator[lookup_pb2.FetchRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[bytes]:
        stream = asyncio.current_task()
        turn = self._turns.setdefault(context.peer(), asyncio.Semaphore(MOST_AT_ONCE))
        assert stream
        try:
            self._idle.add(stream)
            async for request in request_iterator:
                self._idle.discard(stream)
                async with turn:
                    async for reply in self._fetch(request):
                        yield reply
                if self.draining:
                    return
                self._idle.add(stream)
        except asyncio.CancelledError:
            if not self.draining:
                raise
        finally:
            self._idle.discard(stream)

    def drain(self) -> None:
        """End every stream once it has answered what it was asked: clients keep theirs open, and turn to another replica."""
        self.draining = True
        for stream in self._idle:
            stream.cancel()

    async def Describe(
        self, request: lookup_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> lookup_pb2.DescribeReply:
        is_still: bool = await answer(context, self._is_still(request.table, request.known))
        if is_still:
            return lookup_pb2.DescribeReply(max_ids_per_fetch=MAX_IDS_PER_FETCH)
        manifest = await answer(context, asyncio.to_thread(resolve, self.rows.store, request.table))
        if split_ref(request.table)[1] is not None:
            self.leases.used(manifest)
        return lookup_pb2.DescribeReply(
            manifest_json=manifest.to_json(), max_ids_per_fetch=MAX_IDS_PER_FETCH
        )

    async def _is_still(self, table: str, known: str) -> bool:
        """Whether `table` stands for the version `known`; a manifest lists frequent tokens, and may have a megabyte."""
        name, version = split_ref(table)
        if not known:
            return False
        if version is None:
            alias = await asyncio.to_thread(self.rows.store.alias, name)
            return alias is not None and f"{name}@{alias.version}" == known
        if table == known:
            self.leases.used((await self.rows.table(known)).manifest)
        return table == known

    async def ListTables(
        self, request: lookup_pb2.ListTablesRequest, context: grpc.aio.ServicerContext
    ) -> lookup_pb2.ListTablesReply:
        found = await answer(context, asyncio.to_thread(lambda: list(tables(self.rows.store))))
        return lookup_pb2.ListTablesReply(
            tables=[
                lookup_pb2.Table(
                    name=m.name,
                    version=m.version,
                    published=published,
                    manifest_json=replace(m, frequent=()).to_json(),
                )
                for m, published in found
            ]
        )

    async def _fetch(self, request: lookup_pb2.FetchRequest) -> AsyncIterator[bytes]:
        """The serialised replies to one request; its failure is its last reply, and the stream lives on."""
        started, status, told = time.perf_counter(), "OK", ""
        trace = tracing.begin(
            "lookup Fetch",
            tracing.remote(request.traceparent),
            {"tolhouse.table": request.table},
            tracing.SERVER,
        )
        try:
            if split_ref(request.table)[1] is None:
                raise InvalidArgument(
                    f"fetch needs name@version, not {request.table!r}: ask Describe what a name stands for"
                )
            table = await self.rows.table(request.table)
            self.leases.used(table.manifest)
            ids = _ids(request.token_ids, table.manifest)
            size, first, missed = table.manifest.record_bytes, 0, 0
            async for part, arrived in self.rows.parts(
                table, ids, max(1, CHUNK_BYTES // size), trace
            ):
                read = arrived
                while not (reply := self._reply(request.request_id, table, ids, first, part, read)):
                    read = read | await self.rows.again(
                        table, part, trace
                    )  # what was hot has been evicted since
                missed += len(read)
                first += len(part)
                yield reply
            ROWS_HOT.inc(len(ids) - missed)
            ROWS_STORE.inc(missed)
            BYTES.inc(size * len(ids))
            trace.set_attributes({"tolhouse.rows": len(ids), "tolhouse.rows_from_store": missed})
        except Exception as error:  # noqa: BLE001 - the boundary where every error becomes a status
            if not isinstance(error, TolhouseError):
                log.error("internal error", exc_info=error)
                error = Internal("internal error; the service's log has the details")
            status, told = error.grpc_status, str(error)[:MAX_ERROR]
            yield fetch_reply.failed(request.request_id, status, told)
        finally:
            tracing.end(trace, told)
        REQUESTS.labels(status).inc()
        SECONDS.observe(time.perf_counter() - started)

    def _reply(
        self,
        request_id: int,
        table: OpenTable,
        ids: np.ndarray,
        first: int,
        part: np.ndarray,
        read: dict[int, Buffer],
    ) -> bytes:
        """A reply with the records of `part` of `ids`; nothing if one of them is neither hot nor in `read`."""
        last, size = first + len(part) == len(ids), table.manifest.record_bytes * len(part)
        with table.lock:  # until the records are copied
            if table.lacks(part, read):
                return b""
            return fetch_reply.reply(request_id, first, table.records(part, read), size, last)


def register(service: LookupService, server: grpc.aio.Server) -> None:
    """As the generated code does, but for the replies of Fetch, which are serialised already."""
    fetch = grpc.stream_stream_rpc_method_handler(
        service.Fetch, lookup_pb2.FetchRequest.FromString, None
    )
    describe, list_tables = (
        grpc.unary_unary_rpc_method_handler(
            method, kind.FromString, lambda reply: reply.SerializeToString()
        )
        for method, kind in (
            (service.Describe, lookup_pb2.DescribeRequest),
            (service.ListTables, lookup_pb2.ListTablesRequest),
        )
    )
    handlers = {"Fetch": fetch, "Describe": describe, "ListTables": list_tables}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(NAME, handlers)])


def _ids(packed: bytes, manifest: Manifest) -> np.ndarray:
    if len(packed) % 4:
        raise InvalidArgument(
            f"token_ids has {len(packed)} bytes; it packs little-endian uint32, four bytes each"
        )
    ids = np.frombuffer(packed, "<u4")
    if len(ids) > MAX_IDS_PER_FETCH:
        raise InvalidArgument(
            f"{len(ids)} token ids in one request; at most {MAX_IDS_PER_FETCH} are allowed"
        )
    manifest.check_ids(ids)
    return ids


async def run(config: LookupConfig) -> None:
    """Serve the store until told to stop."""
    credentials = config.server_credentials()
    tracing.start_tracing("lookup", config.traces, insecure=config.insecure)
    store = await asyncio.to_thread(
        wait_for_store, config.store, config.store_timeout_seconds, config.store_wait_seconds
    )
    service = LookupService(HotRows(store, int(config.hot_megabytes * 1e6)))
    metrics = serve_metrics(config.metrics_listen, credentials)
    event("serving store", store=store.url)
    with suppress(TolhouseError):  # whoever asks for a row is told
        if not await asyncio.to_thread(store.refs):
            event("the store holds no table yet", WARNING, store=store.url)
    await service.rows.open_published()
    try:
        await serve(
            "lookup",
            config.listen,
            lambda server: register(service, server),
            (NAME,),
            config.drain_seconds,
            drain=service.drain,
            credentials=credentials,
            metrics=metrics,
        )
    finally:
        service.rows.close()
        store.close()
