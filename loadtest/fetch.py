"""Compare row sources with plain Redis and with minimal gRPC servers.

    python -m loadtest.fetch [--quick]

The benchmark starts its own Redis servers and lookup services and calls them over TCP on loopback.
Contenders run in turn on the same ids. The output is a table of medians and a final line of JSON
with ratios. Higher is better, except for single_vs_echo, batch256_vs_bare and growth_*. Compare
ratios only: absolute times vary between runs.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from itertools import pairwise

import numpy as np
import torch
from redis import Redis
from tolhouse import Client, Manifest
from tolhouse.engine.row_providers import CachedRows
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import redis_cluster, redis_server
from tqdm import tqdm

from loadtest.bare import Bare, Naive, server
from loadtest.tables import load, load_plain, manifest_of, service
from loadtest.text import clairvoyant, trace

Work = Callable[[np.ndarray], object]
CLIENTS = 4  # concurrent client processes
_PAUSE = 0.002  # seconds for the previous contender's threads to become idle


def medians(contenders: dict[str, Work], batches: list[np.ndarray], title: str) -> dict[str, float]:
    """Measure and print each contender's median seconds per batch, running all contenders on each
    batch."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for batch in tqdm(batches, desc=title, leave=False):
        for name, work in contenders.items():
            time.sleep(_PAUSE)
            started = time.perf_counter()
            work(batch)
            times[name].append(time.perf_counter() - started)
    found = {name: statistics.median(values) for name, values in times.items()}
    print(title)
    for name, median in found.items():
        print(f"  {name:34} {median * 1e3:8.3f} ms")
    return found


def in_turn(vocabulary: int, size: int, count: int) -> list[np.ndarray]:
    """`count` batches of `size` ids that cycle through the vocabulary, so that a row recurs as late
    as possible."""
    order = np.random.default_rng(0).permutation(vocabulary).astype(np.uint32)
    return [np.take(order, range(n * size, (n + 1) * size), mode="wrap") for n in range(count)]


def large_rows(pairs: int) -> dict[str, float]:
    """Fetch 32 rows of 96 KiB from each kind of source, and compare with `MGET` and a naive gRPC
    server.

    One lookup service holds all rows in memory. The other reads them from Redis without a useful
    cache.
    """
    manifest = manifest_of("large", 2048, 96)
    with ExitStack() as stack:
        enter = stack.enter_context
        url = enter(redis_server())
        files = f"file://{enter(tempfile.TemporaryDirectory(prefix='tolhouse-fetch-'))}"
        redis = enter(closing(Redis.from_url(url)))
        for store in (url, files):
            with closing(open_store(store)) as opened:
                load(opened, manifest)
        ids = np.arange(manifest.vocab_size, dtype=np.uint32)
        keys = load_plain(redis, manifest, ids)
        # `cold` cycles through more rows than fit in its hot rows, so that every read misses
        hot, cold = (enter(Client(enter(service(url, size)).address)) for size in (250, 32))
        direct_redis, direct_file = (enter(Client(store)) for store in (url, files))
        for part in np.split(ids, 32):
            hot.fetch(manifest, part)
            direct_file.fetch(manifest, part)
        contenders: dict[str, Work] = {
            "Redis MGET": lambda batch: redis.mget([keys[i] for i in batch.tolist()]),
            "naive gRPC answer": Naive(enter(server("naive"))).rows,
            "service, hot": lambda batch: hot.fetch(manifest, batch),
            "service, from Redis": lambda batch: cold.fetch(manifest, batch),
            "redis:// directly": lambda batch: direct_redis.fetch(manifest, batch),
            "file:// directly": lambda batch: direct_file.fetch(manifest, batch),
        }
        found = medians(contenders, in_turn(len(ids), 32, pairs), "32 ids of 96 KiB")
    redis_, naive_, hot_, cold_, direct_redis_, direct_file_ = found.values()
    return {
        "hot_vs_redis": redis_ / hot_,
        "hot_vs_unary": naive_ / hot_,
        "cold_vs_redis": redis_ / cold_,
        "direct_redis_vs_mget": redis_ / direct_redis_,
        "direct_file_vs_redis": redis_ / direct_file_,
    }


