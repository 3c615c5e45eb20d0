"""The Redis store: a copy of a table that can be loaded again. Standalone and Cluster run through the same lines.

    tolhouse:{name@version:shards-64:k}  hash: token id -> record; one shard, so one slot of a Cluster
    tolhouse:{name@version}:manifest     string, written last
    tolhouse:{name@version}:lease        string that expires: the version is in use
    tolhouse:{name}:alias                string
    tolhouse:tables                      set of name@version

Reads are grouped by shard into one HMGET each; all are sent, to all nodes, before the first answer is waited for, and
each shard's records are handed on as they come. Every call has a timeout. While a node of a Cluster is away, reads go to
its replica, as they do while it lags (nodes.py).

A URL may name files, which new connections read as they are then: `password_file`, and with rediss:// `ssl_ca_certs`,
`ssl_certfile` and `ssl_keyfile`, as redis-py calls them.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import hiredis
import numpy as np
from redis import Redis, exceptions
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.connection import AbstractConnection, ConnectionPool
from redis.credentials import CredentialProvider
from redis.retry import Retry

from tolhouse.errors import (
    Corrupt,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from tolhouse.files import ReloadingFiles, read_file
from tolhouse.logs import event
from tolhouse.net.health import SUSPECT_SECONDS
from tolhouse.store import LEASE_SECONDS, Alias, Store, by_shard, not_understood, shown
from tolhouse.store.nodes import Nodes
from tolhouse.table.manifest import Manifest, check_name, split_ref
from tolhouse.table.records import Buffer, record_views

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
_LOST = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
)  # a node that can't be reached, or hangs


class RedisStore(Store):
    def __init__(self, url: str, timeout_seconds: float) -> None:
        self.url, self._parents = shown(url), {}
        url, credentials = _credentials(url)
        options: dict[str, Any] = {
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
            "socket_read_size": _READ_BYTES,
            "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
            "credential_provider": credentials,
        }
        self._nodes: Nodes | None = None
        with self._mapped():
            try:
                one, client, clustered = _first_to_answer(url, options)
                self._redis: Any = client
                if clustered:
                    client.close()
                    self._redis = RedisCluster.from_url(one, require_full_coverage=False, **options)
                    self._nodes = Nodes(self._redis)
            except FileNotFoundError as error:
                raise InvalidArgument(
                    f"a TLS file that the store's URL names can't be read: {error.strerror}"
                ) from None
            except (
                ValueError,
                TypeError,
            ):  # a port that is no number, an option that redis-py doesn't have
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
        except (InvalidArgument, Corrupt) as error:
            raise Corrupt(f"{ref} in {self.url}: {error}") from None
        if manifest.ref != ref:
            raise Corrupt(f"{ref} in {self.url} describes table {manifest.ref}")
        return manifest

    def own_records(
        self, manifest: Manifest, ids: np.ndarray
    ) -> Iterator[tuple[np.ndarray, list[Buffer]]]:
        shards = by_shard(manifest, ids)
        reads = [(_shard_key(manifest, shard), ids[places].tolist()) for shard, places in shards]
        with self._mapped():
            for (_, places), (_, tokens), records in zip(
                shards, reads, self._hmget(reads, manifest.record_bytes), strict=True
            ):
                for token, record in zip(tokens, records, strict=True):
                    if record is None or len(record) != manifest.record_bytes:
                        size = (
                            "is missing"
                            if record is None
                            else f"has {len(record)} bytes, not {manifest.record_bytes},"
                        )
                        raise Corrupt(
                            f"the row of token {token} of table {manifest.ref} {size} in {self.url}: load it again"
                        )
                manifest.verify(ids[places], records)
                yield places, records

    def _hmget(self, reads: list[tuple[str, list[int]]], record_bytes: int) -> Iterator[list[Any]]:
        """The answer to each HMGET as it comes; all are sent, to all nodes, before the first is read.

        They are sent in a few parts: Redis answers what it has read before it reads on, and so the first rows are on their
        way while it looks up the next. Where a node of a Cluster fails, its replica is asked for what is left: records never
        change, so that its copy is as good. Where a slot has moved, redis-py's own pipeline does the rest.
        """
        answered, deadline = 0, time.monotonic() + _FAILOVER_SECONDS
        ask = self._sent
        while answered < len(reads):
            try:
                for answer in ask(reads[answered:], record_bytes):
                    yield answer
                    answered += 1
            except (*_LOST, *_NOT_NOW) as error:
                if (
                    not self._nodes
                    and ask == self._sent
                    and not isinstance(error, exceptions.TimeoutError)
                ):
                    ask = self._piped  # it tries again
                    continue
                if not self._nodes or time.monotonic() > deadline:
                    raise
                event("a Redis node failed", logging.WARNING, url=self.url, reason=str(error))
                if isinstance(error, _NOT_NOW) or not self._nodes.spare(reads[answered][0]):
                    time.sleep(_PAUSE_SECONDS)  # until a replica has taken over
                ask = self._sent
            except exceptions.ResponseError:
                if ask == self._piped:
                    raise
                ask = self._piped

    def _piped(self, reads: list[tuple[str, list[int]]], record_bytes: int) -> Iterator[list[Any]]:
        """The same by redis-py, which follows slots to where they moved."""
        pipeline = self._redis.pipeline(transaction=False)
        for key, tokens in reads:
            pipeline.hmget(key, tokens)
        yield from pipeline.execute()

    def _sent(self, reads: list[tuple[str, list[int]]], record_bytes: int) -> Iterator[list[Any]]:
        """The same, each from the node that is asked first for it; the node that fails is asked last from then on."""
        with ExitStack() as stack:
            lanes: dict[str, _Lane] = {}
            order = []
            for key, tokens in reads:
                name, pool, is_replica = (
                    self._nodes.of(key) if self._nodes else ("", self._redis.connection_pool, False)
                )
                lane = lanes.get(name)
                if lane is None:
                    with self._blamed(name):
                        lane = lanes[name] = _Lane(
                            name, stack.enter_context(_connection(pool)), is_replica
                        )
                with self._blamed(name):
                    lane.add(("HMGET", key, *tokens), len(tokens) * record_bytes)
                order.append(lane)
            for lane in lanes.values():
                with self._blamed(lane.name):
                    lane.send()
            for lane in order:
                waits_since = time.monotonic()
                with self._blamed(lane.name):
                    answer = lane.answer()
                if self._nodes and time.monotonic() - waits_since > SUSPECT_SECONDS:
                    self._nodes.suspect(lane.name)
                yield answer

    @contextmanager
    def _blamed(self, name: str) -> Iterator[None]:
        try:
            yield
        except _LOST:
            if self._nodes:
                self._nodes.failed(name)
            raise

    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        key, ids = _shard_key(manifest, shard), manifest.shard_ids(shard).tolist()
        step = max(1, _WRITE_BYTES // manifest.record_bytes)
        views = list(record_views(np.ascontiguousarray(records)))
        with self._mapped():
            self._redis.unlink(key)
            for start in range(0, len(ids), step * _WRITES_AHEAD):
                pipeline = self._redis.pipeline(transaction=False)
                for at in range(start, min(start + step * _WRITES_AHEAD, len(ids)), step):
                    pipeline.hset(
                        key,
                        mapping=dict(zip(ids[at : at + step], views[at : at + step], strict=True)),
                    )
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
            self._redis.delete(
                f"tolhouse:{{{manifest.ref}}}:manifest", f"tolhouse:{{{manifest.ref}}}:lease"
            )
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

    def lease(self, manifest: Manifest) -> None:
        with self._mapped():
            self._redis.set(f"tolhouse:{{{manifest.ref}}}:lease", b"", px=int(LEASE_SECONDS * 1000))

    def leased(self, manifest: Manifest) -> bool:
        with self._mapped():
            return bool(self._redis.exists(f"tolhouse:{{{manifest.ref}}}:lease"))

    def close(self) -> None:
        if self._nodes:
            self._nodes.close()
        self._redis.close()

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        """Redis' errors as ours."""
        try:
            yield
        except (
            exceptions.AuthenticationError,
            exceptions.AuthorizationError,
            exceptions.NoPermissionError,
        ) as error:
            raise Unauthenticated(
                f"Redis at {self.url} refuses the user or password: {error}"
            ) from None
        except exceptions.TimeoutError as error:
            raise DeadlineExceeded(f"Redis at {self.url} did not answer in time: {error}") from None
        except exceptions.OutOfMemoryError as error:
            raise Overloaded(f"Redis at {self.url} is full: {error}; raise its maxmemory") from None
        except IndexError:  # redis-py's, of a Cluster whose nodes don't know each other yet
            raise Unavailable(f"Redis at {self.url} is a Cluster that is not formed yet") from None
        except (exceptions.ConnectionError, exceptions.RedisClusterException) as error:
            raise Unavailable(f"Redis at {self.url} can't be reached: {error}") from None
        except exceptions.RedisError as error:
            raise Unavailable(f"Redis at {self.url} refuses: {error}") from None


