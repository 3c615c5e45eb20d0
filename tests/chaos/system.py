"""The whole system as real processes, with a link on every connection, and clients that send
requests continuously."""

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import torch
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.row_providers import CachedRows
from tolhouse.errors import TolhouseError
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish, stands_for
from tolhouse.testing import (
    Process,
    build_table,
    end,
    free_port,
    process,
    wait_until_healthy,
)

from tests.chaos.history import Answers, Seen
from tests.chaos.proxy import Link

CHECKPOINT = Path("models/demo-memory")
PROMPTS = tuple(
    line
    for line in Path("services/tolhouse/testing.py").read_text(encoding="utf-8").splitlines()
    if line.startswith(("def ", "    with ", "    return "))
)[:24]
SHARDS = 16
ANSWER_TOKENS = 40
CLIENTS = 6
DEADLINE_SECONDS = 30.0


class Service:
    """A process that can be killed and restarted with the same arguments and address."""

    def __init__(self, *arguments: str) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.arguments = (*arguments, "--listen", self.address)
        self._stack = ExitStack()
        self.process: Process | None = None
        self.logs: list[str] = []

    def start(self) -> "Service":
        self.process = self._stack.enter_context(process(*self.arguments))
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self.process
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        if self.process:
            end(self.process.popen)
            self.logs.append(self.process.log.read_text(errors="replace", encoding="utf-8"))
        self._stack.close()
        self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()


class System:
    """Two lookup replicas over `store_url`, two workers of `checkpoint` and a gateway. Every
    connection between them passes through a link."""

    def __init__(
        self,
        stack: ExitStack,
        store_url: str,
        name: str,
        checkpoint: Path = CHECKPOINT,
        hot_megabytes: int = 0,
    ) -> None:
        free = ("--metrics-listen", "127.0.0.1:0")
        self.url = store_url

        def service(*arguments: str) -> Service:
            one = Service(*arguments, *free) if arguments[0] != "gateway" else Service(*arguments)
            stack.callback(one.stop)
            return one

        def link(to: Service) -> Link:
            return stack.enter_context(Link(to.address))

        self.lookups: list[Service] = []
        self.to_rows: list[Link] = []  # to the row port of each lookup replica
        for _ in range(2):
            rows = f"127.0.0.1:{free_port()}"
            self.to_rows.append(stack.enter_context(Link(rows)))
            announced = self.to_rows[-1].address.rpartition(":")[2]
            options = f"--store {store_url} --hot-megabytes {hot_megabytes} --rows-listen {rows}"
            options += f" --rows-advertised-port {announced}"
            self.lookups.append(service("lookup", *options.split()).start())
        self.to_lookups = [[link(lookup) for lookup in self.lookups] for _ in range(2)]  # by worker
        self.workers = []
        for links in self.to_lookups:
            lookup = ",".join(one.address for one in links)
            options = f"--rows {lookup} --table {name} --row-cache-megabytes 0.1 --threads 1"
            options += " --compile never --table-poll-seconds 0.5"
            self.workers.append(service("worker", str(checkpoint), *options.split()).start())
        self.to_workers = [link(worker) for worker in self.workers]
        workers = ",".join(one.address for one in self.to_workers)
        self.gateway = service(
            "gateway", str(checkpoint), "--workers", workers, "--poll-seconds", "0.5"
        ).start()
        wait_until_healthy(self.gateway.address)

    def flip(self, refs: Sequence[str], seconds: float = 15.0) -> str:
        """Publish the other of two versions as soon as the store allows it. Returns "" on a
        timeout."""
        deadline, ref = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            try:
                with closing(open_store(self.url, 1.0)) as store:
                    ref = ref or next(ref for ref in refs if not stands_for(store, ref))
                    publish(store, ref)
            except TolhouseError:
                time.sleep(0.1)
            else:
                return ref
        return ""


def build_versions(url: str) -> list[str]:
    """Build two versions of a table into a store and publish the first. Returns their
    references."""
    return [
        build_table(CHECKPOINT, url, name="chaos", codec=codec, shards=SHARDS, publish=n == 0)
        for n, codec in enumerate(("int8", "int4"))
    ]


@cache
def answers_of_versions() -> Answers:
    """The correct answers of each version, which are the same in every store."""
    torch.set_num_threads(1)  # with several threads, such small steps would wait for each other
    with TemporaryDirectory(prefix="tolhouse-chaos-") as folder:
        url = f"file://{folder}"
        return right_answers(url, build_versions(url))


