"""`AsyncClient`: the calls of `Client` for asyncio.

Completions are streams of grpc.aio. Every other call runs the method of `Client` in a daemon
thread. It therefore does not block the event loop, and the process may exit while it runs.
"""

import asyncio
import os
import threading
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
import numpy.typing as npt

from tolhouse.client.connection import Connection, Generation
from tolhouse.client.generation import WorkerChannel
from tolhouse.client.replica import Replica
from tolhouse.client.results import GenerateOutput, TableInfo, WorkerInfo, generate_output
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.call import Cancellation
from tolhouse.net.channel import Targets
from tolhouse.table.manifest import Manifest

T = TypeVar("T")
P = ParamSpec("P")
MAX_THREADS = 64  # concurrent calls; further calls wait


@dataclass
class _OfLoop:
    """The channels and the thread limit of one event loop."""

    loop: AbstractEventLoop
    pid: int = field(default_factory=os.getpid)
    threads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_THREADS))
    channels: dict[str, WorkerChannel] = field(default_factory=dict)  # by target


class AsyncClient:
    """`Client` for asyncio: the same methods, arguments and errors.

    The constructor checks its arguments, and the first call connects. Cancelling a task cancels
    its call. A cancelled call to Redis or to files may occupy its thread until `timeout`.

    Args:
        target: The same as for `Client`.
        timeout: The same as for `Client`.
        credentials: The same as for `Client`.
        options: The same as for `Client`.

    Example:
        ```python
        async with AsyncClient("127.0.0.1:50052") as worker:
            async for token_id in worker.generate([17, 4, 2048], max_tokens=32):
                print(token_id)
        ```
    """

    def __init__(
        self,
        target: Targets | os.PathLike[str],
        timeout: float = 10.0,
        *,
        credentials: ClientCredentials | None = None,
        **options: Any,
    ) -> None:
        self._connection = Connection(target, timeout, credentials, options)
        self._own: _OfLoop | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._connection})"

    def __reduce__(self) -> tuple[Any, ...]:
        made_of = self._connection
        return AsyncClient._unpickled, (made_of.target, made_of.timeout, made_of.credentials)

    @classmethod
    def _unpickled(cls, target: Targets, timeout: float, credentials: ClientCredentials) -> Self:
        return cls(target, timeout, credentials=credentials)

    async def close(self) -> None:
        """Close all connections. Calls in flight, and later ones, raise ClosedError.

        Closing a client twice is allowed.
        """
        own, self._own = self._own, None
        await _in_thread(self._connection.close)
        if own and own.loop is asyncio.get_running_loop() and own.pid == os.getpid():
            for channel in own.channels.values():
                await channel.close()

    async def tables(self, *, timeout: float | None = None) -> list[TableInfo]:
        """List every table of the row source, as `Client.tables` does.

        Example:
            ```python
            tables = await client.tables()
            ```
        """
        return await self._run(self._connection.tables, timeout)

    async def describe(self, table: str, *, timeout: float | None = None) -> Manifest:
        """Read the manifest of a table, as `Client.describe` does.

        Example:
            ```python
            manifest = await client.describe("demo-memory")
            ```
        """
        return await self._run(self._connection.describe, table, timeout)

    async def fetch(
        self,
        table: str | Manifest,
        ids: npt.ArrayLike | Iterable[int],
        *,
        timeout: float | None = None,
    ) -> np.ndarray:
        """Fetch the rows [T, N, D] of T token ids, as `Client.fetch` does.

        Example:
            ```python
            first, second = await asyncio.gather(client.fetch(table, a), client.fetch(table, b))
            ```
        """
        return await self._run(self._connection.fetch, table, ids, timeout)

    def generate(
        self,
        prompt_token_ids: npt.ArrayLike | Iterable[int],
        max_tokens: int = 16,
        *,
        timeout: float | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[int, None]:
        """Generate a completion, and yield its token ids as they arrive, as `Client.generate` does.

        Example:
            ```python
            tokens = [token async for token in worker.generate([17, 4, 2048], max_tokens=32)]
            ```
        """
        options = {"timeout": timeout, **sampling}
        return _token_ids_of(self.replies(prompt_token_ids, max_tokens, **options))

    def replies(
        self,
        prompt_token_ids: npt.ArrayLike | Iterable[int],
        max_tokens: int = 16,
        *,
        timeout: float | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[GenerateOutput, None]:
        """Generate a completion, and yield its parts, as `Client.replies` does.

        Example:
            ```python
            async for output in worker.replies([17, 4, 2048], logprobs=5):
                print(output.token_ids, output.logprobs)
            ```
        """
        generation = self._connection.generation(prompt_token_ids, max_tokens, timeout, sampling)
        return self._stream(generation)

    async def describe_worker(self, *, timeout: float | None = None) -> WorkerInfo:
        """Describe the worker, as `Client.describe_worker` does.

        Example:
            ```python
            info = await worker.describe_worker()
            ```
        """
        return await self._run(self._connection.describe_worker, timeout)

    async def _stream(self, generation: Generation) -> AsyncGenerator[GenerateOutput, None]:
        worker = await self._run(self._connection.worker_for, generation)
        with self._connection.errors():
            replies = self._channel(worker).generate(generation.request, generation.timeout)
            async with aclosing(replies):
                async for reply in replies:
                    yield generate_output(reply)

    def _of_loop(self) -> _OfLoop:
        loop = asyncio.get_running_loop()
        if not (own := self._own) or own.loop is not loop or own.pid != os.getpid():
            own = self._own = _OfLoop(loop)
        return own

    def _channel(self, worker: Replica) -> WorkerChannel:
        channels = self._of_loop().channels
        if worker.target not in channels:
            channels[worker.target] = WorkerChannel(
                worker.target, worker.credentials, worker.target
            )
        return channels[worker.target]

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._of_loop().threads:
            return await _in_thread(work, *args, **kwargs)


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a call of `Client` in a daemon thread. Cancelling the task cancels the call."""
    loop, cancellation, context = asyncio.get_running_loop(), Cancellation(), copy_context()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # a T if there is no error

    def run() -> None:
        result, error = None, None
        try:
            with cancellation.active():
                result = work(*args, **kwargs)
        except BaseException as failure:  # noqa: BLE001 - the task raises the error
            error = failure
        with suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=context.run, args=(run,), name="client", daemon=True).start()
    try:
        return await done
    except asyncio.CancelledError:
        cancellation.cancel()
        raise


async def _token_ids_of(replies: AsyncGenerator[GenerateOutput, None]) -> AsyncGenerator[int, None]:
    async with aclosing(replies):
        async for reply in replies:
            for token_id in reply.token_ids:
                yield token_id
