"""The engine's throughput with several row sources, at several numbers of concurrent users.

A point is the tokens per second of one user against those of all users, as InferenceX draws it.

The contenders are a dense model and a MemoryLLM of the same size with int8 rows, which are resident
or come from files, from Redis, or from a lookup service. They have random weights and replay real
text. All but `resident` cache a tenth of the rows. They run in turn. If llama.cpp's
`llama-batched-bench` is on the PATH, it runs the dense model too.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.cpu.compiled import CompiledDecode
from tolhouse.engine.row_providers import NoRows, RowProvider
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.config import preset
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import Host, redis_server
from tqdm import tqdm

from loadtest import llama_cpp
from loadtest.decode import COMPILED, CPU, Measured, engine_of, rows_of
from loadtest.tables import TRUSTED, alike, load, service
from loadtest.weights import random_weights

PROMPT, ANSWER, CONTEXT = 64, 64, 2048  # tokens
THREADS = max(1, (os.cpu_count() or 1) - 1)  # one core is for Redis and the lookup service
CACHE_SHARE, HOT_SHARE = 0.1, 2 / 3  # of the table: in the engine, and in the lookup service
Rates = tuple[float, float]  # tokens per second of one user after the prompt, and of all users


class Point(TypedDict):
    """One contender at one concurrency, in tokens per second."""

    contender: str
    users: int
    per_user: float  # after the first token
    total: float  # includes the time of the prompts
    shape: str  # the name of the preset


@contextmanager
def contenders(
    shape: str, vocabulary: int, frequent: tuple[int, ...], folder: Path, host: Host
) -> Iterator[dict[str, Measured]]:
    """The engines by name. `shape` is the name of a preset."""
    limits = {"vocab_size": vocabulary, "max_position_embeddings": CONTEXT}
    models, compiled = dict[str, Checkpoint](), dict[str, CompiledDecode]()
    with ExitStack() as stack:
        for kind in ("base", "memory"):
            config = preset(shape, kind, **limits)
            models[kind] = Checkpoint(random_weights(folder / kind, config), config, kind)
            compiled[kind] = CompiledDecode(models[kind], torch.float32, COMPILED)
            compiled[kind].start()
            stack.callback(compiled[kind].stop)
        manifest = alike(models["memory"].config, "int8", frequent)
        redis, files = stack.enter_context(redis_server(host=host)), f"file://{folder}/tables"
        for url in (redis, files):
            with closing(open_store(url)) as store:
                load(store, manifest)
                publish(store, manifest.ref)
        hot = manifest.table_bytes * HOT_SHARE / 1e6
        lookup = stack.enter_context(service(redis, hot, filled=True, host=host))
        urls = {"lookup over TCP": lookup.address, "redis://": redis, "file://": files}
        rows: dict[str, RowProvider] = {
            "dense": NoRows(models["base"].config.hidden_size, CPU.device)
        }
        for name, url in urls.items():
            source = stack.enter_context(closing(open_row_source(url, credentials=TRUSTED)))
            rows[name] = rows_of(source, manifest, CACHE_SHARE)
        rows["resident rows"] = rows_of(source, manifest, 1)
        engines = {}
        for name, provider in rows.items():
            kind = "base" if name == "dense" else "memory"
            engines[name] = engine_of(models[kind], provider, compiled[kind], name)
        for one in compiled.values():
            one.wait()
        yield engines


def run(one: Measured, texts: list[list[int]]) -> Rates:
    """Replay texts together."""
    one.start([text[:PROMPT] for text in texts], [text[PROMPT:] for text in texts])
    started = time.perf_counter()
    one.until_decoding()
    decoding = one.until_done()
    return ANSWER / decoding, len(texts) * ANSWER / (time.perf_counter() - started)


def measure(
    ids: np.ndarray, vocabulary: int, frequent: tuple[int, ...], host: Host, *, quick: bool
) -> list[Point]:
    """The points of all contenders. `ids` is the text, and caches begin with `frequent` tokens."""
    shape, levels, rounds = ("demo", (1, 4, 16), 2) if quick else ("250m", (1, 2, 4, 8, 16, 32), 3)
    torch.set_num_threads(THREADS)
    length, found = PROMPT + ANSWER, dict[tuple[str, int], list[tuple[float, float]]]()
    with (
        tempfile.TemporaryDirectory(prefix="tolhouse-pareto-") as folder,
        torch.inference_mode(),
        contenders(shape, vocabulary, frequent, Path(folder), host) as engines,
    ):
        runs: dict[str, Callable[[list[list[int]]], Rates]] = {
            name: partial(run, one) for name, one in engines.items()
        }
        if llama_cpp.available():
            dense = preset(shape, "base", vocab_size=vocabulary, max_position_embeddings=CONTEXT)
            model = llama_cpp.write_random(Path(folder, "dense.gguf"), dense)
            runs["dense, llama.cpp"] = partial(llama_cpp.run, model, PROMPT, ANSWER)
        rounds_of = [(users, number) for users in levels for number in range(rounds)]
        for users, number in tqdm(rounds_of, desc="pareto", leave=False):
            at = (np.arange(users) + number * users) * length * 3 % (len(ids) - length)
            texts = [ids[i : i + length].tolist() for i in at]
            for name, one in runs.items():
                found.setdefault((name, users), []).append(one(texts))
    points = []
    for (name, users), rates in found.items():
        user, total = (round(statistics.median(v), 1) for v in zip(*rates, strict=True))
        points.append(Point(contender=name, users=users, per_user=user, total=total, shape=shape))
        print(f"  {users:3} users  {name:16} {user:8.1f} tokens/s for one, {total:8.1f} for all")
    return points


def draw(points: list[Point], path: Path) -> None:
    """Draw the curves, and write the points beside the picture as JSON."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(point["contender"] for point in points):
        curve = [point for point in points if point["contender"] == name]
        style = "--" if name.startswith("dense") else "-"
        coordinates = zip(*((p["per_user"], p["total"]) for p in curve), strict=True)
        axes.plot(*coordinates, style, marker="o", markersize=4, label=name)
    users = ", ".join(str(n) for n in dict.fromkeys(point["users"] for point in points))
    threads = f"{THREADS} thread" + "s" * (THREADS > 1)
    axes.set_title(f"{points[0]['shape']}, {threads}, {users} concurrent users", fontsize=10)
    axes.set(xlabel="tokens/s per user", ylabel="tokens/s of all users", xlim=(0, None))
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    path.with_suffix(".json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
