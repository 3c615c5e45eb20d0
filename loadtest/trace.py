"""Replay public load traces through the gateway: `python -m loadtest.trace [--quick]`.

Times, lengths and shared prefixes come from traces of two Azure services and of Mooncake
(loadtest/data). The text is WikiText, or Python's documentation where WikiText is missing. Redis
and three lookup replicas run isolated from the rest if the machine allows it. Two workers serve the
demo model with a longer context, each behind a gateway. `resident` has all rows in its memory.
`remote` fetches rows over TCP, with a row cache of a tenth of the table that starts with the
frequent tokens of Python code.

The load is open-loop: requests are sent at the times of the trace, whether or not earlier ones have
been answered, and latencies count from these times. A request is good if its first token and the
average time between its later tokens are within limits. Limits are multiples of the medians of
single requests to `resident`. The speed of a trace is set so that about TARGET of its requests to
`resident` are good. Both workers replay each slice of a trace, in alternating order. Half-way, one
replica is killed with requests in flight, and another one is stopped for most of the time from then
on.

Then loadtest/pareto.py measures the engine with several row sources and draws the picture. The
output is a table and a final line of JSON, which docs/benchmarks.md explains.
"""

import argparse
import asyncio
import json
import math
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families
from tolhouse import Manifest
from tolhouse.build.job import build_shards, plan, with_frequent
from tolhouse.config import WorkerConfig
from tolhouse.engine.attention import blocks_of
from tolhouse.model.checkpoint import CONFIG, open_checkpoint
from tolhouse.sources.base import open_source
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.store.writer import commit
from tolhouse.table.row_cache import capacity_for
from tolhouse.testing import Host, Process, process, redis_server, wait_until, wait_until_healthy
from tqdm import tqdm

from loadtest import pareto, traces
from loadtest.isolation import server_side
from loadtest.serve import Answer, Load, send
from loadtest.text import foreign

CHECKPOINT, CONTEXT, SHARDS, REPLICAS = Path("models/demo-memory"), 2048, 16, 3
CACHE_SHARE, HOT_SHARE = 0.1, 2 / 3  # of the table: in the worker, and in each replica
NAMES = RESIDENT, REMOTE = "resident", "remote"
PICTURE = Path("docs/images/pareto.png")
TARGET = 0.8  # share of good requests with resident rows
FIRST_TIMES, BETWEEN_TIMES = 8, 10  # limits, in medians of single requests
STEP_TOKENS = 128  # short steps, so that prompts of others delay the next token little
PAUSE, DEADLINE = 1.0, 60.0  # seconds; longer pauses of a trace are cut
STOPPED, CONTINUED = 0.09, 0.01  # seconds; a slow replica is stopped as by a CPU limit
WORKER = "tolhouse_worker"
_TRIAL, _SINGLE = 1000, 2000  # numbers of texts that no measured slice has
Arrivals = list[tuple[float, list[int], int]]  # seconds, prompt, tokens of the answer


@dataclass
class Effort:
    """How much is measured: single requests, trial slices and pairs of slices for each trace."""

    singles: int
    trials: int
    pairs: int
    seconds: float  # of a slice, roughly


QUICK, FULL = Effort(8, 2, 3, 4.5), Effort(20, 4, 6, 20.0)


@dataclass
class TraceLoad:
    """A trace, the limits of its good requests in seconds, and the replay of its first requests."""

    trace: traces.Trace
    first_token: float
    between: float
    count: int
    speed: float
    slowest: float = 0.0  # slower than this, the system is idle most of the time

    def good(self, answers: list[Answer]) -> int:
        return sum(answer.good(self.first_token, self.between) for answer in answers)

    def steer(self, good: int, gain: float) -> None:
        """Change the speed to bring the share of good requests closer to TARGET."""
        factor = math.exp(gain * (good / self.count - TARGET))
        self.speed = max(self.slowest, self.speed * factor)

    def slice(self, ids: np.ndarray, salt: int) -> Arrivals:
        """The requests with the texts that belong to `salt`."""
        times = traces.arrivals(self.trace, self.count, self.speed, PAUSE)
        numbers = (n % len(self.trace.requests) for n in range(self.count))
        return [
            (at, *request(self.trace, n, ids, salt)) for at, n in zip(times, numbers, strict=True)
        ]


