"""Services announce IPv6 addresses in brackets, and clients refuse them without brackets."""

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tolhouse.testing import Cluster, build_table, process, tiny_model

from tests.cases import Result, equal
from tests.cases.commands import run


def check(folder: Path) -> Iterator[Result]:
    if not Path("/proc/net/if_inet6").exists() or not socket.has_ipv6:
        yield Result("this machine has no IPv6: not checked", True)
        return
    listen = "--listen", "[::1]:0"
    with tempfile.TemporaryDirectory() as at:
        store, model = f"file://{at}/tables", str(tiny_model(Path(at, "tiny")))
        build_table(Path(model), store)
        with process("lookup", "--store", store, *listen) as lookup:
            yield equal("lookup's ready line", "[::1]:", lookup.address[:6])
            done = run("fetch", "tiny", "5", "--rows", lookup.address)
            yield equal("its address can be called", 0, done.returncode)
            bare = run("fetch", "tiny", "5", "--rows", lookup.address.replace("[::1]", "::1"))
            yield equal("without brackets it is refused", 1, bare.returncode)
            yield equal("with a hint", True, "write an IPv6 address in brackets" in bare.stderr)
        with process("gateway", model, *listen) as gateway:
            yield equal("gateway's ready line", "[::1]:", gateway.address[:6])
            url = Cluster("", "", gateway.address, []).url
            yield equal("its URL", f"http://{gateway.address}/v1", url)
