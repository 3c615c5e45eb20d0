"""Compare the time of building a table with the time of computing its rows.

    python -m loadtest.build [--quick]

The model has random weights and the FFNs of the paper's 250M model (h = 960, K = 2560). Ray runs
locally with one single-threaded worker per core, and Redis runs on loopback. Each round measures
`model.rows` over the vocabulary with the same workers and batches, and then the build job, from its
first task to the committed manifest, into files and into files plus Redis. These times exclude
starting Ray and loading the model. The full benchmark also prints the time of one complete
`tolhouse build`.

Memory is a worker process's peak resident memory above its resident memory with the model loaded,
divided by the bound: four shards plus 300 MB. The output is a table of medians and a final line of
JSON with ratios. Ratios without a codec in their names are the worst over all codecs.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from tolhouse.build.job import build, build_shards, plan, source_of
from tolhouse.config import set_ray_defaults
from tolhouse.sources.base import open_source
from tolhouse.testing import redis_server, tiny_model
from tqdm import tqdm

CODECS = ("bf16", "int8", "int4")
SHARDS = 16  # all batches are full; a padded last batch costs 2% at 128k tokens in 64 shards


def bare(path: str, model_id: str, ids: np.ndarray) -> int:
    """Compute rows and discard them."""
    return sum(len(rows) for _, rows in source_of(path, model_id, ()).batches(ids))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peaks(path: str, folder: str, results: "multiprocessing.Queue[dict]") -> None:
    """For each codec, put the peak bytes above the loaded model while building half the shards, and
    the bound."""
    found = {}
    for codec in CODECS:
        planned = plan(open_source(path), f"peak-{codec}", codec, SHARDS)
        # load the model and run it once before the first measurement
        next(source_of(path, planned.model_id, planned.blocks).batches(planned.shard_ids(0)))
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text(
            "5", encoding="utf-8"
        )  # resets VmHWM, the peak resident memory
        build_shards(path, planned, list(range(SHARDS // 2)), (f"file://{folder}",), 10.0)
        shard = len(planned.shard_ids(0)) * planned.record_bytes
        found[codec] = _status("VmHWM") - before, 4 * shard + (300 << 20)
    results.put(found)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure(
    path: Path, vocabulary: int, rounds: int, folder: Path, redis_url: str, *, quick: bool
) -> dict[str, float]:
    source = open_source(path)
    workers = os.cpu_count() or 1
    remote = ray.remote(num_cpus=1)(bare)
    halves = [np.arange(first, vocabulary, workers, dtype=np.uint32) for first in range(workers)]

    def compute() -> None:
        ray.get([remote.remote(str(path), source.model_id(), ids) for ids in halves])

    # hashes the model's weights
    plans = {codec: plan(source, codec, codec, SHARDS) for codec in CODECS}

    def table(codec: str, *, redis: bool) -> None:
        planned = replace(plans[codec], name=f"bench{time.monotonic_ns()}")
        stores = (f"file://{folder}/{planned.name}", *((redis_url,) if redis else ()))
        build(path, planned, stores, "local", 10.0, workers, 1, 30.0)

    contenders: dict[str, Callable[[], None]] = {"model.rows": compute}
    for codec in CODECS:
        contenders[codec] = partial(table, codec, redis=False)
        if codec == "bf16" or not quick:  # bf16 has the largest records
            contenders[f"{codec}, Redis too"] = partial(table, codec, redis=True)
    compute()
    table("bf16", redis=False)  # makes the workers load the model
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        for name, work in contenders.items():
            times[name].append(seconds(work))
    found = {name: statistics.median(values) for name, values in times.items()}
    print(f"{vocabulary} rows, {workers} workers, medians of {rounds} rounds")
    for name, median in found.items():
        print(f"  {name:18} {median:8.2f} s   {median / found['model.rows']:6.3f}")
    return {name: median / found["model.rows"] for name, median in found.items()}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--quick", action="store_true", help="fewer layers and rounds; takes about a minute"
    )
    quick = parser.parse_args().quick
    layers, vocabulary, rounds = (2, 12_288, 2) if quick else (4, 16_384, 5)
    set_ray_defaults(local=True)
    shape: dict[str, Any] = {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_attention_heads": 16,
    }
    with tempfile.TemporaryDirectory(prefix="tolhouse-") as name, redis_server() as redis_url:
        folder = Path(name)
        path = folder / "model"
        tiny_model(path, vocab_size=vocabulary, num_hidden_layers=layers, **shape)
        ray.init(
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            object_store_memory=80 << 20,
        )
        try:
            ratios = measure(path, vocabulary, rounds, folder, redis_url, quick=quick)
        finally:
            ray.shutdown()
        spawn = multiprocessing.get_context("spawn")
        results: multiprocessing.Queue[dict[str, tuple[int, int]]] = spawn.Queue()
        child = spawn.Process(target=peaks, args=(str(path), str(folder / "peak"), results))
        child.start()
        above = results.get(timeout=300)
        child.join()
        for codec, (most, bound) in above.items():
            peak = f"peak memory {most / 1e6:.0f} MB above the model, bound {bound / 1e6:.0f} MB"
            print(f"  {codec:18} {peak}")
        if not quick:
            words = f"-m tolhouse.cli build {path} --store file://{folder}/whole".split()
            command = [sys.executable, *words]
            whole = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
            print(f"  `tolhouse build`, including Ray's start: {whole:.1f} s")
    both = {name: ratio for name, ratio in ratios.items() if name.endswith("Redis too")}
    result = {
        "build_vs_compute": max(ratios[codec] for codec in CODECS),
        "build_redis_vs_compute": max(both.values()),
        "peak_over_bound": max(most / bound for most, bound in above.values()),
        **{f"build_vs_compute_{codec}": ratios[codec] for codec in CODECS},
        **{f"build_redis_vs_compute_{name.partition(',')[0]}": both[name] for name in both},
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