@dataclass
class Slice:
    """The results of one slice, with the changes of the remote worker's metrics."""

    trace: str
    sent: int
    good: dict[str, int]
    errors: Counter[str]
    counts: Counter[str]
    faults: bool = False


@dataclass
class System:
    """The running processes. Gateways and workers are those of `resident` and of `remote`."""

    gateways: dict[str, str]
    workers: dict[str, Process]
    replicas: list[Process]
    manifest: Manifest
    unread: int = 0  # bytes of requests that the killed replica had not read
    ended: threading.Event = field(default_factory=threading.Event)

    def replay(self, name: str, arrivals: Arrivals) -> list[Answer]:
        return asyncio.run(replay(self.gateways[name], arrivals))

    def counts(self, name: str = REMOTE) -> Counter[str]:
        """The samples of a worker's metrics, by name and labels."""
        url = f"http://{self.workers[name].ready['metrics']}/metrics"
        families = text_string_to_metric_families(httpx.get(url, trust_env=False).text)
        samples = (sample for family in families for sample in family.samples)
        return Counter({"/".join([s.name, *s.labels.values()]): s.value for s in samples})

    def inject_faults(self, after: float) -> None:
        """Kill a replica with requests in flight. Stop another one for most of the time."""
        time.sleep(after)
        killed, slowed = (replica.popen for replica in self.replicas[:2])
        killed.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while not self.unread and time.monotonic() < deadline:
            before = self.counts()
            time.sleep(0.05)
            now, steps = self.counts(), f"{WORKER}_steps_total"
            if now[f"{WORKER}_running"] and now[steps] == before[steps]:  # it waits for rows
                self.unread = unread(killed.pid)
        killed.kill()
        while not self.ended.is_set():
            slowed.send_signal(signal.SIGSTOP)
            self.ended.wait(STOPPED)
            slowed.send_signal(signal.SIGCONT)
            self.ended.wait(CONTINUED)