def right_answers(url: str, refs: list[str]) -> dict[str, list[str]]:
    """The model's answer to each prompt with each version's rows, computed in this process."""
    checkpoint = open_checkpoint(CHECKPOINT)
    tokenizer, model = checkpoint.tokenizer(), checkpoint.model(ffn_m=False)
    found = {}
    with closing(open_row_source(url)) as source:
        for ref in refs:
            rows = CachedRows(source, source.describe(ref), 1 << 20, torch.device("cpu"))

            def get(ids_T: torch.Tensor, rows: CachedRows = rows) -> Any:
                return rows.decode(rows.stage(ids_T.numpy().astype(np.uint32)))

            found[ref] = []
            for prompt in PROMPTS:
                ids = tokenizer.encode(prompt).ids
                answer = greedy(model, ids, ANSWER_TOKENS, ignore_eos=True, rows=get)
                found[ref].append(tokenizer.decode(list(answer)))
            rows.close()
    return found


class Load:
    """Clients that send requests continuously, alternating streamed and complete answers, and
    record what they receive in `history`."""

    def __init__(self, gateway: str) -> None:
        self.gateway, self.history, self._stop = gateway, list[Seen](), threading.Event()
        self._next = itertools.count()
        self._threads = [
            threading.Thread(target=self._run, name=f"client {n}", daemon=True)
            for n in range(CLIENTS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with httpx.Client(timeout=DEADLINE_SECONDS + 5, trust_env=False) as client:
            while not self._stop.is_set():
                number = next(self._next)
                seen = Seen(number // 2 % len(PROMPTS), bool(number % 2), time.monotonic())
                try:
                    self._ask(client, seen)
                except (httpx.HTTPError, ValueError) as error:
                    seen.error = seen.error or f"{type(error).__name__}: {error}"
                seen.ended = time.monotonic()
                self.history.append(seen)
                if seen.failed:
                    self._stop.wait(0.1)

    def _ask(self, client: httpx.Client, seen: Seen) -> None:
        body = {
            "prompt": PROMPTS[seen.prompt],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": seen.streamed,
        }
        with client.stream("POST", f"http://{self.gateway}/v1/completions", json=body) as answer:
            seen.status = answer.status_code
            if answer.status_code != httpx.codes.OK:
                seen.error = answer.read().decode()
                return
            if not seen.streamed:
                self._add(seen, json.loads(answer.read()))
                seen.dones += 1
                return
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    seen.dones += 1
                elif line.startswith("data: "):
                    self._add(seen, json.loads(line.removeprefix("data: ")))
            if not seen.dones and not seen.error:
                seen.error = "the stream ended early"

    @staticmethod
    def _add(seen: Seen, data: dict[str, Any]) -> None:
        if "error" in data:
            seen.error = str(data["error"])
            return
        seen.version = data.get("system_fingerprint") or seen.version
        for choice in data["choices"]:
            if choice["text"]:
                seen.pieces.append(choice["text"])
            seen.finishes += choice["finish_reason"] is not None


Asked = list[tuple[str, float]]  # for each request: the error ("" for none) and its seconds


@contextmanager
def asking(ask: Callable[[], object], found: list[str]) -> Iterator[Asked]:
    """A client that calls `ask` continuously beside the load. After the block, it must be answered
    again."""
    seen: Asked = []
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.3):
            began, error = time.monotonic(), ""
            try:
                ask()
            except (httpx.HTTPError, TolhouseError) as failure:
                error = str(failure) or type(failure).__name__
            seen.append((error, time.monotonic() - began))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield seen
    count = len(seen)
    if not wait_until(lambda: "" in dict(seen[count:]), 15):
        found.append(f"rows can't be fetched afterwards: {seen[-1:]}")
    stop.set()
    thread.join()
    found += [f"an answer took {took:.1f} s" for _, took in seen if took > DEADLINE_SECONDS]


def completion(gateway: str, *tokens: int) -> None:
    """Request the completion of some tokens over a new connection."""
    body, most = {"prompt": tokens, "max_tokens": 1}, DEADLINE_SECONDS + 5
    httpx.post(f"http://{gateway}/v1/completions", json=body, timeout=most).raise_for_status()


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
