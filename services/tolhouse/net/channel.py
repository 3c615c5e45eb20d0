"""Channels to services: reloading of TLS files, errors of failed calls, and DNS names."""

import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc

from tolhouse.errors import InvalidArgumentError, TolhouseError, UnsupportedError, from_status
from tolhouse.files import ReloadingFiles
from tolhouse.logs import event, join_address, split_address
from tolhouse.net.auth import ClientCredentials

SCHEME = "dns:///"  # the prefix of a target HOST:PORT that stands for all addresses of its name
_CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.optimization_target", "throughput"),
    # Reconnect within a second. gRPC's default back-off grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # This is also the time limit of an attempt to connect, including TLS.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),  # clients share neither connections nor back-off
]
# Parts of gRPC's messages about failed connections, and their meanings.
_TLS_PROBLEMS = {
    "certificate has expired": "its TLS certificate has expired",
    "certificate is not yet valid": "its TLS certificate is not valid yet",
    "Hostname Verification Check failed": "its TLS certificate is for another host name",
    "CERTIFICATE_VERIFY_FAILED": "its TLS certificate is not signed by a trusted authority",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "Socket closed": "it may be overloaded, or require TLS or a client certificate",
}
Targets = str | Sequence[str]  # addresses, or one text in which commas separate them
_CALLERS_FAULT = ("INVALID_ARGUMENT", "OUT_OF_RANGE", "NOT_FOUND")


_used_by: list[int] = []  # the id of the first process that used gRPC: this process or a parent


def _check_fork() -> None:
    """Raise UnsupportedError in a fork of a process that used gRPC. gRPC may crash there."""
    if not _used_by:
        _used_by.append(os.getpid())
        # Otherwise gRPC starts threads in every fork, which crash.
        os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    if _used_by != [os.getpid()]:
        raise UnsupportedError(
            "gRPC can't be used in a process that was forked after its parent had used gRPC: start "
            "the process by 'spawn' or 'forkserver', or make the first call after the fork"
        )


def dial(target: str, credentials: ClientCredentials, library: Any = grpc) -> Any:
    """Open a channel of `library`, grpc or grpc.aio.

    Raises InvalidArgumentError if the credentials do not allow it.
    """
    _check_fork()
    tls = credentials.channel_credentials(target)
    options = [*_CHANNEL_OPTIONS, credentials.proxy_option(target)]
    if tls is None:
        return library.insecure_channel(target, options=options)
    if credentials.tls_name:
        options.append(("grpc.ssl_target_name_override", credentials.tls_name))
    return library.secure_channel(target, tls, options=options)


def reloading_channel(target: str, credentials: ClientCredentials, library: Any = grpc) -> Callable:
    """Return a function that returns a channel.

    When the TLS files change, the function opens a new channel.
    """
    kept: deque[Any] = deque(maxlen=2)  # calls on the previous channel may finish

    def dial_again() -> Any:
        kept.append(dial(target, credentials, library))
        return kept[-1]

    files = credentials.tls_ca, credentials.tls_cert, credentials.tls_key
    return ReloadingFiles(files, dial_again).get


def error_of(error: grpc.RpcError, peer: str) -> TolhouseError:
    """Return the error of Tolhouse for a failed call to `peer`."""
    status, details = error.code().name, error.details() or ""
    if status == "UNIMPLEMENTED":
        return UnsupportedError(
            f"{peer} does not serve this call; is it the address of another service?"
        )
    if status == "UNAVAILABLE" and ("connect" in details.lower() or "socket" in details.lower()):
        reasons = [reason for sign, reason in _TLS_PROBLEMS.items() if sign in details]
        reasons.append("cannot be reached")
        details = f"{reasons[0]} ({details})"
    return from_status(status, details if status in _CALLERS_FAULT else f"{peer}: {details}")


class Addresses:
    """Resolves the addresses of `targets`, which `credentials` must allow. Not thread-safe."""

    def __init__(self, targets: Targets, credentials: ClientCredentials) -> None:
        given = targets.split(",") if isinstance(targets, str) else targets
        self.targets, self._credentials = tuple(t.strip() for t in given if t.strip()), credentials
        if not self.targets:
            allowed = f"HOST:PORT, or {SCHEME}HOST:PORT for all addresses of a name"
            raise InvalidArgumentError(f"no address given: {allowed}; several with commas")
        self._names, self._found = dict[str, tuple[str, int]](), dict[str, tuple[str, ...]]()
        for target in self.targets:
            address = split_address(target.removeprefix(SCHEME))
            credentials.channel_credentials(target.removeprefix(SCHEME))
            if target.startswith(SCHEME):
                self._names[target], self._found[target] = address, ()
        self._host_of: dict[str, str] = {}  # the DNS name of each address
        self.change = bool(self._names)  # whether addresses may change

    def look_up(self) -> tuple[str, ...]:
        """Resolve all addresses, without duplicates.

        If a look-up of a name fails, its previous addresses stay in use.
        """
        for target, (host, port) in self._names.items():
            found: tuple[str, ...] = ()
            with suppress(OSError, UnicodeError):
                results = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                # Sort the addresses, because resolvers change their order.
                ips = sorted({str(at[0]) for *_, at in results})
                v4 = [ip for ip in ips if ":" not in ip]  # a pod may have an address of each kind
                found = tuple(join_address(ip, port) for ip in v4 or ips)
            if found and found != self._found[target]:
                event("addresses changed", target=target, addresses=",".join(found))
                self._found[target] = found
            self._host_of |= dict.fromkeys(found, host)
        return tuple(dict.fromkeys(a for t in self.targets for a in self._found.get(t, (t,))))

    def credentials_for(self, address: str) -> ClientCredentials:
        """Return the credentials for one address. They expect a certificate for its DNS name."""
        host = self._host_of.get(address)
        return replace(self._credentials, tls_name=host) if host else self._credentials
