"""What goes wrong, how it is mended, and what clients may notice of it."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from redis import Redis, RedisCluster
from redis.cluster import ClusterNode
from redis.exceptions import RedisError
from tolhouse.testing import RedisNode

from tests.chaos.proxy import Link
from tests.chaos.system import System, wait_until

Allowed = Literal[
    "none", "streaming", "errors"
]  # requests that may fail: none, those that had shown a token, any (with a clear error)


@dataclass
class Fault:
    name: str
    inject: Callable[[], object]
    mend: Callable[[], object]
    may_fail: Allowed = "none"
    recovers_within: float = 5.0  # seconds


def of_services(system: System) -> list[Fault]:
    lookup, worker = system.lookups[0], system.workers[0]
    faults = []
    for what, service, may_fail in (
        ("lookup replica", lookup, "none"),
        ("worker", worker, "streaming"),
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
        ("gateway and worker", [system.to_workers[0]], "streaming"),
        ("worker and lookup", [system.to_lookups[0][0]], "none"),
    ):
        faults += of_links(what, links, may_fail)
    return faults


def of_links(what: str, links: list[Link], may_fail: Allowed) -> list[Fault]:
    def each(act: Callable[[Link], None]) -> Callable[[], None]:
        return lambda: [act(link) for link in links] and None

    return [
        Fault(f"cut between {what}", each(Link.cut), each(Link.mend), may_fail),
        Fault(f"200 ms between {what}", each(lambda link: link.delay(0.2)), each(Link.mend)),
    ]


def of_redis(system: System, nodes: list[RedisNode], links: list[Link], ref: str) -> list[Fault]:
    """Each with a master of its own, as far as that goes: after a fault its replica may be the
    master."""
    faults = []
    for what, first in (("master", 0), ("replica", 3)):
        node = nodes[first]
        faults.append(
            Fault(f"kill -9 of a Redis {what}", node.popen.kill, node.restart, "none", 10.0)
        )
        other = nodes[first + 1]
        stop, go_on = (
            lambda n=other, s=number: n.popen.send_signal(s)
            for number in (signal.SIGSTOP, signal.SIGCONT)
        )
        faults.append(Fault(f"SIGSTOP of a Redis {what}", stop, go_on, "none", 10.0))
    faults += of_links("lookup and a Redis master", [links[2]], "none")
    faults += of_links("lookup and a Redis replica", [links[5]], "none")
    faults.append(corrupted(system, nodes[2].url, ref))
    moved = Moved(nodes, ref)
    faults.append(Fault("slot migration", moved.there, moved.back))
    faults.append(
        Fault("restart of everything", lambda: restart(system, nodes), lambda: None, "errors", 30.0)
    )
    return faults


def restart(system: System, nodes: list[RedisNode]) -> None:
    """All processes end, Redis too, and come back in the order of their dependence."""
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
    """A bit is turned in every record of one shard, in its master, and so in its replica."""
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

    return Fault("corrupted records in Redis", inject, mend, "errors", 60.0)


class Moved:
    """The slots of a version's shards go to another master one by one, key by key, under load, and
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
    """Whether every node says that the Cluster is whole, and every replica follows its master."""

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
