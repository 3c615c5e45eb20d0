"""Compare the worker's engine with MemoryLLM rows and with a dense model.

    python -m loadtest.decode [--preset 250m] [--device auto] [--quick]

There are four contenders. `base` is a dense model. The others are a MemoryLLM of the same size with
int8 rows. `remote` fetches rows over TCP from a lookup service, which runs in namespaces of its own
behind a network (loadtest/isolation.py) and holds two thirds of the rows in memory. The row cache
of `remote` has a tenth of the table. `file` reads rows from files with the same cache. `resident`
keeps all rows in memory. The contenders run in turn, so that ratios within a run are meaningful;
times of different runs are not comparable. Weights are random. Token ids come from real text, so
that rows repeat as in real use. A CPU computes in float32 with compiled code, and a GPU in bfloat16
with CUDA graphs. The output is a table and a final line of JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tolhouse.client.row_source import RowSource
from tolhouse.config import WorkerConfig
from tolhouse.engine.attention import PagedKVCache
from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.cpu.compiled import CompiledDecode
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.engine import Engine
from tolhouse.engine.row_providers import CachedRows, NoRows, RowProvider
from tolhouse.engine.runner import GraphRunner, Runner
from tolhouse.engine.scheduler import Scheduler
from tolhouse.model.checkpoint import Checkpoint, torch_device, torch_dtype
from tolhouse.model.config import ModelConfig, preset
from tolhouse.table.manifest import Manifest
from tolhouse.testing import Host
from tolhouse.worker.run import STEP_TOKENS

from loadtest.isolation import server_side
from loadtest.memory import memory_ratio
from loadtest.replay import Contender, rates_in_turn, start_all
from loadtest.tables import alike, served
from loadtest.text import trace
from loadtest.weights import random_weights

VOCABULARY = 32_768  # of a BPE tokenizer trained on the text
PROMPT, ANSWER = 64, 64  # tokens
COMPILED = WorkerConfig.model_fields["compile_cache"].default
SLICE = 8  # steps of one contender before the next contender runs


@dataclass(frozen=True)
class Place:
    """Where engines compute: a device, and the dtype that a worker chooses for it."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str) -> "Place":
        device = torch_device(name)
        return cls(device, torch_dtype("auto", device))

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def synchronize(self) -> None:
        if not self.on_cpu:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        """Bytes of tensors on a GPU, or 0 on a CPU."""
        return 0 if self.on_cpu else torch.cuda.memory_allocated(self.device)

    def __str__(self) -> str:
        name = f"{torch.get_num_threads()} threads"
        if not self.on_cpu:
            name = torch.cuda.get_device_name(self.device)
        return f"{name}, {str(self.dtype).removeprefix('torch.')}"


CPU = Place(torch.device("cpu"), torch.float32)


class Measured(Contender):
    """A contender with its measured rates."""

    def __init__(self, name: str, engine: Engine, weight_bytes: int) -> None:
        super().__init__(name, engine)
        self.weight_bytes = weight_bytes  # bytes of weights that each token reads
        self.device_bytes = 0  # of weights, the KV cache and cached rows, on a GPU
        self.rates: dict[int, list[float]] = {}  # tokens per second, by concurrency
        self.waits: list[float] = []  # seconds that each decode step waited for rows
        # fraction of a step outside the model's forward, by concurrency
        self.outside: dict[int, float] = {}

    def step(self) -> None:
        before, scheduler = self.engine.rows.wait_seconds, self.engine.scheduler
        running = scheduler.running if not scheduler.waiting else []
        decodes = running and all(one.computed >= one.prompt_tokens for one in running)
        super().step()
        if decodes:
            self.waits.append(self.engine.rows.wait_seconds - before)

    @property
    def seconds(self) -> np.ndarray:
        return np.array([self.engine.step_seconds, self.engine.forward_seconds])


