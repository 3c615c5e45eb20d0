"""The SDK against real lookup services and workers: rows in the caller's order, failover, bounded waits, clear errors."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tolhouse import Client, errors
from tolhouse.store import open_store, rows_of
from tolhouse.store.overlay import make_overlay
from tolhouse.testing import Cluster, Process, build_table, free_port, local_cluster, process

from tests.chaos.proxy import Link

FREE = ("--listen", "127.0.0.1:0")


@pytest.fixture(scope="module")
def table(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    url = f"file://{tmp_path_factory.mktemp('tables')}"
    return url, build_table(
        checkpoint, url, codec="bf16", shards=64
    )  # each replica has some, whatever the ports


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, table: tuple[str, str]) -> Iterator[Cluster]:
    with local_cluster(checkpoint, table[0], lookups=2) as running:
        yield running


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.lookup) as made:
        yield made


def test_rows_come_in_the_order_asked_for(client: Client, table: tuple[str, str]) -> None:
    """Row i is that of id i, whatever the order, the duplicates and the shards."""
    every = client.fetch(table[1], range(300))
    ids = np.random.default_rng(0).integers(0, 300, 1000)
    assert every[ids].tobytes() == client.fetch(table[1], ids).tobytes()
    assert (1000, 4, 96) == client.fetch("tiny-memory", ids).shape


def test_rows_are_a_view_of_what_was_received(client: Client, table: tuple[str, str]) -> None:
    """The float codecs are not copied once more, and nobody can write into them by accident."""
    rows = client.fetch(table[1], [3, 1, 2])
    assert not rows.flags.owndata
    assert not rows.flags.writeable
    base = rows
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert (np.uint8, 3 * client.describe(table[1]).record_bytes) == (base.dtype, base.nbytes)


def test_a_client_outlives_many_versions(checkpoint: Path, tmp_path: Path) -> None:
    """It keeps what it knows of the newest alone, and asks again for an older one."""
    url = f"file://{tmp_path}"
    ref = build_table(checkpoint, url, codec="bf16")
    store = open_store(url)
    row = rows_of(store, store.manifest(ref), np.array([7], np.uint32))
    with process("lookup", "--store", url, *FREE) as lookup, Client(lookup.address) as client:
        before, seen = client.fetch(ref, [7, 8]), []
        for number in range(1, 21):
            made = make_overlay(store, ref, np.array([7]), row * 2**number)
            fetched = client.fetch(made.ref, [7])[0].astype(np.float32)
            assert (row[0] * 2**number).tobytes() == fetched.tobytes()
            seen += [weakref.ref(client.describe(made.ref))]
        gc.collect()
        assert 16 == sum(manifest() is not None for manifest in seen)
        assert before.tobytes() == client.fetch(ref, [7, 8]).tobytes()


def test_no_ids_give_no_rows(client: Client, table: tuple[str, str]) -> None:
    """An empty list is answered with an empty array of the right shape."""
    assert (0, 4, 96) == client.fetch(table[1], []).shape


@pytest.mark.parametrize("ids", [[1.5], ["a"], [[1, 2]], [-1], [2**32], [True]])
def test_what_is_no_list_of_ids_is_refused(client: Client, ids: list) -> None:
    """Bad ids are told before anything is sent."""
    with pytest.raises(errors.InvalidArgument):
        client.fetch("tiny-memory", ids)


def test_errors_are_typed_and_say_what_is_allowed(client: Client, table: tuple[str, str]) -> None:
    """Unknown names and versions are NotFound with what there is; ids outside the vocabulary are IdOutOfRange."""
    with pytest.raises(errors.NotFound, match=table[1]):
        client.fetch("nothing", [1])
    with pytest.raises(errors.NotFound, match=table[1]):
        client.fetch("tiny-memory@0123456789abcdef", [1])
    with pytest.raises(errors.InvalidArgument, match="16 hex digits"):
        client.fetch("tiny-memory@zz", [1])
    with pytest.raises(errors.IdOutOfRange, match="allowed are 0 to"):
        client.fetch(table[1], [0, 99_999])


@pytest.mark.parametrize("target", ["", "nowhere", "host:port", "host:99999", ":", "a:1,b"])
def test_bad_addresses_are_refused(target: str) -> None:
    """An address that can't be one is told at once."""
    with pytest.raises(errors.InvalidArgument):
        Client(target)


def test_nobody_there_is_unavailable() -> None:
    """With no service at the address a call fails as Unavailable, naming the address."""
    address = f"127.0.0.1:{free_port()}"
    with Client(address) as client, pytest.raises(errors.Unavailable, match=address):
        client.fetch("a", [1])
    with Client(address) as client, pytest.raises(errors.Unavailable, match=address):
        list(client.generate([1]))


def test_the_wrong_service_is_told(cluster: Cluster) -> None:
    """Rows asked of a worker, and tokens of a lookup service, are Unsupported."""
    with (
        Client(cluster.workers) as client,
        pytest.raises(errors.Unsupported, match="another service"),
    ):
        client.fetch("tiny-memory", [1])
    with (
        Client(cluster.lookup) as client,
        pytest.raises(errors.Unsupported, match="another service"),
    ):
        list(client.generate([1]))


