"""The Redis store: a copy of a table that can be loaded again. Standalone and Cluster run through the same lines.

    tolhouse:{name@version:k}            hash: token id -> record; one shard, so one slot of a Cluster
    tolhouse:{name@version}:manifest     string, written last
    tolhouse:{name}:alias                string
    tolhouse:tables                      set of name@version

Reads are grouped by shard into one HMGET each; all are sent, to all nodes, before the first answer is waited for, and
each shard's records are handed on as they come. Every call has a timeout.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from redis import Redis, exceptions
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.connection import AbstractConnection, ConnectionPool
from redis.retry import Retry

from tolhouse.errors import Corrupt, DeadlineExceeded, InvalidArgument, NotFound, Overloaded, Unauthenticated, Unavailable
from tolhouse.store import Alias, Store, by_shard, not_understood, shown
from tolhouse.table.spec import Buffer, Manifest, check_name, split, split_ref

_TABLES = "tolhouse:tables"
_WRITE_BYTES = 1 << 20  # per HSET
_WRITES_AHEAD = 4  # HSETs sent before the first is answered
_READ_BYTES = 1 << 18  # per recv
_SENT_BYTES = 1 << 19  # of answers that are asked for at a time


class RedisStore(Store):
    def __init__(self, url: str, timeout_seconds: float) -> None:
        self.url = shown(url)
        options: dict[str, Any] = {
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
            "socket_read_size": _READ_BYTES,
            "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
        }
        with self._mapped():
            try:
                client: Redis = Redis.from_url(url, **options)
                clustered = client.info("cluster").get("cluster_enabled") == 1
                self._redis: Any = RedisCluster.from_url(url, **options) if clustered else client
            except (ValueError, TypeError):  # a port that is no number, an option that redis-py doesn't have
                raise not_understood(url) from None

    def refs(self) -> list[str]:
        with self._mapped():
            return sorted(ref.decode() for ref in self._redis.smembers(_TABLES))

    def manifest(self, ref: str) -> Manifest:
        split_ref(ref)
        with self._mapped():
            text = self._redis.get(f"tolhouse:{{{ref}}}:manifest")
        if text is None:
            raise NotFound(f"table {ref} is not in {self.url}")
        try:
            manifest = Manifest.from_json(text)
        except InvalidArgument as error:
            raise Corrupt(f"{ref} in {self.url}: {error}") from None
        if manifest.ref != ref:
            raise Corrupt(f"{ref} in {self.url} describes table {manifest.ref}")
        return manifest

    def records(self, manifest: Manifest, ids: np.ndarray) -> Iterator[tuple[np.ndarray, list[Buffer]]]:
        shards = by_shard(manifest, ids)
        reads = [(_shard_key(manifest, shard), ids[places].tolist()) for shard, places in shards]
        with self._mapped():
            for (_, places), (_, tokens), records in zip(shards, reads, self._hmget(reads, manifest.record_bytes), strict=True):
                for token, record in zip(tokens, records, strict=True):
                    if record is None or len(record) != manifest.record_bytes:
                        size = "is missing" if record is None else f"has {len(record)} bytes, not {manifest.record_bytes},"
                        raise Corrupt(f"the row of token {token} of table {manifest.ref} {size} in {self.url}: load it again")
                manifest.verify(ids[places], records)
                yield places, records

    def _hmget(self, reads: list[tuple[str, list[int]]], record_bytes: int) -> Iterator[list[Any]]:
        """The answer to each HMGET as it comes; all are sent, to all nodes, before the first is read.

        They are sent in a few parts: Redis answers what it has read before it reads on, and so the first rows are on their
        way while it looks up the next. Where a connection fails or a slot has moved, redis-py's own pipeline does the rest.
        """
        answered = 0
        with suppress(exceptions.ConnectionError, exceptions.ResponseError, exceptions.RedisClusterException), ExitStack() as stack:
            lanes: dict[ConnectionPool, _Lane] = {}
            order = []
            for key, tokens in reads:
                pool = self._pool(key)
                lane = lanes.get(pool) or lanes.setdefault(pool, _Lane(stack.enter_context(_connection(pool))))
                lane.add(("HMGET", key, *tokens), len(tokens) * record_bytes)
                order.append(lane)
            for lane in lanes.values():
                lane.send()
            for lane in order:
                yield lane.connection.read_response()
                answered += 1
        if answered < len(reads):
            pipeline = self._redis.pipeline(transaction=False)
            for key, tokens in reads[answered:]:
                pipeline.hmget(key, tokens)
            yield from pipeline.execute()

    def _pool(self, key: str) -> ConnectionPool:
        if isinstance(self._redis, RedisCluster):
            return self._redis.get_redis_connection(self._redis.get_node_from_key(key)).connection_pool
        return self._redis.connection_pool

    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        key, ids = _shard_key(manifest, shard), manifest.shard_ids(shard).tolist()
        step = max(1, _WRITE_BYTES // manifest.record_bytes)
        views = list(split(np.ascontiguousarray(records)))
        with self._mapped():
            self._redis.unlink(key)
            for start in range(0, len(ids), step * _WRITES_AHEAD):
                pipeline = self._redis.pipeline(transaction=False)
                for at in range(start, min(start + step * _WRITES_AHEAD, len(ids)), step):
                    pipeline.hset(key, mapping=dict(zip(ids[at : at + step], views[at : at + step], strict=True)))
                pipeline.execute()

    def count(self, manifest: Manifest, shard: int) -> int:
        with self._mapped():
            return self._redis.hlen(_shard_key(manifest, shard))

    def commit(self, manifest: Manifest) -> None:
        with self._mapped():
            self._redis.set(f"tolhouse:{{{manifest.ref}}}:manifest", manifest.to_json())
            self._redis.sadd(_TABLES, manifest.ref)

    def delete(self, manifest: Manifest) -> None:
        with self._mapped():
            self._redis.srem(_TABLES, manifest.ref)
            self._redis.delete(f"tolhouse:{{{manifest.ref}}}:manifest")
            for shard in range(manifest.num_shards):
                self._redis.unlink(_shard_key(manifest, shard))

    def alias(self, name: str) -> Alias | None:
        with self._mapped():
            text = self._redis.get(f"tolhouse:{{{check_name(name)}}}:alias")
        try:
            return None if text is None else Alias.from_json(text)
        except Corrupt as error:
            raise Corrupt(f"the alias of {name!r} in {self.url} {error}") from None

    def set_alias(self, name: str, alias: Alias | None) -> None:
        key = f"tolhouse:{{{check_name(name)}}}:alias"
        with self._mapped():
            if alias is None:
                self._redis.delete(key)
            else:
                self._redis.set(key, alias.to_json())

    def close(self) -> None:
        self._redis.close()

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Redis' errors as ours."""
        try:
            yield
        except (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError) as error:
            raise Unauthenticated(f"Redis at {self.url} refuses the user or password: {error}") from None
        except exceptions.TimeoutError as error:
            raise DeadlineExceeded(f"Redis at {self.url} did not answer in time: {error}") from None
        except exceptions.OutOfMemoryError as error:
            raise Overloaded(f"Redis at {self.url} is full: {error}; raise its maxmemory") from None
        except (exceptions.ConnectionError, exceptions.RedisClusterException) as error:
            raise Unavailable(f"Redis at {self.url} can't be reached: {error}") from None
        except exceptions.RedisError as error:
            raise Unavailable(f"Redis at {self.url} refuses: {error}") from None


@dataclass
class _Lane:
    """Commands on their way to one node."""

    connection: AbstractConnection
    commands: list[tuple] = field(default_factory=list)
    answer_bytes: int = 0

    def add(self, command: tuple, answer_bytes: int) -> None:
        self.commands.append(command)
        self.answer_bytes += answer_bytes
        if self.answer_bytes >= _SENT_BYTES:
            self.send()

    def send(self) -> None:
        self.connection.send_packed_command(self.connection.pack_commands(self.commands), check_health=False)
        self.commands, self.answer_bytes = [], 0


@contextmanager
def _connection(pool: ConnectionPool) -> Iterator[AbstractConnection]:
    """A connection of the pool; it is closed when something goes wrong, for answers may be left on it."""
    connection = pool.get_connection()
    try:
        yield connection
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _shard_key(manifest: Manifest, shard: int) -> str:
    return f"tolhouse:{{{manifest.ref}:{shard}}}"
