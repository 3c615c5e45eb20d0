"""The Redis store, on one server or on a Redis Cluster.

    tolhouse:{registry}:manifest            hash: name@version -> manifest
    tolhouse:{registry}:deleting            hash: name@version -> ""
    tolhouse:{registry}:alias               hash: name -> alias
    tolhouse:{registry}:log                 list: a line for each change
    tolhouse:{registry}:changed             string: random, changes with each update
    tolhouse:{registry}:lease:name@version  string with expiry: the version is in use

redis_layouts.py has the keys of records. redis_reads.py reads them over the connections of
redis_connection.py. The layout of a table is the field `layout` of its manifest in the registry,
and only there: the same version may have another layout in another store.
"""

import secrets
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
from redis import exceptions as theirs
from redis.backoff import ExponentialBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from tolhouse import errors
from tolhouse.errors import CorruptError, InvalidArgumentError, NotFoundError, UnavailableError
from tolhouse.net.call import end_after
from tolhouse.store.base import (
    LEASE_SECONDS,
    Changes,
    Kind,
    Store,
    Views,
    not_understood,
    shown,
)
from tolhouse.store.redis_connection import connect, split_credentials, until
from tolhouse.store.redis_layouts import HASHES, LAYOUTS, Layout
from tolhouse.store.redis_permissions import guard
from tolhouse.store.redis_reads import FAILOVER_SECONDS, SENT_BYTES, Read, Reader
from tolhouse.table.manifest import Manifest, record_views, split_ref