def unread(pid: int) -> int:
    """The bytes in the receive queues of the TCP connections of a process."""
    folder = Path(f"/proc/{pid}")
    sockets = set()
    for link in (folder / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed in the meantime
            sockets.add(str(link.readlink()))
    tables = [(folder / "net" / name).read_text(encoding="utf-8") for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    established = [row for row in rows if row[3] == "01" and f"socket:[{row[9]}]" in sockets]
    return sum(int(row[4].partition(":")[2], 16) for row in established)


@contextmanager
def running(host: Host) -> Iterator[System]:
    """Build the table and start all processes. Redis and the replicas run on `host`."""
    with (
        tempfile.TemporaryDirectory(prefix="tolhouse-trace-") as folder,
        redis_server(host=host) as redis,
        ExitStack() as stack,
        ThreadPoolExecutor() as pool,
    ):

        def start(address: str, *commands: list[str], **place: Any) -> list[Process]:
            listen = "--listen", f"{address}:0"
            # the addresses of isolated servers are those of another machine
            runs = [process(*words, *listen, "--insecure", **place) for words in commands]
            return list(pool.map(stack.enter_context, runs))

        checkpoint, files = Path(folder, CHECKPOINT.name), f"file://{folder}/tables"
        with_context(checkpoint)
        manifest = build(checkpoint, files, redis)
        size = manifest.table_bytes / 1e6
        lookup = ["lookup", "--store", redis, "--hot-megabytes", f"{size * HOT_SHARE:g}"]
        lookup += ["--metrics-listen", f"{host.address}:0"]
        replicas = start(host.address, *[lookup] * REPLICAS, host=host)
        worker = ["worker", str(checkpoint), "--threads", str(pareto.THREADS)]
        worker += ["--max-num-batched-tokens", str(STEP_TOKENS)]
        rows, cached = ",".join(replica.address for replica in replicas), "--row-cache-megabytes"
        workers = start(
            "127.0.0.1",
            [*worker, "--rows", files, cached, f"{size + 1:g}"],
            [*worker, "--rows", rows, cached, f"{size * CACHE_SHARE:g}"],
        )
        gateway = ["gateway", str(checkpoint), "--poll-seconds", "0.2", "--workers"]
        gateways = start("127.0.0.1", *([*gateway, worker.address] for worker in workers))
        for one in gateways:
            wait_until_healthy(one.address)
        for one in workers:
            wait_until(partial(compilation_ended, one), "code", 300)
        urls = [f"http://{one.address}" for one in gateways]
        system = System(
            dict(zip(NAMES, urls, strict=True)),
            dict(zip(NAMES, workers, strict=True)),
            replicas,
            manifest,
        )
        try:
            yield system
        finally:
            system.ended.set()


def compilation_ended(worker: Process) -> bool:
    """Whether the log tells that decoding is compiled, or that it runs uncompiled."""
    return "compiled" in worker.log.read_text(encoding="utf-8")


def with_context(path: Path) -> None:
    """Copy the demo model. Its context becomes CONTEXT tokens."""
    shutil.copytree(CHECKPOINT, path)
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    config["max_position_embeddings"] = CONTEXT
    (path / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def build(path: Path, *stores: str) -> Manifest:
    """Build and publish a table that lists the frequent tokens of Python's library."""
    shards = list(range(SHARDS))
    planned = with_frequent(path, plan(open_source(path), "", "bf16", SHARDS), "")
    written = build_shards(str(path), planned, shards, stores, 10.0)
    for url in stores:
        with closing(open_store(url)) as store:
            commit([store], planned, [digest for digest, _ in written])
            publish(store, planned.ref)
    return planned


def request(trace: traces.Trace, number: int, ids: np.ndarray, salt: int) -> tuple[list[int], int]:
    """The prompt and the length of the answer of a request."""
    return traces.prompt(trace, number, ids, salt), trace.requests[number].answer_tokens


async def replay(url: str, arrivals: Arrivals) -> list[Answer]:
    """Send requests at their times, whether or not earlier requests have been answered.

    The times of the answers count from the times of the requests.
    """
    load = Load(url, CHECKPOINT.name, "", (1, 1), (1, 1), DEADLINE)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    options: Any = {"base_url": url, "limits": limits, "timeout": DEADLINE, "trust_env": False}
    async with httpx.AsyncClient(**options) as client:
        started = time.perf_counter()

        async def one(at: float, prompt: list[int], tokens: int) -> Answer:
            await asyncio.sleep(started + at - time.perf_counter())
            late = time.perf_counter() - started - at
            answer = await send(client, load, prompt, tokens)
            answer.whole += late
            # an answer without a complete character has no piece
            pieces = [late + piece for piece in answer.pieces]
            answer.pieces = pieces or [answer.whole] * (not answer.error)
            return answer

        return await asyncio.gather(*(one(*arrival) for arrival in arrivals))


def warm_up(system: System) -> None:
    """Make all rows resident, and run both workers without changing the cache of `remote`."""
    vocabulary, step = system.manifest.vocab_size, CONTEXT - 1
    for start in range(0, vocabulary, step):
        prompt = list(range(start, min(start + step, vocabulary)))
        system.replay(RESIDENT, [(0.0, prompt, 1)])
    cached = list(system.manifest.frequent[:64])
    for name in system.gateways:
        system.replay(name, [(0.0, cached, 16)] * 4)


def unloaded(system: System, trace: traces.Trace, ids: np.ndarray, effort: Effort) -> TraceLoad:
    """Send single requests to `resident`, and derive the limits, a slice and its speed."""
    answers, size = list[Answer](), len(trace.requests)
    for number in range(0, size, -(-size // effort.singles)):
        answers += system.replay(RESIDENT, [(0.0, *request(trace, number, ids, _SINGLE))])
    first = median(answer.pieces[0] for answer in answers)
    several = [answer for answer in answers if answer.tokens > 1]
    between = median((a.pieces[-1] - a.pieces[0]) / (a.tokens - 1) for a in several)
    # a first guess: a step with several sequences takes little longer than a step with one
    busy = sum(a.pieces[0] + (a.whole - a.pieces[0]) / 4 for a in answers) / len(answers)
    count = max(12, round(effort.seconds * 0.3 / busy))
    speed = traces.arrivals(trace, count, 1.0, 8 * PAUSE)[-1] / effort.seconds
    limits = FIRST_TIMES * first, BETWEEN_TIMES * between
    return TraceLoad(trace, *limits, count, speed, speed / 4)


def measure(
    system: System, tested: TraceLoad, ids: np.ndarray, number: int, half: int, seconds: float
) -> Slice:
    """Replay a slice with both workers. In slice number `half`, inject faults after `seconds`."""
    arrivals, good, errors = tested.slice(ids, number), {}, Counter[str]()
    for name in list(system.gateways)[:: 1 if number % 2 else -1]:
        before = system.counts(name)
        if name == REMOTE and number == half:
            threading.Thread(target=system.inject_faults, args=(seconds,)).start()
        answers = system.replay(name, arrivals)
        after = system.counts(name)
        after.subtract(before)
        good[name] = tested.good(answers)
        errors.update(answer.error for answer in answers if answer.error)
        if name == REMOTE:
            counts = after
        elif after[f"{WORKER}_rows_total/file"]:
            raise AssertionError("`resident` had to read rows")
    tested.steer(good[RESIDENT], 1.5)
    return Slice(tested.trace.name, tested.count, good, errors, counts, number >= half)


def percentile(counts: Counter[str], wanted: float) -> float:
    """A percentile of the wait for rows of a step, in ms, interpolated within its bucket."""
    prefix = f"{WORKER}_step_row_wait_seconds_bucket/"
    totals = {float(k.removeprefix(prefix)): n for k, n in counts.items() if prefix in k}
    bounds = sorted(bound for bound in totals if np.isfinite(bound))
    found = np.interp(
        wanted / 100 * totals[float("inf")],
        [0, *(totals[bound] for bound in bounds)],
        [0, *bounds],
    )
    return round(float(found) * 1e3, 2)


def hit_rate(counts: Counter[str]) -> float:
    cached, fetched = (counts[f"{WORKER}_rows_total/{place}"] for place in ("cache", "remote"))
    return round(cached / max(1, cached + fetched), 3)


def total(counters: Iterable[Counter[str]]) -> Counter[str]:
    found = Counter[str]()
    for one in counters:
        found.update(one)
    return found


def summary(slices: list[Slice]) -> dict[str, Any]:
    """The figures of all slices. The first slice is cold; those before the faults are warm."""
    good = {n: sum(one.good[n] for one in slices) for n in (RESIDENT, REMOTE)}
    sent = sum(one.sent for one in slices)
    after = [one.good for one in slices if one.faults]
    parts = {
        "": slices,
        "_cold": slices[:1],
        "_warm": [one for one in slices[1:] if not one.faults],
        "_faults": [one for one in slices if one.faults],
    }
    totals = {part: total(one.counts for one in some) for part, some in parts.items()}
    all_counts = totals[""]
    computed, shared, generated = (
        all_counts[f"{WORKER}_{name}_total"]
        for name in ("prompt_tokens", "prefix_hit_tokens", "tokens")
    )
    return {
        "requests": sent,
        "resident_goodput": round(good[RESIDENT] / sent, 3),
        "remote_goodput": round(good[REMOTE] / sent, 3),
        "goodput_ratio": round(good[REMOTE] / max(1, good[RESIDENT]), 3),
        "goodput_ratio_faults": round(
            sum(one[REMOTE] for one in after) / max(1, sum(one[RESIDENT] for one in after)), 3
        ),
        "failed": total(one.errors for one in slices).total(),
        **{
            f"exposed_wait_p{wanted}_ms{part}": percentile(counts, wanted)
            for part, counts in totals.items()
            for wanted in (50, 99)
            if counts
        },
        "cache_hit_rate": hit_rate(all_counts),
        "bytes_per_token": round(
            all_counts[f"{WORKER}_row_bytes_total"] / max(1, computed - shared + generated)
        ),
    }


def kv_blocks_gained(manifest: Manifest) -> tuple[int, int]:
    """KV blocks in the memory that remote rows free, and in the worker's default KV cache."""
    shape, dtype = open_checkpoint(CHECKPOINT).config, torch.float32
    rows = manifest.num_records - capacity_for(manifest, int(manifest.table_bytes * CACHE_SHARE))
    default = WorkerConfig.model_fields["kv_cache_megabytes"].default
    return (
        blocks_of(shape, rows * manifest.record_bytes, dtype),
        blocks_of(shape, int(default * 1e6), dtype),
    )


def replay_all(system: System, ids: np.ndarray, effort: Effort) -> list[Slice]:
    """Set the load of every trace, and replay slices of all traces in turn."""
    warm_up(system)
    ones, slices = list[TraceLoad](), list[Slice]()
    half = effort.pairs * len(traces.FILES) // 2
    replays = len(traces.FILES) * (effort.trials + 2 * effort.pairs)
    with tqdm(total=replays, desc="slices", leave=False) as bar:
        for name in traces.FILES:
            trace = traces.scaled(traces.load(name), CONTEXT)
            tested = unloaded(system, trace, ids, effort)
            ones.append(tested)
            for trial in range(effort.trials):
                answers = system.replay(RESIDENT, tested.slice(ids, _TRIAL + trial))
                tested.steer(tested.good(answers), 4.0 / (trial + 1) ** 0.5)
                bar.update()
            bar.write(
                f"{name:10} lengths / {trace.factor:.2f}, {trace.cut} of {len(trace.requests)} "
                f"requests cut; {tested.count} requests a slice; limits: first token "
                f"{tested.first_token * 1e3:.0f} ms, others {tested.between * 1e3:.1f} ms"
            )
        for number, tested in zip(range(effort.pairs * len(ones)), cycle(ones), strict=False):
            speed = tested.speed
            one = measure(system, tested, ids, number, half, effort.seconds / 3)
            slices.append(one)
            bar.write(
                f"{one.trace:10} {speed:6.2f} × its speed, {one.sent:3} sent; good: resident "
                f"{one.good[RESIDENT]:3}, remote {one.good[REMOTE]:3}; wait per step: p50 "
                f"{percentile(one.counts, 50):.2f} ms, p99 {percentile(one.counts, 99):.2f} ms; "
                f"{hit_rate(one.counts):.1%} cached{', faults' * one.faults}"
                f"{''.join(f', failed: {n} × {error}' for error, n in one.errors.items())}"
            )
            bar.update(2)
    return slices


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="short slices; takes 3 minutes")
    text = f"file of the picture; its data is written beside it (default {PICTURE})"
    parser.add_argument("--picture", type=Path, default=PICTURE, help=text)
    options = parser.parse_args()
    effort, started = QUICK if options.quick else FULL, time.monotonic()
    with server_side() as host:
        source, path = foreign()
        tokenizer = open_checkpoint(CHECKPOINT).tokenizer()
        ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8")).ids)
        print(f"text: {source}, {len(ids)} tokens; context: {CONTEXT} tokens")
        with running(host) as system:
            result = summary(replay_all(system, ids, effort))
            manifest = system.manifest
        gained, had = kv_blocks_gained(manifest)
        print(f"rows free memory for {gained} KV blocks; the KV cache has {had}")
        known = ids, manifest.vocab_size, manifest.frequent
        pareto.draw(pareto.measure(*known, host, quick=options.quick), options.picture)
    result |= {
        "kv_blocks_gained": gained,
        "kv_blocks": had,
        "killed_with_unread_bytes": system.unread,
        "isolated": host.isolated,
        "picture": str(options.picture),
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
