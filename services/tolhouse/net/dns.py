"""Addresses of targets: HOST:PORT is one, dns:///HOST:PORT all that the name has, now and later."""

import logging
import socket
from collections.abc import Sequence
from dataclasses import replace

from tolhouse.errors import InvalidArgument
from tolhouse.logs import event, split_address
from tolhouse.net.auth import ClientCredentials

SCHEME = "dns:///"  # as gRPC writes it


class Addresses:
    """The addresses of `targets`: texts, or one with commas between them. For one thread."""

    def __init__(self, targets: str | Sequence[str]) -> None:
        given = targets.split(",") if isinstance(targets, str) else targets
        self.targets = tuple(t.strip() for t in given if t.strip())
        if not self.targets:
            raise InvalidArgument(
                f"no address given: HOST:PORT, {SCHEME}HOST:PORT for all addresses of a name, "
                "or several with commas between"
            )
        parsed = {t: split_address(t.removeprefix(SCHEME)) for t in self.targets}
        self._names = {t: address for t, address in parsed.items() if t.startswith(SCHEME)}
        self._found: dict[str, tuple[str, ...]] = dict.fromkeys(self._names, ())
        self._host_of: dict[str, str] = {}  # by address, the name that it was found by

    @property
    def change(self) -> bool:
        """Whether another look-up may find others."""
        return bool(self._names)

    def look_up(self) -> tuple[str, ...]:
        """All addresses, each once. A name that has none now keeps those that it had last."""
        for target, (host, port) in self._names.items():
            found = _addresses(host, port)
            if found and found != self._found[target]:
                event("addresses changed", target=target, addresses=",".join(found))
                self._found[target] = found
            elif not found and not self._found[target]:
                event("no address yet", logging.DEBUG, target=target)
            self._host_of |= dict.fromkeys(found, host)
        return tuple(dict.fromkeys(a for t in self.targets for a in self._found.get(t, (t,))))

    def check(self, credentials: ClientCredentials) -> None:
        """InvalidArgument if `credentials` do not allow for calls to the targets."""
        for target in self.targets:
            credentials.channel_credentials(target.removeprefix(SCHEME))

    def credentials_for(self, address: str, credentials: ClientCredentials) -> ClientCredentials:
        """The credentials for calls to one address, whose certificate is for its name."""
        host = self._host_of.get(address)
        return replace(credentials, tls_name=host) if host else credentials


def _addresses(host: str, port: int) -> tuple[str, ...]:
    """Addresses of one family, as a pod may have one of each; sorted, as resolvers rotate them."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    v4 = sorted({str(at[0]) for family, *_, at in found if family == socket.AF_INET})
    v6 = sorted({str(at[0]) for family, *_, at in found if family == socket.AF_INET6})
    return tuple(f"{a}:{port}" for a in v4) or tuple(f"[{a}]:{port}" for a in v6)
