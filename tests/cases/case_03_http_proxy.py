"""Proxy variables do not affect calls to this machine."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread

from tolhouse.testing import build_table, process, tiny_model

from tests.cases import Result, equal
from tests.cases.commands import run

TOKEN = "SECRET-token-of-at-least-thirty-two-characters"


def check(folder: Path) -> Iterator[Result]:
    called: list[str] = []

    class Proxy(BaseRequestHandler):
        def handle(self) -> None:
            called.append(self.request.recv(1000).decode(errors="replace"))

    with ThreadingTCPServer(("127.0.0.1", 0), Proxy) as server, tempfile.TemporaryDirectory() as at:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        variables = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), url)
        store, token = f"file://{at}/tables", Path(at, "token")
        token.write_text(TOKEN, encoding="utf-8")
        build_table(tiny_model(Path(at, "tiny")), store)
        options = "--token-file", str(token)
        listen = "--listen", "127.0.0.1:0"
        with process("lookup", "--store", store, *listen, *options) as lookup:
            done = run("fetch", "tiny", "5", "--rows", lookup.address, *options, **variables)
        server.shutdown()
    yield equal("a row is fetched", 0, done.returncode)
    yield equal("nothing reaches the proxy", [], called)
