"""Connections to Redis servers: limits for whole replies, and records received in place.

The timeout limits a whole reply, even if the server sends it byte by byte. New connections read the
files in the URL's options: `password_file`, and for rediss:// redis-py's `ssl_ca_certs`,
`ssl_certfile` and `ssl_keyfile`.
"""

import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from math import inf
from ssl import SSLSocket
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from redis import Redis
from redis import exceptions as theirs
from redis._parsers import _HiredisParser
from redis.cluster import RedisCluster
from redis.connection import AbstractConnection, ConnectionPool
from redis.credentials import CredentialProvider
from redis.utils import SENTINEL

from tolhouse.errors import ClosedError, InvalidArgumentError
from tolhouse.files import ReloadingFiles, read_file
from tolhouse.net.call import has_time_limit
from tolhouse.store.base import Views, has_password, shown

LOST = theirs.ConnectionError, theirs.TimeoutError  # a node is down or hangs
_RECEIVED_BYTES = 1 << 18  # the bytes that one receive allows; more buffers cost time
# The running thread's deadline for replies, and the event that its store is closed.
_limits: ContextVar[tuple[float, threading.Event]] = ContextVar(
    "limits", default=(inf, threading.Event())
)


@contextmanager
def until(end: float, closed: threading.Event) -> Iterator[None]:
    """Let the block read replies until the monotonic time `end`, or until `closed` is set."""
    token = _limits.set((end, closed))
    try:
        yield
    finally:
        _limits.reset(token)


class Parser(_HiredisParser):
    """Reads replies until the deadline of the call. A socket's timeout limits only one `recv`."""

    def read_from_socket(self, timeout: Any = SENTINEL, raise_on_timeout: bool = True) -> bool:
        left = self._seconds(*_limits.get())
        timeout = left if timeout is SENTINEL and left is not None else timeout
        return super().read_from_socket(timeout, raise_on_timeout)

    def receive(self, buffers: Sequence[memoryview], end: float, closed: threading.Event) -> int:
        """Receive bytes into `buffers`, one after the other, and return their number."""
        seconds, sock = self._seconds(end, closed), self._sock
        if sock is None:  # another thread closed the store
            raise theirs.ConnectionError("the connection is closed")
        try:
            if seconds is not None:
                sock.settimeout(seconds)
            in_one = isinstance(sock, SSLSocket)
            count = sock.recv_into(buffers[0]) if in_one else sock.recvmsg_into(buffers)[0]
        except TimeoutError:
            raise theirs.TimeoutError("the answer was too slow") from None
        except OSError as error:
            raise theirs.ConnectionError(f"the connection was lost: {error}") from None
        finally:
            if seconds is not None:
                sock.settimeout(self._socket_timeout)
        if not count:
            raise theirs.ConnectionError("the server closed the connection")
        return count

    def feed(self, received: bytes) -> None:
        """Parse bytes from `receive` before those that arrive next."""
        self._reader.feed(received)

    def _seconds(self, end: float, closed: threading.Event) -> float | None:
        """Return the time until `end`, or None if the timeout of the socket is shorter."""
        if closed.is_set():
            raise ClosedError("the store is closed")
        left = end - time.monotonic()
        if left <= 0:
            raise theirs.TimeoutError("the answer was too slow")
        return left if left < (self._socket_timeout or inf) or has_time_limit() else None


def replies(
    connection: Any, arrays: list[Views], record_bytes: int, end: float, closed: threading.Event
) -> Iterator[list[Any]]:
    """Yield the replies that the connection receives. Each is an array of records.

    Records are received directly into `arrays`, and a reply is then its array. hiredis parses the
    first reply that is not an array of records of this size, such as an error, and all later ones.
    """
    parser: Parser = connection._parser  # noqa: SLF001 - redis-py has no public name
    size = b"$%d\r\n" % record_bytes
    frames = list[bytes]()  # the expected bytes before each record
    for views in arrays:
        frames += [b"*%d\r\n%b" % (len(views), size), *[size] * (len(views) - 1)]
    frames = [frames[0], *(b"\r\n" + frame for frame in frames[1:]), b"\r\n"]
    expected, starts = b"".join(frames), [0, *accumulate(map(len, frames))]
    framing = memoryview(bytearray(len(expected)))  # the received bytes between records
    parts = [framing[start:stop] for start, stop in pairwise(starts)]
    records = chain.from_iterable(arrays)
    # Frames and records in turn, as their bytes arrive.
    buffers = [parts[0], *chain.from_iterable(zip(records, parts[1:], strict=True))]
    ends = [*accumulate(map(len, buffers))]
    most = min(128, 2 * (_RECEIVED_BYTES // record_bytes + 1))
    received = checked = done = last = 0
    for n, views in enumerate(arrays):
        last += 2 * len(views)
        reply_end = ends[last - 1] + 2
        while received < reply_end:
            at = bisect_right(ends, received)
            rest = buffers[at : at + most]
            rest[0] = rest[0][len(rest[0]) - ends[at] + received :]
            received += parser.receive(rest, end, closed)
            at = bisect_right(ends, received)
            framed = starts[(at + 1) // 2]
            if at % 2 == 0:  # a part of a frame has arrived
                framed += received - ends[at] + len(buffers[at])
            if framing[checked:framed] != expected[checked:framed]:
                parser.feed(b"".join(buffers)[done:received])
                for _ in arrays[n:]:
                    with until(end, closed):
                        reply = connection.read_response()
                    yield reply
                return
            checked = framed
        done = reply_end
        yield views


class _Pool(ConnectionPool):
    """A pool whose connections use `Parser`, for a Cluster."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, parser_class=Parser, **options)


def connect(urls: list[str], options: dict[str, Any]) -> tuple[Any, bool]:
    """Connect to the first server that answers. Returns the client, and whether it is a Cluster."""
    client: Redis = Redis.from_url(urls[0], parser_class=Parser, **options)
    try:
        if client.info("cluster").get("cluster_enabled") != 1:
            return client, False
        more = {"require_full_coverage": False, "redis_connect_func": _read_only}
        more["connection_pool_class"] = _Pool
        cluster = RedisCluster.from_url(urls[0], parser_class=Parser, **options, **more)
    except LOST:
        client.close()
        if not urls[1:]:
            raise
        return connect(urls[1:], options)
    client.close()
    return cluster, True


def _read_only(connection: AbstractConnection) -> None:
    """Let a replica answer reads. A master ignores the command."""
    connection.send_command("READONLY")
    connection.read_response()


@dataclass
class _PasswordFile(CredentialProvider):
    """A password from a file. After a change of the file, new connections use the new password."""

    user: str
    file: ReloadingFiles[bytes]

    def get_credentials(self) -> tuple[str, str]:
        return self.user, self.file.get().decode(errors="replace").strip()


def split_credentials(url: str) -> tuple[str, CredentialProvider | None]:
    """Split a URL into the URL without `password_file`, and the credentials from that file."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if not (path := options.pop("password_file", "")):
        return url, None
    if has_password(url):
        raise InvalidArgumentError(f"store {shown(url)!r} has both a password and a password_file")
    user = unquote(parts.username or options.pop("username", "default"))
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(options))
    file = ReloadingFiles((path,), lambda: read_file(path, "the Redis password file"))
    return urlunsplit(bare), _PasswordFile(user, file)
