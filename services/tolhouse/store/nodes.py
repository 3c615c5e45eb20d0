"""Which node of a Redis Cluster is asked for a key: its master, or a replica while the master is away."""

import logging
import threading

from redis.cluster import ClusterNode, RedisCluster
from redis.connection import ConnectionPool
from redis.exceptions import RedisError

from tolhouse.telemetry import event

_LOOK_SECONDS = 0.5  # between two looks at the Cluster while a node is away


class Nodes:
    """Safe to use from several threads. While a node is away, a thread looks for it, and at who is master now."""

    def __init__(self, cluster: RedisCluster) -> None:
        self.cluster = cluster
        self._away: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def of(self, key: str) -> tuple[str, ConnectionPool, bool]:
        """Name and connections of the node to ask for `key`, and whether that is a replica."""
        nodes, away = self._of(key), self._away
        place = next((n for n, node in enumerate(nodes) if node.name not in away), 0)
        return nodes[place].name, self.cluster.get_redis_connection(nodes[place]).connection_pool, place > 0

    def spare(self, key: str) -> bool:
        """Whether a node for `key` is left that has not failed."""
        return any(node.name not in self._away for node in self._of(key))

    def failed(self, name: str) -> None:
        with self._lock:
            begins, self._away = not self._away, self._away | {name}
        if begins:
            threading.Thread(target=self._watch, name="redis nodes", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _of(self, key: str) -> list[ClusterNode]:
        """Master and replicas of a key."""
        manager = self.cluster.nodes_manager
        slot = self.cluster.keyslot(key)
        return list(manager.slots_cache.get(slot) or [manager.get_node_from_slot(slot)])

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            try:
                self._refresh()
            except RedisError as error:
                event("the Redis Cluster does not answer", logging.WARNING, reason=str(error))
                continue
            for name in self._away:
                if self._is_there(name):
                    with self._lock:
                        self._away -= {name}
            with self._lock:
                if not self._away:
                    return

    def _refresh(self) -> None:
        """Learn anew who the nodes are; connections of those that are none any more are closed."""
        manager = self.cluster.nodes_manager
        before = list(manager.nodes_cache.values())
        manager.initialize(last_failed_node_name=next(iter(self._away), None))
        for node in before:
            if manager.get_node(node_name=node.name) is None and node.redis_connection:
                node.redis_connection.close()

    def _is_there(self, name: str) -> bool:
        """Whether a node answers, or is none of the Cluster's any more."""
        node = self.cluster.nodes_manager.get_node(node_name=name)
        try:
            return node is None or bool(self.cluster.get_redis_connection(node).ping())
        except RedisError:
            return False