@contextmanager
def contenders(
    preset_name: str, folder: Path, frequent: tuple[int, ...], host: Host, place: Place
) -> Iterator[dict[str, Measured]]:
    """The contenders by name: base, remote, file, resident."""
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": 8192}
    base, memory = (preset(preset_name, kind, **limits) for kind in ("base", "memory"))
    manifest = alike(memory, "int8", frequent)
    models: dict[str, Checkpoint] = {
        s.kind: Checkpoint(random_weights(folder / s.kind, s), s, s.kind) for s in (base, memory)
    }
    compiled: dict[str, CompiledDecode] = {}
    if place.on_cpu:
        compiled = {k: CompiledDecode(one, place.dtype, COMPILED) for k, one in models.items()}
    with ExitStack() as stack:
        for one in compiled.values():
            one.start()
            stack.callback(one.stop)
        hot_megabytes = manifest.table_bytes / 1.5e6
        sources = stack.enter_context(served(folder / "tables", manifest, hot_megabytes, host))
        rows: dict[str, RowProvider] = {
            "base": NoRows(base.hidden_size, place.device),
            "remote": rows_of(sources["remote"], manifest, 0.1, place),
            "file": rows_of(sources["file"], manifest, 0.1, place),
            "resident": rows_of(sources["file"], manifest, 1, place),
        }
        engines = {}
        for name, provider in rows.items():
            kind, before = "base" if name == "base" else "memory", place.allocated()
            engines[name] = engine_of(models[kind], provider, compiled.get(kind), name, place)
            cached = 0 if place.on_cpu else provider.records.nbytes
            engines[name].device_bytes = place.allocated() - before + cached
        assert all(one.wait() for one in compiled.values()), (
            "decoding was not compiled: no C++ compiler found"
        )
        yield engines


def rows_of(source: RowSource, manifest: Manifest, share: float, place: Place = CPU) -> CachedRows:
    """Rows with a filled cache of a fraction of the table."""
    cache_bytes = int(manifest.table_bytes * share)
    rows = CachedRows(source, manifest, cache_bytes, place.device, place.dtype)
    rows.fill()
    if share == 1:
        for part in np.array_split(np.arange(manifest.vocab_size, dtype=np.uint32), 64):
            rows.stage(part)
    return rows


