"""Compare each codec's decoding time with the fetch time that its smaller records save.

    python -m loadtest.codecs [--quick]

The first part measures each codec alone: record size, encoding time, and the time to decode a batch
with numpy (as in the SDK) and with torch (as in the worker). The second part measures fetching and
decoding together, through a lookup service over Redis, with the codecs interleaved on the same ids.
Servers run in namespaces of their own, behind a network (loadtest/isolation.py).
The output is a table of medians and a final line of JSON with the speed-ups over bf16 in the second
part. Compare only ratios within a run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import numpy as np
import torch
from tolhouse import Client, Manifest
from tolhouse.engine.dequant import decode
from tolhouse.store.base import open_store
from tolhouse.table.codecs import CODECS
from tolhouse.testing import Host, redis_server
from tqdm import tqdm

from loadtest import tables
from loadtest.isolation import server_side

VOCABULARY, LAYERS, HIDDEN = 512, 24, 2048  # the rows of the paper's 1B model
IDS = 32
BUILT_TOGETHER = 128  # rows that the builder encodes per call


def manifest_of(codec: str) -> Manifest:
    return tables.manifest_of(codec, VOCABULARY, LAYERS * 4, 16, codec=codec)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def medians(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender over interleaved rounds, after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name, work in contenders.items():
            taken = seconds(work)
            if number:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def decode_in_numpy(manifest: Manifest, records: np.ndarray) -> np.ndarray:
    return manifest.decode(records).astype(np.float32)


def fetch_next(client: Client, manifest: Manifest, batches: Iterator[np.ndarray]) -> torch.Tensor:
    records = client.rows.fetch_records(manifest, next(batches))
    return decode(torch.from_numpy(records), manifest)


def on_threads(count: int, work: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        torch.set_num_threads(count)
        work()

    return run


def alone(rounds: int) -> None:
    """Print the cost of each codec alone."""
    random = np.random.default_rng(0)
    many = random.standard_normal((BUILT_TOGETHER, LAYERS, HIDDEN), np.float32)
    batch, ids = many[:IDS], np.arange(IDS, dtype=np.uint32)
    print(f"rows of {LAYERS} x {HIDDEN} values: microseconds per row")
    print(f"batches of {BUILT_TOGETHER} rows for encoding and {IDS} for decoding")
    columns = f"{'bytes':>9}{'encode':>9}{'(ns/value)':>12}{'numpy':>9}"
    print(f"  {'':6}{columns}{'torch, 1 thread':>18}{'2 threads':>12}")
    encoders: dict[str, Callable[[], object]] = {
        name: partial(codec.encode, many) for name, codec in CODECS.items()
    }
    encoding = medians(encoders, max(3, rounds // 10))
    contenders: dict[str, Callable[[], object]] = {}
    for name in CODECS:
        manifest = manifest_of(name)
        records = manifest.encode(ids, batch)
        tensor = torch.from_numpy(records)
        contenders[f"{name} numpy"] = partial(decode_in_numpy, manifest, records)
        for threads in (1, 2):
            contenders[f"{name} {threads}"] = on_threads(threads, partial(decode, tensor, manifest))
    decoding = medians(contenders, rounds)
    for name in CODECS:
        encode = encoding[name] / BUILT_TOGETHER
        numpy, one, two = (decoding[f"{name} {how}"] / IDS * 1e6 for how in ("numpy", 1, 2))
        size, value = manifest_of(name).record_bytes, encode / LAYERS / HIDDEN * 1e9
        encoded = f"{size:9,}{encode * 1e6:9.1f}{value:12.2f}"
        print(f"  {name:6}{encoded}{numpy:9.1f}{one:18.1f}{two:12.1f}")


def fetched(rounds: int, host: Host) -> dict[str, dict[str, float]]:
    """Median seconds from ids to float32 rows, by source (hot or Redis) and codec."""
    random = np.random.default_rng(1)
    found: dict[str, dict[str, float]] = {}
    with redis_server(host=host) as url:
        manifests = [manifest_of(name) for name in CODECS]
        with closing(open_store(url)) as store:
            for manifest in tqdm(manifests, desc="tables", leave=False):
                tables.load(store, manifest)
        for how, megabytes in (("hot", 200), ("from Redis", 0)):
            with (
                tables.service(url, megabytes, host=host) as lookup,
                Client(lookup.address, credentials=tables.TRUSTED) as client,
            ):
                for manifest in manifests:
                    client.rows.fetch_records(manifest, np.arange(VOCABULARY, dtype=np.uint32))
                picks = (random.choice(VOCABULARY, IDS, replace=False) for _ in range(rounds + 1))
                chosen = [ids.astype(np.uint32) for ids in picks]
                contenders: dict[str, Callable[[], object]] = {}
                for manifest in manifests:
                    ids = iter(chosen)
                    contenders[manifest.codec_name] = partial(fetch_next, client, manifest, ids)
                found[how] = medians(contenders, rounds)
    return found


def measure(rounds: int, host: Host) -> dict[str, float]:
    threads = torch.get_num_threads()
    alone(rounds)
    torch.set_num_threads(threads)
    ratios: dict[str, float] = {}
    print(f"{IDS} ids to float32 rows, fetch and decode: milliseconds, speed-up over bf16")
    for how, times in fetched(rounds, host).items():
        for name, median in times.items():
            ratio = times["bf16"] / median
            print(f"  {how:12}{name:6}{median * 1e3:8.2f}{ratio:8.2f}")
            if name in ("int8", "int4"):
                ratios[f"{name}_vs_bf16{'' if how == 'hot' else '_redis'}"] = round(ratio, 3)
    return ratios


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds; takes less than a minute"
    )
    rounds = 40 if parser.parse_args().quick else 400
    with server_side() as host:
        print(json.dumps(measure(rounds, host) | {"isolated": host.isolated}))


if __name__ == "__main__":
    main()
