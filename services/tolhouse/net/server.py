"""gRPC services, the same for every process: health, reflection, drain and limits; errors to statuses."""

import asyncio
import ctypes
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import grpc

from tolhouse.errors import Internal, InUse, TolhouseError
from tolhouse.logs import event, log, ready, split_address
from tolhouse.net.auth import ServerCredentials
from tolhouse.net.tls import HANDSHAKE_SECONDS

T = TypeVar("T")

MAX_STREAMS = 1024  # open calls of one connection; more wait for one of them to end
MAX_CONNECTIONS = 1024  # of one service; more are closed
MAX_HEADER_BYTES = 16 << 10  # of one call
MAX_ERROR = 2000  # characters of an error, which may quote what was sent
MAX_REQUEST_BYTES = 4 << 20  # gRPC's own default

SERVER_OPTIONS = [
    ("grpc.optimization_target", "throughput"),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_metadata_size", MAX_HEADER_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_HEADER_BYTES),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.server_handshake_timeout_ms", int(1000 * HANDSHAKE_SECONDS)),  # of TLS and of HTTP/2
]


def finish_startup() -> None:
    """Exempt what has been loaded from garbage collection, and return the memory that loading took.

    Python looks for cycles among old objects only once a quarter as many have survived as exist. With
    the objects of imported modules that takes hours, in which the cycles of calls pile up.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # counts the old objects anew: there are none
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """End a call with the status of `error`; a defect of ours is logged whole and told in a line."""
    if not isinstance(error, TolhouseError):
        log.error("internal error", exc_info=error)
        error = Internal("internal error; the service's log has the details")
    await context.abort(grpc.StatusCode[error.grpc_status], str(error)[:MAX_ERROR])
    raise AssertionError("abort returns never")


async def answer(context: grpc.aio.ServicerContext, work: Awaitable[T]) -> T:
    """The result of `work`, or the call's end with the status of its error."""
    try:
        return await work
    except Exception as error:  # noqa: BLE001 - the boundary where every error becomes a status
        await abort(context, error)


async def stream(context: grpc.aio.ServicerContext, work: AsyncIterator[T]) -> AsyncIterator[T]:
    """The same for a stream of results."""
    try:
        async for item in work:
            yield item
    except Exception as error:  # noqa: BLE001
        await abort(context, error)


async def serve(
    service: str,
    listen: str,
    register: Callable[[grpc.aio.Server], Any],
    names: tuple[str, ...],
    drain_seconds: float,
    drain: Callable[[], None] | None = None,
    *,
    credentials: ServerCredentials,
    **fields: object,
) -> None:
    """Serve on `listen` until SIGTERM or SIGINT, then call `drain` and finish calls in flight for at most `drain_seconds`.

    Once it answers, one line of JSON on stdout says so: service, address with its real port, and `fields`.
    InvalidArgument where `credentials` do not allow for `listen`.
    """
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

    credentials.check(listen, "--listen")
    server = grpc.aio.server(
        options=[*SERVER_OPTIONS, ("grpc.so_reuseport", 0)],
        interceptors=credentials.interceptors(),
    )
    register(server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection(
        (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    host, _ = split_address(listen)
    try:
        port = (
            server.add_secure_port(listen, credentials.tls.credentials())
            if credentials.tls
            else server.add_insecure_port(listen)
        )
    except RuntimeError:
        port = 0
    if not port:
        raise InUse(
            f"{service} can't listen on {listen}: the port is in use or the address is not this machine's; choose another --listen"
        )
    finish_startup()
    await server.start()
    for name in ("", *names):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    ready(service, f"{host}:{port}", **fields)
    await stop.wait()
    event("draining", service=service)
    await checks.enter_graceful_shutdown()
    if drain:
        drain()
    await server.stop(drain_seconds)
    event("stopped", service=service)
