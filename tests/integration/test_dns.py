"""DNS names with several addresses, as the clients and the gateway's router resolve them."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from tolhouse import Client, errors
from tolhouse.certs import ensure_authority, issue
from tolhouse.gateway.router import WorkerRouter
from tolhouse.model.tokenizer import tokenizer_id
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import Addresses
from tolhouse.testing import build_table, free_port, process, wait_until
from tolhouse.v1.generation_pb2 import GenerateRequest

from tests.tables import owners_of

HOSTS = "127.0.0.2", "127.0.0.3", "127.0.0.4"
INSECURE = ClientCredentials(insecure=True)


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The addresses of the name `rows.test`; the real resolver handles all other names."""
    found: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *rest: int, **more: int) -> list:
        if host != "rows.test":
            return real(host, port, *rest, **more)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [answer for address in found for answer in real(address, port, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return found


def known_to(client: Client) -> list[str]:
    """Return the addresses that a client has resolved."""
    with suppress(errors.UnavailableError):
        return [replica.target for replica in client.rows.replicas.in_turn()]
    return []


def test_a_lookup_returns_the_addresses_of_names(behind: list[str]) -> None:
    """A lookup returns distinct addresses in order, and keeps the last ones if a name has none."""
    addresses = Addresses("dns:///rows.test:50051, 10.0.0.1:1,127.0.0.2:50051", INSECURE)
    assert ("10.0.0.1:1", "127.0.0.2:50051") == addresses.look_up()
    behind[:] = ["127.0.0.3", "127.0.0.2", "::1"]
    assert ("127.0.0.2:50051", "127.0.0.3:50051", "10.0.0.1:1") == addresses.look_up()
    behind.clear()
    assert ("127.0.0.2:50051", "127.0.0.3:50051", "10.0.0.1:1") == addresses.look_up()
    behind[:] = ["::1"]
    assert ("[::1]:50051", "10.0.0.1:1", "127.0.0.2:50051") == addresses.look_up()
    assert ("127.0.0.1:50051",) == Addresses("dns:///localhost:50051", INSECURE).look_up()


@pytest.mark.parametrize(
    "target", ["", " , ", "rows.test", "dns:///rows.test", "dns:rows.test", "dns:///rows.test:grpc"]
)
def test_malformed_targets_are_refused(target: str) -> None:
    """A target without a port or with an unknown scheme is refused at once."""
    with pytest.raises(errors.InvalidArgumentError, match="HOST:PORT"):
        Addresses(target, INSECURE)


def test_plaintext_to_a_name_is_refused() -> None:
    """A name counts as another machine before it is resolved."""
    with pytest.raises(errors.InvalidArgumentError, match=r"rows\.test:50051 is another machine"):
        Client("dns:///rows.test:50051")


def test_a_client_follows_a_name(behind: list[str], checkpoint: Path, tmp_path: Path) -> None:
    """A client reads rows from the replicas that the name has now."""
    url, port = f"file://{tmp_path}", free_port()
    ref = build_table(checkpoint, url)
    with (
        ExitStack() as running,
        Client(f"dns:///rows.test:{port}", 8, credentials=INSECURE) as client,
    ):
        with pytest.raises(errors.UnavailableError, match=r"rows\.test"):
            client.describe(ref)
        options = ("lookup", "--store", url, "--listen")
        for host in HOSTS:
            running.enter_context(process(*options, f"{host}:{port}", "--insecure"))
        behind[:] = HOSTS[:2]
        wait_until(lambda: bool(known_to(client)))
        ids = np.arange(300)
        expected = client.fetch(ref, ids).tobytes()
        for there in (HOSTS, HOSTS[1:], HOSTS[:1]):
            behind[:] = there
            addresses = [f"{host}:{port}" for host in there]
            wait_until(lambda addresses=addresses: known_to(client) == addresses)
            assert expected == client.fetch(ref, ids).tobytes()
        assert {f"{HOSTS[0]}:{port}"} == set(owners_of(client, ref, ids))


def test_a_shard_stays_with_its_replica(
    behind: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    """When a name gains an address, shards move only to it, and return after its removal."""
    url, port = f"file://{tmp_path}", free_port()
    ref = build_table(checkpoint, url, shards=64)
    with process("lookup", "--store", url, "--listen", f"{HOSTS[0]}:{port}", "--insecure"):
        behind[:] = HOSTS[:2]
        with Client(f"dns:///rows.test:{port}", credentials=INSECURE) as client:

            def owners(hosts: tuple[str, ...]) -> list[str]:
                behind[:] = hosts
                wait_until(lambda: len(known_to(client)) == len(hosts))
                return owners_of(client, ref, np.arange(64))

            before, during, after = owners(HOSTS[:2]), owners(HOSTS), owners(HOSTS[:2])
            pairs = zip(before, during, strict=True)
            assert {f"{HOSTS[2]}:{port}"} == {new for old, new in pairs if old != new}
            assert before == after


def test_a_certificate_must_match_the_name(
    behind: list[str], checkpoint: Path, tmp_path: Path
) -> None:
    """A client checks a certificate against the name, not the address."""
    url, port = f"file://{tmp_path / 'tables'}", free_port()
    ref = build_table(checkpoint, url)
    authority = ensure_authority(tmp_path / "pki")
    behind[:] = HOSTS[:1]
    for name, right in (("rows.test", True), ("other.test", False)):
        certificate, key = issue(tmp_path / "pki", name, [name])
        tls = ("--tls-cert", str(certificate), "--tls-key", str(key))
        options = ("--listen", f"{HOSTS[0]}:{port}", *tls)
        credentials = ClientCredentials(tls_ca=str(authority))
        with (
            process("lookup", "--store", url, *options),
            Client(f"dns:///rows.test:{port}", 4, credentials=credentials) as client,
        ):
            refused = pytest.raises(errors.UnavailableError, match="another host name")
            with nullcontext() if right else refused:
                assert ref == client.describe(ref).ref


def test_the_router_follows_a_name(behind: list[str], checkpoint: Path, tmp_path: Path) -> None:
    """The router sends requests to new workers, and requests on a removed worker complete."""
    url, port = f"file://{tmp_path}", free_port()
    build_table(checkpoint, url)
    request = GenerateRequest(prompt_token_ids=[1, 2, 3], max_tokens=40, ignore_eos=True)

    async def follow() -> None:
        addresses = Addresses(f"dns:///rows.test:{port}", INSECURE)
        router = WorkerRouter(addresses, tokenizer_id(checkpoint / "tokenizer.json"), 0.05)
        watching = asyncio.create_task(router.watch())

        async def healthy(*hosts: str) -> None:
            expected = {f"{host}:{port}" for host in hosts}
            async with asyncio.timeout(60):
                while {w.target for w in router.healthy()} != expected:
                    await asyncio.sleep(0.02)

        await asyncio.sleep(0.2)
        with pytest.raises(errors.UnavailableError, match="no worker is healthy"):
            router.model(None)
        behind[:] = HOSTS[:1]
        await healthy(HOSTS[0])
        model = router.model(None)
        first = router.generate(model.name, request, set())
        tokens = list((await anext(first)).token_ids)
        behind[:] = HOSTS[1:2]
        await healthy(HOSTS[1])
        second = router.generate(model.name, request, set())
        assert 40 == len([token async for reply in second for token in reply.token_ids])
        async for reply in first:  # on the removed worker
            tokens += reply.token_ids
        assert 40 == len(tokens)
        behind[:] = HOSTS[:2]
        await healthy(*HOSTS[:2])
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    with ExitStack() as running:
        lookup = running.enter_context(process("lookup", "--store", url, "--listen", "127.0.0.1:0"))
        options = ("worker", str(checkpoint), "--rows", lookup.address, "--insecure", "--listen")
        for host in HOSTS[:2]:
            running.enter_context(process(*options, f"{host}:{port}"))
        asyncio.run(follow())
