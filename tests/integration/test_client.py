"""The SDK against real row sources and workers: order of rows, failover, timeouts and errors."""

import gc
import os
import signal
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from tolhouse import Client, ClientCredentials, errors
from tolhouse.store.base import open_store
from tolhouse.store.overlay import make_overlay
from tolhouse.store.registry import delete, publish, rollback
from tolhouse.testing import (
    Cluster,
    Process,
    build_table,
    free_port,
    local_cluster,
    process,
    redis_server,
    wait_until,
)

from tests.chaos.proxy import Link
from tests.commands import LOCAL, send_signal
from tests.tables import owners_of

IDS = np.arange(300, dtype=np.uint32)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with redis_server() as redis:
        yield {"file": f"file://{tmp_path_factory.mktemp('tables')}", "redis": redis}


@pytest.fixture(scope="module")
def table(checkpoint: Path, stores: dict[str, str]) -> str:
    # with 64 shards each replica owns some, whatever the ports
    return build_table(checkpoint, *stores.values(), codec="bf16", shards=64)


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, stores: dict[str, str], table: str) -> Iterator[Cluster]:
    with local_cluster(checkpoint, stores["file"], lookups=2) as running:
        yield running


@pytest.fixture(params=["lookup", "file", "redis"])
def client(request: pytest.FixtureRequest, cluster: Cluster, stores: dict) -> Iterator[Client]:
    """A client for each kind of row source; all sources have the same table."""
    with Client({"lookup": cluster.lookup, **stores}[request.param]) as made:
        yield made


@pytest.fixture(params=["lookup", "file", "redis"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Client, str]]:
    """A client for each kind of row source and its store's URL, separate for each test."""
    with ExitStack() as stack:
        url = target = f"file://{tmp_path}"
        if request.param == "redis":
            url = target = stack.enter_context(redis_server())
        elif request.param == "lookup":
            target = stack.enter_context(process("lookup", "--store", url, *LOCAL)).address
        yield stack.enter_context(Client(target)), url


def test_rows_come_in_the_requested_order(client: Client, table: str) -> None:
    """Row i belongs to id i, whatever the order, duplicates and shards."""
    every = client.fetch(table, IDS)
    ids = np.random.default_rng(0).integers(0, 300, 1000)
    assert every[ids].tobytes() == client.fetch(table, ids).tobytes()
    assert (1000, 4, 96) == client.fetch("tiny-memory", ids).shape
    assert (0, 4, 96) == client.fetch(table, []).shape


def test_records_go_to_the_given_slots(client: Client, table: str) -> None:
    """A fetch writes records into the given slots of a buffer and leaves the others unchanged."""
    manifest = client.describe(table)
    expected = client.rows.fetch_records(manifest, np.array([5, 200, 7], np.uint32))
    out = np.full((6, manifest.record_bytes), 9, np.uint8)
    slots = np.array([4, 0, 3])
    assert out is client.rows.fetch_records(manifest, np.array([5, 200, 7], np.uint32), out, slots)
    assert np.array_equal(expected, out[slots])
    assert (out[[1, 2, 5]] == 9).all()


def test_rows_are_a_view_of_the_received_bytes(client: Client, table: str) -> None:
    """Rows of the float codecs are a read-only view of the received bytes."""
    rows = client.fetch(table, [3, 1, 2])
    assert not rows.flags.owndata
    assert not rows.flags.writeable
    base = rows
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert (np.uint8, 3 * client.describe(table).record_bytes) == (base.dtype, base.nbytes)


def test_a_client_keeps_a_limited_number_of_manifests(
    own: tuple[Client, str], checkpoint: Path
) -> None:
    """A client keeps only the newest manifests, and fetches an older one again."""
    client, url = own
    ref = build_table(checkpoint, url, codec="bf16")
    with closing(open_store(url)) as store:
        row = store.rows(store.manifest(ref), np.array([7], np.uint32))
        before, seen = client.fetch(ref, [7, 8]), []
        for number in range(1, 21):
            made = make_overlay(store, ref, np.array([7]), row * 2**number)
            fetched = client.fetch(made.ref, [7])[0].astype(np.float32)
            assert (row[0] * 2**number).tobytes() == fetched.tobytes()
            seen += [weakref.ref(client.describe(made.ref))]
    del made
    gc.collect()
    assert 10 < sum(manifest() is not None for manifest in seen) <= 16
    assert before.tobytes() == client.fetch(ref, [7, 8]).tobytes()