_REGISTRY = "tolhouse:{registry}"  # one slot, because an update is a script over all its keys
_FORMAT_1_TABLES = "tolhouse:tables"  # listed, so that these tables can be refused and deleted
# Applies an update unless there was another update. Returns 1 on success, and also on a retry after
# a lost reply.
_UPDATE = """
local token = redis.call('GET', KEYS[1])
if token == ARGV[1] then return 1 end
if (token or '') ~= ARGV[2] then return 0 end
for i = 3, #ARGV, 4 do
  local key, field = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  if field == '' then redis.call('RPUSH', key, ARGV[i + 3])
  elseif ARGV[i + 2] == '1' then redis.call('HSET', key, field, ARGV[i + 3])
  else redis.call('HDEL', key, field) end
end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""
_UPDATE_TRIES = 50
_DELETED_KEYS = 1000  # the keys of a pipeline
_NO_ENTRY = theirs.AuthenticationError, theirs.AuthorizationError
_NO_CONNECTION = theirs.ConnectionError, theirs.RedisClusterException
_ERRORS: tuple[tuple[Any, type[errors.TolhouseError], str], ...] = (  # the first match is used
    (theirs.NoPermissionError, errors.UnauthenticatedError, "refuses what the user may not do: {}"),
    (_NO_ENTRY, errors.UnauthenticatedError, "refuses the user or password: {}"),
    (theirs.TimeoutError, errors.DeadlineExceededError, "did not answer in time: {}"),
    (theirs.OutOfMemoryError, errors.OverloadedError, "is full: {}; raise its maxmemory"),
    (_NO_CONNECTION, UnavailableError, "cannot be reached: {}"),
    (theirs.RedisError, UnavailableError, "refuses: {}"),
    (IndexError, UnavailableError, "is a Cluster that is not formed yet"),  # raised by redis-py
)


# Cached, because the validation of a long manifest is slow.
_portable = lru_cache(16)(lambda manifest: replace(manifest, layout=HASHES.in_manifest))


class RedisStore(Store):
    """A store in Redis. `timeout_seconds` limits each reply.

    The option `layout` of the URL, "hashes" or "keys", is the layout of new tables. By default it
    is "hashes", and for an overlay the layout of its parent.
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        super().__init__(shown(url))
        self._timeout, self._closed = timeout_seconds, threading.Event()
        url, self._new_layout = _split_layout(url)
        self._layouts = dict[str, Layout]()  # of complete tables, by ref
        url, credentials = split_credentials(url)
        options: dict[str, Any] = {
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
            "socket_read_size": 1 << 18,
            "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
            "credential_provider": credentials,
        }
        parts = urlsplit(url)
        user, at, hosts = parts.netloc.rpartition("@")
        places = [parts._replace(netloc=f"{user}{at}{host}") for host in hosts.split(",")]
        seconds = timeout_seconds * (1 + len(places))
        with self._mapped(), until(end_after(seconds), self._closed):
            try:
                self._redis, self._is_cluster = connect([*map(urlunsplit, places)], options)
            except FileNotFoundError as error:
                raise InvalidArgumentError(
                    f"cannot read a TLS file of the URL: {error.strerror}"
                ) from None
            except (ValueError, TypeError):  # redis-py does not accept a port or an option
                raise not_understood(url) from None
        self._reader = Reader(
            self._redis, is_cluster=self._is_cluster, timeout=timeout_seconds, closed=self._closed
        )
        self.health = self._reader.health

    def refs(self) -> list[str]:
        found = {*self._call("hkeys", f"{_REGISTRY}:manifest")}
        return sorted(ref.decode() for ref in found | self._call("smembers", _FORMAT_1_TABLES))

    def manifest(self, ref: str) -> Manifest:
        self._layouts.pop(ref, None)
        stored = super().manifest(ref)
        self._layouts[ref] = next(own for own in LAYOUTS if own.in_manifest == stored.layout)
        return stored if stored.layout == HASHES.in_manifest else _portable(stored)

    def manifest_text(self, manifest: Manifest) -> bytes:
        return replace(manifest, layout=self._layout(manifest).in_manifest).to_json().encode()

    def conflict(self, planned: Manifest) -> str:
        there = self._layouts.get(planned.ref)
        if there is None or self._new_layout in (None, there):
            return ""
        return f"in the layout {there.name}: use `?layout={there.name}` in the URL"

    def write_shard(self, manifest: Manifest, shard: int, records: np.ndarray) -> None:
        views = list(record_views(np.ascontiguousarray(records)))
        self._layouts.pop(manifest.ref, None)  # the table may have been deleted and built again
        layout = self._layout(manifest)
        with self._mapped():
            layout.write(self._redis, manifest, shard, views)

    def count(self, manifest: Manifest, shard: int) -> int:
        layout = self._layout(manifest)
        with self._mapped(), self._limited():
            return layout.count(self._redis, manifest, shard)

    def delete_records(self, ref: str) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        with self._mapped():
            keys = self._redis.scan_iter(match=f"tolhouse:{{{ref}[:}}]*", count=_DELETED_KEYS)
            for n, key in enumerate(keys, 1):
                pipeline.unlink(key)
                if n % _DELETED_KEYS == 0:
                    pipeline.execute()
            pipeline.execute()
            self._redis.srem(_FORMAT_1_TABLES, ref)

    def lease(self, ref: str) -> None:
        self._call("set", f"{_REGISTRY}:lease:{ref}", b"", px=int(LEASE_SECONDS * 1000))

    def leased(self, ref: str) -> bool:
        return bool(self._call("exists", f"{_REGISTRY}:lease:{ref}"))

    def update(self, change: Callable[[], Changes]) -> None:
        changed = f"{_REGISTRY}:changed"
        for _ in range(_UPDATE_TRIES):
            seen = self._call("get", changed) or b""
            texts: list[Any] = []
            try:
                changes, error = change(), None
            except errors.TolhouseError as refusal:
                changes, error = {}, refusal
            if not changes:  # this is valid only if there was no other update during the reads
                if (self._call("get", changed) or b"") != seen:
                    continue
                if error:
                    raise error
                return
            kinds = [*dict.fromkeys(kind for kind, _ in changes)]
            keys = [changed, *(f"{_REGISTRY}:{kind}" for kind in kinds)]
            named = ((kind, split_ref(ref)[0]) for kind, ref in changes if kind != "log")
            keys += dict.fromkeys(guard(*one) for one in named)
            for (kind, ref), text in changes.items():
                field = "" if kind == "log" else ref  # a line of the log has no field
                texts += [kinds.index(kind) + 2, field, int(text is not None), text or b""]
            words = [secrets.token_hex(8), seen, *texts]
            if self._call("eval", _UPDATE, len(keys), *keys, *words):
                return
        raise UnavailableError(
            f"other clients keep changing the registry in Redis at {self.url}: try again"
        )

    def user(self) -> str:
        with suppress(errors.TolhouseError):  # the user may lack the permission
            if (user := str(self._call("acl_whoami"))) != "default":
                return user
        return ""

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

    def _read_log(self) -> list[bytes]:
        return self._call("lrange", f"{_REGISTRY}:log", 0, -1)

    def _call(self, command: str, *arguments: Any, **options: Any) -> Any:
        with self._mapped(), self._limited():
            return getattr(self._redis, command)(*arguments, **options)

    def _limited(self) -> AbstractContextManager[None]:
        """Limit the time of the block, which executes one command."""
        seconds = self._timeout + (FAILOVER_SECONDS if self._is_cluster else 0)
        return until(end_after(seconds), self._closed)

    def _layout(self, manifest: Manifest) -> Layout:
        """Return the layout of a table: that of its manifest here, or that of a new table."""
        for ref in filter(None, (manifest.ref, manifest.parent)):
            if ref not in self._layouts:
                with suppress(NotFoundError, CorruptError):
                    self.manifest(ref)
            if found := self._layouts.get(ref):
                return found
            if self._new_layout:
                return self._new_layout
        return HASHES

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
        # The manifest may be unknown here, and its server down. Lost rows cause another look.
        layout = self._layouts.get(manifest.ref) or self._new_layout or HASHES
        return self._fill_from(layout, manifest, ids, views)

    def _fill_from(
        self, layout: Layout, manifest: Manifest, ids: np.ndarray, views: Views
    ) -> Generator[memoryview | str]:
        size, shards = manifest.record_bytes, manifest.shard_of(ids)
        reads, step, done, checked = list[Read](), max(1, SENT_BYTES // size), 0, False
        for start, end in pairwise([0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(ids)]):
            for at in range(start, end, step):
                tokens = ids[at : min(at + step, end)].tolist()
                words = layout.read(manifest, int(shards[start]), tokens)
                reads.append(Read(words, tokens, views[at : at + len(tokens)]))
        with self._mapped():
            for read, records in zip(reads, self._reader.records(reads, size), strict=True):
                if records is read.views:
                    yield from records
                    done += len(records)
                    continue
                if None in records and not checked:
                    self._layouts.pop(manifest.ref, None)
                    if (now := self._layout(manifest)) is not layout:
                        yield from self._fill_from(now, manifest, ids[done:], views[done:])
                        return
                    checked = True
                for token, view, record in zip(read.tokens, read.views, records, strict=True):
                    if record is None or len(record) != size:
                        row = f"the row of token {token} of table {manifest.ref}"
                        what = f"has {len(record)} bytes" if record else "is missing"
                        yield f"{row} {what} in {self.url}: load it again"
                    else:
                        view[:] = record
                        yield view
                done += len(records)

    def _reopen(self, manifest: Manifest, ids: np.ndarray) -> None:
        pass  # there is no state of a shard


def _split_layout(url: str) -> tuple[str, Layout | None]:
    """Split a URL into the URL without `layout`, and the layout."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if (name := options.pop("layout", None)) is None:
        return url, None
    for layout in LAYOUTS:
        if layout.name == name:
            return urlunsplit(parts._replace(query=urlencode(options))), layout
    allowed = " or ".join(layout.name for layout in LAYOUTS)
    raise InvalidArgumentError(f"store {shown(url)!r} has the layout {name!r:.40}, not {allowed}")
