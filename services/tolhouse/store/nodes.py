"""Which node of a Redis Cluster is asked for a key: its master, or a replica while the master is away or lags behind it."""

import logging
import threading
import time

from redis.cluster import ClusterNode, RedisCluster
from redis.connection import ConnectionPool
from redis.exceptions import RedisError

from tolhouse.logs import event
from tolhouse.net.health import lags

_LOOK_SECONDS = 0.5  # between two looks at the Cluster while a node is away or suspected


class Nodes:
    """Safe to use from several threads. While a node is away, a thread looks for it, and at who is master now."""

    def __init__(self, cluster: RedisCluster) -> None:
        self.cluster = cluster
        self._away: frozenset[str] = frozenset()
        self._suspected: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._watching = False
        self._closed = threading.Event()

    def of(self, key: str) -> tuple[str, ConnectionPool, bool]:
        """Name and connections of the node to ask for `key`, and whether that is a replica."""
        nodes, away = self._of(key), self._away
        place = next((n for n, node in enumerate(nodes) if node.name not in away), 0)
        return (
            nodes[place].name,
            self.cluster.get_redis_connection(nodes[place]).connection_pool,
            place > 0,
        )

    def spare(self, key: str) -> bool:
        """Whether a node for `key` is left that has not failed."""
        return any(node.name not in self._away for node in self._of(key))

    def failed(self, name: str) -> None:
        """It is asked last until it answers."""
        with self._lock:
            self._away |= {name}
            self._begin_to_watch()

    def suspect(self, name: str) -> None:
        """It took long: it is asked last if, and while, it lags behind others that have the same keys."""
        with self._lock:
            self._suspected |= {name}
            self._begin_to_watch()

    def close(self) -> None:
        self._closed.set()

    def _of(self, key: str) -> list[ClusterNode]:
        """Master and replicas of a key."""
        manager = self.cluster.nodes_manager
        slot = self.cluster.keyslot(key)
        return list(manager.slots_cache.get(slot) or [manager.get_node_from_slot(slot)])

    def _begin_to_watch(self) -> None:
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name="redis nodes", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            try:
                self._refresh()  # for suspects too: a replica that joined later is not known yet
            except RedisError as error:
                event("the Redis Cluster does not answer", logging.WARNING, reason=str(error))
                continue
            for name in self._away | self._suspected:
                is_last = self._lags(name)
                with self._lock:
                    if is_last and name not in self._away:
                        event("a Redis node lags behind the others", logging.WARNING, node=name)
                    self._away = self._away | {name} if is_last else self._away - {name}
                    self._suspected -= {name}
            with self._lock:
                self._watching = bool(self._away | self._suspected)
                if not self._watching:
                    return

    def _refresh(self) -> None:
        """Learn anew who the nodes are; connections of those that are none any more are closed."""
        manager = self.cluster.nodes_manager
        before = list(manager.nodes_cache.values())
        manager.initialize(last_failed_node_name=next(iter(self._away | self._suspected), None))
        for node in before:
            if manager.get_node(node_name=node.name) is None and node.redis_connection:
                node.redis_connection.close()

    def _lags(self, name: str) -> bool:
        """Whether a node of the Cluster's does not answer, or later than others that have the same keys."""
        manager = self.cluster.nodes_manager
        if manager.get_node(node_name=name) is None:
            return False
        shares = (
            nodes
            for nodes in manager.slots_cache.values()
            if any(node.name == name for node in nodes)
        )
        others = [
            node.name
            for node in next(shares, [])
            if node.name != name and node.name not in self._away
        ]
        return lags(name, others, self._seconds)

    def _seconds(self, name: str) -> float | None:
        node, began = self.cluster.nodes_manager.get_node(node_name=name), time.monotonic()
        try:
            if node and self.cluster.get_redis_connection(node).ping():
                return time.monotonic() - began
        except RedisError:
            pass
        return None