@pytest.mark.parametrize("ids", [[1.5], ["a"], [[1, 2]], [-1], [2**32], [True]])
def test_bad_ids_are_refused(cluster: Cluster, ids: list) -> None:
    """A client refuses bad ids before it sends a request."""
    with Client(cluster.lookup) as client, pytest.raises(errors.InvalidArgumentError):
        client.fetch("tiny-memory", ids)


def test_errors_are_the_same_for_all_row_sources(client: Client, table: str) -> None:
    """Every row source raises the same errors for unknown tables, bad names and bad ids."""
    for wrong, error, message in (
        ("nothing", errors.NotFoundError, table),
        ("tiny-memory@0123456789abcdef", errors.NotFoundError, table),
        ("tiny-memory@zz", errors.InvalidArgumentError, "16 hex digits"),
        ("a b", errors.InvalidArgumentError, "not allowed"),
    ):
        for call in (client.describe, lambda ref: client.fetch(ref, [1])):
            with pytest.raises(error, match=message):
                call(wrong)
    with pytest.raises(errors.IdOutOfRangeError, match="allowed are 0 to"):
        client.fetch(table, [0, 99_999])


def test_a_version_rebuilt_with_other_shards_is_read(
    own: tuple[Client, str], checkpoint: Path
) -> None:
    """A client reads a version correctly after it was rebuilt with another number of shards."""
    client, url = own
    ref = build_table(checkpoint, url, shards=2, publish=False)
    expected = client.fetch(ref, [1, 2, 3]).tobytes()
    with closing(open_store(url)) as store:
        delete(store, ref, force=True)
    assert ref == build_table(checkpoint, url, shards=7)
    assert 30 == len(client.fetch(ref, range(20, 50)))
    assert expected == client.fetch(ref, [1, 2, 3]).tobytes()


@pytest.mark.parametrize(
    "target",
    ["", "nowhere", "host:port", "host:99999", ":", "a:1,b", "http://a:1", "redis://127.0.0.1/one"],
)
def test_bad_addresses_are_refused(target: str) -> None:
    """The client's constructor refuses a malformed target."""
    with pytest.raises(errors.InvalidArgumentError):
        Client(target)


def test_plaintext_to_another_machine_is_refused() -> None:
    """A client refuses plaintext to a service or Redis on another machine, unless allowed."""
    for target in ("rows.example:50051", "redis://rows.example"):
        with pytest.raises(errors.InvalidArgumentError, match="another machine"):
            Client(target)
    Client("rows.example:50051", credentials=ClientCredentials(insecure=True)).close()


@pytest.mark.parametrize("scheme", ["", "redis://"])
def test_a_missing_server_is_unavailable(scheme: str) -> None:
    """If no server listens at the address, a call raises UnavailableError with the address."""
    address = f"127.0.0.1:{free_port()}"
    with (
        Client(f"{scheme}{address}") as client,
        pytest.raises(errors.UnavailableError, match=address),
    ):
        client.fetch("a", [1])
    with Client(address) as client, pytest.raises(errors.UnavailableError, match=address):
        list(client.generate([1]))


def test_the_wrong_service_is_an_error(cluster: Cluster, stores: dict[str, str]) -> None:
    """A call to a service that does not implement it raises UnsupportedError."""
    with Client(cluster.workers) as client, pytest.raises(errors.UnsupportedError, match="another"):
        client.fetch("tiny-memory", [1])
    with Client(cluster.lookup) as client, pytest.raises(errors.UnsupportedError, match="another"):
        list(client.generate([1]))
    with (
        Client(stores["file"]) as client,
        pytest.raises(errors.InvalidArgumentError, match="a worker"),
    ):
        list(client.generate([1]))


def test_many_threads_share_a_client(client: Client, table: str) -> None:
    """Requests from many threads at the same time get their own rows."""
    every = client.fetch(table, IDS)

    def fetch(seed: int) -> bool:
        ids = np.random.default_rng(seed).integers(0, 300, 40)
        return every[ids].tobytes() == client.fetch(table, ids).tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fetch, range(200)))


def test_a_name_is_resolved_each_time(own: tuple[Client, str], checkpoint: Path) -> None:
    """A name gives other rows after publish and rollback; a version always gives the same rows."""
    client, url = own
    old, new = (build_table(checkpoint, url, codec=c, name="flip") for c in ("fp32", "int8"))
    assert new == client.describe("flip").ref
    rows = client.fetch("flip", [1, 2]).tobytes()
    with closing(open_store(url)) as store:
        rollback(store, "flip")
        assert old == client.describe("flip").ref
        assert client.describe("flip") is client.describe("flip")  # cached
        assert client.fetch(old, [1, 2]).tobytes() == client.fetch("flip", [1, 2]).tobytes() != rows
        publish(store, new)
    assert rows == client.fetch("flip", [1, 2]).tobytes() == client.fetch(new, [1, 2]).tobytes()


