"""The Redis store: a copy of a table that can be loaded again, on one server or on a Cluster.

    tolhouse:{name@version:shards-64:k}  hash: token id -> record; one shard, so one slot
    tolhouse:{name@version}:manifest     string, written last
    tolhouse:{name@version}:lease        string that expires: the version is in use
    tolhouse:{name}:alias                string
    tolhouse:tables                      set of name@version

Reads are grouped by shard into one HMGET each; all are sent, to all nodes, before the first answer
is waited for. Every call has a timeout. While a node of a Cluster is down or slow, its replica is
read: records never change, so that its copy is as good.

A URL may name files, which new connections read as they are then: `password_file`, and with
rediss:// `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile`, as redis-py calls them.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import hiredis
import numpy as np
from redis import Redis, exceptions
from redis.backoff import ExponentialBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import AbstractConnection
from redis.credentials import CredentialProvider
from redis.retry import Retry

from tolhouse.errors import (
    Corrupt,
    DeadlineExceeded,
    InvalidArgument,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from tolhouse.files import ReloadingFiles, read_file
from tolhouse.logs import event
from tolhouse.net.health import SUSPECT_SECONDS, PeerHealth
from tolhouse.store.base import LEASE_SECONDS, Alias, Store, not_understood, shown
from tolhouse.table.manifest import Manifest
from tolhouse.table.records import record_views

_TABLES = "tolhouse:tables"
_WRITE_BYTES = 1 << 20  # per HSET
_WRITES_AHEAD = 4  # HSETs sent before the first is answered
_READ_BYTES = 1 << 18  # per recv
_SENT_BYTES = 1 << 19  # of answers that are asked for at a time
_FAILOVER_SECONDS = 8.0  # longest wait for a node of a Cluster, or one that takes its place
_PAUSE_SECONDS = 0.1
_NOT_NOW = (
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    exceptions.MasterDownError,
    exceptions.BusyLoadingError,
)
_LOST = (exceptions.ConnectionError, exceptions.TimeoutError)  # a node is gone, or hangs

Read = tuple[str, list[int]]  # the key of a shard, and token ids


class RedisStore(Store):
    def __init__(self, url: str, timeout_seconds: float) -> None:
        super().__init__(shown(url))
        self._nodes: _Nodes | None = None
        url, credentials = _credentials(url)
        options: dict[str, Any] = {
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
            "socket_read_size": _READ_BYTES,
            "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
            "credential_provider": credentials,
        }
        with self._mapped():
            try:
                one, client, clustered = _first_to_answer(url, options)
                self._redis: Any = client
                if clustered:
                    client.close()
                    self._nodes = _Nodes(one, options)
                    self._redis = self._nodes.cluster
            except FileNotFoundError as error:
                raise InvalidArgument(
                    f"a TLS file that the store's URL names can't be read: {error.strerror}"
                ) from None
            except (ValueError, TypeError):  # a port or an option that redis-py doesn't know
                raise not_understood(url) from None

    @property
    def unhealthy(self) -> frozenset[str]:
        """Nodes of a Cluster that are down or slow."""
        return self._nodes.health.unhealthy if self._nodes else frozenset()

    def refs(self) -> list[str]:
        with self._mapped():
            return sorted(ref.decode() for ref in self._redis.smembers(_TABLES))

    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        key, ids = _shard_key(manifest, shard), manifest.shard_ids(shard).tolist()
        step = max(1, _WRITE_BYTES // manifest.record_bytes)
        views = list(record_views(np.ascontiguousarray(records)))
        with self._mapped():
            self._redis.unlink(key)
            for start in range(0, len(ids), step * _WRITES_AHEAD):
                pipeline = self._redis.pipeline(transaction=False)
                for at in range(start, min(start + step * _WRITES_AHEAD, len(ids)), step):
                    part = zip(ids[at : at + step], views[at : at + step], strict=True)
                    pipeline.hset(key, mapping=dict(part))
                pipeline.execute()

    def count(self, manifest: Manifest, shard: int) -> int:
        with self._mapped():
            return self._redis.hlen(_shard_key(manifest, shard))

    def commit(self, manifest: Manifest) -> None:
        with self._mapped():
            self._redis.set(_key(manifest.ref, "manifest"), manifest.to_json())
            self._redis.sadd(_TABLES, manifest.ref)

    def delete(self, ref: str) -> None:
        with self._mapped():
            self._redis.srem(_TABLES, ref)
            self._redis.delete(_key(ref, "manifest"), _key(ref, "lease"))
            for key in self._redis.scan_iter(match=f"tolhouse:{{{ref}:*", count=1000):
                self._redis.unlink(key)

    def set_alias(self, name: str, alias: Alias | None) -> None:
        with self._mapped():
            if alias is None:
                self._redis.delete(_key(name, "alias"))
            else:
                self._redis.set(_key(name, "alias"), alias.to_json())

    def lease(self, ref: str) -> None:
        with self._mapped():
            self._redis.set(_key(ref, "lease"), b"", px=int(LEASE_SECONDS * 1000))

    def leased(self, ref: str) -> bool:
        with self._mapped():
            return bool(self._redis.exists(_key(ref, "lease")))

    def close(self) -> None:
        if self._nodes:
            self._nodes.health.close()
        self._redis.close()

    def _manifest_text(self, ref: str) -> bytes | None:
        with self._mapped():
            return self._redis.get(_key(ref, "manifest"))

    def _alias_text(self, name: str) -> bytes | None:
        with self._mapped():
            return self._redis.get(_key(name, "alias"))

    def _fill(
        self, manifest: Manifest, ids: np.ndarray, views: list[memoryview]
    ) -> Generator[memoryview]:
        shards, size, unfilled = manifest.shard_of(ids), manifest.record_bytes, iter(views)
        parts = np.split(ids, np.flatnonzero(np.diff(shards)) + 1)
        reads = [(_shard_key(manifest, int(p[0]) % manifest.num_shards), p.tolist()) for p in parts]
        with self._mapped():
            for (_, tokens), records in zip(reads, self._answers(reads, size), strict=True):
                for token, record in zip(tokens, records, strict=True):
                    if record is None or len(record) != size:
                        what = (
                            f"has {len(record or b'')} bytes, not {size},"
                            if record
                            else "is missing"
                        )
                        raise Corrupt(
                            f"the row of token {token} of table {manifest.ref} {what} in "
                            f"{self.url}: load it again"
                        )
                    view = next(unfilled)
                    view[:] = record
                    yield view

    def _answers(self, reads: list[Read], record_bytes: int) -> Iterator[list[Any]]:
        """The answer to each HMGET. All are sent, to all nodes, before the first is read.

        What a failed node has not answered is asked of another. redis-py's own pipeline does the
        rest where a slot has moved, or a server's connections have to be made anew.
        """
        answered, deadline = 0, time.monotonic() + _FAILOVER_SECONDS
        ask: Callable[..., Iterator[list[Any]]] = self._send
        while answered < len(reads):
            try:
                for answer in ask(reads[answered:], record_bytes):
                    yield answer
                    answered += 1
            except (*_LOST, *_NOT_NOW) as error:
                if not self._nodes:
                    if ask == self._pipeline or isinstance(error, exceptions.TimeoutError):
                        raise
                    ask = self._pipeline
                    continue
                if time.monotonic() > deadline:
                    raise
                event("a Redis node failed", logging.WARNING, url=self.url, reason=str(error))
                if isinstance(error, _NOT_NOW) or not self._nodes.any_up(reads[answered][0]):
                    time.sleep(_PAUSE_SECONDS)  # until a replica has taken over
                ask = self._send
            except exceptions.ResponseError:
                if ask == self._pipeline:
                    raise
                ask = self._pipeline

    def _pipeline(self, reads: list[Read], _: int) -> Iterator[list[Any]]:
        pipeline = self._redis.pipeline(transaction=False)
        for key, tokens in reads:
            pipeline.hmget(key, tokens)
        yield from pipeline.execute()

    def _send(self, reads: list[Read], record_bytes: int) -> Iterator[list[Any]]:
        """Each is sent to a node that is up, in parts: a server answers one and reads the next."""
        with ExitStack() as stack:
            lanes: dict[str, _Lane] = {}
            order = []
            for key, tokens in reads:
                name, client = self._nodes.of(key) if self._nodes else ("", self._redis)
                with self._reported(name):
                    if name not in lanes:
                        lanes[name] = _Lane(name, stack.enter_context(_connection(client)))
                    lanes[name].add(("HMGET", key, *tokens), len(tokens) * record_bytes)
                order.append(lanes[name])
            for lane in lanes.values():
                with self._reported(lane.name):
                    lane.send()
            for lane in order:
                began = time.monotonic()
                with self._reported(lane.name):
                    answer = lane.connection.read_response()
                if self._nodes and time.monotonic() - began > SUSPECT_SECONDS:
                    self._nodes.health.report_slow(lane.name)
                yield answer

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        try:
            yield
        except _LOST as error:
            if self._nodes:
                self._nodes.health.report_down(name, error)
            raise

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Redis' errors as ours."""
        try:
            yield
        except IndexError:  # redis-py's, of a Cluster whose nodes don't know each other yet
            raise Unavailable(f"Redis at {self.url} is a Cluster that is not formed yet") from None
        except exceptions.RedisError as error:
            ours, message = next(
                (ours, message) for theirs, ours, message in _ERRORS if isinstance(error, theirs)
            )
            raise ours(f"Redis at {self.url} {message.format(error)}") from None


