"""Rows per second through the lookup service, side by side with Redis alone: `python -m loadtest.fetch [--quick]`.

Starts its own Redis and lookup service on loopback, measures interleaved pairs, prints a table of medians and, last, one
line of JSON with the ratios. Machines are noisy: the ratios within a run mean something, the times of two runs do not.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
from redis import Redis
from tolhouse import Client, Manifest
from tolhouse.rpc import keep_large_blocks
from tolhouse.store import open_store
from tolhouse.table.spec import content_id
from tolhouse.testing import process, redis_server
from tqdm import tqdm

VOCABULARY, LAYERS, HIDDEN = 512, 24, 2048  # bf16: rows of 96 KiB, the shape of the paper's 1B model
IDS = 32


def load(url: str) -> Manifest:
    """A table of random rows, loaded into the Redis at `url`."""
    layers = tuple(range(LAYERS))
    identity = {"model_id": "0" * 64, "tokenizer_id": "0" * 64, "version": content_id("random", "bf16", layers)}
    manifest = Manifest(name="bench", codec="bf16", vocab_size=VOCABULARY, hidden_size=HIDDEN, layers=layers, num_shards=16, **identity)
    random = np.random.default_rng(0)
    with closing(open_store(url)) as store:
        for shard in range(manifest.num_shards):
            ids = manifest.shard_ids(shard)
            rows = random.standard_normal((len(ids), LAYERS, HIDDEN), np.float32)
            store.write_shard(manifest, shard, manifest.encode(ids, rows))
        store.commit(manifest)
    return manifest


def seconds(work: Callable[[np.ndarray], object], ids: np.ndarray) -> float:
    started = time.perf_counter()
    work(ids)
    return time.perf_counter() - started


def measure(pairs: int) -> dict[str, float]:
    """Median seconds per fetch of each contender, over `pairs` interleaved rounds."""
    with redis_server() as url, closing(Redis.from_url(url)) as redis:
        manifest = load(url)
        keys = {i: f"row:{i}" for i in range(VOCABULARY)}
        with closing(open_store(url)) as store:
            ids = np.arange(VOCABULARY, dtype=np.uint32)
            records = np.empty((VOCABULARY, manifest.record_bytes), np.uint8)
            store.read(manifest, ids, records)
        redis.mset({keys[i]: record.tobytes() for i, record in zip(ids.tolist(), records, strict=True)})
        free = ("--store", url, "--listen", "127.0.0.1:0")
        with (
            process("lookup", *free, "--hot-megabytes", "200") as hot,
            process("lookup", *free, "--hot-megabytes", "0") as cold,
            Client(hot.address) as hot_client,
            Client(cold.address) as cold_client,
        ):
            contenders: dict[str, Callable[[np.ndarray], object]] = {
                "redis MGET": lambda chosen: redis.mget([keys[i] for i in chosen.tolist()]),
                "service, hot": lambda chosen: hot_client.fetch(manifest, chosen),
                "service, from Redis": lambda chosen: cold_client.fetch(manifest, chosen),
            }
            hot_client.fetch(manifest, ids)
            random = np.random.default_rng(1)
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in tqdm(range(pairs), desc="pairs", leave=False):
                chosen = random.choice(VOCABULARY, IDS, replace=False).astype(np.uint32)
                for name, work in contenders.items():
                    times[name].append(seconds(work, chosen))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pairs: done within a minute")
    keep_large_blocks()  # as the worker does
    medians = measure(40 if parser.parse_args().quick else 400)
    size = IDS * LAYERS * HIDDEN * 2
    print(f"{IDS} ids of {size // IDS // 1024} KiB, medians")
    for name, median in medians.items():
        print(f"  {name:22} {median * 1e3:8.2f} ms   {size / median / 1e9:6.2f} GB/s")
    redis = medians["redis MGET"]
    ratios = {"hot_vs_redis": redis / medians["service, hot"], "cold_vs_redis": redis / medians["service, from Redis"]}
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
