"""Calls: channels that follow their TLS files, and failed calls as errors."""

from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from tolhouse.errors import TolhouseError, Unsupported, from_status
from tolhouse.files import ReloadingFiles
from tolhouse.net.auth import ClientCredentials

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


def dial(target: str, credentials: ClientCredentials, library: Any = grpc) -> Any:
    """A channel of `library`, grpc or grpc.aio; InvalidArgument if `credentials` forbid it."""
    tls, options = credentials.channel_credentials(target), [*_CHANNEL_OPTIONS]
    if tls is None:
        return library.insecure_channel(target, options=options)
    if credentials.tls_name:
        options.append(("grpc.ssl_target_name_override", credentials.tls_name))
    return library.secure_channel(target, tls, options=options)


def reloading_channel(
    target: str, credentials: ClientCredentials, library: Any = grpc
) -> Callable[[], Any]:
    """Returns the channel of `dial`, made anew when the TLS files change."""
    kept: deque[Any] = deque(maxlen=2)  # calls on the one before may end

    def dial_again() -> Any:
        kept.append(dial(target, credentials, library))
        return kept[-1]

    files = credentials.tls_ca, credentials.tls_cert, credentials.tls_key
    return ReloadingFiles(files, dial_again).get


def error_of(error: grpc.RpcError, peer: str) -> TolhouseError:
    """The error that a failed call to `peer` stands for."""
    status, details = error.code().name, error.details() or ""
    if status == "UNIMPLEMENTED":
        return Unsupported(f"{peer} does not serve this call; is it another service's address?")
    if status == "UNAVAILABLE" and ("connect" in details.lower() or "socket" in details.lower()):
        unreachable = "can't be reached"
        reasons = (reason for sign, reason in _TLS_PROBLEMS.items() if sign in details)
        details = f"{next(reasons, unreachable)} ({details})"
    return from_status(status, details if status in _CALLERS_FAULT else f"{peer}: {details}")