_ERRORS = (
    (
        (
            exceptions.AuthenticationError,
            exceptions.AuthorizationError,
            exceptions.NoPermissionError,
        ),
        Unauthenticated,
        "refuses the user or password: {}",
    ),
    (exceptions.TimeoutError, DeadlineExceeded, "did not answer in time: {}"),
    (exceptions.OutOfMemoryError, Overloaded, "is full: {}; raise its maxmemory"),
    (
        (exceptions.ConnectionError, exceptions.RedisClusterException),
        Unavailable,
        "can't be reached: {}",
    ),
    (exceptions.RedisError, Unavailable, "refuses: {}"),
)


class _Nodes:
    """The nodes of a Cluster: a key is read from its master, or a replica while that is not up."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.cluster: Any = RedisCluster.from_url(
            url, require_full_coverage=False, redis_connect_func=_read_only, **options
        )
        self.health = PeerHealth("Redis node", self._probe, self._alternatives)

    def of(self, key: str) -> tuple[str, Redis]:
        """The node to ask for a key: its name and a client of it."""
        nodes = {node.name: node for node in self._holders(self.cluster.keyslot(key))}
        name = self.health.order(nodes)[0]
        return name, self.cluster.get_redis_connection(nodes[name])

    def any_up(self, key: str) -> bool:
        return any(self.health.up(n.name) for n in self._holders(self.cluster.keyslot(key)))

    def _holders(self, slot: int) -> list[ClusterNode]:
        """Master and replicas of a slot."""
        manager = self.cluster.nodes_manager
        return list(manager.slots_cache.get(slot) or [manager.get_node_from_slot(slot)])

    def _probe(self, name: str) -> bool:
        node = self.cluster.get_node(node_name=name)
        try:
            return bool(node and self.cluster.get_redis_connection(node).ping())
        except exceptions.RedisError:
            return False

    def _alternatives(self, name: str) -> list[str] | None:
        """Other nodes with the same keys, as the Cluster is now; None if the node is no part."""
        manager = self.cluster.nodes_manager
        before = list(manager.nodes_cache.values())
        try:
            manager.initialize(last_failed_node_name=name)
        except exceptions.RedisError as error:
            event("the Redis Cluster does not answer", logging.WARNING, reason=str(error))
        for node in before:
            if manager.get_node(node_name=node.name) is None and node.redis_connection:
                node.redis_connection.close()
        if manager.get_node(node_name=name) is None:
            return None
        groups = ([node.name for node in nodes] for nodes in manager.slots_cache.values())
        return [other for other in next((g for g in groups if name in g), []) if other != name]


def _read_only(connection: AbstractConnection) -> None:
    """Let a replica answer reads; a master takes no notice."""
    connection.send_command("READONLY")
    connection.read_response()


def _first_to_answer(url: str, options: dict[str, Any]) -> tuple[str, Redis, bool]:
    """Of several hosts the URL of the first that answers, a client, and if it is in a Cluster."""
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    urls = [urlunsplit(parts._replace(netloc=f"{user}{at}{host}")) for host in hosts.split(",")]
    for one in urls:
        client: Redis = Redis.from_url(one, **options)
        try:
            clustered = client.info("cluster").get("cluster_enabled") == 1
        except _LOST:
            client.close()
            if one == urls[-1]:
                raise
        else:
            return one, client, clustered
    raise AssertionError("there is at least one host")


class _PasswordFile(CredentialProvider):
    """A password from a file, read anew by each new connection after it has changed."""

    def __init__(self, user: str, path: str) -> None:
        self._user = user
        self._password = ReloadingFiles(
            (path,), lambda: read_file(path, "the file of Redis' password").decode().strip()
        )

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        return (self._user, self._password.get()) if self._user else (self._password.get(),)


def _credentials(url: str) -> tuple[str, CredentialProvider | None]:
    """A URL without its `password_file`, and user and password by that; redis-py takes them together only."""
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        path = options.pop("password_file", "")
        if not path:
            return url, None
        if parts.password or "password" in options:
            raise InvalidArgument(
                f"store {shown(url)!r} has a password and a password_file: give one of them"
            )
        user = unquote(parts.username or options.pop("username", ""))
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(options))
        return urlunsplit(bare), _PasswordFile(user, path)
    except (ValueError, UnicodeDecodeError):
        raise not_understood(url) from None


@dataclass
class _Lane:
    """Commands on their way to one node, which answers them in order."""

    name: str
    connection: AbstractConnection
    commands: list[tuple] = field(default_factory=list)
    answer_bytes: int = 0

    def add(self, command: tuple, answer_bytes: int) -> None:
        self.commands.append(command)
        self.answer_bytes += answer_bytes
        if self.answer_bytes >= _SENT_BYTES:
            self.send()

    def send(self) -> None:
        # packed here: redis-py makes tuples from generators, which CPython's free list then holds
        packed = b"".join(map(hiredis.pack_command, self.commands))
        self.connection.send_packed_command([packed], check_health=False)
        self.commands, self.answer_bytes = [], 0


@contextmanager
def _connection(client: Redis) -> Iterator[AbstractConnection]:
    """A connection of the client's; it is closed on an error, since answers may be left on it."""
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        yield connection
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _key(ref: str, what: str) -> str:
    return f"tolhouse:{{{ref}}}:{what}"


def _shard_key(manifest: Manifest, shard: int) -> str:
    return f"tolhouse:{{{manifest.ref}:{manifest.layout}-{manifest.num_shards}:{shard}}}"
