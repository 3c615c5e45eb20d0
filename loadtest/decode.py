"""The worker's engine, side by side: `python -m loadtest.decode [--preset 250m] [--quick]`.

A dense base model, a MemoryLLM of as many parameters whose rows come from a lookup service (int8, row cache of a tenth of
the table, two thirds of it hot in the service), and the same one with all rows resident run in turn, a few steps each, in one process: the ratios within a run mean
something, the times of two runs do not. Weights are random; token ids are replayed from real text, so that rows are asked
for as often as in real life. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from tolhouse import Client
from tolhouse.config import WorkerConfig
from tolhouse.engine.attention import PagedKVCache
from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.cpu.compiled import Compiled
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.engine import Engine
from tolhouse.engine.row_providers import NoRows, RowProvider, open_rows
from tolhouse.engine.runner import Runner
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.config import ModelConfig, preset
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import process

from loadtest.memory import memory_ratio
from loadtest.models import random_weights
from loadtest.replay import Contender
from loadtest.tables import alike
from loadtest.tables import load as load_table
from loadtest.text import trace

CPU = torch.device("cpu")
VOCABULARY = 32_768  # a BPE of the text at hand gives so many
PROMPT, ANSWER = 64, 64  # tokens
COMPILED = WorkerConfig.model_fields["compile_cache"].default
SLICE = 8  # steps of one contender before the next has its turn


class Measured(Contender):
    """One whose rates are kept, and who knows how many bytes of weights each token reads."""

    def __init__(self, name: str, engine: Engine, weight_bytes: int) -> None:
        super().__init__(name, engine)
        self.weight_bytes = weight_bytes
        self.rates: dict[int, list[float]] = {}  # tokens per second, by concurrency
        self.outside: dict[int, float] = {}  # share of a step that is not the model's forward


@contextmanager
def contenders(name: str, folder: Path, frequent: tuple[int, ...]) -> Iterator[list[Measured]]:
    """Base, MemoryLLM with remote rows, MemoryLLM with resident rows, over a lookup service with a table of its own."""
    shapes = [
        preset(name, kind, vocab_size=VOCABULARY, max_position_embeddings=8192)
        for kind in ("base", "memory")
    ]
    manifest = alike(shapes[1], "int8", frequent)
    url = f"file://{folder / 'tables'}"
    compilers = {shape.kind: Compiled(shape, torch.float32, COMPILED) for shape in shapes}
    with ExitStack() as stack:
        for compiled in compilers.values():
            compiled.start()
            stack.callback(compiled.stop)
        with closing(open_store(url)) as store:
            load_table(store, manifest)
            publish(store, manifest.ref)
        lookup = stack.enter_context(
            process(
                "lookup",
                "--store",
                url,
                "--listen",
                "127.0.0.1:0",
                "--hot-megabytes",
                f"{manifest.table_bytes / 1.5e6:.0f}",
            )
        )
        client = stack.enter_context(Client(lookup.address))
        found = []
        for title, shape, cached in (
            ("dense base model", shapes[0], 0),
            ("remote rows", shapes[1], 0.1),
            ("resident rows", shapes[1], 1),
        ):
            rows: RowProvider = NoRows(shape.hidden_size, CPU)
            if cached:
                rows = open_rows(client.rows, manifest, int(manifest.table_bytes * cached), CPU)
                rows.fill()
                if cached == 1:
                    for part in np.array_split(np.arange(VOCABULARY, dtype=np.uint32), 64):
                        rows.stage(part)
            cache = BlockManager(max(64 * (PROMPT + ANSWER), 2 * 4352) // BLOCK_TOKENS)
            pages = PagedKVCache(shape, cache.num_blocks, CPU, torch.float32)
            (
                pages.keys.zero_(),
                pages.values.zero_(),
            )  # as in a worker that has long used all of them
            model = load(
                Checkpoint(random_weights(folder / shape.kind, shape), shape), CPU, torch.float32
            )
            compilers[shape.kind].attach(model)
            engine = Engine(Runner(model, pages, rows), rows, cache, 64, 1000, 512)
            found.append(Measured(title, engine, read_bytes(shape)))
        assert all(compiled.wait() for compiled in compilers.values()), "there is no compiler"
        yield found


def read_bytes(shape: ModelConfig) -> int:
    """Bytes of 16-bit weights that a token's forward reads: every matrix but the embedding, of which it reads one row."""
    attention = 4 * shape.hidden_size**2
    ffn = (
        3 * shape.hidden_size * shape.intermediate_size
        if shape.kind == "base"
        else shape.beta * shape.hidden_size**2
    )
    return 2 * (shape.num_hidden_layers * (attention + ffn) + shape.vocab_size * shape.hidden_size)


