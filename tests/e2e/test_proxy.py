"""Proxies: local and plaintext connections never use one, regardless of the environment."""

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from tolhouse import Client, ClientCredentials
from tolhouse.certs import issue
from tolhouse.errors import InvalidArgumentError
from tolhouse.testing import local_cluster, open_url, process

from tests.commands import LOCAL, tolhouse

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
TOKEN = "a-secret-of-the-services-that-is-long"


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that records request lines and connects to this machine for every host."""

    daemon_threads = True

    def __init__(self) -> None:
        self.lines: list[str] = []
        super().__init__(("127.0.0.1", 0), _Tunnel)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Tunnel(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        line = self.rfile.readline().decode()
        self.server.lines.append(line.strip())
        while self.rfile.readline().strip():
            pass
        port = int(line.split()[1].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as upstream, suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            there = upstream, self.connection
            threading.Thread(target=self._copy, args=there, daemon=True).start()
            self._copy(*reversed(there))

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that all proxy variables name."""
    with Proxy() as one:
        for name in VARIABLES:
            monkeypatch.setenv(name, one.url)
            monkeypatch.setenv(name.upper(), one.url)
        yield one
        one.shutdown()


def test_local_connections_ignore_proxy_variables(
    proxy: Proxy, checkpoint: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Services, commands, the SDK, test helpers and the trace exporter connect directly."""
    token = tmp_path / "token"
    token.write_text(TOKEN, encoding="utf-8")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with closing(socket.create_server(("127.0.0.1", 0))) as collector:
        collector.settimeout(30)
        secret = ("--token-file", str(token))
        traces = (*secret, "--traces", f"http://127.0.0.1:{collector.getsockname()[1]}")
        options = dict.fromkeys(("lookup_options", "worker_options", "gateway_options"), traces)
        with local_cluster(checkpoint, store, **options) as cluster:
            tolhouse(f"fetch tiny-memory 5 --rows {cluster.lookup}", *secret)
            worker = f"--worker {cluster.workers} --max-tokens 1"
            tolhouse(f"generate {checkpoint} a {worker}", *secret)
            access = ClientCredentials(token_file=str(token))
            with Client(cluster.lookup, credentials=access) as client:
                assert 1 == len(client.fetch("tiny-memory", [5]))
            open_url(f"{cluster.url}/models", 10).close()
            collector.accept()[0].close()
    assert [] == proxy.lines


def test_a_configured_proxy_is_used_for_other_machines(
    proxy: Proxy, store: str, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configured proxy is used for TLS connections to other machines, and neither for this
    machine nor in place of one from the environment."""
    names = ["lookup.example", "127.0.0.1"]
    cert, key = (str(path) for path in issue(pki, "proxied", names))
    with (
        Proxy() as asked,
        process("lookup", "--store", store, *LOCAL, "--tls-cert", cert, "--tls-key", key) as lookup,
    ):
        access = ClientCredentials(f"{pki}/ca.pem", proxy=asked.url)
        elsewhere = f"lookup.example:{lookup.address.rpartition(':')[2]}"
        for target in (lookup.address, elsewhere):
            with Client(target, credentials=access) as client:
                assert 1 == len(client.tables())
        options = ("--tls-ca", f"{pki}/ca.pem", "--proxy", asked.url)
        tolhouse(f"fetch tiny-memory 5 --rows {elsewhere}", *options)
        assert {f"CONNECT {elsewhere} HTTP/1.1"} == {*asked.lines}
        asked.shutdown()
    assert [] == proxy.lines


@pytest.mark.parametrize("url", ["http://proxy:3128", "proxy:3128", "https://proxy:3128"])
def test_a_proxy_needs_tls_and_a_complete_url(url: str, pki: Path) -> None:
    """A proxy without TLS is refused, because the proxy could read plaintext."""
    tls = "" if url.startswith("http://") else f"{pki}/ca.pem"
    with pytest.raises(InvalidArgumentError, match="needs `tls_ca`"):
        Client("127.0.0.1:1", credentials=ClientCredentials(tls, insecure=True, proxy=url))
