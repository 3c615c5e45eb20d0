"""Start a system with an empty Redis from a backup in files.

    python -m loadtest.coldstart [--quick]

Redis, a lookup service with `--refill`, and a worker start at once, as in a deployment. The lookup
service loads the table from the files into Redis, publishes it and fills its hot rows. The output
is a timeline from the start of the processes to the first token and to compiled decoding, and a
final line of JSON with the seconds of each stage: since the start (`at`), and since the stage that
it waits for (`took`). Weights and rows have the shape of the 250m preset and random values.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from tolhouse import Client
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.config import preset
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.table.manifest import Manifest
from tolhouse.testing import Process, free_port, process, redis_server, wait_until

from loadtest.capacity import drop_page_cache
from loadtest.tables import alike, load
from loadtest.weights import zero_weights

# Each stage, and the stage that it waits for.
STAGES = {
    "redis_ready": "",
    "lookup_ready": "redis_ready",
    "table_loaded": "lookup_ready",
    "published": "table_loaded",
    "first_row": "published",
    "hot_rows_filled": "published",
    "worker_ready": "published",
    "first_token": "worker_ready",
    "decoding_compiled": "worker_ready",
}
_WIDTH, _LIMIT = 60, 600.0  # characters of the longest bar; seconds


class Timeline:
    """The time of each stage, in seconds since the timeline was made."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}
        self._started = time.perf_counter()

    def mark(self, stage: str) -> None:
        self.at[stage] = time.perf_counter() - self._started

    def wait(self, stage: str, condition: Callable[[], object]) -> None:
        wait_until(condition, stage, _LIMIT)
        self.mark(stage)

    def took(self) -> dict[str, float]:
        """The seconds of each stage since the stage that it waits for."""
        return {stage: at - self.at.get(STAGES[stage], 0.0) for stage, at in self.at.items()}

    def show(self) -> None:
        scale, took = _WIDTH / max(self.at.values()), self.took()
        for stage in filter(self.at.get, STAGES):
            end = self.at[stage]
            before = round((end - took[stage]) * scale)
            bar = " " * before + "█" * max(1, round(end * scale) - before)
            print(f"  {stage:18} {end:7.2f} s  +{took[stage]:6.2f}  {bar}")


def run(vocabulary: int, *, compiled: bool) -> Timeline:
    shape = preset("250m", "memory", vocab_size=vocabulary)
    with tempfile.TemporaryDirectory(prefix="tolhouse-coldstart-") as name:
        folder = Path(name)
        path = zero_weights(folder / "model", shape)
        checkpoint = Checkpoint(path, shape, path.name)
        manifest = alike(shape, "int8", tuple(range(8192)), checkpoint.model_id())
        manifest = replace(manifest, tokenizer_id=checkpoint.tokenizer_id)
        backup = f"file://{folder / 'backup'}"
        with closing(open_store(backup)) as store:
            load(store, manifest)
            publish(store, manifest.ref)
        drop_page_cache(folder)
        print(
            f"{manifest.table_bytes / 1e6:.0f} MB in {manifest.num_shards} shards from files to "
            "Redis, and a worker of the 250m preset"
        )
        return _start(manifest, path, backup, folder / "compiled", compiled=compiled)


def _start(
    manifest: Manifest, model: Path, backup: str, cache: Path, *, compiled: bool
) -> Timeline:
    redis_port, lookup = free_port(), f"127.0.0.1:{free_port()}"
    url = f"redis://127.0.0.1:{redis_port}"
    wait = "--store-wait-seconds", "60"
    lookup_options = "--store", url, "--refill", backup, "--listen", lookup, *wait
    worker_options: tuple[str, ...]
    worker_options = "--rows", lookup, "--table", manifest.name, "--listen", "127.0.0.1:0"
    worker_options += "--lookup-wait-seconds", f"{_LIMIT}", "--compile-cache", str(cache)
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        timeline = Timeline()

        def start(stage: str, *arguments: str) -> Process:
            running = stack.enter_context(process(*arguments))
            timeline.mark(stage)
            return running

        starting = pool.submit(start, "lookup_ready", "lookup", *lookup_options)
        worker = pool.submit(start, "worker_ready", "worker", str(model), *worker_options)
        stack.enter_context(redis_server(port=redis_port))
        timeline.mark("redis_ready")
        store = stack.enter_context(closing(open_store(url)))
        client = stack.enter_context(Client(lookup))
        waits: dict[str, Callable[[], object]] = {
            "table_loaded": lambda: manifest.ref in store.refs(),
            "published": lambda: store.alias(manifest.name),
            "first_row": lambda: len(client.fetch(manifest.name, [0])),
            "hot_rows_filled": partial(_logged, starting.result(), "hot rows filled"),
        }
        list(pool.map(timeline.wait, waits, waits.values()))
        with Client(worker.result().address) as generating:
            next(iter(generating.generate([1, 2, 3], 1, ignore_eos=True)))
            timeline.mark("first_token")
        if compiled:
            done = partial(_logged, worker.result(), "decoding is compiled")
            timeline.wait("decoding_compiled", done)
    return timeline


def _logged(running: Process, message: str) -> bool:
    return message in running.log.read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smaller table, without the wait for the compiler"
    )
    quick = parser.parse_args().quick
    timeline = run(16_384 if quick else 128_256, compiled=not quick)
    timeline.show()
    found = {"at": timeline.at, "took": timeline.took()}
    rounded = {k: {stage: round(s, 2) for stage, s in v.items()} for k, v in found.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
