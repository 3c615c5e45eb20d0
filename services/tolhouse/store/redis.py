"""The Redis store, on one server or on a Redis Cluster.

    tolhouse:{name@version:shards-64:k}     hash: token id -> record; a shard is in one slot
    tolhouse:{registry}:manifest            hash: name@version -> manifest
    tolhouse:{registry}:deleting            hash: name@version -> ""
    tolhouse:{registry}:alias               hash: name -> alias
    tolhouse:{registry}:changed             string: random, changes with each update
    tolhouse:{registry}:lease:name@version  string with expiry: the version is in use

A read is one HMGET per shard. All commands are sent to all nodes before the first reply is read.
The timeout limits a whole reply, even if the server sends it byte by byte. While a node of a
Cluster is down or slow, its replica is read, because records never change. New connections read
the files in the URL's options: `password_file`, and for rediss:// redis-py's `ssl_ca_certs`,
`ssl_certfile` and `ssl_keyfile`.
"""

import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from math import inf
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import hiredis
import numpy as np
from redis import Redis
from redis import exceptions as theirs
from redis._parsers import _HiredisParser
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.connection import AbstractConnection, ConnectionPool
from redis.credentials import CredentialProvider
from redis.retry import Retry
from redis.utils import SENTINEL

from tolhouse import errors
from tolhouse.errors import InvalidArgumentError, UnavailableError
from tolhouse.files import ReloadingFiles, read_file
from tolhouse.net.call import end_after, has_time_limit
from tolhouse.net.health import SUSPECT_SECONDS, PeerHealth
from tolhouse.store.base import (
    LEASE_SECONDS,
    Changes,
    Kind,
    Store,
    Views,
    has_password,
    not_understood,
    shown,
)
from tolhouse.table.manifest import Manifest, record_views

