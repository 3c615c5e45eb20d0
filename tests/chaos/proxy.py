"""A TCP link between two processes that can cut, delay, and slow down their connections."""

import asyncio
import contextlib
import threading
from types import TracebackType
from typing import Self


class Link:
    """Forwards TCP connections from its own port to `target`, in its own thread."""

    def __init__(self, target: str, port: int = 0) -> None:
        self.host, _, self.port = target.partition(":")
        self.delay_seconds = self.drip_seconds = 0.0
        self._cut = False
        self._tasks: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name=f"link to {target}", daemon=True
        )
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", port), self._loop
        ).result()
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Close all connections, and every new connection at once."""
        self._cut = True

        async def end() -> None:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()

    def delay(self, seconds: float) -> None:
        """Delay every byte by this time, in both directions."""
        self.delay_seconds = seconds

    def drip(self, seconds: float) -> None:
        """Forward answers one byte at a time, with this time between two bytes."""
        self.drip_seconds = seconds

    def mend(self) -> None:
        self._cut, self.delay_seconds, self.drip_seconds = False, 0.0, 0.0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        other = None
        try:
            if self._cut:
                return
            there, other = await asyncio.open_connection(self.host, int(self.port))
            pumps = self._pump(reader, other), self._pump(there, writer, answers=True)
            await asyncio.gather(*pumps)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for one in (writer, other):
                if one:
                    one.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        """Forward bytes `delay_seconds` after they arrived, without limiting the bytes in
        flight."""
        coming: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        queued = 0

        async def write() -> None:
            nonlocal queued
            while True:
                due, data = await coming.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    with contextlib.suppress(OSError):
                        writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
                queued -= 1

        writing = asyncio.create_task(write())
        try:
            while data := await reader.read(1 << 16):
                while answers and self.drip_seconds and len(data) > 1 and not writer.is_closing():
                    writer.write(data[:1])
                    data = data[1:]
                    await asyncio.sleep(self.drip_seconds)
                if self.delay_seconds or queued:
                    queued += 1
                    coming.put_nowait((loop.time() + self.delay_seconds, data))
                else:
                    writer.write(data)
                    await writer.drain()
            coming.put_nowait((loop.time(), b""))
            await writing
        finally:
            writing.cancel()