def engine_of(
    checkpoint: Checkpoint,
    rows: RowProvider,
    compiled: CompiledDecode | None,
    name: str,
    place: Place = CPU,
) -> Measured:
    shape = checkpoint.config
    cache = BlockManager(max(64 * (PROMPT + ANSWER), 2 * 4352) // BLOCK_TOKENS)
    pages = PagedKVCache(shape, cache.num_blocks + 1, place.device, place.dtype)
    pages.keys.zero_()  # touches every page of memory, as in a worker that has run for a long time
    pages.values.zero_()
    model = load(checkpoint, place.device, place.dtype)
    if compiled:
        compiled.attach(model)
    runner = (Runner if place.on_cpu else GraphRunner)(model, pages, rows)
    engine = Engine(runner, Scheduler(cache, 64, STEP_TOKENS[place.device.type]), 1000)
    return Measured(name, engine, read_bytes(shape))


def read_bytes(shape: ModelConfig) -> int:
    """Bytes of 16-bit weights that one token's forward reads: all matrices except the embedding."""
    size = shape.hidden_size
    ffn = 3 * size * shape.intermediate_size if shape.kind == "base" else shape.beta * size**2
    return 2 * (shape.num_hidden_layers * (4 * size**2 + ffn) + shape.vocab_size * size)


def decoding(
    measured: dict[str, Measured], ids: np.ndarray, concurrency: int, rounds: int
) -> dict[str, float]:
    """Run all contenders in interleaved slices and return the median ratios of their tokens per
    second."""
    length, ones = PROMPT + ANSWER, list(measured.values())
    seconds = np.zeros((len(ones), 2))
    for one in ones:
        one.rates[concurrency], one.waits = [], []
    for number in range(rounds):
        at = (np.arange(concurrency) + number * concurrency) * length * 3 % (len(ids) - length)
        texts = [ids[start : start + length].tolist() for start in at]
        start_all(texts, PROMPT, *ones)
        before = np.array([one.seconds for one in ones])
        for one, found in zip(ones, rates_in_turn(SLICE, *ones), strict=True):
            one.rates[concurrency] += found
        seconds += np.array([one.seconds for one in ones]) - before
    for one, (step, forward) in zip(ones, seconds, strict=True):
        one.outside[concurrency] = 1 - forward / step
        rate = f"{statistics.median(one.rates[concurrency]):8.1f} tokens/s"
        half, most = (wait_ms(one, percent) for percent in (50, 99))
        about = f"rows waited for {half:.2f} ms, at most {most:.2f} ms in 99 % of steps"
        print(f"  {concurrency:3} sequences  {one.name:9} {rate}   {about}")
    rates = {name: np.array(one.rates[concurrency]) for name, one in measured.items()}
    waits = {
        f"{name}_row_wait_ms_p{percent}_c{concurrency}": wait_ms(measured[name], percent)
        for name in ("remote", "file")
        for percent in (50, 99)
    }
    return waits | {
        f"{key}_c{concurrency}": float(np.median(rates[one] / rates[other]))
        for key, one, other in (
            ("speedup", "remote", "base"),
            ("remote_vs_resident", "remote", "resident"),
            ("file_vs_resident", "file", "resident"),
        )
    }


def wait_ms(one: Measured, percent: int) -> float:
    """A percentile of the time that a decode step waited for rows."""
    return 1000 * float(np.percentile(one.waits, percent))


def prefilling(
    measured: dict[str, Measured], ids: np.ndarray, length: int, rounds: int
) -> tuple[float, float]:
    """Prompt speed with remote rows and with rows from files, relative to resident rows."""
    times: dict[str, list[float]] = {name: [] for name in ("remote", "file", "resident")}
    for number in range(rounds):
        start = (number * 7919 + 137 * length) % (len(ids) - length)
        for name, values in times.items():
            measured[name].start([ids[start : start + length].tolist()], [[0]])
            values.append(measured[name].until_done())
    for name, values in times.items():
        rate = f"{length / statistics.median(values):8.0f} tokens/s"
        print(f"  prompt of {length:4}  {name:9} {rate}")
    remote, file, resident = (np.array(values) for values in times.values())
    return float(np.median(resident / remote)), float(np.median(resident / file))


def measure(
    measured: dict[str, Measured], ids: np.ndarray, place: Place, *, quick: bool
) -> dict[str, float]:
    block, seconds = torch.ones(2**27, device=place.device), []  # half a gigabyte
    for _ in range(20):
        started = time.perf_counter()
        block.sum()
        place.synchronize()
        seconds.append(time.perf_counter() - started)
    bandwidth = block.nbytes / statistics.median(seconds)
    result = decoding(measured, ids, 1, 1 if quick else 6)
    for concurrency, rounds in ((8, 4), (32, 3)):
        result |= decoding(measured, ids, concurrency, 1 if quick else rounds)
    prompts = [prefilling(measured, ids, n, 1 if quick else 5) for n in (1024, 4096)]
    remote = measured["remote"]
    weights = f"{remote.weight_bytes / 1e6:.0f} MB of weights per token"
    print(f"  memory bandwidth {bandwidth / 1e9:.1f} GB/s, {weights}")
    result |= {
        "remote_prefill_vs_resident": min(values[0] for values in prompts),
        "file_prefill_vs_resident": min(values[1] for values in prompts),
        "bandwidth_fraction": statistics.median(remote.rates[1]) * remote.weight_bytes / bandwidth,
    }
    if place.on_cpu:  # a GPU still computes when the forward returns
        result["host_overhead"] = remote.outside[8]
    for name, one in measured.items():
        if one.device_bytes:
            result[f"gpu_gb_{name}"] = one.device_bytes / 1e9
        for concurrency, rates in one.rates.items():
            result[f"tokens_per_s_{name}_c{concurrency}"] = statistics.median(rates)
    return result


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    presets = "demo", "250m", "750m", "1b"
    parser.add_argument(
        "--preset", default="250m", choices=presets, help="model shape (default 250m)"
    )
    where = "cpu, cuda or auto: cuda if there is a GPU (default auto)"
    parser.add_argument("--device", default="auto", help=where)
    text = "fewer rounds and no memory measurement of the 1b preset; takes 90 seconds"
    parser.add_argument("--quick", action="store_true", help=text)
    options = parser.parse_args()
    with server_side() as host:
        place = Place.of(options.device)
        source, ids, frequent = trace(VOCABULARY)
        print(
            f"{options.preset}, {VOCABULARY} tokens, {source}, "
            f"{PROMPT} + {ANSWER} tokens per sequence, {place}"
        )
        with (
            tempfile.TemporaryDirectory(prefix="tolhouse-decode-", dir=host.folder) as folder,
            torch.inference_mode(),
            contenders(options.preset, Path(folder), frequent, host, place) as measured,
        ):
            result = measure(measured, ids, place, quick=options.quick)
        if not options.quick and place.on_cpu:
            for tied in (True, False):
                key = f"memory_ratio_{'tied' if tied else 'untied'}"
                result[key] = memory_ratio("1b", host, tied=tied)
        result = {key: round(value, 3) for key, value in result.items()}
        print(json.dumps(result | {"isolated": host.isolated}))


if __name__ == "__main__":
    main()
