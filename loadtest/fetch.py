"""Compare row sources with plain Redis, a bare socket loop and minimal gRPC servers.

    python -m loadtest.fetch [--quick]

The benchmark starts its own servers, and runs them and itself in separate namespaces, so that rows
travel through a network (see loadtest/isolation.py). Contenders run in turn on the same ids. The
output is a table of medians and a final line of JSON with the medians of the ratios of each turn.
A bare loop over a Unix socket, which works on one machine only, is a contender beside the others.
Higher is better, except for single_vs_echo, batch256_vs_bare, missed_vs_raw_tcp and growth_*.
Compare ratios only: absolute times vary between runs.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
from redis import Redis
from redis.connection import DefaultParser
from tolhouse import Client, Manifest
from tolhouse.certs import ensure_authority, issue
from tolhouse.engine.row_providers import CachedRows
from tolhouse.net.auth import ClientCredentials
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import Host, redis_cluster, redis_server
from tqdm import tqdm

from loadtest.bare import Bare, Naive, Socket, server
from loadtest.isolation import server_side
from loadtest.tables import TRUSTED, load, load_plain, manifest_of, service
from loadtest.text import clairvoyant, trace

Work = Callable[[np.ndarray], object]
CLIENTS = 4  # concurrent client processes
_PAUSE = 0.002  # seconds for the previous contender's threads to become idle


class Measured(dict[str, np.ndarray]):
    """Seconds of each contender's turns."""

    def ratio(self, one: str, other: str) -> float:
        """The median of the ratios of two contenders' seconds in each turn."""
        return float(np.median(self[one] / self[other]))


def measure(contenders: dict[str, Work], batches: list[np.ndarray], title: str) -> Measured:
    """Measure all contenders on each batch, and print their medians. Each turn starts with another
    contender."""
    found = Measured({name: np.empty(len(batches)) for name in contenders})
    names = list(contenders)
    for turn, batch in enumerate(tqdm(batches, desc=title, leave=False, disable=None)):
        for name in names:
            time.sleep(_PAUSE)
            started = time.perf_counter()
            contenders[name](batch)
            found[name][turn] = time.perf_counter() - started
        names = [*names[1:], names[0]]
    print(title)
    for name, seconds in found.items():
        print(f"  {name:34} {np.median(seconds) * 1e3:8.3f} ms")
    return found


def in_turn(vocabulary: int, size: int, count: int) -> list[np.ndarray]:
    """`count` batches of `size` ids that cycle through the vocabulary, so that a row recurs as late
    as possible."""
    order = np.random.default_rng(0).permutation(vocabulary).astype(np.uint32)
    return [np.take(order, range(n * size, (n + 1) * size), mode="wrap") for n in range(count)]


def large_rows(pairs: int, host: Host) -> dict[str, float]:
    """Fetch 32 rows of 96 KiB from each kind of source, and compare with `MGET`, a bare socket loop
    and a naive gRPC server.

    One lookup service holds all rows in memory, another does so with TLS. The third reads them from
    Redis without a useful cache.
    """
    manifest = manifest_of("large", 2048, 96)
    with ExitStack() as stack:
        enter = stack.enter_context
        url = enter(redis_server(host=host))
        files = f"file://{enter(tempfile.TemporaryDirectory(prefix='tolhouse-fetch-'))}"
        redis = enter(closing(Redis.from_url(url)))
        for store in (url, files):
            with closing(open_store(store)) as opened:
                load(opened, manifest)
        ids = np.arange(manifest.vocab_size, dtype=np.uint32)
        keys = load_plain(redis, manifest, ids)
        tls = Path(enter(tempfile.TemporaryDirectory(prefix="tolhouse-tls-", dir=host.folder)))
        authority = ensure_authority(tls)
        certificate, key = map(str, issue(tls, "service", [host.address]))
        options = "--tls-cert", certificate, "--tls-key", key
        # `cold` cycles through more rows than fit in its hot rows, so that every read misses
        hot, cold, secure = (
            enter(Client(enter(service(url, size, *more, host=host)).address, credentials=trusted))
            for size, more, trusted in (
                (250, (), TRUSTED),
                (32, (), TRUSTED),
                (250, options, ClientCredentials(tls_ca=str(authority))),
            )
        )
        direct_redis, direct_file = (enter(Client(s, credentials=TRUSTED)) for s in (url, files))
        for part in np.split(ids, 32):
            for client in (hot, secure, direct_file):
                client.fetch(manifest, part)
        found = measure(
            {
                "Redis MGET": lambda batch: redis.mget([keys[i] for i in batch.tolist()]),
                "bare socket loop": enter(closing(Socket(enter(server("tcp", host))))).rows,
                "bare loop, Unix socket": enter(closing(Socket(enter(server("unix", host))))).rows,
                "naive gRPC answer": Naive(enter(server("naive", host))).rows,
                "service, hot": lambda batch: hot.fetch(manifest, batch),
                "service, hot, TLS": lambda batch: secure.fetch(manifest, batch),
                "service, from Redis": lambda batch: cold.fetch(manifest, batch),
                "redis:// directly": lambda batch: direct_redis.fetch(manifest, batch),
                "file:// directly": lambda batch: direct_file.fetch(manifest, batch),
            },
            in_turn(len(ids), 32, pairs),
            "32 ids of 96 KiB",
        )
    return {
        "hot_vs_redis": found.ratio("Redis MGET", "service, hot"),
        "hot_vs_raw_tcp": found.ratio("bare socket loop", "service, hot"),
        "unix_vs_raw_tcp": found.ratio("bare socket loop", "bare loop, Unix socket"),
        "hot_vs_unary": found.ratio("naive gRPC answer", "service, hot"),
        "cold_vs_redis": found.ratio("Redis MGET", "service, from Redis"),
        "tls_vs_plain": found.ratio("service, hot", "service, hot, TLS"),
        "direct_redis_vs_mget": found.ratio("Redis MGET", "redis:// directly"),
        "direct_file_vs_redis": found.ratio("Redis MGET", "file:// directly"),
    }


