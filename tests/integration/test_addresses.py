"""IPv4, IPv6 and host addresses: clients accept every address that a service announces."""

import socket
from contextlib import suppress
from pathlib import Path

import pytest
from tolhouse import Client, ClientCredentials, config, errors
from tolhouse.certs import ensure_authority, issue
from tolhouse.logs import join_address, split_address
from tolhouse.store.base import open_store, require_private
from tolhouse.testing import (
    Cluster,
    build_table,
    open_url,
    process,
    redis_server,
    wait_until_healthy,
)

from tests.commands import tolhouse


def _has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("a.test:1", "a.test", 1), ("127.0.0.1:0", "127.0.0.1", 0), ("[::1]:65535", "::1", 65535)],
)
def test_splitting_and_joining_an_address_are_inverse(address: str, host: str, port: int) -> None:
    """Splitting an address and joining its parts gives the same address."""
    assert (host, port) == split_address(address)
    assert address == join_address(host, port)


@pytest.mark.parametrize("address", ["::1:50051", "::1", "fe80::1:80", "dns:///::1:1"])
def test_an_ipv6_address_without_brackets_is_refused(address: str) -> None:
    """An IPv6 address without brackets is ambiguous, and the error requests brackets."""
    with pytest.raises(errors.InvalidArgumentError, match="write an IPv6 address in brackets"):
        Client(address)


@pytest.mark.parametrize("address", ["", "a", "a:", ":1", "a:65536", "a:-1", "a:1:2", "[a]:1"])
def test_malformed_addresses_are_refused(address: str) -> None:
    """The error shows the expected form, and a command's error names its option."""
    with pytest.raises(errors.InvalidArgumentError, match="is not HOST:PORT, such as 127"):
        split_address(address)
    name = "--metrics-listen (TOLHOUSE_WORKER_METRICS_LISTEN): address "
    with pytest.raises(errors.InvalidArgumentError) as refused:
        config.load(config.WorkerConfig, {"metrics_listen": address})
    assert str(refused.value).startswith(name)


@needs_ipv6
def test_services_announce_ipv6_addresses_in_brackets(checkpoint: Path, store: str) -> None:
    """Other services, URLs and the SDK accept the address in each service's ready line."""
    listen = "--listen", "[::1]:0"
    free, metrics = ("--host", "::1", "--port", "0"), ("--metrics-listen", "[::1]:0")
    with (
        process("lookup", "--store", store, *free, *metrics) as lookup,
        process("worker", str(checkpoint), "--rows", lookup.address, *listen, *metrics) as worker,
        process("gateway", str(checkpoint), "--workers", worker.address, *listen) as gateway,
        Client(lookup.address) as client,
    ):
        shown = [lookup.address, lookup.ready["metrics"], worker.address, gateway.address]
        assert all(address.startswith("[::1]:") for address in shown)
        assert [True] == [table.published for table in client.tables()]
        open_url(f"http://{lookup.ready['metrics']}/metrics", 10).close()
        wait_until_healthy(gateway.address)
        url = Cluster(lookup.address, worker.address, gateway.address, []).url
        assert f"http://{gateway.address}/v1" == url
        open_url(f"{url}/models", 10).close()
        done = tolhouse("fetch tiny-memory 5 --rows", lookup.address)
        assert done.stdout.startswith("       5  ")


@needs_ipv6
def test_a_certificate_may_be_for_an_ipv6_address(
    checkpoint: Path, store: str, tmp_path: Path
) -> None:
    """A certificate for ::1 is valid for the address in brackets."""
    ensure_authority(tmp_path)
    certificate, key = issue(tmp_path, "service", ["::1"])
    tls = "--tls-cert", str(certificate), "--tls-key", str(key)
    credentials = ClientCredentials(tls_ca=str(tmp_path / "ca.pem"))
    with (
        process("lookup", "--store", store, "--listen", "[::1]:0", *tls) as lookup,
        Client(lookup.address, credentials=credentials) as client,
    ):
        assert [True] == [table.published for table in client.tables()]


@needs_ipv6
def test_redis_accepts_an_ipv6_address(checkpoint: Path) -> None:
    """Redis URLs accept [::1] as loopback and in lists, and refuse it without brackets."""
    with redis_server("--bind", "127.0.0.1", "::1") as url:
        port = url.rpartition(":")[2]
        ref = build_table(checkpoint, require_private(f"redis://[::1]:{port}", insecure=False))
        assert [ref] == open_store(f"redis://127.0.0.1:1,[::1]:{port}").refs()
        with pytest.raises(errors.InvalidArgumentError, match=r"IPv6: redis://\[::1\]:6379"):
            require_private(f"redis://::1:{port}", insecure=False)
