"""The public SDK: sync and async clients, closing, forks, threads, arguments and results."""

import asyncio
import copy
import gc
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, closing, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import tolhouse
import torch
from tolhouse import AsyncClient, Client, ClientCredentials, errors
from tolhouse.client.results import NO_TOKEN, worker_info
from tolhouse.store.base import open_store
from tolhouse.testing import (
    build_table,
    free_port,
    local_cluster,
    process,
    redis_node,
    wait_until,
)
from tolhouse.v1 import generation_pb2 as pb

from tests.commands import LOCAL, send_signal

IDS = [5, 200, 7, 5]
KINDS = ["lookup", "file", "redis"]
PROMPT = [17, 4, 20]


@pytest.fixture(scope="module")
def running(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Yield the target of each kind of row source, and of a worker."""
    file = f"file://{tmp_path_factory.mktemp('tables')}"
    with redis_node() as redis:
        build_table(checkpoint, file, redis.url, codec="bf16", shards=4)
        with local_cluster(checkpoint, file) as cluster:
            yield {
                "file": file,
                "redis": redis.url,
                "redis pid": redis.popen.pid,
                "lookup": cluster.lookup,
                "worker": cluster.workers,
            }


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest, running: dict) -> str:
    return running[request.param]


def public(kind: type) -> dict[str, inspect.Signature]:
    found = {
        name: inspect.signature(value)
        for name, value in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_")
    }
    return found | {"": inspect.signature(kind)}


def test_both_clients_have_the_same_methods_and_arguments() -> None:
    """Both clients have the same methods and parameters."""
    sync, aio = public(Client), public(AsyncClient)
    assert sync.keys() == aio.keys()
    assert {name: s.parameters for name, s in sync.items()} == {
        name: s.parameters for name, s in aio.items()
    }


def test_both_clients_return_equal_results(running: dict, target: str) -> None:
    """Both clients return equal rows, manifests, tables, tokens and descriptions."""

    async def ask() -> tuple:
        async with AsyncClient(target) as source, AsyncClient(running["worker"]) as worker:
            rows = await source.fetch("tiny-memory", IDS)
            found = await source.describe("tiny-memory"), await source.tables()
            tokens = [i async for i in worker.generate(PROMPT, 8)]
            outputs = [o async for o in worker.replies(PROMPT, 4, logprobs=2)]
            return rows.tobytes(), *found, tokens, outputs, (await worker.describe_worker()).model

    with Client(target) as source, Client(running["worker"]) as worker:
        expected = (
            source.fetch("tiny-memory", IDS).tobytes(),
            source.describe("tiny-memory"),
            source.tables(),
            list(worker.generate(PROMPT, 8)),
            list(worker.replies(PROMPT, 4, logprobs=2)),
            worker.describe_worker().model,
        )
    assert expected == asyncio.run(ask())


def test_many_calls_of_one_async_client_run_at_once(running: dict) -> None:
    """Hundreds of concurrent fetches and completions do not block the event loop."""

    async def run() -> int:
        turns = 0

        async def tick() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async def complete(seed: int) -> list[int]:
            stream = worker.generate(PROMPT, 4, temperature=1.0, seed=seed, ignore_eos=True)
            return [i async for i in stream]

        async with (
            AsyncClient(running["lookup"]) as source,
            AsyncClient(running["worker"]) as worker,
        ):
            ticking = asyncio.create_task(tick())
            rows = await asyncio.gather(*(source.fetch("tiny-memory", [i]) for i in range(200)))
            tokens = await asyncio.gather(*(complete(k) for k in range(24)))
            ticking.cancel()
            every = await source.fetch("tiny-memory", range(200))
        assert every.tobytes() == np.concatenate(rows).tobytes()
        assert [4] * 24 == [len(t) for t in tokens]
        return turns

    assert 200 < asyncio.run(run())


def test_an_async_client_works_in_one_event_loop_after_another(running: dict) -> None:
    """An async client can be used in several event loops, one after another."""
    client, worker = AsyncClient(running["lookup"]), AsyncClient(running["worker"])

    async def use() -> tuple[int, list[int]]:
        rows = await client.fetch("tiny-memory", [1])
        return len(rows), [i async for i in worker.generate(PROMPT, 3)]

    assert asyncio.run(use()) == asyncio.run(use())


def test_cancelling_a_task_cancels_its_call(running: dict) -> None:
    """Cancellation of a task ends a fetch from a hung lookup service, and a running completion."""

    async def run() -> None:
        options = ("lookup", "--store", running["file"], *LOCAL)
        with process(*options) as hung:
            async with AsyncClient(hung.address, timeout=300) as source:
                await source.fetch("tiny-memory", [1])
                send_signal(hung.pid, signal.SIGSTOP)
                try:
                    fetches = [
                        asyncio.create_task(source.fetch(table, [k]))
                        for k in range(3)
                        for table in ("tiny-memory", ref)
                    ]
                    await asyncio.sleep(0.2)
                    for task in fetches:
                        task.cancel()
                    results = await asyncio.gather(*fetches, return_exceptions=True)
                    assert [asyncio.CancelledError] * 6 == [type(r) for r in results]
                    names = lambda: [t.name for t in threading.enumerate()]  # noqa: E731
                    while "client" in names():
                        await asyncio.sleep(0.01)
                finally:
                    os.kill(hung.pid, signal.SIGCONT)
        async with AsyncClient(running["worker"]) as worker:

            async def complete() -> None:
                async for _ in worker.generate(PROMPT, 60, ignore_eos=True):
                    started.set()

            started = asyncio.Event()
            task = asyncio.create_task(complete())
            await started.wait()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            while (await worker.describe_worker()).running:
                await asyncio.sleep(0.01)

    with Client(running["file"]) as client:
        ref = client.describe("tiny-memory").ref
    asyncio.run(run())


def test_a_closed_client_raises_an_error(running: dict, target: str) -> None:
    """Every method of a closed client raises ClosedError, and a second close does nothing."""
    with Client(target) as client:
        client.fetch("tiny-memory", [1])
    client.close()
    worker = Client(running["worker"])
    worker.close()
    for call in (
        lambda: client.fetch("tiny-memory", [1]),
        lambda: client.describe("tiny-memory"),
        client.tables,
        lambda: client.rows,
        worker.describe_worker,
        lambda: worker.generate([1]),
        lambda: worker.replies([1]),
    ):
        with pytest.raises(errors.ClosedError, match="is closed"):
            call()

    async def run() -> None:
        async with AsyncClient(target) as client:
            await client.fetch("tiny-memory", [1])
        await client.close()
        with pytest.raises(errors.ClosedError, match="is closed"):
            await client.fetch("tiny-memory", [1])

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["lookup", "redis"])
def test_closing_ends_calls_in_flight(running: dict, kind: str) -> None:
    """A fetch from a hung server ends with ClosedError when another thread closes the client."""
    options = ("lookup", "--store", running["file"], *LOCAL)
    with ExitStack() as stack:
        if kind == "lookup":
            served = stack.enter_context(process(*options))
            target, pid = served.address, served.pid
        else:
            target, pid = running["redis"], running["redis pid"]
        client = Client(target, timeout=100)
        client.fetch("tiny-memory", [1])
        send_signal(pid, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(4) as pool:
                calls = [pool.submit(client.fetch, "tiny-memory", [k]) for k in range(3)]
                calls.append(pool.submit(client.tables))
                assert not any(call.done() for call in calls)
                client.close()
                assert [errors.ClosedError] * 4 == [type(call.exception(60)) for call in calls]
        finally:
            os.kill(pid, signal.SIGCONT)


def test_closing_ends_completions(running: dict) -> None:
    """A completion in flight ends with ClosedError in both clients."""
    client = Client(running["worker"])
    stream = client.generate(PROMPT, 60, ignore_eos=True)
    next(stream)
    client.close()
    with pytest.raises(errors.ClosedError):
        list(stream)

    async def run() -> None:
        client = AsyncClient(running["worker"])
        stream = client.generate(PROMPT, 60, ignore_eos=True)
        await anext(stream)
        await client.close()
        with pytest.raises(errors.ClosedError):
            async for _ in stream:
                pass

    asyncio.run(run())


def test_a_model_may_have_no_end_token() -> None:
    """The description of a worker has None in place of the protocol's number for no token."""
    assert worker_info(pb.DescribeWorkerReply(eos_token_id=NO_TOKEN)).eos_token_id is None
    assert 0 == worker_info(pb.DescribeWorkerReply()).eos_token_id


def test_an_abandoned_completion_is_cancelled(running: dict) -> None:
    """The worker ends a sequence when its iterator is closed or deleted."""
    with Client(running["worker"]) as client:
        for end in (lambda stream: stream.close(), lambda _: None):
            stream = client.generate(PROMPT, 60, ignore_eos=True)
            next(stream)
            end(stream)
            del stream
            gc.collect()
            wait_until(lambda: not client.describe_worker().running)

        async def run() -> None:
            async with AsyncClient(running["worker"]) as worker:
                async with aclosing(worker.generate(PROMPT, 60, ignore_eos=True)) as stream:
                    await anext(stream)

        asyncio.run(run())
        wait_until(lambda: not client.describe_worker().running)


def in_child(work: Callable[[], object]) -> object:
    """Return what `work` returns or raises in a forked process."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(60)  # kills a child that hangs
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - the parent checks the error
            result = error
        os.write(write, pickle.dumps(result))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    assert (pid, 0) == os.waitpid(pid, 0), "the child was killed"
    return pickle.loads(data)


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_a_forked_process_uses_the_client(running: dict, kind: str) -> None:
    """Parent and forked processes can use a client of a store at the same time."""
    with Client(running[kind]) as client, ThreadPoolExecutor(4) as pool:
        expected = client.fetch("tiny-memory", IDS).tobytes()
        stop = threading.Event()

        def load() -> int:
            count = 0
            while not stop.is_set():
                assert expected == client.fetch("tiny-memory", IDS).tobytes()
                count += 1
            return count

        loads = [pool.submit(load) for _ in range(4)]
        try:
            found = [in_child(lambda: client.fetch("tiny-memory", IDS).tobytes()) for _ in range(8)]
            assert [expected] * 8 == found
        finally:
            stop.set()
        assert all(done.result() for done in loads)


def test_a_forked_process_can_not_call_services(running: dict) -> None:
    """If its parent made calls, a forked process gets an error, and the parent is not affected."""
    with Client(running["lookup"]) as source, Client(running["worker"]) as worker:
        rows = source.fetch("tiny-memory", IDS).tobytes()
        expected = list(worker.generate(PROMPT, 200, ignore_eos=True))
        streams = [worker.generate(PROMPT, 200, ignore_eos=True)]
        tokens = [next(streams[0])]

        def fetch() -> bytes:
            return source.fetch("tiny-memory", IDS)

        def drop_the_stream() -> None:
            streams.clear()
            gc.collect()

        async def fetch_async() -> None:
            await AsyncClient(running["lookup"]).fetch("tiny-memory", IDS)

        for call in (
            fetch,
            lambda: Client(running["lookup"]).describe("tiny-memory"),
            lambda: list(worker.generate(PROMPT, 4)),
            lambda: asyncio.run(fetch_async()),
        ):
            error = in_child(call)
            assert isinstance(error, errors.UnsupportedError), error
            assert "spawn" in str(error)
        assert in_child(drop_the_stream) is None
        assert rows == source.fetch("tiny-memory", IDS).tobytes()
        assert expected == tokens + list(streams[0])


FORKS = """
import multiprocessing, sys, torch
from tolhouse import Client

class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.client = Client(sys.argv[1])
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return self.client.fetch("tiny-memory", [i])[0].astype("float32")

if __name__ == "__main__":
    rows = Rows()
    for method in sys.argv[2:]:
        if method == "used":
            rows[0]
            continue
        workers = {"num_workers": 2, "multiprocessing_context": method, "timeout": 120}
        loaded = torch.cat(list(torch.utils.data.DataLoader(rows, batch_size=10, **workers)))
        print(len(loaded))
    assert rows.client.fetch("tiny-memory", range(40)).astype("float32").tobytes() == (
        loaded.numpy().tobytes()
    )
"""


def test_workers_of_a_data_loader_use_the_client(target: str, tmp_path: Path) -> None:
    """A data set that holds a client works in forked and in spawned workers."""
    (tmp_path / "forks.py").write_text(FORKS, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "forks.py"), target, "fork", "used", "spawn"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=200, check=False)
    assert (0, "40\n40\n") == (done.returncode, done.stdout), done.stderr


def test_sixteen_threads_share_a_client(running: dict) -> None:
    """Concurrent fetches, completions and descriptions return each thread's own results."""
    with Client(running["lookup"]) as source, Client(running["worker"]) as worker:
        expected = list(worker.generate(PROMPT, 6))

        def use(k: int) -> bool:
            same = len(source.fetch("tiny-memory", range(k, k + 5))) == 5
            return (
                same
                and worker.describe_worker().model
                and expected == list(worker.generate(PROMPT, 6))
            )

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(use, range(32)))


