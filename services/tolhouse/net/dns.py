"""Which addresses targets stand for: HOST:PORT is one, dns:///HOST:PORT is every one that the name has, now and later."""

import logging
import socket
from collections.abc import Sequence
from dataclasses import replace

from tolhouse.errors import InvalidArgument
from tolhouse.logs import event, split_address
from tolhouse.net.auth import ClientCredentials

SCHEME = "dns:///"  # as gRPC writes it


class Addresses:
    """Of `targets`, a text with commas between them, or several texts. For one thread at a time."""

    def __init__(self, targets: str | Sequence[str]) -> None:
        given = targets.split(",") if isinstance(targets, str) else targets
        self.targets = tuple(t.strip() for t in given if t.strip())
        if not self.targets:
            raise InvalidArgument(
                f"no address given: HOST:PORT, {SCHEME}HOST:PORT for all addresses of a name, or several with commas between"
            )
        self._names = {
            t: split_address(t.removeprefix(SCHEME)) for t in self.targets if t.startswith(SCHEME)
        }
        for target in self.targets:
            if target not in self._names:
                split_address(target)
        self._found: dict[str, tuple[str, ...]] = dict.fromkeys(self._names, ())
        self._host_of: dict[str, str] = {}  # by address, the name that it was found by

    @property
    def change(self) -> bool:
        """Whether another look may find others."""
        return bool(self._names)

    def look_up(self) -> tuple[str, ...]:
        """All addresses, each once; asks the resolver. A name that has none now, or can't be resolved, keeps those it had last."""
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
        """InvalidArgument unless `credentials` allow for calls to the targets."""
        for target in self.targets:
            credentials.channel_credentials(target.removeprefix(SCHEME))

    def credentials_for(self, address: str, credentials: ClientCredentials) -> ClientCredentials:
        """How to call one of them: its certificate is for the name that stood for it."""
        host = self._host_of.get(address)
        return replace(credentials, tls_name=host) if host else credentials


def _addresses(host: str, port: int) -> tuple[str, ...]:
    """Of one family, as a pod may have one of each; sorted, since resolvers take turns."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    version4 = sorted(
        {str(address[0]) for family, *_, address in found if family == socket.AF_INET}
    )
    version6 = sorted(
        {str(address[0]) for family, *_, address in found if family == socket.AF_INET6}
    )
    return tuple(f"{a}:{port}" for a in version4) or tuple(f"[{a}]:{port}" for a in version6)
