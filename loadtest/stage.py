"""Measure what the plug-in for vLLM adds to a step: `python -m loadtest.stage [--quick]`.

Before each step the plug-in writes the decoded rows of the step's tokens to a buffer. The
contenders are its kinds of memory (`row_memory`): a cache of a tenth of the table over a lookup
service, a cache of all rows, and the whole table. The baseline is the gather of a matrix of decoded
rows in bfloat16, as in a model whose table is a weight. All compute with one thread. Rows have the
shape of the 1b preset in int8, and token ids come from real text: a token for each of 1, 8 or 32
sequences, or 512 tokens of a prompt. The service runs in namespaces of its own, behind a network
(loadtest/isolation.py). The output is a table of microseconds per step and a final line of JSON
with ratios of medians to the baseline. Compare only ratios within a run.
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
from tolhouse.integrations.vllm.options import AdditionalConfig, parse
from tolhouse.integrations.vllm.staging import NoFallback, RowStage, open_rows
from tolhouse.model.config import preset
from tolhouse.testing import Host
from torch import Tensor
from tqdm import tqdm

from loadtest.isolation import server_side
from loadtest.tables import alike, served
from loadtest.text import trace

VOCABULARY, PROMPT = 32_768, 512
SEQUENCES = 1, 8, 32
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
Fill = Callable[[Tensor], object]


def stage(url: str, manifest: Manifest, memory: str, share: float) -> Fill:
    """Return a function that stages the rows of ids. `share` of the table fits the cache."""
    megabytes = share * manifest.table_bytes / 1e6
    options = {"rows": url, "fallback": "none", "insecure": True, "row_memory": memory}
    given = parse({"tolhouse": options | {"row_cache_megabytes": megabytes}})
    config = AdditionalConfig(given, manifest.ref, manifest.blocks, {})
    made = RowStage(open_rows(config, NoFallback, PROMPT, CPU, DTYPE), PROMPT)
    return lambda ids_T: made.fill(ids_T, lambda: None)


def gather(manifest: Manifest) -> Fill:
    """Return a function that copies decoded rows of a weight to a buffer."""
    shape = manifest.num_blocks, manifest.width
    weight = torch.ones(manifest.vocab_size, *shape, dtype=DTYPE)
    buffer = torch.empty(PROMPT, *shape, dtype=DTYPE)
    return lambda ids_T: torch.index_select(weight, 0, ids_T, out=buffer[: len(ids_T)])


def steps(ids: np.ndarray, count: int) -> dict[str, list[Tensor]]:
    """Return `count` steps of each size, which follow the text."""
    found = {}
    for sequences in SEQUENCES:
        starts = np.linspace(0, len(ids) - count - 1, sequences).astype(int)
        found[f"c{sequences}"] = [ids[starts + step] for step in range(count)]
    found["prompt"] = np.split(ids[: PROMPT * count], count)
    return {
        name: [torch.from_numpy(i.astype(np.int64)) for i in all_] for name, all_ in found.items()
    }


def measure(host: Host, *, quick: bool) -> dict[str, float]:
    source, ids, frequent = trace(VOCABULARY)
    manifest = alike(preset("1b", "memory", vocab_size=VOCABULARY), "int8", frequent)
    size = f"rows of {manifest.record_bytes} bytes, table of {manifest.table_bytes / 1e9:.1f} GB"
    print(f"{source}, {size}")
    with (
        tempfile.TemporaryDirectory(prefix="tolhouse-stage-", dir=host.folder) as folder,
        served(Path(folder), manifest, 1000, host) as sources,
        torch.inference_mode(),
    ):
        url = sources["remote"].url
        contenders = {
            "gather of decoded rows": gather(manifest),
            "cache of a tenth": stage(url, manifest, "cache", 0.1),
            "cache of all rows": stage(url, manifest, "cache", 1.1),
            "whole table": stage(url, manifest, "host", 0),
        }
        return compare(contenders, steps(ids, 60 if quick else 300))


def compare(contenders: dict[str, Fill], work: dict[str, list[Tensor]]) -> dict[str, float]:
    """Return each contender's median time over that of the first one, by kind of step."""
    result = {}
    print(f"{'microseconds per step':24}{''.join(f'{name:>10}' for name in work)}")
    times: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for kind, all_ids in work.items():
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for ids_T in tqdm(all_ids, desc=kind, leave=False, disable=None):
            for name, fill in contenders.items():
                started = time.perf_counter()
                fill(ids_T)
                taken[name].append(time.perf_counter() - started)
        late = len(all_ids) // 4  # the first quarter fills caches
        for name, seconds in taken.items():
            times[name][kind] = statistics.median(seconds[late:])
    first, *others = contenders
    for name in contenders:
        print(f"{name:24}{''.join(f'{times[name][kind] * 1e6:10.0f}' for kind in work)}")
    for name in others:
        for kind in work:
            result[f"{name.replace(' ', '_')}_{kind}"] = times[name][kind] / times[first][kind]
    return {name: round(ratio, 2) for name, ratio in result.items()}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with server_side() as host:
        result = measure(host, quick=options.quick)
        print(json.dumps(result | {"isolated": host.isolated}))


if __name__ == "__main__":
    main()
