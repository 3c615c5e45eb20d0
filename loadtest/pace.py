"""What rows cost a worker with an accelerator's pace: `python -m loadtest.pace [--quick]`.

The engine's own scheduler, row cache (a tenth of the table), client and a lookup service, under a forward that is a wait of so many milliseconds:
a stand-in for a GPU, which leaves the cores free. Rows have the 1b preset's shape in int8, token ids are replayed from real text, 64
sequences run at once. Tokens per second against the same engine without any rows, in turn. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
from tolhouse import Client, Manifest
from tolhouse.engine.block_manager import BlockManager
from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.engine import Engine
from tolhouse.engine.row_providers import CachedRows, NoRows, RowProvider, open_rows
from tolhouse.engine.scheduler import ScheduledChunk
from tolhouse.model.config import preset
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import process
from torch import Tensor

from loadtest.replay import Contender
from loadtest.tables import alike, load
from loadtest.text import trace

CPU = torch.device("cpu")
VOCABULARY, SEQUENCES, PROMPT, ANSWER = 32_768, 64, 32, 160
_POLLED = (
    5e-4  # seconds: who waits for a device polls it in the end, which is more punctual than a sleep
)
LAYERS = 24
SLICE = 40  # steps of one contender before the other has its turn
PREFILL_TOKENS, PREFILL_RATE = 4096, 50_000


class Paced:
    """A runner whose forward of a step takes so many seconds and no work. Rows are wanted when the first of LAYERS has attended."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds, self.until = seconds, 0.0

    def launch(self, step: list[ScheduledChunk]) -> tuple[float, int]:
        self.wait()
        return time.perf_counter(), sum(chunk.last - chunk.first for chunk in step)

    def finish(self, begun: tuple[float, int], staged: StagedRows) -> Tensor:
        started, tokens = begun
        seconds = self.seconds(tokens)
        self.until = max(time.perf_counter(), started + seconds / LAYERS) + seconds * (
            1 - 1 / LAYERS
        )
        return torch.zeros(tokens, 1)

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
    return Engine(Paced(seconds), rows, BlockManager(8192), SEQUENCES, 1000, 512)  # type: ignore[arg-type]


def paced(
    client: Client, manifest: Manifest, ids: np.ndarray, milliseconds: float, rounds: int
) -> float:
    """Tokens per second with rows over those without: median over slices in turn. The text begins with `ids`."""
    rows = open_rows(client.rows, manifest, manifest.table_bytes // 10, CPU)
    rows.fill()
    found = [
        Contender(name, engine(r, lambda _: milliseconds / 1e3))
        for name, r in (("no rows", NoRows(1, CPU)), ("remote rows", rows))
    ]
    rates: list[list[float]] = [[], []]
    length = PROMPT + ANSWER
    for number in range(rounds):
        at = (np.arange(SEQUENCES) + number * SEQUENCES) * length % (len(ids) - length)
        texts = [ids[start : start + length].tolist() for start in at]
        for one in found:
            one.start([text[:PROMPT] for text in texts], [text[PROMPT:] for text in texts])
            one.until_decoding()
        while found[0].engine.running:
            for one, mine in zip(found, rates, strict=True):
                mine.append(one.rate(SLICE))
    remote = found[1].engine
    counts = rows.counts()
    share = counts["from_cache"] / (counts["from_cache"] + counts["from_remote"])
    print(
        f"  forward of {milliseconds:g} ms: no rows {statistics.median(rates[0]):7.0f} tokens/s, remote {statistics.median(rates[1]):7.0f}; "
        f"{share:.1%} of a step's distinct rows cached, {rows.wait_seconds / remote.steps * 1e3:.2f} ms of a step waited for the rest"
    )
    rows.close()
    return float(np.median(np.array(rates[1]) / np.array(rates[0])))


def paced_prefill(client: Client, manifest: Manifest, ids: np.ndarray, rounds: int) -> float:
    """The same for one long prompt, nothing of it cached."""
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        prompt = ids[number * PREFILL_TOKENS : (number + 1) * PREFILL_TOKENS].tolist()
        for mine, r in zip(
            times,
            (NoRows(1, CPU), open_rows(client.rows, manifest, manifest.table_bytes // 10, CPU)),
            strict=True,
        ):
            one = Contender("", engine(r, lambda tokens: tokens / PREFILL_RATE))
            one.start([prompt], [[0]])
            mine.append(one.until_done())
            if isinstance(r, CachedRows):
                r.close()
    bare, remote = (statistics.median(t) for t in times)
    print(
        f"  cold prompt of {PREFILL_TOKENS} at {PREFILL_RATE} tokens/s: no rows {bare * 1e3:.0f} ms, remote {remote * 1e3:.0f} ms"
    )
    return float(np.median(np.array(times[0]) / np.array(times[1])))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: within 90 seconds")
    parser.add_argument(
        "--hot-megabytes",
        type=float,
        default=1000,
        help="the lookup service's memory for hot rows (default 1000)",
    )
    options = parser.parse_args()
    source, ids, frequent = trace(VOCABULARY)
    manifest = alike(preset("1b", "memory", vocab_size=VOCABULARY), "int8", frequent)
    print(
        f"{source}, {SEQUENCES} sequences, rows of {manifest.record_bytes} bytes, table of {manifest.table_bytes / 1e9:.1f} GB, "
        f"of which the worker keeps a tenth and the service {options.hot_megabytes:g} MB"
    )
    with (
        tempfile.TemporaryDirectory(prefix="tolhouse-pace-") as folder,
        ExitStack() as stack,
        torch.inference_mode(),
    ):
        url = f"file://{Path(folder)}"
        with closing(open_store(url)) as store:
            load(store, manifest)
            publish(store, manifest.ref)
        service = (
            "lookup",
            "--store",
            url,
            "--listen",
            "127.0.0.1:0",
            "--hot-megabytes",
            str(options.hot_megabytes),
        )
        lookup = stack.enter_context(process(*service))
        while "hot rows filled" not in lookup.log.read_text():
            time.sleep(0.05)
        client = stack.enter_context(Client(lookup.address))
        rounds = 1 if options.quick else 3
        part = (
            rounds * SEQUENCES * (PROMPT + ANSWER)
        )  # other text each time: first, unmeasured, some that a service in use has long seen
        paced(client, manifest, ids, 1, rounds)
        result = {
            f"paced_{x}ms": paced(client, manifest, ids[at * part :], x, rounds)
            for at, x in ((1, 10), (2, 3))
        }
        result["paced_prefill"] = paced_prefill(client, manifest, ids[3 * part :], 3)
    print(json.dumps({k: round(v, 3) for k, v in result.items()}))


if __name__ == "__main__":
    main()
