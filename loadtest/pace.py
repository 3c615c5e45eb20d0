"""Measure the cost of fetching rows at an accelerator's speed: `python -m loadtest.pace [--quick]`.

The engine's scheduler and row cache (a tenth of the table) read rows from a lookup service over TCP
and from files. The service runs in namespaces of its own, behind a network (loadtest/isolation.py).
The model's forward is replaced by a wait of fixed length, which stands in for a GPU and leaves the
cores free. Rows have the shape of the 1b preset in int8, token ids come from real text, and 64
sequences run at once. Tokens per second are compared with those of the same engine without rows, in
interleaved slices. The output is a table, with each source's misses and bytes per step, and a final
line of JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tolhouse import Manifest
from tolhouse.client.row_source import RowSource
from tolhouse.engine.block_manager import BlockManager
from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.engine import Engine
from tolhouse.engine.row_providers import CachedRows, NoRows, RowProvider
from tolhouse.engine.scheduler import ScheduledChunk, Scheduler
from tolhouse.model.config import preset
from tolhouse.testing import Host
from torch import Tensor

from loadtest.isolation import server_side
from loadtest.replay import Contender, rates_in_turn, start_all
from loadtest.tables import alike, served
from loadtest.text import trace

CPU = torch.device("cpu")
VOCABULARY, SEQUENCES, PROMPT, ANSWER = 32_768, 64, 32, 160
_POLLED = 5e-4  # seconds; the end of a wait is polled, because a sleep wakes up late
LAYERS = 24
SLICE = 40  # steps of one contender before the next contender runs
PREFILL_TOKENS, PREFILL_RATE = 4096, 50_000


class Paced:
    """A runner whose forward takes time but no processor. Rows are needed after the first of LAYERS
    layers."""

    def __init__(self, rows: RowProvider, seconds: Callable[[int], float]) -> None:
        self.rows, self.seconds, self.until = rows, seconds, 0.0

    def launch(self, step: list[ScheduledChunk]) -> tuple[float, int]:
        self.wait()
        return time.perf_counter(), sum(chunk.last - chunk.first for chunk in step)

    def finish(self, begun: tuple[float, int], staged: StagedRows) -> Tensor:
        started, tokens = begun
        first = self.seconds(tokens) / LAYERS
        self.until = max(time.perf_counter(), started + first) + (LAYERS - 1) * first
        return torch.zeros(tokens, 1)

    def move(self, step: list[ScheduledChunk]) -> None:
        """There are no keys and values to move."""

    def logits(self, hidden_TD: Tensor) -> Tensor:
        self.wait()
        return hidden_TD

    def wait(self) -> None:
        left = self.until - time.perf_counter()
        if left > _POLLED:
            time.sleep(left - _POLLED)
        while time.perf_counter() < self.until:
            pass


def engine(rows: RowProvider, seconds: Callable[[int], float]) -> Engine:
    scheduler = Scheduler(BlockManager(8192), SEQUENCES, 512)
    return Engine(Paced(rows, seconds), scheduler, 1000)  # type: ignore[arg-type] # as a Runner


def paced(
    sources: dict[str, RowSource],
    manifest: Manifest,
    ids: np.ndarray,
    milliseconds: float,
    rounds: int,
) -> dict[str, float]:
    """By source, the median ratio of tokens per second with rows to tokens per second without."""
    rows = {name: rows_of(source, manifest) for name, source in sources.items()}
    for provider in rows.values():
        provider.fill()
    filled = {name: _fetched(one) for name, one in rows.items()}
    providers: dict[str, RowProvider] = {"no rows": NoRows(1, CPU), **rows}
    seconds = milliseconds / 1e3
    found = [Contender(n, engine(r, lambda _: seconds)) for n, r in providers.items()]
    rates: dict[str, list[float]] = {name: [] for name in providers}
    length = PROMPT + ANSWER
    for number in range(rounds):
        at = (np.arange(SEQUENCES) + number * SEQUENCES) * length % (len(ids) - length)
        texts = [ids[start : start + length].tolist() for start in at]
        start_all(texts, PROMPT, *found)
        for one, more in zip(found, rates_in_turn(SLICE, *found), strict=True):
            rates[one.name] += more
    bare = np.array(rates["no rows"])
    print(f"  forward of {milliseconds:g} ms: no rows {np.median(bare):7.0f} tokens/s")
    for one in found[1:]:
        provider = rows[one.name]
        counts, rate = provider.counts(), statistics.median(rates[one.name])
        misses, steps = _fetched(provider) - filled[one.name], one.engine.steps
        cached = counts["from_cache"] / (counts["from_cache"] + misses)
        size, wait = provider.manifest.record_bytes * misses / steps, counts["wait_seconds"] / steps
        print(f"    {one.name:6} {rate:7.0f} tokens/s, {cached:.1%} of distinct rows cached")
        waited = f"{wait * 1e3:.2f} ms of wait"
        print(f"{'':11}{misses / steps:.1f} misses, {size:,.0f} bytes and {waited} per step")
        provider.close()
    return {name: float(np.median(np.array(rates[name]) / bare)) for name in rows}


def _fetched(rows: CachedRows) -> float:
    """The number of rows read from the source."""
    counts = rows.counts()
    return counts["from_remote"] + counts["from_file"]


def paced_prefill(
    sources: dict[str, RowSource], manifest: Manifest, ids: np.ndarray, rounds: int
) -> dict[str, float]:
    """The same ratio for one long prompt with an empty row cache."""
    times: dict[str, list[float]] = {name: [] for name in ("no rows", *sources)}
    for number in range(rounds):
        prompt = ids[number * PREFILL_TOKENS : (number + 1) * PREFILL_TOKENS].tolist()
        for name, seconds in times.items():
            rows = rows_of(sources[name], manifest) if name in sources else NoRows(1, CPU)
            one = Contender(name, engine(rows, lambda tokens: tokens / PREFILL_RATE))
            one.start([prompt], [[0]])
            seconds.append(one.until_done())
            rows.close()
    shown = ", ".join(f"{name} {statistics.median(t) * 1e3:.0f} ms" for name, t in times.items())
    print(f"  cold prompt of {PREFILL_TOKENS} at {PREFILL_RATE} tokens/s: {shown}")
    bare = np.array(times["no rows"])
    return {name: float(np.median(bare / np.array(times[name]))) for name in sources}


def rows_of(source: RowSource, manifest: Manifest) -> CachedRows:
    return CachedRows(source, manifest, manifest.table_bytes // 10, CPU)


def measure(hot_megabytes: float, host: Host, *, quick: bool) -> dict[str, float]:
    source, ids, frequent = trace(VOCABULARY)
    manifest = alike(preset("1b", "memory", vocab_size=VOCABULARY), "int8", frequent)
    size = f"rows of {manifest.record_bytes} bytes, table of {manifest.table_bytes / 1e9:.1f} GB"
    kept = f"caches: a tenth in the worker, {hot_megabytes:g} MB in the service"
    print(f"{source}, {SEQUENCES} sequences, {size}, {kept}")
    with (
        tempfile.TemporaryDirectory(prefix="tolhouse-pace-", dir=host.folder) as folder,
        served(Path(folder), manifest, hot_megabytes, host) as sources,
        torch.inference_mode(),
    ):
        rounds = 1 if quick else 3
        # each measurement reads new text; the warm-up puts the service into the state of long use
        part = rounds * SEQUENCES * (PROMPT + ANSWER)
        print("warm-up, not counted:")
        paced(sources, manifest, ids, 1, rounds)
        result = {}
        for at, milliseconds in ((1, 10), (2, 3)):
            ratios = paced(sources, manifest, ids[at * part :], milliseconds, rounds)
            result[f"paced_{milliseconds}ms"] = ratios["remote"]
            result[f"paced_file_{milliseconds}ms"] = ratios["file"]
        ratios = paced_prefill(sources, manifest, ids[3 * part :], 3)
        result |= {"paced_prefill": ratios["remote"], "paced_file_prefill": ratios["file"]}
    return {key: round(value, 3) for key, value in result.items()}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds; takes less than 90 seconds"
    )
    text = "the lookup service's memory for hot rows, in MB (default 1000)"
    parser.add_argument("--hot-megabytes", type=float, default=1000, help=text)
    options = parser.parse_args()
    with server_side() as host:
        result = measure(options.hot_megabytes, host, quick=options.quick)
        print(json.dumps(result | {"isolated": host.isolated}))


if __name__ == "__main__":
    main()
