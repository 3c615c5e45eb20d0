"""The two layouts of a table in Redis: a hash per shard, or a key per record.

    hashes  tolhouse:{name@version:shards-64:k}   hash: token id -> record
    keys    tolhouse:{name@version:k}:ID          string: the record of token ID

In both, shard k is in one slot of a Cluster. A shard is written under names that expire, so that
nothing of a killed build remains, and then renamed.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

from redis import exceptions as theirs

from tolhouse.store.base import Views
from tolhouse.table.manifest import Manifest

_ABANDONED_SECONDS = 3600  # the expiry of incomplete shards of killed builds
_WRITE_BYTES = 1 << 20  # the bytes of an HSET
_PARTIAL = "partial"  # a field of incomplete hashes
_WRITES_AHEAD = 4  # the bytes of a pipeline are this times _WRITE_BYTES
_KEYS = 1000  # the keys of a command
# Takes pairs of keys, and makes the record of the first key the permanent record of the second.
_RENAME = """
for i = 1, #KEYS, 2 do
  redis.call('PERSIST', KEYS[i])
  redis.call('RENAME', KEYS[i], KEYS[i + 1])
end
"""


class Layout(ABC):
    """How records are stored. `redis` is a client of redis-py, for one server or for a Cluster."""

    name: str  # in the option `layout` of a URL
    in_manifest: Literal["shards", "keys"]  # in the field `layout` of a manifest

    @abstractmethod
    def read(self, manifest: Manifest, shard: int, tokens: list[int]) -> list[str | int]:
        """Return the words of the command that reads records of a shard."""

    @abstractmethod
    def write(self, redis: Any, manifest: Manifest, shard: int, views: Views) -> None:
        """Store the records of a whole shard."""

    @abstractmethod
    def count(self, redis: Any, manifest: Manifest, shard: int) -> int:
        """Return the number of records of a shard that Redis holds."""


class _Hashes(Layout):
    name = "hashes"
    in_manifest = "shards"

    def read(self, manifest: Manifest, shard: int, tokens: list[int]) -> list[str | int]:
        return ["HMGET", self._key(manifest, shard), *tokens]

    def write(self, redis: Any, manifest: Manifest, shard: int, views: Views) -> None:
        key, ids = self._key(manifest, shard), manifest.shard_ids(shard).tolist()
        partial = f"{key}:{secrets.token_hex(8)}"
        step = max(1, _WRITE_BYTES // manifest.record_bytes)
        # The key expires from the beginning, also if the process ends between two commands.
        pipeline = redis.pipeline(transaction=False)
        pipeline.hset(partial, _PARTIAL, b"").expire(partial, _ABANDONED_SECONDS).execute()
        for start in range(0, len(ids), step * _WRITES_AHEAD):
            pipeline = redis.pipeline(transaction=False)
            for at in range(start, min(start + step * _WRITES_AHEAD, len(ids)), step):
                part = zip(ids[at : at + step], views[at : at + step], strict=True)
                pipeline.hset(partial, mapping=dict(part))
            pipeline.expire(partial, _ABANDONED_SECONDS)
            pipeline.execute()
        redis.hdel(partial, _PARTIAL)
        redis.persist(partial)
        redis.rename(partial, key)

    def count(self, redis: Any, manifest: Manifest, shard: int) -> int:
        return redis.hlen(self._key(manifest, shard))

    def _key(self, manifest: Manifest, shard: int) -> str:
        return f"tolhouse:{{{manifest.ref}:shards-{manifest.num_shards}:{shard}}}"


class _Keys(Layout):
    name = "keys"
    in_manifest = "keys"

    def read(self, manifest: Manifest, shard: int, tokens: list[int]) -> list[str | int]:
        return ["MGET", *self._keys(manifest, shard, tokens)]

    def write(self, redis: Any, manifest: Manifest, shard: int, views: Views) -> None:
        keys = self._keys(manifest, shard, manifest.shard_ids(shard).tolist())
        suffix = secrets.token_hex(8)
        partial = [f"{key}:{suffix}" for key in keys]
        step = max(1, _WRITE_BYTES * _WRITES_AHEAD // manifest.record_bytes)
        for part in _batches(list(zip(partial, views, strict=True)), step):
            pipeline = redis.pipeline(transaction=False)
            for key, view in part:
                pipeline.set(key, view, ex=_ABANDONED_SECONDS)
            pipeline.execute()
        for pairs in _batches(list(zip(partial, keys, strict=True)), _KEYS // 2):
            names = [name for pair in pairs for name in pair]
            redis.eval(_RENAME, len(names), *names)

    def count(self, redis: Any, manifest: Manifest, shard: int) -> int:
        found = 0
        keys = self._keys(manifest, shard, manifest.shard_ids(shard).tolist())
        for part in _batches(keys, _KEYS):
            try:
                found += redis.execute_command("EXISTS", *part)
            except (theirs.TryAgainError, theirs.ClusterError):  # the slot is being moved
                pipeline = redis.pipeline(transaction=False)
                for key in part:
                    pipeline.execute_command("EXISTS", key)
                found += sum(pipeline.execute())
        return found

    def _keys(self, manifest: Manifest, shard: int, tokens: list[int]) -> list[str]:
        start = f"tolhouse:{{{manifest.ref}:{shard}}}:"
        return [f"{start}{token}" for token in tokens]


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[at : at + size] for at in range(0, len(items), size))


HASHES, KEYS = _Hashes(), _Keys()
LAYOUTS: tuple[Layout, ...] = (HASHES, KEYS)