_REGISTRY = "tolhouse:{registry}"  # one slot, because an update is a script over all its keys
_FORMAT_1_TABLES = "tolhouse:tables"  # listed, so that these tables can be refused and deleted
_KINDS: tuple[Kind, ...] = ("manifest", "deleting", "alias")
# Applies an update unless there was another update. Returns 1 on success, and also on a retry after
# a lost reply.
_UPDATE = """
local token = redis.call('GET', KEYS[1])
if token == ARGV[1] then return 1 end
if (token or '') ~= ARGV[2] then return 0 end
for i = 3, #ARGV, 4 do
  local key, field = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  if ARGV[i + 2] == '1' then redis.call('HSET', key, field, ARGV[i + 3])
  else redis.call('HDEL', key, field) end
end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""
_UPDATE_TRIES = 50
_ABANDONED_SECONDS = 3600  # the expiry of incomplete shards of killed builds
_WRITE_BYTES = 1 << 20  # the bytes in an HSET
_WRITES_AHEAD = 4  # HSETs in a pipeline
_SENT_BYTES = 1 << 19  # the bytes of replies that one send requests
_READ_BYTES = 4 << 20  # the bytes of records per timeout; larger reads have more time
_FAILOVER_SECONDS = 8.0  # the longest wait for a node of a Cluster or its replacement
_PAUSE_SECONDS = 0.1
_NO_ENTRY = theirs.AuthenticationError, theirs.AuthorizationError, theirs.NoPermissionError
_LOST = theirs.ConnectionError, theirs.TimeoutError  # a node is down or hangs
_NOT_NOW = theirs.ClusterDownError, theirs.TryAgainError, theirs.MasterDownError
_NO_CONNECTION = theirs.ConnectionError, theirs.RedisClusterException
_ERRORS: tuple[tuple[Any, type[errors.TolhouseError], str], ...] = (  # the first match is used
    (_NO_ENTRY, errors.UnauthenticatedError, "refuses the user or password: {}"),
    (theirs.TimeoutError, errors.DeadlineExceededError, "did not answer in time: {}"),
    (theirs.OutOfMemoryError, errors.OverloadedError, "is full: {}; raise its maxmemory"),
    (_NO_CONNECTION, UnavailableError, "cannot be reached: {}"),
    (theirs.RedisError, UnavailableError, "refuses: {}"),
    (IndexError, UnavailableError, "is a Cluster that is not formed yet"),  # raised by redis-py
)

Read = tuple[str, list[int]]  # the key of a shard, and token ids
# The running thread's deadline for replies, and the event that its store is closed.
_limits: ContextVar[tuple[float, threading.Event]] = ContextVar(
    "limits", default=(inf, threading.Event())
)


class RedisStore(Store):
    """A store in Redis. `timeout_seconds` limits each reply."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        super().__init__(shown(url))
        self._timeout, self._closed = timeout_seconds, threading.Event()
        url, credentials = split_credentials(url)
        options: dict[str, Any] = {
            "parser_class": _Parser,
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
            "socket_read_size": 1 << 18,
            "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
            "credential_provider": credentials,
        }
        parts = urlsplit(url)
        user, at, hosts = parts.netloc.rpartition("@")
        places = [parts._replace(netloc=f"{user}{at}{host}") for host in hosts.split(",")]
        with self._mapped(), self._until(end_after(timeout_seconds * (1 + len(places)))):
            try:
                self._redis, self._is_cluster = _connect([*map(urlunsplit, places)], options)
            except FileNotFoundError as error:
                raise InvalidArgumentError(
                    f"cannot read a TLS file of the URL: {error.strerror}"
                ) from None
            except (ValueError, TypeError):  # redis-py does not accept a port or an option
                raise not_understood(url) from None
        # The health of the nodes of a Cluster.
        self.health = PeerHealth("Redis node", self._probe, self._alternatives)

    def refs(self) -> list[str]:
        found = {*self._call("hkeys", f"{_REGISTRY}:manifest")}
        return sorted(ref.decode() for ref in found | self._call("smembers", _FORMAT_1_TABLES))

    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        key, ids = _shard_key(manifest, shard), manifest.shard_ids(shard).tolist()
        step = max(1, _WRITE_BYTES // manifest.record_bytes)
        views = list(record_views(np.ascontiguousarray(records)))
        partial = f"{key}:{secrets.token_hex(8)}"
        with self._mapped():
            for start in range(0, len(ids), step * _WRITES_AHEAD):
                pipeline = self._redis.pipeline(transaction=False)
                for at in range(start, min(start + step * _WRITES_AHEAD, len(ids)), step):
                    part = zip(ids[at : at + step], views[at : at + step], strict=True)
                    pipeline.hset(partial, mapping=dict(part))
                pipeline.expire(partial, _ABANDONED_SECONDS)
                pipeline.execute()
            self._redis.persist(partial)
            self._redis.rename(partial, key)

    def count(self, manifest: Manifest, shard: int) -> int:
        return self._call("hlen", _shard_key(manifest, shard))

    def delete_records(self, ref: str) -> None:
        with self._mapped():
            for key in self._redis.scan_iter(match=f"tolhouse:{{{ref}[:}}]*", count=1000):
                self._redis.unlink(key)
            self._redis.srem(_FORMAT_1_TABLES, ref)

    def lease(self, ref: str) -> None:
        self._call("set", f"{_REGISTRY}:lease:{ref}", b"", px=int(LEASE_SECONDS * 1000))

    def leased(self, ref: str) -> bool:
        return bool(self._call("exists", f"{_REGISTRY}:lease:{ref}"))

    def update(self, change: Callable[[], Changes]) -> None:
        keys = [f"{_REGISTRY}:{kind}" for kind in ("changed", *_KINDS)]
        for _ in range(_UPDATE_TRIES):
            seen = self._call("get", keys[0]) or b""
            texts: list[Any] = []
            try:
                changes, error = change(), None
            except errors.TolhouseError as refusal:
                changes, error = {}, refusal
            if not changes:  # this is valid only if there was no other update during the reads
                if (self._call("get", keys[0]) or b"") != seen:
                    continue
                if error:
                    raise error
                return
            for (kind, ref), text in changes.items():
                texts += [_KINDS.index(kind) + 2, ref, int(text is not None), text or b""]
            words = [secrets.token_hex(8), seen, *texts]
            if self._call("eval", _UPDATE, len(keys), *keys, *words):
                return
        raise UnavailableError(
            f"other clients keep changing the registry in Redis at {self.url}: try again"
        )

    def risk(self) -> str:
        with suppress(errors.TolhouseError):  # the user may lack the permission
            where = {"target_nodes": RedisCluster.PRIMARIES} if self._is_cluster else {}
            answer = self._call("info", "memory", **where)
            nodes = [answer] if "maxmemory" in answer else answer.values()
            policies = {node["maxmemory_policy"] for node in nodes if node.get("maxmemory")}
            for policy in sorted(policies):
                # Other policies evict only keys with expiry, which rows do not have.
                if policy.startswith("allkeys"):
                    how = f"by its maxmemory-policy {policy}: set noeviction"
                    return f"Redis at {self.url} may evict rows {how}"
        return ""

    def close(self) -> None:
        self._closed.set()
        self.health.close()
        self._redis.close()

    def _read_text(self, ref: str, kind: Kind) -> bytes | None:
        text = self._call("hget", f"{_REGISTRY}:{kind}", ref)
        if text is None and kind == "manifest":
            return self._call("get", f"tolhouse:{{{ref}}}:manifest")  # format 1
        return text

    def _call(self, command: str, *arguments: Any, **options: Any) -> Any:
        seconds = self._timeout + (_FAILOVER_SECONDS if self._is_cluster else 0)
        with self._mapped(), self._until(end_after(seconds)):
            return getattr(self._redis, command)(*arguments, **options)

    @contextmanager
    def _until(self, end: float) -> Iterator[None]:
        """Let the block read replies until `end`, or until the store is closed."""
        token = _limits.set((end, self._closed))
        try:
            yield
        finally:
            _limits.reset(token)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Turn errors of redis-py into errors of Tolhouse."""
        try:
            yield
        except (theirs.RedisError, theirs.RedisClusterException, IndexError) as error:
            _, ours, what = next(row for row in _ERRORS if isinstance(error, row[0]))
            raise ours(f"Redis at {self.url} {what.format(error)}") from None

    # reads

    def _fill(
        self, manifest: Manifest, ids: np.ndarray, views: Views
    ) -> Generator[memoryview | str]:
        size, unfilled = manifest.record_bytes, iter(views)
        parts = np.split(ids, np.flatnonzero(np.diff(manifest.shard_of(ids))) + 1)
        reads = [(_shard_key(manifest, int(p[0]) % manifest.num_shards), p.tolist()) for p in parts]
        with self._mapped():
            for (_, tokens), records in zip(reads, self._answers(reads, size), strict=True):
                for token, record, view in zip(tokens, records, unfilled, strict=False):
                    if record is None or len(record) != size:
                        row = f"the row of token {token} of table {manifest.ref}"
                        what = f"has {len(record)} bytes" if record else "is missing"
                        yield f"{row} {what} in {self.url}: load it again"
                    else:
                        view[:] = record
                        yield view

    def _reopen(self, manifest: Manifest, ids: np.ndarray) -> None:
        pass  # there is no state of a shard

    def _answers(self, reads: list[Read], record_bytes: int) -> Iterator[list[Any]]:
        """Yield the reply to each HMGET. If a node fails, another node gets its commands.

        redis-py's pipeline is used after a slot has moved, and to reopen connections.
        """
        answered, deadline = 0, end_after(_FAILOVER_SECONDS)
        ask: Callable[..., Iterator[list[Any]]] = self._send
        while answered < len(reads):
            try:
                for answer in ask(reads[answered:], record_bytes):
                    yield answer
                    answered += 1
            except (*_LOST, theirs.ResponseError) as error:
                if self._is_cluster and isinstance(error, (*_LOST, *_NOT_NOW)):
                    if time.monotonic() > deadline:
                        raise
                    first = self._holders(reads[answered][0])[0]
                    if not (isinstance(error, _LOST) and self.health.up(first)):
                        time.sleep(_PAUSE_SECONDS)  # a replica may take over in the meantime
                    ask = self._send
                elif ask == self._pipeline or isinstance(error, theirs.TimeoutError):
                    raise
                else:
                    ask = self._pipeline

    def _end(self, reads: list[Read], record_bytes: int) -> float:
        """Return the deadline of all replies to `reads`, if they are sent now."""
        size = sum(len(tokens) for _, tokens in reads) * record_bytes
        return end_after(self._timeout * max(1, size / _READ_BYTES))

    def _pipeline(self, reads: list[Read], record_bytes: int) -> Iterator[list[Any]]:
        pipeline = self._redis.pipeline(transaction=False)
        for key, tokens in reads:
            pipeline.hmget(key, tokens)
        with self._until(self._end(reads, record_bytes)):
            answers = pipeline.execute()
        yield from answers

    def _send(self, reads: list[Read], record_bytes: int) -> Iterator[list[Any]]:
        """Send all commands to healthy nodes, and then read the replies."""
        size = sum(len(tokens) for _, tokens in reads) * record_bytes
        step, end = max(1, _SENT_BYTES * len(reads) // size), self._end(reads, record_bytes)
        nodes = [self._holders(key)[0] for key, _ in reads]
        pools: dict[str, Any] = {}
        connections: dict[str, Any] = {}
        try:
            for name in dict.fromkeys(nodes):
                # redis-py itself would make large tuples, which CPython keeps in a free list.
                commands: list[bytes] = [
                    hiredis.pack_command(cast("Any", ("HMGET", key, *tokens)))
                    for node, (key, tokens) in zip(nodes, reads, strict=True)
                    if node == name
                ]
                with self._reported(name), self._until(end):
                    pools[name] = self._client(name).connection_pool
                    connections[name] = pools[name].get_connection()
                    # Steps limit the replies that the server has to buffer.
                    for at in range(0, len(commands), step):
                        packed = [b"".join(commands[at : at + step])]
                        connections[name].send_packed_command(packed, check_health=False)
            for name in nodes:
                with self._reported(name), self._until(end):
                    answer = connections[name].read_response()
                yield answer
        except BaseException:
            for connection in connections.values():  # connections may have unread replies
                connection.disconnect()
            raise
        finally:
            for name, connection in connections.items():
                pools[name].release(connection)

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Report a node of a Cluster that fails or is slow."""
        began = time.monotonic()
        try:
            yield
        except _LOST as error:
            if name:
                self.health.report_down(name, error)
            raise
        if name and time.monotonic() - began > SUSPECT_SECONDS:
            self.health.report_slow(name)

    # the nodes of a Cluster, by name

    def _holders(self, key: str) -> list[str]:
        """Return the names of a key's master and replicas, healthy ones first.

        The name of a single server is "".
        """
        if not self._is_cluster:
            return [""]
        manager, slot = self._redis.nodes_manager, self._redis.keyslot(key)
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
        with self._mapped(), self._until(time.monotonic() + self._timeout):
            return bool(self._client(name).ping())

    def _alternatives(self, name: str) -> list[str] | None:
        """Return the other nodes with the same keys, or None if the node has left the Cluster."""
        manager = self._redis.nodes_manager
        end = time.monotonic() + _FAILOVER_SECONDS
        # Without a reply, the known layout stays in use.
        with suppress(theirs.RedisError, theirs.RedisClusterException), self._until(end):
            manager.initialize(last_failed_node_name=name)
        if manager.get_node(node_name=name) is None:
            return None
        groups = ([node.name for node in nodes] for nodes in manager.slots_cache.values())
        return [other for other in next((g for g in groups if name in g), []) if other != name]


class _Parser(_HiredisParser):
    """Reads replies until the deadline of the call. A socket's timeout limits only one `recv`."""

    def read_from_socket(self, timeout: Any = SENTINEL, raise_on_timeout: bool = True) -> bool:
        end, closed = _limits.get()
        if closed.is_set():
            raise errors.ClosedError("the store is closed")
        left = end - time.monotonic()
        if left <= 0:
            raise theirs.TimeoutError("the answer was too slow")
        if timeout is SENTINEL and (left < (self._socket_timeout or inf) or has_time_limit()):
            timeout = left
        return super().read_from_socket(timeout, raise_on_timeout)


class _Pool(ConnectionPool):
    """A pool whose connections use `_Parser`, for a Cluster."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, parser_class=_Parser, **options)


def _connect(urls: list[str], options: dict[str, Any]) -> tuple[Any, bool]:
    """Connect to the first server that answers. Returns the client, and whether it is a Cluster."""
    client: Redis = Redis.from_url(urls[0], **options)
    try:
        if client.info("cluster").get("cluster_enabled") != 1:
            return client, False
        more = {"require_full_coverage": False, "redis_connect_func": _read_only}
        more["connection_pool_class"] = _Pool
        cluster = RedisCluster.from_url(urls[0], **options, **more)
    except _LOST:
        client.close()
        if not urls[1:]:
            raise
        return _connect(urls[1:], options)
    client.close()
    return cluster, True


def _read_only(connection: AbstractConnection) -> None:
    """Let a replica answer reads. A master ignores the command."""
    connection.send_command("READONLY")
    connection.read_response()


@dataclass
class _PasswordFile(CredentialProvider):
    """A password from a file. After a change of the file, new connections use the new password."""

    user: str
    file: ReloadingFiles[bytes]

    def get_credentials(self) -> tuple[str, str]:
        return self.user, self.file.get().decode(errors="replace").strip()


def split_credentials(url: str) -> tuple[str, CredentialProvider | None]:
    """Split a URL into the URL without `password_file`, and the credentials from that file."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if not (path := options.pop("password_file", "")):
        return url, None
    if has_password(url):
        raise InvalidArgumentError(f"store {shown(url)!r} has both a password and a password_file")
    user = unquote(parts.username or options.pop("username", "default"))
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(options))
    file = ReloadingFiles((path,), lambda: read_file(path, "the Redis password file"))
    return urlunsplit(bare), _PasswordFile(user, file)


def _shard_key(manifest: Manifest, shard: int) -> str:
    return f"tolhouse:{{{manifest.ref}:{manifest.layout}-{manifest.num_shards}:{shard}}}"