def test_a_version_in_use_is_not_deleted(own: tuple[Client, str], checkpoint: Path) -> None:
    """A fetch or a pin protects a version from deletion."""
    client, url = own
    fetched, pinned, idle = (
        build_table(checkpoint, url, codec=c, name="leased", publish=False)
        for c in ("fp32", "int8", "int4")
    )
    client.fetch(fetched, [1])
    client.rows.pin(pinned)
    with closing(open_store(url)) as store:
        for ref in (fetched, pinned):
            wait_until(lambda ref=ref: store.leased(ref))
            with pytest.raises(errors.InUseError, match="in use"):
                delete(store, ref)
        delete(store, idle)


@pytest.fixture
def replicas(stores: dict[str, str], table: str) -> Iterator[list[Process]]:
    options = ("lookup", "--store", stores["file"], *LOCAL)
    with process(*options) as first, process(*options) as second:
        yield [first, second]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_replica_may_die_or_hang(
    replicas: list[Process], table: str, number: signal.Signals
) -> None:
    """If one replica is killed or stopped, the other answers within the deadline."""
    with Client([r.address for r in replicas], timeout=8) as client:
        expected = client.fetch(table, IDS).tobytes()
        send_signal(replicas[0].pid, number)
        assert expected == client.fetch(table, IDS).tobytes()
        os.kill(replicas[1].pid, signal.SIGKILL)
        if number == signal.SIGSTOP:
            os.kill(replicas[0].pid, signal.SIGCONT)
            assert expected == client.fetch(table, IDS).tobytes()
        else:
            with pytest.raises(errors.UnavailableError):
                client.fetch(table, IDS)


def test_a_hung_replica_costs_one_timeout(replicas: list[Process], table: str) -> None:
    """After one timeout a hung replica's ids go to the other replica until it answers again."""
    with Client([r.address for r in replicas], timeout=8) as client:
        usual, expected = owners_of(client, table, IDS), client.fetch(table, IDS).tobytes()
        send_signal(replicas[0].pid, signal.SIGSTOP)
        assert expected == client.fetch(table, IDS).tobytes()
        assert {replicas[1].address} == set(owners_of(client, table, IDS))
        os.kill(replicas[0].pid, signal.SIGCONT)
        wait_until(lambda: usual == owners_of(client, table, IDS))
        assert expected == client.fetch(table, IDS).tobytes()


@pytest.mark.parametrize("transport", ["rows", "grpc"])
def test_a_slow_replica_is_deprioritised(
    transport: str, replicas: list[Process], stores: dict[str, str], table: str
) -> None:
    """A replica several times slower than the other gets no ids until its link is fast again."""
    other = replicas[1].address
    rows = f"127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        link = stack.enter_context(Link(rows))
        port = link.address.rpartition(":")[2]
        options = ["--rows-listen", rows, "--rows-advertised-port", port]
        if transport == "grpc":
            options = ["--rows-listen", "none"]
        slow = stack.enter_context(process("lookup", "--store", stores["file"], *LOCAL, *options))
        address = slow.address
        if transport == "grpc":
            link = stack.enter_context(Link(slow.address))
            address = link.address
        client = stack.enter_context(Client([address, other]))
        usual, expected = owners_of(client, table, IDS), client.fetch(table, IDS).tobytes()
        assert {address, other} == set(usual)
        fetched = set()

        def owners() -> list[str]:
            fetched.add(client.fetch(table, IDS).tobytes())
            return owners_of(client, table, IDS)

        for seconds, then in ((0.2, [other] * 300), (0.0, usual)):
            link.delay(seconds)
            wait_until(lambda then=then: then == owners())
        assert {expected} == fetched


def test_each_shard_has_a_fixed_replica(replicas: list[Process], table: str) -> None:
    """A shard's replica does not depend on the order of addresses, and each replica has shards."""
    addresses = [r.address for r in replicas]
    with Client(addresses) as client, Client([*reversed(addresses)]) as other:
        owners = owners_of(client, table, IDS)
        assert owners == owners_of(other, table, IDS)
        assert set(addresses) == set(owners)
