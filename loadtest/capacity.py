"""Serve a table that is four times larger than the memory of its lookup service, beside Redis.

    python -m loadtest.capacity [--quick] [--folder FOLDER]

The service reads the table from files on a disk. A cgroup limits its memory to a quarter of the
table, including the page cache. Redis has all rows in memory and no limit. The client asks both in
turn for the ids of a real text, and for uniformly random ids, which give `rows_per_s_vs_redis`.
Then it asks for single rows. The page cache of the files is dropped before, and only requests for
which the service read from the device count as cold. The output is a table and a final line of
JSON.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from redis import Redis
from tolhouse import Client, Manifest
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import Host, Process, open_url, redis_server
from tqdm import tqdm

from loadtest.cgroup import MemoryGroup, memory_limited
from loadtest.isolation import server_side
from loadtest.tables import TRUSTED, load, load_plain, manifest_of, service
from loadtest.text import trace

VOCABULARY, TIMES, AT_ONCE = 32_768, 4, 32
HOT_SHARE = 0.4  # of the limit; the rest is for the process and the page cache


@dataclass
class Compared:
    """Rows per second of the service and of Redis, and what the service did for them."""

    service: float
    redis: float
    hot: float  # the share of rows from the service's memory
    device: float  # the bytes that it read from the device, over the bytes of all rows


@dataclass
class Served:
    """A lookup service with a client, and a Redis that has the same rows under `keys`."""

    running: Process
    client: Client
    redis: Redis
    keys: dict[int, str]
    manifest: Manifest
    folder: Path

    def fetch(self, ids: np.ndarray) -> float:
        """Fetch and verify rows, and return the seconds that it took."""
        started = time.perf_counter()
        self.client.fetch(self.manifest, ids)
        return time.perf_counter() - started

    def mget(self, ids: np.ndarray) -> float:
        started = time.perf_counter()
        self.redis.mget([self.keys[i] for i in ids.tolist()])
        return time.perf_counter() - started

    def device_bytes(self) -> int:
        """The bytes that the service has read from the device so far."""
        return _proc(self.running.pid, "io", "read_bytes")

    def from_memory(self) -> float:
        """The number of rows that the service has served from its hot rows so far."""
        text = open_url(f"http://{self.running.ready['metrics']}/metrics", 10).read().decode()
        found = re.search(r'lookup_rows_total{source="hot"} (\S+)', text)
        assert found
        return float(found[1])

    def compare(self, batches: list[np.ndarray], title: str) -> Compared:
        """Fetch each batch from the service and from Redis in turn."""
        hot, read, ours, theirs = self.from_memory(), self.device_bytes(), 0.0, 0.0
        for n, batch in enumerate(tqdm(batches, desc=title, leave=False)):
            for contender in (0, 1) if n % 2 else (1, 0):
                if contender:
                    ours += self.fetch(batch)
                else:
                    theirs += self.mget(batch)
        rows = sum(map(len, batches))
        size = rows * self.manifest.record_bytes
        hot_share, device = (self.from_memory() - hot) / rows, (self.device_bytes() - read) / size
        found = Compared(rows / ours, rows / theirs, hot_share, device)
        print(
            f"  {title:24} service {found.service:8.0f} rows/s   Redis {found.redis:8.0f} rows/s   "
            f"{found.service / found.redis:5.2f}x   hot {found.hot:.3f}   device {found.device:.3f}"
        )
        return found

    def singles(self, ids: Iterable[int]) -> tuple[list[float], list[float]]:
        """Fetch one row at a time, and return the milliseconds of each.

        The first list has the reads that reached the device, the second one all others.
        """
        times: tuple[list[float], list[float]] = ([], [])
        for i in ids:
            before = self.device_bytes()
            took = self.fetch(np.array([i], np.uint32)) * 1e3
            times[self.device_bytes() - before < self.manifest.record_bytes].append(took)
        return times


def _proc(pid: int, file: str, field: str) -> int:
    """A number in a file of /proc/PID."""
    text = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE)
    assert found
    return int(found[1])


def drop_page_cache(folder: Path) -> None:
    """Drop the files of tables from the page cache. All their pages are on the device."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(served: Served, text: np.ndarray, rounds: int) -> dict[str, float]:
    """Measure the rates and the latencies of a running service."""
    rng = np.random.default_rng(0)
    vocabulary, frequent = served.manifest.vocab_size, served.manifest.frequent
    text = text[: 4 * rounds * AT_ONCE]
    steps = [np.unique(part) for part in np.array_split(text, len(text) // AT_ONCE)]
    uniform = [rng.choice(vocabulary, AT_ONCE, replace=False) for _ in range(rounds)]
    uniform = [ids.astype(np.uint32) for ids in uniform]
    print(f"{AT_ONCE} ids at once")
    real = served.compare(steps, "real text")
    spread = served.compare(uniform, "uniformly random")
    unused = np.setdiff1d(np.arange(vocabulary, dtype=np.uint32), np.concatenate(steps + uniform))
    unused = np.setdiff1d(unused, np.array(frequent, np.uint32))
    drop_page_cache(served.folder)
    cold, _ = served.singles(rng.permutation(unused)[: 2 * rounds].tolist())
    if not cold:
        sys.exit("error: no row came from a device; give a folder on a disk with --folder")
    served.singles(frequent[:50])
    _, warm = served.singles(frequent[:50] * 10)
    beside = [served.mget(np.array([i])) * 1e3 for i in frequent[:50] * 10]
    for name, times in (("cold", cold), ("warm", warm), ("Redis", beside)):
        p50, p99 = np.percentile(times, (50, 99))
        print(f"  1 id, {name:6} {len(times):5} reads   p50 {p50:7.3f} ms   p99 {p99:7.3f} ms")
    return {
        "rows_per_s_vs_redis": spread.service / spread.redis,
        "text_rows_per_s_vs_redis": real.service / real.redis,
        "hit_rate": real.hot,
        "cold_p50_ms": float(np.median(cold)),
        "cold_p99_ms": float(np.percentile(cold, 99)),
        "warm_p50_ms": float(np.median(warm)),
    }


def memory(pid: int, group: MemoryGroup | None, limit: int) -> dict[str, bool | float | None]:
    """Whether the limit applied to the service, and what the service used of it."""
    limited = bool(group and group.limits(pid, limit))
    peak = group.peak() if group and limited else None
    resident, device = _proc(pid, "status", "VmHWM") * 1024, _proc(pid, "io", "read_bytes")
    shown = f"{peak / 1e6:.0f} MB with its page cache, " if peak else "not limited, "
    print(f"highest memory of the service: {shown}{resident / 1e6:.0f} MB resident")
    return {
        "limited": limited,
        "device_read_bytes": device,
        "peak_over_limit": peak and peak / limit,
        "resident_bytes": resident,
    }


def run(
    row_kib: int, rounds: int, parent: str | None, host: Host
) -> dict[str, bool | float | None]:
    source, text, frequent = trace(VOCABULARY)
    manifest = manifest_of("capacity", VOCABULARY, row_kib, frequent=frequent)
    limit = manifest.table_bytes // TIMES
    limit -= limit % os.sysconf("SC_PAGE_SIZE")
    hot = HOT_SHARE * limit / 1e6
    print(
        f"{source}, {VOCABULARY} rows of {row_kib} KiB, {manifest.table_bytes / 1e6:.0f} MB; "
        f"limit {limit / 1e6:.0f} MB, of which hot rows {hot:.0f} MB"
    )
    with ExitStack() as stack:
        enter = stack.enter_context
        parent = parent or host.folder
        folder = Path(enter(tempfile.TemporaryDirectory(prefix="tolhouse-capacity-", dir=parent)))
        url = f"file://{folder}"
        with closing(open_store(url)) as store:
            load(store, manifest)
            publish(store, manifest.ref)
        redis = enter(closing(Redis.from_url(enter(redis_server(host=host)))))
        keys = load_plain(redis, manifest, np.arange(VOCABULARY, dtype=np.uint32))
        group = enter(memory_limited(limit))
        python = (*group.command, sys.executable) if group else (sys.executable,)
        metrics = "--metrics-listen", f"{host.address}:0"
        drop_page_cache(folder)
        running = enter(service(url, hot, *metrics, filled=True, host=host, python=python))
        client = enter(Client(running.address, credentials=TRUSTED))
        served = Served(running, client, redis, keys, manifest, folder)
        return {**measure(served, text, rounds), **memory(running.pid, group, limit)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", help="folder on the disk to measure (default: that of temporary files)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller rows")
    options = parser.parse_args()
    size = (48, 150) if options.quick else (96, 1000)
    with server_side() as host:
        found = {**run(*size, options.folder, host), "isolated": host.isolated}
    shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