def test_many_threads_share_a_client(client: Client, table: tuple[str, str]) -> None:
    """Requests of many threads on the same streams get their own rows."""
    every = client.fetch(table[1], range(300))

    def fetch(seed: int) -> bool:
        ids = np.random.default_rng(seed).integers(0, 300, 40)
        return every[ids].tobytes() == client.fetch(table[1], ids).tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fetch, range(200)))


@pytest.fixture
def replicas(table: tuple[str, str]) -> Iterator[list[Process]]:
    with (
        process("lookup", "--store", table[0], *FREE) as first,
        process("lookup", "--store", table[0], *FREE) as second,
    ):
        yield [first, second]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_may_die_or_hang(
    replicas: list[Process], table: tuple[str, str], number: signal.Signals
) -> None:
    """Whichever replica is killed or stopped, the other answers within the deadline."""
    with Client([r.address for r in replicas], timeout_seconds=8) as client:
        expected = client.fetch(table[1], range(300)).tobytes()
        os.kill(replicas[0].pid, number)
        assert expected == client.fetch(table[1], range(300)).tobytes()
        os.kill(replicas[1].pid, signal.SIGKILL)
        if number == signal.SIGSTOP:
            os.kill(replicas[0].pid, signal.SIGCONT)
            assert expected == client.fetch(table[1], range(300)).tobytes()
        else:
            with pytest.raises(errors.Unavailable):
                client.fetch(table[1], range(300))


def test_a_replica_that_hangs_is_waited_for_once(
    replicas: list[Process], table: tuple[str, str]
) -> None:
    """After the first wait its ids go to the other replica, until it answers again."""
    with Client([r.address for r in replicas], timeout_seconds=8) as client:
        manifest = client.describe(table[1])
        ids, usual = (
            np.arange(300, dtype=np.uint32),
            client.rows.replicas.owner(manifest, np.arange(300), 0)[1],
        )
        expected = client.rows.fetch_records(manifest, ids)
        os.kill(replicas[0].pid, signal.SIGSTOP)
        assert np.array_equal(expected, client.rows.fetch_records(manifest, ids))
        assert {1} == set(client.rows.replicas.owner(manifest, ids, 0)[1].tolist())
        os.kill(replicas[0].pid, signal.SIGCONT)
        deadline = time.monotonic() + 30
        while (
            client.rows.replicas.owner(manifest, ids, 0)[1].tolist() != usual.tolist()
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        assert usual.tolist() == client.rows.replicas.owner(manifest, ids, 0)[1].tolist()
        assert np.array_equal(expected, client.rows.fetch_records(manifest, ids))


def test_a_replica_behind_a_slow_link_is_asked_last(
    replicas: list[Process], table: tuple[str, str]
) -> None:
    """While answers of one take several times as long as the other's, its ids go there; no longer once the link is mended."""
    with (
        Link(replicas[0].address) as link,
        Client([link.address, replicas[1].address]) as client,
    ):
        manifest = client.describe(table[1])
        ids = np.arange(300, dtype=np.uint32)
        expected, usual = (
            client.rows.fetch_records(manifest, ids),
            client.rows.replicas.owner(manifest, ids, 0)[1].tolist(),
        )

        def owners() -> list[int]:
            assert np.array_equal(expected, client.rows.fetch_records(manifest, ids))
            return client.rows.replicas.owner(manifest, ids, 0)[1].tolist()

        assert {0, 1} == set(usual)
        for seconds, then in ((0.2, [1] * 300), (0.0, usual)):
            link.delay(seconds)
            deadline = time.monotonic() + 30
            while owners() != then and time.monotonic() < deadline:
                time.sleep(0.02)
            assert then == owners()


def test_each_shard_has_its_replica(replicas: list[Process], table: tuple[str, str]) -> None:
    """A shard is always asked of the same replica, whoever else there is in the list, so that the replicas' hot rows differ."""
    addresses = [r.address for r in replicas]
    with Client(addresses) as client, Client([*reversed(addresses)]) as other:
        manifest, ids = client.describe(table[1]), np.arange(64, dtype=np.uint32)
        first, second = (
            [targets[n] for n in owners]
            for targets, owners in (
                c.rows.replicas.owner(manifest, ids, 0) for c in (client, other)
            )
        )
        assert first == second
        assert set(addresses) == set(first)


def test_a_published_version_is_what_a_name_stands_for_from_then_on(
    checkpoint: Path, tmp_path: Path
) -> None:
    """After publish and rollback a client that asks by name gets the other version's rows; by version, always the same."""
    url = f"file://{tmp_path}"
    old, new = (
        build_table(checkpoint, url, codec=codec, name="flip") for codec in ("fp32", "int8")
    )
    with process("lookup", "--store", url, *FREE) as running, Client(running.address) as client:
        assert new == client.describe("flip").ref
        rows = client.fetch("flip", [1, 2]).tobytes()
        command = [
            sys.executable,
            "-m",
            "tolhouse.cli",
            "tables",
            "rollback",
            "flip",
            "--store",
            url,
        ]
        subprocess.run(command, check=True, capture_output=True)
        assert old == client.describe("flip").ref
        assert client.describe("flip") is client.describe("flip")  # sent once
        assert client.fetch(old, [1, 2]).tobytes() == client.fetch("flip", [1, 2]).tobytes() != rows
        assert rows == client.fetch(new, [1, 2]).tobytes()