def _first_to_answer(url: str, options: dict[str, Any]) -> tuple[str, Redis, bool]:
    """Of several hosts with commas between: the URL of the first that answers, a client of it, and whether it is a Cluster's node."""
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
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(options))
        return urlunsplit(bare), _PasswordFile(
            unquote(parts.username or options.pop("username", "")), path
        )
    except (ValueError, UnicodeDecodeError):
        raise not_understood(url) from None


@dataclass
class _Lane:
    """Commands on their way to one node, and its answers in order."""

    name: str
    connection: AbstractConnection
    is_replica: bool
    commands: list[tuple] = field(default_factory=list)
    answer_bytes: int = 0

    def __post_init__(self) -> None:
        if self.is_replica:  # else it sends us to its master
            self.commands.append(("READONLY",))

    def add(self, command: tuple, answer_bytes: int) -> None:
        self.commands.append(command)
        self.answer_bytes += answer_bytes
        if self.answer_bytes >= _SENT_BYTES:
            self.send()

    def send(self) -> None:
        # redis-py's own way makes a tuple from a generator, which CPython puts on a list of free ones that nothing else takes from
        self.connection.send_packed_command(
            [b"".join(map(hiredis.pack_command, self.commands))], check_health=False
        )
        self.commands, self.answer_bytes = [], 0

    def answer(self) -> Any:
        if self.is_replica:
            self.connection.read_response()
            self.is_replica = False
        return self.connection.read_response()


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
    return f"tolhouse:{{{manifest.ref}:{manifest.layout}-{manifest.num_shards}:{shard}}}"
