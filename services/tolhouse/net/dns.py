"""Addresses of targets: HOST:PORT is one, dns:///HOST:PORT all that the name has, now and later."""

import socket
from collections.abc import Sequence
from dataclasses import replace

from tolhouse.errors import InvalidArgument
from tolhouse.logs import event, split_address
from tolhouse.net.auth import ClientCredentials

SCHEME = "dns:///"  # as gRPC writes it


class Addresses:
    """The addresses of `targets`: texts, or one with commas between them. For one thread.

    InvalidArgument for a target that is none, or that `credentials` do not allow to call.
    """

    def __init__(self, targets: str | Sequence[str], credentials: ClientCredentials) -> None:
        given = targets.split(",") if isinstance(targets, str) else targets
        self.targets, self._credentials = tuple(t.strip() for t in given if t.strip()), credentials
        if not self.targets:
            named = f"{SCHEME}HOST:PORT for all addresses of a name"
            raise InvalidArgument(f"no address given: HOST:PORT, {named}, or several with commas")
        parsed = {t: split_address(t.removeprefix(SCHEME)) for t in self.targets}
        for target in self.targets:
            credentials.channel_credentials(target.removeprefix(SCHEME))
        self._names = {t: address for t, address in parsed.items() if t.startswith(SCHEME)}
        self._found: dict[str, tuple[str, ...]] = dict.fromkeys(self._names, ())
        self._host_of: dict[str, str] = {}  # by address, the name that it was found by
        self.change = bool(self._names)  # whether another look-up may find others

    def look_up(self) -> tuple[str, ...]:
        """All addresses, each once. A name that has none now keeps those that it had last."""
        for target, (host, port) in self._names.items():
            found = _addresses(host, port)
            if found and found != self._found[target]:
                event("addresses changed", target=target, addresses=",".join(found))
                self._found[target] = found
            self._host_of |= dict.fromkeys(found, host)
        return tuple(dict.fromkeys(a for t in self.targets for a in self._found.get(t, (t,))))

    def credentials_for(self, address: str) -> ClientCredentials:
        """The credentials for calls to one address, whose certificate is for its name."""
        host = self._host_of.get(address)
        return replace(self._credentials, tls_name=host) if host else self._credentials


def _addresses(host: str, port: int) -> tuple[str, ...]:
    """Addresses of one family, as a pod may have one of each; sorted, as resolvers rotate them."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    hosts = sorted({str(at[0]) for *_, at in found})
    v4 = tuple(f"{host}:{port}" for host in hosts if ":" not in host)
    return v4 or tuple(f"[{host}]:{port}" for host in hosts)
