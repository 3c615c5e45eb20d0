"""Compare the resident memory of a MemoryLLM worker process with that of a dense model's worker."""

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
from tolhouse import Client
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.model.config import preset
from tolhouse.store.base import open_store
from tolhouse.store.registry import commit, publish
from tolhouse.testing import Host, process

from loadtest.tables import alike, records_of, service
from loadtest.weights import zero_weights

CACHE_MEGABYTES = 32  # the worker's default
PROMPT, ANSWER = 64, 64


def memory_ratio(name: str, host: Host, *, tied: bool) -> float:
    """VmRSS after one request of a MemoryLLM worker with a full row cache, divided by a dense
    model's.

    The vocabulary is the preset's own. Weights are zeros in a sparse file, which the worker packs
    into memory like any others.
    """
    resident = {}
    for kind in ("base", "memory"):
        shape = preset(name, kind, tie_word_embeddings=tied)
        with ExitStack() as stack:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="tolhouse-memory-", dir=host.folder)
            )
            path = zero_weights(Path(folder) / kind, shape)
            options = ["--listen", "127.0.0.1:0", "--compile", "never"]
            options += ["--row-cache-megabytes", str(CACHE_MEGABYTES)]
            if shape.num_rows:
                options += stack.enter_context(
                    _lookup(Path(folder), Checkpoint(path, shape, path.name), host)
                )
            worker = stack.enter_context(process("worker", str(path), *options))
            resident[kind] = _after_request(worker.address, worker.pid)
    ratio = resident["memory"] / resident["base"]
    memory, base = (f"{resident[kind] / 1e9:.2f} GB" for kind in ("memory", "base"))
    embeddings = "tied" if tied else "untied"
    print(f"  {name}, {embeddings} embeddings: resident {memory}, dense {base}: {ratio:.3f}")
    return ratio


@contextmanager
def _lookup(folder: Path, checkpoint: Checkpoint, host: Host) -> Iterator[tuple[str, ...]]:
    """Run a lookup service over a table that stores only frequent tokens' rows, and yield the
    worker's options for it."""
    shape, url = checkpoint.config, f"file://{folder / 'tables'}"
    manifest = alike(shape, "int8", model_id=checkpoint.model_id())
    count = min(int(CACHE_MEGABYTES * 1e6) // manifest.record_bytes, shape.vocab_size)
    ids, tokenizer_id = np.arange(count, dtype=np.uint32), checkpoint.tokenizer_id
    manifest = dataclasses.replace(
        manifest, frequent=tuple(range(count)), num_shards=1, tokenizer_id=tokenizer_id
    )
    with closing(open_store(url)) as store:
        held = dataclasses.replace(manifest, vocab_size=count)
        store.write_shard(held, 0, records_of(manifest, ids))
        _stretch(next(folder.glob("tables/*/*/*.safetensors")), manifest.vocab_size)
        commit(store, manifest)
        publish(store, manifest.ref)
    with service(url, 0, host=host) as lookup:
        yield "--rows", lookup.address, "--table", manifest.ref, "--insecure"


def _stretch(path: Path, rows: int) -> None:
    """Extend a shard file to `rows` rows; the added rows are a hole in the file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    shape = re.search(r'"shape":\[(\d+),(\d+)\]', header)
    assert shape
    held, size = (int(n) for n in shape.groups())
    header = header.replace(f"[{held},{size}]", f"[{rows},{size}]")
    header = header.replace(f"[0,{held * size}]", f"[0,{rows * size}]").rstrip()
    header += " " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode() + data[8 + length :])
        file.truncate(8 + len(header) + rows * size)


def _after_request(address: str, pid: int) -> int:
    """Resident bytes of a worker after it has generated one sequence."""
    with Client(address) as client:
        assert len(list(client.generate(range(PROMPT), ANSWER, ignore_eos=True))) == ANSWER
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident
    return int(resident[1]) * 1024