def small_rows(pairs: int, host: Host) -> dict[str, float]:
    """Compare fetching one hot row of 4 KiB with an echo on an open stream, 256 of them with a
    unary answer of the same size, and one row of 48 KiB with a bare socket loop."""
    small, middle = manifest_of("small", 4096, 4), manifest_of("middle", 1024, 48)
    payload, slab = bytes(4096), np.empty((1, middle.record_bytes), np.uint8)
    with ExitStack() as stack:
        enter = stack.enter_context
        url = enter(redis_server(host=host))
        store = enter(closing(open_store(url)))
        lookup = enter(service(url, 64, host=host))
        client = enter(Client(lookup.address, credentials=TRUSTED))
        for manifest in (small, middle):
            load(store, manifest)
            client.fetch(manifest, range(manifest.vocab_size))
        bare = Bare(enter(server("bare", host)))
        tcp = enter(closing(Socket(enter(server("tcp", host)))))
        one = measure(
            {
                "bare echo on an open stream": lambda _: bare.echo(payload),
                "service": lambda batch: client.fetch(small, batch),
            },
            in_turn(small.vocab_size, 1, 10 * pairs),
            "1 id of 4 KiB",
        )
        many = measure(
            {
                "bare unary answer": lambda batch: bare.bytes(b"%d" % (len(batch) * 4096)),
                "service": lambda batch: client.fetch(small, batch),
            },
            in_turn(small.vocab_size, 256, 2 * pairs),
            "256 ids of 4 KiB",
        )
        missed = measure(
            {
                "bare socket loop": lambda batch: tcp.rows(batch, middle.record_bytes),
                "service": lambda batch: client.rows.fetch_records(middle, batch, slab),
            },
            in_turn(middle.vocab_size, 1, 5 * pairs),
            "1 id of 48 KiB, into a worker's memory",
        )
    return {
        "single_vs_echo": one.ratio("service", "bare echo on an open stream"),
        "batch256_vs_bare": many.ratio("service", "bare unary answer"),
        "missed_vs_raw_tcp": missed.ratio("service", "bare socket loop"),
    }