def small_rows(pairs: int) -> dict[str, float]:
    """Compare fetching one hot row of 4 KiB with an echo on an open stream, and 256 of them with a
    unary answer of the same size."""
    manifest = manifest_of("small", 4096, 4)
    payload = bytes(4096)
    with redis_server() as url, closing(open_store(url)) as store, server("bare") as bare:
        load(store, manifest)
        bare_ = Bare(bare)
        with (
            service(url, 64) as lookup,
            Client(lookup.address) as client,
        ):
            client.fetch(manifest, range(manifest.vocab_size))
            one = medians(
                {
                    "bare echo on an open stream": lambda _: bare_.echo(payload),
                    "service": lambda batch: client.fetch(manifest, batch),
                },
                in_turn(manifest.vocab_size, 1, 10 * pairs),
                "1 id of 4 KiB",
            )
            many = medians(
                {
                    "bare unary answer": lambda batch: bare_.bytes(b"%d" % (len(batch) * 4096)),
                    "service": lambda batch: client.fetch(manifest, batch),
                },
                in_turn(manifest.vocab_size, 256, 2 * pairs),
                "256 ids of 4 KiB",
            )
    echo, single = one.values()
    unary, batch = many.values()
    return {
        "single_vs_echo": single / echo,
        "batch256_vs_bare": batch / unary,
    }


def real_text(row_kib: int) -> dict[str, float]:
    """Compare a worker that reads real text through a row cache with `MGET` of the same ids.

    The row cache holds a tenth of the table, and the service a third. One pass reads 512 ids at a
    time, as in steps with a prompt; the other reads 32, as in steps that decode 32 sequences.
    """
    source, ids, frequent = trace(32_768)
    manifest = manifest_of("text", 32_768, row_kib, frequent=frequent)
    slots, found = manifest.vocab_size // 10, {}
    with (
        redis_server() as url,
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
                service(url, manifest.table_bytes / 3e6, filled=True) as lookup,
                Client(lookup.address) as client,
            ):
                rows = CachedRows(
                    client.rows, manifest, slots * manifest.record_bytes, torch.device("cpu")
                )
                rows.fill()
                filled, ours, theirs = rows.counts()["from_remote"], 0.0, 0.0
                for part in tqdm(
                    np.array_split(read, len(read) // size), desc=f"{size} at a time", leave=False
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


def growth(pairs: int) -> dict[str, float]:
    """Ratios of the time to fetch rows from Redis, uncached, for a larger vocabulary and for more
    Cluster nodes."""
    found = {}
    small, large = manifest_of("v16k", 16_384, 4), manifest_of("v128k", 131_072, 4)
    with redis_server() as url, closing(open_store(url)) as store:
        for manifest in (small, large):
            load(store, manifest)
        with service(url, 2) as lookup, Client(lookup.address) as client:
            found["growth_vocab"] = _growth(
                {"16k tokens": (client, small), "128k tokens": (client, large)},
                pairs,
                "32 ids of 4 KiB, by vocabulary",
            )
    with redis_cluster(1) as (one,), redis_cluster(6) as (six, *_):
        for node in (one, six):
            with closing(open_store(node.url)) as store:
                load(store, small)
        with (
            service(one.url, 2) as first,
            service(six.url, 2) as second,
            Client(first.address) as alone,
            Client(second.address) as many,
        ):
            found["growth_nodes"] = _growth(
                {"1 node": (alone, small), "6 nodes": (many, small)},
                pairs,
                "32 ids of 4 KiB, by Cluster nodes",
            )
    return found


def _growth(sizes: dict[str, tuple[Client, Manifest]], pairs: int, title: str) -> float:
    def fetch(client: Client, manifest: Manifest) -> Work:
        rounds = iter(in_turn(manifest.vocab_size, 32, pairs))
        return lambda _: client.fetch(manifest, next(rounds))

    found = medians(
        {name: fetch(*size) for name, size in sizes.items()}, [np.empty(0)] * pairs, title
    )
    return max(after / before for before, after in pairwise(found.values()))


def clients(seconds: float) -> dict[str, float]:
    """Rows per second of four client processes relative to one, from one lookup service."""
    manifest, rates = manifest_of("clients", 4096, 4), []
    spawn = multiprocessing.get_context("spawn")
    with redis_server() as url, closing(open_store(url)) as store:
        load(store, manifest)
        print("256 ids of 4 KiB, hot")
        with service(url, 64) as lookup, ProcessPoolExecutor(CLIENTS, mp_context=spawn) as pool:
            for count in (1, CLIENTS):
                each = [(lookup.address, manifest.to_json(), seconds)] * count
                rates.append(sum(pool.map(_rate, *zip(*each, strict=True))))
                print(f"  {count} clients {rates[-1]:12.0f} rows/s")
    return {"clients": rates[1] / rates[0]}


def _rate(address: str, manifest_json: str, seconds: float) -> float:
    manifest = Manifest.from_json(manifest_json)
    with Client(address) as client:
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
        help="fewer rounds and smaller rows; takes less than a minute",
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    pairs = 60 if quick else 400
    ratios = {
        **large_rows(pairs),
        **small_rows(pairs),
        **real_text(48 if quick else 96),
        **growth(pairs),
        **clients(1 if quick else 4),
    }
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