UNCLOSED = """
import sys, os, signal, threading
from tolhouse import Client
source, worker = Client(sys.argv[1]), Client(sys.argv[2])
source.fetch("tiny-memory", [1])
stream = worker.generate([17, 4, 20], 60, ignore_eos=True)
next(stream)
print("used", flush=True)
"""
INTERRUPTED = (
    UNCLOSED
    + """
try:
    source.fetch("tiny-memory", [2]) if sys.argv[3:] else [*stream, signal.pause()]
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
)


def test_a_client_that_is_not_closed_lets_the_process_exit(running: dict, target: str) -> None:
    """A process exits without closing its client, even during a completion."""
    command = [sys.executable, "-c", UNCLOSED, target, running["worker"]]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60, check=False)
    assert (0, "used\n", "") == (done.returncode, done.stdout, done.stderr)
    with Client(running["worker"]) as worker:
        wait_until(lambda: not worker.describe_worker().running)


@pytest.mark.parametrize("what", ["completion", "fetch"])
def test_an_interrupt_ends_the_call(running: dict, what: str) -> None:
    """Ctrl-C ends the call, its sequence and the process."""
    with process("lookup", "--store", running["file"], *LOCAL) as hung:
        command = [sys.executable, "-c", INTERRUPTED, hung.address, running["worker"]]
        command += ["fetch"] * (what == "fetch")
        popen = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
        with popen:
            assert "used\n" == popen.stdout.readline()
            send_signal(hung.pid, signal.SIGSTOP)
            threading.Event().wait(0.3)
            popen.send_signal(signal.SIGINT)
            assert "interrupted\n" == popen.stdout.readline()
            assert 0 == popen.wait(60)
        os.kill(hung.pid, signal.SIGCONT)
    with Client(running["worker"]) as worker:
        wait_until(lambda: not worker.describe_worker().running)


def test_a_misspelt_option_is_refused(running: dict) -> None:
    """The error for a misspelt option names the option and the intended one."""
    with pytest.raises(errors.InvalidArgumentError, match="'tls_cq'; did you mean 'tls_ca'"):
        Client("127.0.0.1:1", tls_cq="x")
    with pytest.raises(errors.InvalidArgumentError, match="did you mean 'timeout'"):
        AsyncClient("127.0.0.1:1", timeout_seconds=3)
    with Client(running["worker"]) as client:
        for method in (client.generate, client.replies, AsyncClient("127.0.0.1:1").generate):
            with pytest.raises(errors.InvalidArgumentError, match="did you mean 'temperature'"):
                method(PROMPT, temprature=1)
            with pytest.raises(errors.InvalidArgumentError, match="'max_token'; did you mean 'max"):
                method(PROMPT, max_token=1)


@pytest.mark.parametrize("timeout", [0, -1, "5", None, True, float("nan"), float("inf")])
def test_a_timeout_is_a_number_of_seconds(running: dict, timeout: object) -> None:
    """Both clients and every call refuse a timeout that is not a positive number."""
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.InvalidArgumentError, match="`timeout` must be"):
            kind(running["file"], timeout)
    if timeout is not None:
        with Client(running["file"]) as client:
            with pytest.raises(errors.InvalidArgumentError, match="`timeout` must be"):
                client.fetch("tiny-memory", [1], timeout=timeout)


@pytest.mark.parametrize("kind", ["lookup", "redis"])
def test_a_call_may_have_its_own_timeout(running: dict, kind: str) -> None:
    """A call to a hung server ends at the call's own timeout, not at the client's."""
    with process("lookup", "--store", running["file"], *LOCAL) as served:
        target, pid = (
            (served.address, served.pid)
            if kind == "lookup"
            else (running["redis"], running["redis pid"])
        )
        with Client(target, timeout=1000) as client:
            client.fetch("tiny-memory", [1])
            send_signal(pid, signal.SIGSTOP)
            try:
                for call in (
                    lambda: client.fetch("tiny-memory", [2], timeout=0.3),
                    lambda: client.describe("tiny-memory", timeout=0.3),
                    lambda: client.tables(timeout=0.3),
                ):
                    with pytest.raises(errors.DeadlineExceededError):
                        call()
            finally:
                os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    "ids",
    [
        [7, 3],
        (7, 3),
        iter([7, 3]),
        (i for i in (7, 3)),
        np.array([7, 3]),
        np.array([7, 3], np.uint8),
        [np.int64(7), 3],
        torch.tensor([7, 3]),
        [torch.tensor(7), torch.tensor(3)],
        range(7, 2, -4),
        {7: "a", 3: "b"}.keys().__iter__(),
    ],
)
def test_ids_may_be_any_sequence_of_whole_numbers(running: dict, ids: object) -> None:
    """Lists, tuples, ranges, generators, arrays and tensors give the same rows."""
    with Client(running["file"]) as client:
        expected = client.fetch("tiny-memory", [7, 3]).tobytes()
        assert expected == client.fetch("tiny-memory", ids).tobytes()


@pytest.mark.parametrize(
    "ids",
    [
        *("17", b"17", None, 5, 1.5, [1.0], [1.5], ["a"], [None], [[1, 2]], [[1], [2, 3]], [True]),
        *({1, 2}, {1: 2}, [-1], [2**32], [2**70], np.zeros((2, 2), int), np.float32(1), object()),
        *(torch.tensor([[1]]), torch.tensor([1.0]), np.array(3)),
    ],
)
def test_invalid_ids_are_refused(running: dict, ids: object) -> None:
    """fetch and both forms of generate refuse invalid ids before they send a request."""
    with Client(running["file"]) as client, Client(running["worker"]) as worker:
        for call in (
            lambda: client.fetch("tiny-memory", ids),
            lambda: worker.generate(ids),
            lambda: AsyncClient("127.0.0.1:1").generate(ids),
        ):
            with pytest.raises(errors.InvalidArgumentError, match="token ids must be"):
                call()


def test_arguments_of_a_wrong_type_are_refused(running: dict) -> None:
    """The error for an argument of a wrong type names the argument."""
    for target in (None, 5, b"127.0.0.1:1", ["127.0.0.1:1", 5]):
        with pytest.raises(errors.InvalidArgumentError, match="`target` must be"):
            Client(target)
    with pytest.raises(errors.InvalidArgumentError, match="`credentials` must be"):
        Client("127.0.0.1:1", credentials="secret")
    for name, value in (("tls_ca", 5), ("token", b"secret"), ("insecure", "yes"), ("proxy", None)):
        with pytest.raises(errors.InvalidArgumentError, match=f"`{name}` must be"):
            Client("127.0.0.1:1", **{name: value})
    with Client(Path(running["file"].removeprefix("file://"))) as client:
        for table in (None, 5, b"tiny-memory", ["tiny-memory"]):
            for call in (client.describe, lambda t: client.fetch(t, [1])):
                with pytest.raises(errors.InvalidArgumentError, match="`table` must be"):
                    call(table)
    with Client(running["worker"]) as worker:
        assert 3 == len(list(worker.generate(np.array(PROMPT), np.int64(3), ignore_eos=True)))
        stops = np.arange(2, 4)
        assert list(worker.generate(PROMPT, 3, stop_token_ids=stops, temperature=np.float64(0)))
        for wrong in (
            {"max_tokens": "3"},
            {"max_tokens": 1.5},
            {"temperature": "hot"},
            {"seed": 1.5},
        ):
            with pytest.raises(errors.InvalidArgumentError, match=next(iter(wrong))):
                worker.generate(PROMPT, **wrong)


def test_a_token_is_sent_but_not_shown(running: dict, tmp_path: Path) -> None:
    """The client sends `token=`, and no representation shows a token or a password."""
    token = "a-token-of-16-characters"
    (tmp_path / "tokens").write_text(token, encoding="utf-8")
    options = ("--store", running["file"], "--token-file", str(tmp_path / "tokens"))
    with process("lookup", *options, *LOCAL) as served:
        with Client(served.address, token=token) as client:
            assert 1 == len(client.fetch("tiny-memory", [1]))
            assert f"Client({served.address!r}, timeout=10)" == repr(client)
            assert token not in repr(ClientCredentials(token=token))
        assert f"Client({served.address!r}, timeout=10, closed)" == repr(client)
        with (
            Client(served.address, token="another-token-of-mine") as stranger,
            pytest.raises(errors.UnauthenticatedError) as refused,
        ):
            stranger.tables()
        assert "--" not in str(refused.value)
    for wrong in ("two words", "line\n", "ü"):
        with pytest.raises(errors.InvalidArgumentError, match="`token` must be"):
            Client("127.0.0.1:1", token=wrong)
    with pytest.raises(errors.InvalidArgumentError, match="not both"):
        Client("127.0.0.1:1", token=token, token_file="x")
    made = AsyncClient(f"redis://user:secret@127.0.0.1:{free_port()}/0")
    assert "secret" not in repr(made)


def test_errors_name_arguments_and_not_options(running: dict) -> None:
    """SDK errors never name command-line options."""
    for work in (
        lambda: Client("rows.example:50051"),
        lambda: Client("redis://rows.example"),
        lambda: Client("rediss://rows.example?ssl_cert_reqs=none"),
        lambda: Client("rows.example:1", tls_cert="a", tls_key="b"),
        lambda: Client("rows.example:1", proxy="http://a"),
        lambda: Client("rows.example:1", tls_ca="/nowhere"),
        lambda: Client("rows.example:1", insecure=True, token_file="/nowhere").tables(),
        lambda: Client(running["file"]).generate([1]).__next__(),
        lambda: Client(running["lookup"]).fetch("absent", [1]),
        lambda: Client(running["file"]).fetch("absent", [1]),
        lambda: Client(running["worker"]).fetch("absent", [1]),
        lambda: Client(running["worker"]).generate([], 3).__next__(),
        lambda: Client(running["worker"]).generate([1], 10**6).__next__(),
    ):
        with pytest.raises(errors.TolhouseError) as raised:
            work()
        assert "--" not in str(raised.value)


@pytest.mark.parametrize("kind", ["file", "redis"])
def test_a_lookup_service_does_not_show_its_store(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    """No error of a lookup service shows the store's address or paths."""
    with ExitStack() as stack:
        folder = tmp_path / "secret-place"
        url = f"file://{folder}"
        if kind == "redis":
            redis = stack.enter_context(redis_node())
            url = redis.url
        ref = build_table(checkpoint, url, codec="bf16", shards=2)
        place = url.rpartition("//")[2]
        options = ("--store", url, "--hot-megabytes", "0", "--store-timeout-seconds", "1")
        served = stack.enter_context(process("lookup", *options, *LOCAL))
        client = stack.enter_context(Client(served.address, timeout=4))
        messages = []

        def fails(error: type[Exception], call: Callable[[], object]) -> None:
            with pytest.raises(error) as raised:
                call()
            messages.append(str(raised.value))

        assert 2 == len(client.fetch(ref, [1, 2]))
        absent = f"tiny-memory@{'0' * 16}"
        fails(errors.NotFoundError, lambda: client.describe("absent"))
        fails(errors.NotFoundError, lambda: client.fetch(absent, [1]))
        if kind == "redis":
            with closing(open_store(url)) as store:
                store.delete_records(ref)
            fails(errors.CorruptError, lambda: client.fetch(ref, [1, 2]))
            send_signal(redis.popen.pid, signal.SIGSTOP)
            fails(errors.DeadlineExceededError, lambda: client.fetch(ref, [3], timeout=30))
            os.kill(redis.popen.pid, signal.SIGKILL)
            fails(errors.UnavailableError, lambda: client.describe("absent"))
        else:
            for shard in folder.rglob("*.safetensors"):
                shard.write_bytes(b"")
            fails(errors.CorruptError, lambda: client.fetch(ref, [1, 2]))
            for shard in folder.rglob("*.safetensors"):
                shard.unlink()
                shard.mkdir()
            fails(errors.UnavailableError, lambda: client.fetch(ref, [3, 4]))
    assert [] == [m for m in messages if place in m or "secret" in m], messages


def plain(value: object) -> bool:
    """Return whether a value and its fields have only Python, NumPy and Tolhouse types."""
    module = type(value).__module__
    if is_dataclass(value):
        return module.startswith("tolhouse.") and all(
            plain(getattr(value, f.name)) for f in fields(value)
        )
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    if isinstance(value, dict):
        return plain([*value.items()])
    return module in ("builtins", "numpy")


def test_results_hold_no_protobuf(running: dict) -> None:
    """Results and annotations contain no protobuf types."""
    with Client(running["lookup"]) as source, Client(running["worker"]) as worker:
        results = [
            source.tables(),
            source.describe("tiny-memory"),
            worker.describe_worker(),
            list(worker.replies(PROMPT, 2, logprobs=2, prompt_logprobs=1)),
        ]
    assert all(map(plain, results)), results
    for kind in (getattr(tolhouse, name) for name in tolhouse.__all__ if name[0] != "_"):
        functions = [f for f in vars(kind).values() if inspect.isfunction(f)]
        hints = [typing.get_type_hints(f) for f in functions if f.__module__.startswith("tolhouse")]
        assert "_pb2" not in str(hints), kind


def test_results_have_all_fields_of_the_protocol() -> None:
    """Each result class has all fields of its protocol message."""
    for kind, message in (
        (tolhouse.WorkerInfo, pb.DescribeWorkerReply),
        (tolhouse.RowCounts, pb.RowCounts),
        (tolhouse.GenerateOutput, pb.GenerateReply),
        (tolhouse.TokenLogprobs, pb.Logprobs),
    ):
        assert {f.name for f in fields(kind)} == set(message.DESCRIPTOR.fields_by_name)


def test_errors_can_be_pickled_and_copied(running: dict) -> None:
    """Copied and unpickled errors keep class, message and token ids."""
    with Client(running["file"]) as client, pytest.raises(errors.NotFoundError) as raised:
        client.describe("absent")
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    made = [raised.value, errors.CorruptError("why", [3, 5]), *(kind("why") for kind in kinds)]
    for error in made:
        for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert (type(error), str(error)) == (type(other), str(other))
            assert getattr(error, "token_ids", ()) == getattr(other, "token_ids", ())


PROGRAM = """
import asyncio
from collections.abc import Iterator

from tolhouse import AsyncClient, Client, ClientCredentials, CorruptError, Manifest, WorkerInfo


def tokens(address: str) -> Iterator[int]:
    credentials = ClientCredentials(tls_ca="ca.pem", token="secret")
    with Client(address, timeout=5, credentials=credentials) as worker:
        info: WorkerInfo = worker.describe_worker()
        print(info.model, info.rows.from_cache + 1)
        yield from worker.generate([1, 2], max_tokens=3, temperature=0.5)
        for output in worker.replies(range(3), logprobs=1):
            if output.logprobs:
                print(output.logprobs.top[0][0] + 1.0, output.finish_reason)


async def rows(address: str) -> list[int]:
    async with AsyncClient([address], tls_ca="ca.pem") as source:
        manifest: Manifest = await source.describe("demo", timeout=3)
        first, second = await asyncio.gather(
            source.fetch(manifest, [1, 2]), source.fetch("demo", range(3), timeout=1.5)
        )
        try:
            print(first.shape, second.dtype, [table.ref for table in await source.tables()])
        except CorruptError as error:
            print(error.token_ids[0] + 1)
        return [token async for token in source.generate([1], 4)]


mistake: str = asyncio.run(rows("127.0.0.1:50051"))
"""


def test_a_typed_program_passes_mypy(tmp_path: Path) -> None:
    """`mypy --strict` accepts a typed program except for its one deliberate mistake."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--config-file=", f"--cache-dir={tmp_path}/cache", str(path)]
    sources = {"MYPYPATH": str(Path(tolhouse.__file__).parent.parent), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=sources, cwd=tmp_path, check=False
    )
    found = [line for line in done.stdout.splitlines() if "program.py" in line]
    assert 1 == len(found), found
    assert 'has type "list[int]", variable has type "str"' in found[0]
