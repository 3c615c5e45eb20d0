"""The faults, how each is injected and repaired, and which failures clients may see."""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from redis import Redis, RedisCluster
from redis.cluster import ClusterNode
from redis.exceptions import RedisError
from tolhouse.testing import RedisNode, redis_cluster

from tests.chaos.history import Seen
from tests.chaos.proxy import Link
from tests.chaos.system import System, build_versions, wait_until


def nothing(_: Seen) -> bool:
    return False


def streams(seen: Seen) -> bool:
    """Streams that had begun may fail; before the first token, another worker can answer."""
    return bool(seen.pieces)


def anything(_: Seen) -> bool:
    return True


@dataclass
class Fault:
    name: str
    inject: Callable[[], object]
    mend: Callable[[], object]
    # predicate of requests that may fail with a clear error
    may_fail: Callable[[Seen], bool] = nothing
    recovers_within: float = 5.0  # seconds
    seconds: float = 9.0  # duration
    flips: bool = True  # whether another version is published during the fault
    found: list[str] = field(default_factory=list)  # violations other than wrong answers


def lasting(
    name: str, context: Callable[[list[str]], AbstractContextManager], **more: Any
) -> Fault:
    """A fault that lasts as long as a context, which appends violations to `found`."""
    stack, found = ExitStack(), list[str]()
    return Fault(
        name,
        inject=lambda: stack.enter_context(context(found)),
        mend=stack.close,
        seconds=6.0,
        found=found,
        **more,
    )


@dataclass
class Group:
    """Faults of one system that serves the same two versions throughout."""

    system: System
    refs: list[str]
    faults: list[Fault]
    settled: Callable[[], bool] = lambda: True  # wait for the system to settle after a fault


@contextmanager
def over_cluster() -> Iterator[Group]:
    """The system over a Redis Cluster with three masters and three replicas."""
    with ExitStack() as stack:
        links: list[Link] = []

        def announced(port: int) -> int:
            links.append(stack.enter_context(Link(f"127.0.0.1:{port}")))
            return int(links[-1].address.rpartition(":")[2])

        on_disk = ("--appendonly", "yes")
        nodes = stack.enter_context(
            redis_cluster(3, 1, *on_disk, node_timeout_ms=2000, announced=announced)
        )
        url = f"redis://{','.join(link.address for link in links)}"
        refs = build_versions(url)
        system = System(stack, url, "chaos")
        faults = of_services(system) + of_redis(system, nodes, links, refs[0])
        yield Group(system, refs, faults, lambda: settled(nodes))


def of_services(system: System) -> list[Fault]:
    lookup, worker = system.lookups[0], system.workers[0]
    faults = []
    for what, service, may_fail in (
        ("lookup replica", lookup, nothing),
        ("worker", worker, streams),
    ):
        kill, stop = (
            lambda s=service, n=number: s.signal(n) for number in (signal.SIGKILL, signal.SIGSTOP)
        )
        faults.append(Fault(f"kill -9 of a {what}", kill, service.restart, may_fail))
        faults.append(
            Fault(
                f"SIGSTOP of a {what}", stop, lambda s=service: s.signal(signal.SIGCONT), may_fail
            )
        )
    for what, links, may_fail in (
        ("gateway and worker", [system.to_workers[0]], streams),
        ("worker and lookup", [system.to_lookups[0][0], system.to_rows[0]], nothing),
        ("workers and a row port", [system.to_rows[1]], nothing),
    ):
        faults += of_links(what, links, may_fail)
    return faults


def of_links(what: str, links: list[Link], may_fail: Callable[[Seen], bool]) -> list[Fault]:
    def each(act: Callable[[Link], None]) -> Callable[[], None]:
        return lambda: [act(link) for link in links] and None

    return [
        Fault(f"cut between {what}", each(Link.cut), each(Link.mend), may_fail),
        Fault(f"200 ms between {what}", each(lambda link: link.delay(0.2)), each(Link.mend)),
    ]