def real_text(row_kib: int, host: Host) -> dict[str, float]:
    """Compare a worker that reads real text through a row cache with `MGET` of the same ids.

    The row cache holds a tenth of the table, and the service a third. One pass reads 512 ids at a
    time, as in steps with a prompt; the other reads 32, as in steps that decode 32 sequences.
    """
    source, ids, frequent = trace(32_768)
    manifest = manifest_of("text", 32_768, row_kib, frequent=frequent)
    slots, found = manifest.vocab_size // 10, {}
    with (
        redis_server(host=host) as url,
        closing(Redis.from_url(url)) as redis,
        closing(open_store(url)) as store,
    ):
        load(store, manifest)
        publish(store, manifest.ref)
        keys = load_plain(redis, manifest, np.unique(ids))
        print(
            f"{source}: {len(ids)} tokens, 32k BPE, rows of {row_kib} KiB, "
            f"worker cache of {slots} rows"
        )
        for name, size, read in (
            ("effective_vs_redis", 512, ids),
            ("effective_decoding_vs_redis", 32, ids[: len(ids) // 4]),
        ):
            with (
                service(url, manifest.table_bytes / 3e6, filled=True, host=host) as lookup,
                Client(lookup.address, credentials=TRUSTED) as client,
            ):
                rows = CachedRows(
                    client.rows, manifest, slots * manifest.record_bytes, torch.device("cpu")
                )
                rows.fill()
                filled, ours, theirs = rows.counts()["from_remote"], 0.0, 0.0
                for part in tqdm(
                    np.array_split(read, len(read) // size),
                    desc=f"{size} at a time",
                    leave=False,
                    disable=None,
                ):
                    first = time.perf_counter()
                    redis.mget([keys[i] for i in part.tolist()])
                    then = time.perf_counter()
                    rows.stage(np.unique(part))
                    ours, theirs = ours + time.perf_counter() - then, theirs + then - first
            found[name] = theirs / ours
            if read is ids:
                hit_rate = 1 - (rows.counts()["from_remote"] - filled) / len(ids)
            print(
                f"  {size:3} at a time: worker {len(read) / ours:9.0f} rows/s   "
                f"Redis MGET {len(read) / theirs:9.0f} rows/s"
            )
    asked = ids.tolist()
    best, cold_best = clairvoyant(asked, slots, frequent), clairvoyant(asked, slots, ())
    print(
        f"  hit rate {hit_rate:.4f}; optimal (Belady) {best:.4f} from the same start, "
        f"{cold_best:.4f} from an empty cache"
    )
    return {
        "hit_rate": hit_rate,
        "hit_vs_belady": hit_rate / best,
        "hit_vs_belady_empty": hit_rate / cold_best,
        **found,
    }


def growth(pairs: int, host: Host) -> dict[str, float]:
    """Ratios of the time to fetch rows from Redis, uncached, for a larger vocabulary and for more
    Cluster nodes."""
    small, large = manifest_of("v16k", 16_384, 4), manifest_of("v128k", 131_072, 4)
    with ExitStack() as stack:
        enter = stack.enter_context

        def fetch(url: str, manifest: Manifest) -> Work:
            with closing(open_store(url)) as store:
                load(store, manifest)
            address = enter(service(url, 2, host=host)).address
            client = enter(Client(address, credentials=TRUSTED))
            rounds = iter(in_turn(manifest.vocab_size, 32, pairs))
            return lambda _: client.fetch(manifest, next(rounds))

        url = enter(redis_server(host=host))
        (one,), (six, *_) = (enter(redis_cluster(nodes, host=host)) for nodes in (1, 6))
        turns = [np.empty(0)] * pairs
        vocabulary = {"16k tokens": fetch(url, small), "128k tokens": fetch(url, large)}
        tokens = measure(vocabulary, turns, "32 ids of 4 KiB, by vocabulary")
        cluster = {"1 node": fetch(one.url, small), "6 nodes": fetch(six.url, small)}
        nodes = measure(cluster, turns, "32 ids of 4 KiB, by Cluster nodes")
    return {
        "growth_vocab": tokens.ratio("128k tokens", "16k tokens"),
        "growth_nodes": nodes.ratio("6 nodes", "1 node"),
    }


def clients(seconds: float, host: Host) -> dict[str, float]:
    """Rows per second of four client processes and two replicas of a lookup service, relative to
    one client and one replica."""
    manifest, rates = manifest_of("clients", 4096, 4), []
    spawn = multiprocessing.get_context("spawn")
    with (
        redis_server(host=host) as url,
        closing(open_store(url)) as store,
        service(url, 64, host=host) as first,
        service(url, 64, host=host) as second,
        ProcessPoolExecutor(CLIENTS, mp_context=spawn) as pool,
    ):
        load(store, manifest)
        print("256 ids of 4 KiB, hot")
        for count, replicas in ((1, first.address), (CLIENTS, f"{first.address},{second.address}")):
            each = [(replicas, manifest.to_json(), seconds)] * count
            rates.append(sum(pool.map(_rate, *zip(*each, strict=True))))
            print(f"  {count} clients {rates[-1]:12.0f} rows/s")
    return {"clients_4_vs_1": rates[1] / rates[0]}


def _rate(address: str, manifest_json: str, seconds: float) -> float:
    manifest = Manifest.from_json(manifest_json)
    with Client(address, credentials=TRUSTED) as client:
        batches = in_turn(manifest.vocab_size, 256, 16)
        for batch in batches:
            client.fetch(manifest, batch)
        time.sleep(0.5)  # until the other processes have started
        rows, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            rows += len(client.fetch(manifest, batches[rows // 256 % 16]))
    return rows / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds and smaller rows; takes less than 90 seconds",
    )
    quick = parser.parse_args().quick
    if DefaultParser.__name__ != "_HiredisParser":
        parser.error("the baseline needs redis-py with hiredis")
    torch.set_num_threads(1)
    pairs = 60 if quick else 400
    with server_side() as host:
        ratios = {
            **large_rows(pairs, host),
            **small_rows(pairs, host),
            **real_text(48 if quick else 96, host),
            **growth(pairs, host),
            **clients(1 if quick else 4, host),
        }
        result = {name: round(ratio, 3) for name, ratio in ratios.items()}
        print(json.dumps(result | {"isolated": host.isolated}))


if __name__ == "__main__":
    main()
