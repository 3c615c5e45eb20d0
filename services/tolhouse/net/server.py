"""The gRPC server of every service, with health, reflection, metrics, draining and limits."""

import asyncio
import ctypes
import gc
import json
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager, suppress
from functools import partial
from logging import DEBUG, ERROR
from typing import Any, Protocol
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import grpc
from prometheus_client import REGISTRY, make_wsgi_app, start_http_server

from tolhouse.errors import InternalError, InUseError, TolhouseError
from tolhouse.logs import event, join_address, log, ready, split_address
from tolhouse.net.auth import ServerCredentials

Register = Callable[[grpc.aio.Server], None]  # a function that adds a service to a server
Drain = Callable[[float], Awaitable[None]] | None  # takes the seconds for calls in flight
Report = Callable[[bool], Awaitable[None]]
Check = Callable[[Report], Coroutine[None, None, None]] | None
# The health service name for liveness probes, which is served while the process answers.
LIVE = "live"

MAX_STREAMS = 1024  # open calls per connection; further calls wait
MAX_CONNECTIONS = 1024  # per service; further connections are closed
MAX_HEADER_BYTES = 16 << 10  # per call
MAX_REQUEST_BYTES = 4 << 20  # gRPC's default
_HEALTH_SECONDS = 3  # time for the event loop to answer; probes time out after five

SERVER_OPTIONS = [
    ("grpc.optimization_target", "throughput"),
    ("grpc.so_reuseport", 0),  # a port in use is an error, and two servers never share it
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_metadata_size", MAX_HEADER_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_HEADER_BYTES),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.server_handshake_timeout_ms", 10_000),  # for TLS and HTTP/2
]


class Config(Protocol):
    listen: str
    metrics_listen: str
    drain_seconds: float

    def server_credentials(self) -> ServerCredentials: ...


def finish_startup() -> None:
    """Exempt loaded objects from garbage collection, and return free memory to the system."""
    gc.collect()  # with many old objects, Python would rarely collect the cycles of calls
    gc.freeze()
    gc.collect()  # resets the count of old objects
    with suppress(AttributeError, OSError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


@asynccontextmanager
async def errors_as_status(
    context: grpc.aio.ServicerContext, public: Callable[[Exception], Exception] = lambda e: e
) -> AsyncIterator[None]:
    """End the call with the status of the block's error. `public` returns the error for callers."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the boundary where every error becomes a status
        status, message = status_of(public(error))
        await context.abort(grpc.StatusCode[status], message)


def status_of(error: Exception) -> tuple[str, str]:
    """Return the name of an error's gRPC status, and the message for the caller.

    Defects are logged.
    """
    if not isinstance(error, TolhouseError):
        log.error("internal error", exc_info=error)
        error = InternalError("internal error; the service's log has the details")
    return error.grpc_status, str(error)[:2000]  # the message may quote the request


async def serve(
    service: str,
    name: str,
    config: Config,
    register: Register,
    drain: Drain = None,
    check: Check = None,
    **ports: str,
) -> None:
    """Serve until SIGTERM or SIGINT, then call `drain` and finish the calls in flight.

    The ready message is printed once the service answers, with the addresses of other `ports`.
    `check` runs in its own task and reports whether the service is ready for requests.
    """
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

    listen, credentials = config.listen, config.server_credentials()
    credentials.check(listen, "--listen")
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=credentials.interceptors())
    register(server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = name, health.SERVICE_NAME, reflection.SERVICE_NAME
    reflection.enable_server_reflection(names, server)
    port, tls = 0, credentials.for_grpc()
    with suppress(RuntimeError):
        port = server.add_secure_port(listen, tls) if tls else server.add_insecure_port(listen)
    if not port:
        reason = "the port is in use, or the address is another machine's"
        raise InUseError(f"{service} can't listen on {listen}: {reason}; choose another --listen")
    finish_startup()
    await server.start()
    health_of = health_pb2.HealthCheckResponse

    async def report(ok: bool) -> None:
        for checked in ("", name):
            await checks.set(checked, health_of.SERVING if ok else health_of.NOT_SERVING)

    await report(True)
    await checks.set(LIVE, health_of.SERVING)
    checking = asyncio.create_task(check(report)) if check else None
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    loop, request = asyncio.get_running_loop(), health_pb2.HealthCheckRequest()

    def healthy() -> bool:
        """Return whether the event loop answers a health check like that of a gRPC client."""
        if stop.is_set():
            return False
        check = asyncio.run_coroutine_threadsafe(checks.Check(request, None), loop)
        return check.result(_HEALTH_SECONDS).status == health_pb2.HealthCheckResponse.SERVING

    metrics = serve_metrics(config.metrics_listen, credentials, healthy)
    ready(service, join_address(split_address(listen)[0], port), metrics=metrics, **ports)
    await stop.wait()
    event("draining", service=service)
    if checking:
        checking.cancel()
    await checks.enter_graceful_shutdown()
    seconds = config.drain_seconds
    await asyncio.gather(server.stop(seconds), *([drain(seconds)] if drain else []))
    event("stopped", service=service)


def serve_metrics(address: str, credentials: ServerCredentials, healthy: Callable[[], bool]) -> str:
    """Serve Prometheus metrics and /health over HTTP, or HTTPS if `credentials` have TLS.

    Returns the address, with the port that was chosen.
    """
    credentials.check(address, "--metrics-listen")
    host, port = split_address(address)
    ca, pair = credentials.tls_client_ca or None, (credentials.tls_cert, credentials.tls_key)
    try:
        server, _ = start_http_server(
            port, host, REGISTRY, *pair, ca, client_auth_required=bool(ca)
        )
    except OSError as error:
        raise InUseError(f"--metrics-listen {address} fails: {error.strerror or error}") from None
    server.handle_error = _log_failure  # type: ignore[assignment] # the default prints a traceback
    server.set_app(partial(_health_or_metrics, healthy, make_wsgi_app()))
    if isinstance(server.socket, ssl.SSLSocket):

        def accept() -> tuple[ssl.SSLSocket, Any]:
            raw, caller = socket.socket.accept(server.socket)
            # Threads do the handshakes, so that a slow handshake does not delay others.
            options: Any = {"server_side": True, "do_handshake_on_connect": False}
            return credentials.current_context().wrap_socket(raw, **options), caller

        server.get_request = accept  # type: ignore[method-assign] # there is no other hook
    return join_address(host, server.server_port)


def _log_failure(*_: object) -> None:
    """Log a failed request for metrics. Closed connections are common, so their level is debug."""
    here = isinstance(sys.exception(), OSError)
    log.log(DEBUG if here else ERROR, "a request for metrics failed", exc_info=not here)


def _health_or_metrics(
    healthy: Callable[[], bool],
    metrics: WSGIApplication,
    request: WSGIEnvironment,
    start: StartResponse,
) -> Iterable[bytes]:
    """The WSGI app of the metrics listener: /health is 200 or 503, and other paths are metrics."""
    if request["PATH_INFO"] != "/health":
        return metrics(request, start)
    ok = False
    with suppress(TimeoutError, CancelledError):  # the event loop hangs or has ended
        ok = healthy()
    start("200 OK" if ok else "503 Service Unavailable", [("Content-Type", "application/json")])
    return [json.dumps({"status": "ok" if ok else "unavailable"}).encode()]
