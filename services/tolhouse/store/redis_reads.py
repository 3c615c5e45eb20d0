"""Reads of records from a Redis server, or from the nodes of a Cluster.

A command reads up to a megabyte of records of one shard. Commands for a few megabytes are sent to
each node before the first reply is read. While a node of a Cluster is down or slow, its replica is
read, because records never change.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any, cast

import hiredis
from redis import Redis
from redis import exceptions as theirs

from tolhouse.net.call import end_after
from tolhouse.net.health import SUSPECT_SECONDS, PeerHealth
from tolhouse.net.path import bytes_in_flight
from tolhouse.store.base import Views
from tolhouse.store.redis_connection import LOST, replies, until

SENT_BYTES = 1 << 17  # the bytes of replies that one command, or one send, requests
FAILOVER_SECONDS = 8.0  # the longest wait for a node of a Cluster or its replacement
_MOST_AHEAD = 8  # limits the replies that a server has to buffer
_READ_BYTES = 4 << 20  # the bytes of records per timeout; larger reads have more time
_PAUSE_SECONDS = 0.1
_NOT_NOW = theirs.ClusterDownError, theirs.MasterDownError

Records = list[Any]  # the reply to a read: the read's views, or for each record bytes or None


@dataclass
class Read:
    """A command for records of one shard, and the views for the records."""

    words: list[str | int]  # HMGET key id ..., or MGET key ...
    tokens: list[int]
    views: Views


class Reader:
    """Reads records from the servers of `redis`. `timeout` in seconds limits each reply."""

    def __init__(
        self, redis: Any, *, is_cluster: bool, timeout: float, closed: threading.Event
    ) -> None:
        self._redis, self._is_cluster = redis, is_cluster
        self._timeout, self._closed = timeout, closed
        # The health of the nodes of a Cluster.
        self.health = PeerHealth("Redis node", self._probe, self._alternatives)

    def records(self, reads: list[Read], record_bytes: int) -> Iterator[Records]:
        """Yield the reply to each read. If a node fails, another node gets its commands.

        redis-py's pipeline is used after a slot has moved, and to reopen connections.
        """
        answered, deadline = 0, end_after(FAILOVER_SECONDS)
        ask: Callable[..., Iterator[Records]] = self._send
        while answered < len(reads):
            try:
                for answer in ask(reads[answered:], record_bytes):
                    yield self._found(reads[answered], answer, record_bytes)
                    answered += 1
            except (*LOST, theirs.ResponseError) as error:
                if self._is_cluster and isinstance(error, (*LOST, *_NOT_NOW)):
                    if time.monotonic() > deadline:
                        raise
                    first = self._holders(reads[answered])[0]
                    if not (isinstance(error, LOST) and self.health.up(first)):
                        time.sleep(_PAUSE_SECONDS)  # a replica may take over in the meantime
                    ask = self._send
                elif ask == self._pipeline or isinstance(error, theirs.TimeoutError):
                    raise
                else:
                    ask = self._pipeline

    def _found(self, read: Read, answer: Records, record_bytes: int) -> Records:
        """Return the answer. If a Cluster lacks records, ask redis-py, which follows moved slots.

        A replica has no redirections for a slot that is being moved.
        """
        if self._is_cluster and answer is not read.views and None in answer:
            return next(self._pipeline([read], record_bytes))
        return answer

    def _end(self, reads: list[Read], record_bytes: int) -> float:
        """Return the deadline of all replies to `reads`, if they are sent now."""
        size = sum(len(read.tokens) for read in reads) * record_bytes
        return end_after(self._timeout * max(1, size / _READ_BYTES))

    def _pipeline(self, reads: list[Read], record_bytes: int) -> Iterator[Records]:
        """Send all commands with redis-py. MGET becomes GETs, which also work in a moving slot."""
        pipeline = self._redis.pipeline(transaction=False)
        for read in reads:
            command, *keys = read.words
            for words in [("GET", key) for key in keys] if command == "MGET" else [read.words]:
                pipeline.execute_command(*words)
        with until(self._end(reads, record_bytes), self._closed):
            answers = iter(pipeline.execute())
        for read in reads:
            single = read.words[0] == "MGET"
            yield list(islice(answers, len(read.tokens))) if single else next(answers)

    def _send(self, reads: list[Read], record_bytes: int) -> Iterator[Records]:
        """Send the commands to healthy nodes, with a few sends ahead, and read the replies."""
        end = self._end(reads, record_bytes)
        size = sum(len(read.tokens) for read in reads) * record_bytes
        step, limits = max(1, SENT_BYTES * len(reads) // size), (end, self._closed)
        nodes = [self._holders(read)[0] for read in reads]
        pools: dict[str, Any] = {}
        connections: dict[str, Any] = {}
        sending: dict[str, Iterator[None]] = {}
        answers: dict[str, Iterator[Records]] = {}
        answered = dict.fromkeys(nodes, 0)
        name = ""
        try:
            for name in dict.fromkeys(nodes):
                own = [read for node, read in zip(nodes, reads, strict=True) if node == name]
                # redis-py itself would make large tuples, which CPython keeps in a free list.
                commands = [hiredis.pack_command(cast("Any", tuple(read.words))) for read in own]
                with until(*limits):
                    pools[name] = self._client(name).connection_pool
                    connections[name] = pools[name].get_connection()
                    sending[name] = _sends(connections[name], commands, step)
                    deque(islice(sending[name], _sends_ahead(connections[name])), maxlen=0)
                arrays = [read.views for read in own]
                answers[name] = replies(connections[name], arrays, record_bytes, *limits)
            for name in nodes:
                began = time.monotonic()
                answer = next(answers[name])
                answered[name] += 1
                if answered[name] % step == 0:
                    next(sending[name], None)
                if name and time.monotonic() - began > SUSPECT_SECONDS:
                    self.health.report_slow(name)
                yield answer
        except BaseException as error:
            for connection in connections.values():  # connections may have unread replies
                connection.disconnect()
            if name and isinstance(error, LOST):
                self.health.report_down(name, error)
            raise
        finally:
            for name, connection in connections.items():
                pools[name].release(connection)

    # the nodes of a Cluster, by name

    def _holders(self, read: Read) -> list[str]:
        """Return the names of a shard's master and replicas, healthy ones first.

        The name of a single server is "".
        """
        if not self._is_cluster:
            return [""]
        manager, slot = self._redis.nodes_manager, self._redis.keyslot(read.words[1])
        nodes = manager.slots_cache.get(slot) or [manager.get_node_from_slot(slot)]
        return self.health.order(node.name for node in nodes)

    def _client(self, name: str) -> Redis:
        if not name:
            return self._redis
        node = self._redis.get_node(node_name=name)
        if node is None:
            raise theirs.ConnectionError(f"{name} is not a node of the Cluster any more")
        return self._redis.get_redis_connection(node)

    def _probe(self, name: str) -> bool:
        with until(time.monotonic() + self._timeout, self._closed), suppress(theirs.RedisError):
            return bool(self._client(name).ping())
        return False

    def _alternatives(self, name: str) -> list[str] | None:
        """Return the other nodes with the same keys, or None if the node has left the Cluster."""
        manager = self._redis.nodes_manager
        end = time.monotonic() + FAILOVER_SECONDS
        # Without a reply, the known layout stays in use.
        with suppress(theirs.RedisError, theirs.RedisClusterException), until(end, self._closed):
            manager.initialize(last_failed_node_name=name)
        if manager.get_node(node_name=name) is None:
            return None
        groups = ([node.name for node in nodes] for nodes in manager.slots_cache.values())
        return [other for other in next((g for g in groups if name in g), []) if other != name]


def _sends_ahead(connection: Any) -> int:
    """Return how many sends the server needs to have, so that it always has one to answer."""
    size = bytes_in_flight(connection._sock)  # noqa: SLF001 - redis-py has no public name
    return 1 + ceil(min(size / SENT_BYTES, _MOST_AHEAD - 1))


def _sends(connection: Any, commands: list[bytes], step: int) -> Iterator[None]:
    """Send `step` commands at a time, and yield after each time."""
    for at in range(0, len(commands), step):
        connection.send_packed_command([b"".join(commands[at : at + step])], check_health=False)
        yield