def decoding(
    found: list[Measured], ids: np.ndarray, concurrency: int, rounds: int
) -> dict[str, float]:
    """Tokens per second of each, by slices in turn; a ratio is the median over slices that ran one after the other."""
    length = PROMPT + ANSWER
    seconds = np.zeros((len(found), 2))
    for one in found:
        one.rates[concurrency] = []
    for number in range(rounds):
        at = (np.arange(concurrency) + number * concurrency) * length * 3 % (len(ids) - length)
        texts = [ids[start : start + length].tolist() for start in at]
        for one in found:
            one.start([text[:PROMPT] for text in texts], [text[PROMPT:] for text in texts])
            one.until_decoding()
        before = np.array([(one.engine.step_seconds, one.engine.forward_seconds) for one in found])
        while found[0].engine.running:
            for one in found:
                one.rates[concurrency].append(one.rate(SLICE))
        seconds += (
            np.array([(one.engine.step_seconds, one.engine.forward_seconds) for one in found])
            - before
        )
    for one, (step, forward) in zip(found, seconds, strict=True):
        one.outside[concurrency] = 1 - forward / step
        rate = statistics.median(one.rates[concurrency])
        print(
            f"  {concurrency:3} sequences  {one.name:18} {rate:8.1f} tokens/s   outside the forward {one.outside[concurrency]:.1%}"
        )
    base, remote, resident = (np.array(one.rates[concurrency]) for one in found)
    return {
        f"speedup_c{concurrency}": float(np.median(remote / base)),
        f"remote_vs_resident_c{concurrency}": float(np.median(remote / resident)),
    }


def prefilling(found: list[Measured], ids: np.ndarray, length: int, rounds: int) -> float:
    """How fast a prompt of so many tokens is with remote rows against resident ones: median over prompts in turn."""
    times: dict[str, list[float]] = {one.name: [] for one in found[1:]}
    for number in range(rounds):
        start = (number * 7919 + 137 * length) % (len(ids) - length)
        for one in found[1:]:
            one.start([ids[start : start + length].tolist()], [[0]])
            times[one.name].append(one.until_done())
    for name, values in times.items():
        print(
            f"  prompt of {length:4}  {name:18} {length / statistics.median(values):8.0f} tokens/s"
        )
    remote, resident = (np.array(t) for t in times.values())
    return float(np.median(resident / remote))


def memory_bandwidth(block: torch.Tensor) -> float:
    """Bytes per second at which all threads together read memory."""
    started = time.perf_counter()
    block.sum()
    return block.nbytes / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset",
        default="250m",
        choices=("demo", "250m", "750m", "1b"),
        help="shape of the models (default 250m)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds, and no workers of the 1b preset for their memory: within 90 seconds",
    )
    options = parser.parse_args()
    source, ids, frequent = trace(VOCABULARY)
    print(
        f"{options.preset}, vocabulary {VOCABULARY}, {source}, prompts of {PROMPT} and answers of {ANSWER} tokens, {torch.get_num_threads()} threads"
    )
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="tolhouse-decode-") as folder, torch.inference_mode():
        with contenders(options.preset, Path(folder), frequent) as found:
            block = torch.ones(2**27)  # half a gigabyte
            bandwidths = [memory_bandwidth(block) for _ in range(10)]
            result |= decoding(found, ids, 1, 1 if options.quick else 6)
            bandwidths += [memory_bandwidth(block) for _ in range(10)]
            for concurrency, rounds in ((8, 4), (32, 3)):
                result |= decoding(found, ids, concurrency, 1 if options.quick else rounds)
            prompts = {
                length: prefilling(found, ids, length, 1 if options.quick else 5)
                for length in (1024, 4096)
            }
            result["remote_prefill_vs_resident"] = min(prompts.values())
            remote = found[1]
            bandwidth = statistics.median(bandwidths)
            result["bandwidth_fraction"] = (
                statistics.median(remote.rates[1]) * remote.weight_bytes / bandwidth
            )
            result["host_overhead"] = remote.outside[8]
            print(
                f"  memory is read at {bandwidth / 1e9:.1f} GB/s; a token reads {remote.weight_bytes / 1e6:.0f} MB of weights"
            )
            tokens = {
                f"tokens_per_s_{one.name.split()[0]}_c{c}": statistics.median(one.rates[c])
                for one in found
                for c in (1, 8, 32)
            }
    if not options.quick:
        result |= {
            f"memory_ratio_{'tied' if tied else 'untied'}": memory_ratio("1b", tied=tied)
            for tied in (True, False)
        }
    print(json.dumps({k: round(v, 3) for k, v in {**result, **tokens}.items()}))


if __name__ == "__main__":
    main()
