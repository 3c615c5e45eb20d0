"""Run mixed load for a long time and test whether anything grows.

    python -m loadtest.soak [--minutes 20]      # or make soak

The whole system runs over Redis in processes on this machine, at about half the load that two cores
can handle. Streams of random lengths start at random times. Every ten seconds the benchmark records
the median time of an answer and the resident memory of each process.

A new process grows until it has seen its peak concurrency and its heap has seen every mixture of
sizes, which is not a leak. A warm-up that does not count therefore comes first. It fetches every
row from each lookup service, and then random rows from several threads, together with the metadata
calls that workers make each second, as many as in an hour. Then it sends half as many requests
again as the measurement for eight minutes.

The output has, for each series, the slope of a fitted line with its confidence interval and whether
the interval contains zero, and a final line of JSON. The six intervals hold jointly with 95%
confidence: with 95% each, every fourth run would find a slope where there is none. The interval of
a memory series is at least as wide as the slope that a single page more produces.
"""

import argparse
import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
from tolhouse import Client
from tolhouse.testing import build_table, local_cluster, redis_server
from tqdm import tqdm

from loadtest.serve import Load, run, text_of

CHECKPOINT = Path("models/demo-memory")
RATE, WINDOW_SECONDS = 10.0, 10.0
WARM_RATE, WARM_WINDOWS, WARM_FETCHES, WARM_THREADS = 15.0, 48, 30_000, 4
PAGE_MB = 0.004096
DEVIATIONS = 2.64  # standard deviations of a normal distribution for six joint intervals at 95%


def slope(values: list[float], grain: float = 0.0) -> tuple[float, float]:
    """Slope per hour and half the width of its confidence interval. The interval accounts for
    correlated neighbours by their first autocorrelation.

    Values are multiples of `grain`. The interval is at least as wide as the slope that one step of
    `grain` in the middle of the series produces.
    """
    x, y = np.arange(len(values)) * WINDOW_SECONDS / 3600, np.array(values)
    a, b = np.polyfit(x, y, 1)
    rest = y - (a * x + b)
    spread = np.sqrt((rest @ rest) / max(1, len(y) - 2) / ((x - x.mean()) ** 2).sum())
    alike = float(np.clip(rest[:-1] @ rest[1:] / max(1e-12, rest @ rest), 0, 0.95))
    return float(a), max(
        1.5 * grain / float(x[-1]), float(DEVIATIONS * spread * np.sqrt((1 + alike) / (1 - alike)))
    )


def exercise(target: str, ref: str) -> None:
    """Send as many fetches as an hour of load does, several at a time, and with every third fetch a
    metadata call that workers make, such as reading the published version."""
    with (
        Client(target) as client,
        Client(target) as other,
        ThreadPoolExecutor(WARM_THREADS) as pool,
    ):
        manifest = client.describe(ref)
        client.rows.fetch_records(manifest, np.arange(manifest.vocab_size, dtype=np.uint32))

        def fetch(seed: int) -> None:
            random = np.random.default_rng(seed)
            ids = np.unique(random.zipf(1.2, random.integers(1, 60)) % manifest.vocab_size)
            client.rows.fetch_records(manifest, ids.astype(np.uint32))
            if seed % 3 == 0:
                other.describe(manifest.name)
            if seed % 30 == 0:
                other.rows.pin(ref)

        for _ in tqdm(
            pool.map(fetch, range(WARM_FETCHES)),
            desc=f"warm up {target}",
            unit="fetch",
            total=WARM_FETCHES,
        ):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        help="duration of the measurement (default %(default)g)",
    )
    windows = max(10, round(parser.parse_args().minutes * 60 / WINDOW_SECONDS))
    series: dict[str, list[float]] = {"median answer, ms": []}
    failed = sent = 0
    with ExitStack() as stack:
        url = stack.enter_context(redis_server())
        ref = build_table(CHECKPOINT, url)
        cluster = stack.enter_context(
            local_cluster(
                CHECKPOINT,
                url,
                lookups=2,
                workers=2,
                worker_options=("--threads", "1", "--row-cache-megabytes", "1"),
                lookup_options=("--hot-megabytes", "8"),
            )
        )
        for target in cluster.lookup.split(","):
            exercise(target, ref)
        load = Load(
            f"http://{cluster.gateway}", CHECKPOINT.name, text_of(""), (10, 400), (1, 64), 60.0
        )
        named = [f"{p.ready['service']} {n}" for n, p in enumerate(cluster.processes)]
        processes = [psutil.Process(process.pid) for process in cluster.processes]
        for number in tqdm(range(WARM_WINDOWS), desc="warm up the system", unit="window"):
            asyncio.run(run(load, WARM_RATE, WINDOW_SECONDS, windows + number))
        for number in tqdm(range(windows), desc="soak", unit="window"):
            answers, _ = asyncio.run(run(load, RATE, WINDOW_SECONDS, number))
            sent, failed = (
                sent + len(answers),
                failed + sum(bool(answer.error) for answer in answers),
            )
            series["median answer, ms"].append(
                float(np.median([answer.whole for answer in answers if not answer.error])) * 1e3
            )
            for name, process in zip(named, processes, strict=True):
                series.setdefault(f"{name}, MB", []).append(process.memory_info().rss / 1e6)
    found = {}
    for what, values in series.items():
        rise, margin = slope(values, PAGE_MB if what.endswith("MB") else 0.0)
        found[what] = {
            "mean": round(float(np.mean(values)), 1),
            "per_hour": round(rise, 2),
            "margin": round(margin, 2),
        }
        verdict = "contains zero" if abs(rise) <= margin else "does not contain zero"
        hourly = f"{rise:+9.2f} ± {margin:.2f} per hour"
        print(f"{what:20} mean {np.mean(values):8.1f}   {hourly}: {verdict}")
    print(
        json.dumps(
            {
                "minutes": windows * WINDOW_SECONDS / 60,
                "sent": sent,
                "failed": failed,
                "series": found,
            }
        )
    )


if __name__ == "__main__":
    main()
