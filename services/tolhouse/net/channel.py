"""Calls: channels that follow their TLS files, and failed calls as errors."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import grpc

from tolhouse.errors import TolhouseError, Unsupported, from_status
from tolhouse.files import ReloadingFiles
from tolhouse.net.auth import ClientCredentials

T = TypeVar("T")

_CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.optimization_target", "throughput"),
    # a peer that comes back is found within a second; gRPC's own back-off goes up to two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    (
        "grpc.min_reconnect_backoff_ms",
        1000,
    ),  # what an attempt may take at least: TLS on a busy machine takes a while
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    (
        "grpc.use_local_subchannel_pool",
        1,
    ),  # two clients in a process share no connection, nor its back-off
]


# what gRPC says of a connection that failed, and what that means
_TLS_TROUBLE = {
    "certificate has expired": "its TLS certificate has expired",
    "certificate is not yet valid": "its TLS certificate is not valid yet",
    "Hostname Verification Check failed": "its TLS certificate is for another host name",
    "CERTIFICATE_VERIFY_FAILED": "its TLS certificate is not of the authority trusted here",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "Socket closed": "it closed the connection: it may be full, want TLS, or want a TLS certificate that it trusts; its log may say more",
}


def dial(target: str, credentials: ClientCredentials) -> grpc.Channel:
    """A channel to `target`; InvalidArgument where `credentials` do not allow for it."""
    tls = credentials.channel_credentials(target)
    if tls is None:
        return grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
    return grpc.secure_channel(target, tls, options=_options(credentials))


def dial_async(target: str, credentials: ClientCredentials) -> grpc.aio.Channel:
    """The same for an event loop."""
    tls = credentials.channel_credentials(target)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(target, tls, options=_options(credentials))


def _options(credentials: ClientCredentials) -> list[tuple[str, int | str]]:
    return (
        [*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", credentials.tls_name)]
        if credentials.tls_name
        else [*_CHANNEL_OPTIONS]
    )


class ReloadingChannel(Generic[T]):
    """What `dialled` makes, a channel and its stubs; made again, for calls to come, when the TLS files of `credentials` have changed."""

    def __init__(self, credentials: ClientCredentials, dialled: Callable[[], T]) -> None:
        self.credentials = credentials
        kept: deque[T] = deque(maxlen=2)  # calls on the one before end in peace

        def dial_again() -> T:
            kept.append(dialled())
            return kept[-1]

        self._current = ReloadingFiles(credentials.files, dial_again)

    @property
    def current(self) -> T:
        return self._current.get()


def error_of(error: grpc.RpcError, peer: str) -> TolhouseError:
    """The error that a failed call to `peer` stands for."""
    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return Unsupported(
            f"{peer} does not serve this call; is it the address of another service?"
        )
    if status is grpc.StatusCode.UNAVAILABLE and (
        "connect" in details.lower() or "socket" in details.lower()
    ):
        reason = next(
            (text for sign, text in _TLS_TROUBLE.items() if sign in details), "can't be reached"
        )
        details = f"{reason} ({details})"
    mine = status in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.NOT_FOUND,
    )
    return from_status(status.name, details if mine else f"{peer}: {details}")  # whose fault it is
