"""Several lookup processes on one port, to use several cores: the kernel deals connections out to them (SO_REUSEPORT).

The first process only watches. It says "ready" when all are, passes SIGTERM and SIGINT on, and gives up when one of them
ends by itself, so that whoever started it can start it again. Should it be killed, the others end.
"""

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from tolhouse.config import LookupConfig
from tolhouse.errors import InUse, TolhouseError, Unavailable
from tolhouse.logs import event, ready, split_address, start_logging
from tolhouse.lookup.service import run

_START_SECONDS = 120


def run_all(config: LookupConfig) -> None:
    """Serve with `config.processes` processes until told to stop."""
    if config.processes == 1:
        asyncio.run(run(config, partial(ready, "lookup")))
        return
    host, _ = split_address(config.listen)
    metrics_host, metrics_port = split_address(config.metrics_listen)
    spawn = multiprocessing.get_context("spawn")
    stopping = threading.Event()
    with _port(config.listen) as held:
        listen = f"{host}:{held.getsockname()[1]}"
        children: list[tuple[SpawnProcess, Connection]] = []
        for number in range(config.processes):
            ours, theirs = spawn.Pipe()
            each = {
                "listen": listen,
                "metrics_listen": f"{metrics_host}:{metrics_port + number if metrics_port else 0}",
            }
            child = spawn.Process(
                target=_serve, args=(config.model_copy(update=each), theirs), daemon=True
            )
            child.start()
            theirs.close()
            children.append((child, ours))

        def stop(*given: object) -> None:  # noqa: ARG001 - a signal handler
            stopping.set()
            for child, _ in children:
                child.terminate()

        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, stop)
        try:
            told = [_ready(ours) for _, ours in children]
            ready(
                "lookup",
                listen,
                metrics=",".join(str(fields["metrics"]) for fields in told),
                processes=len(told),
            )
            wait([child.sentinel for child, _ in children])  # the first that ends
            if not stopping.is_set():
                raise Unavailable("one of the lookup processes ended by itself; its log says why")
        except Unavailable:
            if not stopping.is_set():
                raise
        finally:
            stop()
            for child, _ in children:
                child.join()
    event("stopped", service="lookup", processes=len(children))


def _serve(config: LookupConfig, parent: Connection) -> None:
    start_logging(config.log_level)

    def outlive_nobody() -> None:
        try:
            parent.recv()
        except EOFError:
            os.kill(os.getpid(), signal.SIGTERM)

    def announce(address: str, **fields: object) -> None:
        parent.send({"address": address, **fields})
        threading.Thread(target=outlive_nobody, daemon=True).start()

    try:
        asyncio.run(run(config, announce, share_port=True))
    except TolhouseError as error:
        parent.send(error)  # the first process says it
        raise SystemExit(1) from None


def _ready(child: Connection) -> dict[str, object]:
    """What a process said when it got ready, or its error."""
    try:
        if not child.poll(_START_SECONDS):
            raise Unavailable(f"a lookup process did not get ready in {_START_SECONDS} seconds")
        told = child.recv()
    except EOFError:
        raise Unavailable("a lookup process ended before it was ready") from None
    if isinstance(told, Exception):
        raise told
    return told


def _port(listen: str) -> socket.socket:
    """The port to share, bound and not listened on; InUse if someone else has it."""
    host, port = split_address(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for shared in (0, 1):  # alone first: with SO_REUSEPORT one could join another service's port
        held = socket.socket(family)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, port))
        except OSError as error:
            held.close()
            raise InUse(
                f"lookup can't listen on {listen}: {error.strerror or error}: choose another --listen"
            ) from None
        if not shared:
            port = held.getsockname()[1]
            held.close()
    return held
