"""Faults of a single Redis server: slow answers, one corrupt record, and eviction."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from redis import Redis
from tolhouse import Client
from tolhouse.testing import redis_server

from tests.chaos.faults import Group, anything, lasting
from tests.chaos.files import RARE_TOKENS
from tests.chaos.proxy import Link
from tests.chaos.system import SHARDS, System, asking, build_versions, completion, wait_until

DRIP_SECONDS = 0.3
OTHER_BYTES = 100_000  # size of each value that the other client writes
# store reads per request with a bad row: two workers read two replicas twice each, plus a margin
MOST_READS = 12.0


@contextmanager
def over_one_redis() -> Iterator[Group]:
    """The system over one Redis server, with hot rows in the lookup services."""
    with ExitStack() as stack:
        url = stack.enter_context(redis_server())
        link = stack.enter_context(Link(url.removeprefix("redis://")))
        refs = build_versions(url)
        system = System(stack, f"redis://{link.address}", "chaos", hot_megabytes=64)
        errors = {"may_fail": anything, "flips": False}
        drip, full = partial(dripping, system, link, refs[0]), partial(evicted, system, url)
        corrupt = partial(one_corrupt, system, url, refs)
        faults = [
            lasting("dripping Redis", drip, recovers_within=11.0, **errors),
            lasting("one corrupt record", corrupt, flips=False),
            lasting("eviction by another client", full, recovers_within=30.0, **errors),
        ]
        yield Group(system, refs, faults)


@contextmanager
def dripping(system: System, link: Link, ref: str, found: list[str]) -> Iterator[None]:
    """Redis answers one byte at a time. A lookup service serves hot rows as fast as before."""
    with Client(system.lookups[0].address) as client:
        client.fetch(ref, RARE_TOKENS[:50])
        with asking(lambda: client.fetch(ref, RARE_TOKENS[:50]), found) as seen:
            link.drip(DRIP_SECONDS)
            yield
            found += [f"hot rows can't be fetched: {error}" for error, _ in seen if error]
            link.mend()


@contextmanager
def one_corrupt(system: System, url: str, refs: list[str], found: list[str]) -> Iterator[None]:
    """A client repeatedly requests one corrupt record together with valid ones.

    Other clients must not be affected. The lookup service reads valid records from the store once
    and then serves them from memory.
    """
    token = RARE_TOKENS[-1]
    keys = [f"tolhouse:{{{ref}:shards-{SHARDS}:{token % SHARDS}}}" for ref in refs]
    with Redis.from_url(url) as redis:

        def reads() -> int:
            return redis.info("commandstats")["cmdstat_hmget"]["calls"]

        kept = [redis.hget(key, token) for key in keys]
        for key, record in zip(keys, kept, strict=True):
            redis.hset(key, token, bytes([record[0] ^ 1]) + record[1:])
        with asking(lambda: completion(system.gateway.address, *RARE_TOKENS[50:]), found) as seen:
            wait_until(lambda: len(seen) > 1)
            before, asked = reads(), len(seen)
            yield
            now = (reads() - before) / max(1, len(seen) - asked)
            if now > MOST_READS:
                found.append(f"{now:.1f} store reads per request with one bad row")
            if asked == len(seen) or "" in dict(seen):
                found.append(f"the corrupt row was served or not requested: {seen[-1:]}")
            for key, record in zip(keys, kept, strict=True):
                redis.hset(key, token, record)


@contextmanager
def evicted(system: System, url: str, _: list[str]) -> Iterator[None]:
    """Another client fills a Redis that may evict keys, and the lookup services restart."""
    with Redis.from_url(url) as redis:
        redis.config_set("maxmemory-policy", "allkeys-lru")
        redis.config_set("maxmemory", redis.info("memory")["used_memory"])
        others = (f"other:{n}" for n in itertools.count())
        while len(list(redis.scan_iter("tolhouse:{chaos@*", count=1000))) > SHARDS:
            redis.set(next(others), bytes(OTHER_BYTES))
        for lookup in system.lookups:
            lookup.restart()
        yield
        redis.config_set("maxmemory", 0)
        redis.delete(*redis.scan_iter("other:*", count=1000))
        build_versions(url)
