"""`Client`: rows and manifests from a row source, tokens from a worker."""

import os
from collections.abc import Generator, Iterable
from contextlib import closing
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tolhouse.client.connection import Connection
from tolhouse.client.results import GenerateOutput, TableInfo, WorkerInfo
from tolhouse.client.row_source import RowSource
from tolhouse.net.auth import ClientCredentials
from tolhouse.net.channel import Targets
from tolhouse.table.manifest import Manifest


class Client:
    """Reads rows from a row source, or generates tokens with an attention worker.

    The first call connects. One client may be used by several threads. Use it as a context manager,
    or call `close`.

    A client works after a fork, because it opens new connections in the child process. gRPC is the
    exception: if the parent process called a service at HOST:PORT before the fork, such calls raise
    UnsupportedError in the child. Start such processes by "spawn" or "forkserver". Clients can be
    pickled.

    Args:
        target: Where to connect. Row sources are `"HOST:PORT"` of a lookup service,
            `"file://PATH"` (or a `pathlib.Path`) and `"redis://HOST:PORT"`. A worker is
            `"HOST:PORT"`. Replicas are `"HOST:PORT,HOST:PORT"`, a list, or `"dns:///HOST:PORT"`
            for all addresses of a name.
        timeout: Seconds that a call may take. It does not limit `generate` and `replies`.
        credentials: TLS files and token for services on other machines.
        options: Fields of `ClientCredentials` as keyword arguments, in place of `credentials`.

    Raises:
        InvalidArgumentError: An argument is not allowed, or would send plaintext to another
            machine.

    Example:
        ```python
        with Client("rows.example:50051", tls_ca="ca.pem", token="…") as source:
            rows = source.fetch("demo-memory", [17, 4, 2048])
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._connection})"

    def __reduce__(self) -> tuple[Any, ...]:
        made_of = self._connection
        return Client._unpickled, (made_of.target, made_of.timeout, made_of.credentials)

    @classmethod
    def _unpickled(cls, target: Targets, timeout: float, credentials: ClientCredentials) -> Self:
        return cls(target, timeout, credentials=credentials)

    def close(self) -> None:
        """Close all connections. Calls in flight, and later ones, raise ClosedError.

        Closing a client twice is allowed.
        """
        self._connection.close()

    @property
    def rows(self) -> RowSource:
        """The row source, for reading records as they are stored."""
        return self._connection.source()

    def tables(self, *, timeout: float | None = None) -> list[TableInfo]:
        """List every table of the row source.

        Args:
            timeout: Seconds that the call may take. None: as given to the constructor.

        Raises:
            UnavailableError: No replica can be reached.
            DeadlineExceededError: No replica answered in time.

        Example:
            ```python
            for table in client.tables():
                print(table.ref, table.published, table.manifest.codec_name)
            ```
        """
        return self._connection.tables(timeout)

    def describe(self, table: str, *, timeout: float | None = None) -> Manifest:
        """Read the manifest of a table.

        Args:
            table: `"name@version"`, or `"name"` for the version that is published now.
            timeout: Seconds that the call may take. None: as given to the constructor.

        Raises:
            NotFoundError: There is no such table. The message lists the existing tables.

        Example:
            ```python
            manifest = client.describe("demo-memory")
            print(manifest.ref, manifest.vocab_size, manifest.blocks, manifest.width)
            ```
        """
        return self._connection.describe(table, timeout)

    def fetch(
        self,
        table: str | Manifest,
        ids: npt.ArrayLike | Iterable[int],
        *,
        timeout: float | None = None,
    ) -> np.ndarray:
        """Fetch the rows of token ids.

        Args:
            table: `"name@version"`, `"name"` for the version that is published now, or a manifest.
            ids: T token ids in any order; ids may repeat. A list, tuple, range, generator, NumPy
                array or tensor.
            timeout: Seconds that the call may take. None: as given to the constructor.

        Returns:
            Rows [T, N, D]: N blocks of D values, in the order of `Manifest.blocks`. The array is
            read-only. Its type is that of the codec: float32, float16 or bfloat16; float32 for
            int8 and int4.

        Raises:
            NotFoundError: There is no such table.
            IdOutOfRangeError: An id is not below the size of the vocabulary.
            UnavailableError: No replica can be reached.
            DeadlineExceededError: No replica answered in time.
            CorruptError: No replica has an intact row of some of the ids.

        Example:
            ```python
            rows = client.fetch("demo-memory", [17, 4, 2048])  # [3, blocks, width]
            ```
        """
        return self._connection.fetch(table, ids, timeout)

    def generate(
        self,
        prompt_token_ids: npt.ArrayLike | Iterable[int],
        max_tokens: int = 16,
        *,
        timeout: float | None = None,
        **sampling: Any,
    ) -> Generator[int, None, None]:
        """Generate a completion, and yield its token ids as they arrive.

        Closing or dropping the iterator cancels the completion.

        Args:
            prompt_token_ids: Token ids of the prompt, at least one.
            max_tokens: Largest number of tokens to generate.
            timeout: Seconds that the whole completion may take. None: no limit.
            sampling: Sampling parameters such as `temperature`, `top_p`, `seed` and
                `stop_token_ids`. `tolhouse.sampling.SamplingParams` has all of them.

        Raises:
            InvalidArgumentError: A parameter is unknown or not allowed.
            PromptTooLongError: The prompt and `max_tokens` exceed the context.
            OverloadedError: The worker's queue is full.
            UnavailableError: The worker cannot be reached.
            DeadlineExceededError: The completion took longer than `timeout`.

        Example:
            ```python
            for token_id in worker.generate([17, 4, 2048], max_tokens=32, temperature=0.8):
                print(token_id)
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
    ) -> Generator[GenerateOutput, None, None]:
        """Generate a completion, and yield its parts with log probabilities and finish reason.

        Arguments and errors are those of `generate`.

        Example:
            ```python
            for output in worker.replies([17, 4, 2048], max_tokens=8, logprobs=5):
                print(output.token_ids, output.logprobs, output.finish_reason)
            ```
        """
        generation = self._connection.generation(prompt_token_ids, max_tokens, timeout, sampling)
        return self._connection.stream(generation)

    def describe_worker(self, *, timeout: float | None = None) -> WorkerInfo:
        """Describe the worker: what it serves, its load and its row counts.

        Args:
            timeout: Seconds that the call may take. None: as given to the constructor.

        Example:
            ```python
            info = worker.describe_worker()
            print(info.model, info.table, info.running, info.waiting)
            ```
        """
        return self._connection.describe_worker(timeout)


def _token_ids_of(replies: Generator[GenerateOutput, None, None]) -> Generator[int, None, None]:
    with closing(replies):
        for reply in replies:
            yield from reply.token_ids
