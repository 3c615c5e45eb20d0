"""Calls: channels that follow their TLS files, and failed calls as errors."""

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

from tolhouse.errors import TolhouseError, Unsupported, from_status
from tolhouse.files import ReloadingFiles
from tolhouse.net.auth import ClientCredentials

T = TypeVar("T")

_CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.optimization_target", "throughput"),
    # a peer that comes back is found within a second; gRPC's own back-off goes up to two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also an attempt's time: TLS may take a while
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),  # two clients share no connection, nor its back-off
]
# what gRPC says of a connection that failed, and what that means
_TLS_PROBLEMS = {
    "certificate has expired": "its TLS certificate has expired",
    "certificate is not yet valid": "its TLS certificate is not valid yet",
    "Hostname Verification Check failed": "its TLS certificate is for another host name",
    "CERTIFICATE_VERIFY_FAILED": "its TLS certificate is not of the authority trusted here",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "Socket closed": "it closed the connection: it may be full, want TLS, or want a TLS "
    "certificate that it trusts; its log may say more",
}
_CALLERS_FAULT = ("INVALID_ARGUMENT", "OUT_OF_RANGE", "NOT_FOUND")


def dial(target: str, credentials: ClientCredentials) -> grpc.Channel:
    """A channel to `target`; InvalidArgument if `credentials` do not allow for it."""
    return _dial(grpc, target, credentials)


def dial_async(target: str, credentials: ClientCredentials) -> grpc.aio.Channel:
    """The same for an event loop."""
    return _dial(grpc.aio, target, credentials)


def _dial(library: Any, target: str, credentials: ClientCredentials) -> Any:
    tls, options = credentials.channel_credentials(target), [*_CHANNEL_OPTIONS]
    if tls is None:
        return library.insecure_channel(target, options=options)
    if credentials.tls_name:
        options.append(("grpc.ssl_target_name_override", credentials.tls_name))
    return library.secure_channel(target, tls, options=options)


class ReloadingChannel(Generic[T]):
    """What `dial` makes, a channel and its stubs; made anew when the TLS files change."""

    def __init__(self, credentials: ClientCredentials, dial: Callable[[], T]) -> None:
        self.credentials = credentials
        kept: deque[T] = deque(maxlen=2)  # calls on the one before may end

        def dial_again() -> T:
            kept.append(dial())
            return kept[-1]

        self._current = ReloadingFiles(credentials.files, dial_again)

    @property
    def current(self) -> T:
        return self._current.get()


def error_of(error: grpc.RpcError, peer: str) -> TolhouseError:
    """The error that a failed call to `peer` stands for."""
    status, details = error.code().name, error.details() or ""
    if status == "UNIMPLEMENTED":
        return Unsupported(
            f"{peer} does not serve this call; is it the address of another service?"
        )
    if status == "UNAVAILABLE" and ("connect" in details.lower() or "socket" in details.lower()):
        unreachable = "can't be reached"
        reasons = (reason for sign, reason in _TLS_PROBLEMS.items() if sign in details)
        details = f"{next(reasons, unreachable)} ({details})"
    return from_status(status, details if status in _CALLERS_FAULT else f"{peer}: {details}")