def of_redis(system: System, nodes: list[RedisNode], links: list[Link], ref: str) -> list[Fault]:
    """Each fault uses a different master where possible, because a fault may promote a master's
    replica."""
    faults = []
    for what, first in (("master", 0), ("replica", 3)):
        node = nodes[first]
        faults.append(
            Fault(f"kill -9 of a Redis {what}", node.popen.kill, node.restart, nothing, 10.0)
        )
        other = nodes[first + 1]
        stop, go_on = (
            lambda n=other, s=number: n.popen.send_signal(s)
            for number in (signal.SIGSTOP, signal.SIGCONT)
        )
        faults.append(Fault(f"SIGSTOP of a Redis {what}", stop, go_on, nothing, 10.0))
    faults += of_links("lookup and a Redis master", [links[2]], nothing)
    faults += of_links("lookup and a Redis replica", [links[5]], nothing)
    faults.append(corrupted(system, nodes[2].url, ref))
    moved = Moved(nodes, ref)
    faults.append(Fault("slot migration", moved.there, moved.back))
    faults.append(
        Fault("restart of everything", lambda: restart(system, nodes), lambda: None, anything, 30.0)
    )
    return faults


def restart(system: System, nodes: list[RedisNode]) -> None:
    """Stop all processes, including Redis, and start them in the order of their dependencies."""
    services = [system.gateway, *system.workers, *system.lookups]
    for service in services:
        service.signal(signal.SIGTERM)
    for node in nodes:
        node.popen.terminate()
    for node in nodes:
        node.restart()
    settled(nodes)
    for service in reversed(services):
        service.restart()


def corrupted(system: System, url: str, ref: str) -> Fault:
    """Flip a bit in every record of one shard, in its master and so in its replica."""
    kept: dict[bytes, bytes] = {}

    def cluster() -> RedisCluster:
        return RedisCluster.from_url(url)

    key = f"tolhouse:{{{ref}:shards-16:3}}"

    def inject() -> None:
        with cluster() as redis:
            kept.update(redis.hgetall(key))
            turned = {t: bytes([record[0] ^ 1]) + record[1:] for t, record in kept.items()}
            redis.hset(key, mapping=turned)

    def mend() -> None:
        with cluster() as redis:
            redis.hset(key, mapping=kept)

    return Fault("corrupted records in Redis", inject, mend, anything, 60.0)


class Moved:
    """Migrate the slots of a version's shards to another master under load, key by key, and
    back."""

    def __init__(self, nodes: list[RedisNode], ref: str) -> None:
        self.nodes = nodes
        self.keys = [f"tolhouse:{{{ref}:shards-16:{shard}}}" for shard in range(4)]
        self.homes: dict[int, str] = {}

    def there(self) -> None:
        with RedisCluster.from_url(self.nodes[2].url) as redis:
            primaries = sorted(redis.get_primaries(), key=lambda node: node.name)
            for key in self.keys:
                slot = redis.keyslot(key)
                home = redis.get_node_from_key(key)
                self.homes[slot] = home.name
                other = next(node for node in primaries if node.name != home.name)
                self._move(redis, slot, home, other)

    def back(self) -> None:
        with RedisCluster.from_url(self.nodes[2].url) as redis:
            for slot, name in self.homes.items():
                now, home = (
                    redis.nodes_manager.get_node_from_slot(slot),
                    redis.get_node(node_name=name),
                )
                self._move(redis, slot, now, home)

    def _move(
        self, redis: RedisCluster, slot: int, source: ClusterNode, target: ClusterNode
    ) -> None:
        one, other = redis.get_redis_connection(source), redis.get_redis_connection(target)
        names = [client.execute_command("CLUSTER MYID").decode() for client in (one, other)]
        other.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[0])
        one.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[1])
        while keys := one.execute_command("CLUSTER GETKEYSINSLOT", slot, 10):
            one.execute_command("MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *keys)
        for client in (other, one):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", names[1])
        redis.nodes_manager.initialize()


def settled(nodes: list[RedisNode]) -> bool:
    """Whether every node reports a complete Cluster and every replica follows its master."""

    def well() -> bool:
        try:
            for node in nodes:
                with Redis.from_url(node.url, socket_timeout=1) as redis:
                    info = redis.info("replication")
                    state = redis.execute_command("CLUSTER INFO")["cluster_state"]
                    if state != "ok" or info.get("master_link_status", "up") != "up":
                        return False
        except RedisError:
            return False
        return True

    return wait_until(well, 40)
