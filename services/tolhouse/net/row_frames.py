"""The frames of the row transport, which carries records over TCP without copies in between.

A request is its length as uint32, and then a FetchRequest. A reply is one or more frames: the
number of bytes of records and of an error, both uint32, then whole records, then the Error. A reply
ends after the last requested record or with an error. Integers are little-endian. Replies have the
order of the requests. docs/row-transport.md specifies the protocol.
"""

import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import inf
from typing import BinaryIO

from tolhouse.errors import InvalidArgumentError
from tolhouse.v1 import lookup_pb2 as pb

MAX_IDS_PER_FETCH = 65_536
MAX_REQUEST_BYTES = 4 * MAX_IDS_PER_FETCH + (16 << 10)  # ids, and the limit of gRPC's headers
Buffer = bytes | memoryview

_LENGTH, _HEADER = struct.Struct("<I"), struct.Struct("<II")
_TIMEVAL = struct.Struct("@ll")
_MOST_VIEWS = 1024  # IOV_MAX
_SURE_BYTES = 4096  # the socket's buffer, which holds one request at a time, has this much room
_BUFFER_BYTES = 4 << 14  # four TLS records
_KEEPALIVE = (socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)


def prepare(sock: socket.socket) -> None:
    """Set the options of a connection: no delay, and keepalive as for gRPC."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def pack_request(request: pb.FetchRequest) -> bytes:
    """Return the bytes of a request."""
    data = request.SerializeToString()
    return _LENGTH.pack(len(data)) + data


def read_request(file: BinaryIO) -> pb.FetchRequest | None:
    """Read a request, or return None at the end of the stream.

    Raises InvalidArgumentError if the request is malformed. The stream is unusable then.
    """
    if len(head := file.read(_LENGTH.size)) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_REQUEST_BYTES:
        message = f"a request of {length} bytes; at most {MAX_REQUEST_BYTES} are allowed"
        raise InvalidArgumentError(message)
    if len(data := file.read(length)) < length:
        return None
    try:
        return pb.FetchRequest.FromString(data)
    except Exception:  # noqa: BLE001 - protobuf's DecodeError, or one of text that is not UTF-8
        raise InvalidArgumentError("the request is not a FetchRequest") from None


def send_records(sock: socket.socket, records: Sequence[Buffer]) -> None:
    """Send a frame of whole records."""
    size = sum(map(len, records))
    _send(sock, [_HEADER.pack(size, 0), *records])


def send_error(sock: socket.socket, error: pb.Error) -> None:
    """Send the frame that ends a failed request."""
    data = error.SerializeToString()
    _send(sock, [_HEADER.pack(0, len(data)), data])


class Caller:
    """The client's end of a connection. A call that raises leaves the connection unusable."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._is_encrypted = sock, isinstance(sock, ssl.SSLSocket)
        self._header = memoryview(bytearray(_HEADER.size))
        self._timeout = inf  # of one system call, as set on the socket

    def send(self, data: bytes, end: float) -> None:
        """Send `data`. Raises TimeoutError or another OSError at the monotonic time `end`."""
        if len(data) > _SURE_BYTES:
            seconds = max(0.001, end - time.monotonic())
            if self._is_encrypted:
                self._timeout = seconds
                self._sock.settimeout(seconds)
            else:
                limit_sends(self._sock, seconds)
        self._sock.sendall(data)

    def header(self, end: float) -> tuple[int, int]:
        """Receive the number of bytes of records and of an error that follow."""
        self.fill([self._header], end)
        records, error = _HEADER.unpack(self._header)
        return records, error

    def fill(self, views: list[memoryview], end: float) -> None:
        """Receive bytes until all views are full.

        Raises:
            TimeoutError: They are not full at the monotonic time `end`.
            OSError: The stream has ended.
        """
        for first in range(0, len(views), _MOST_VIEWS):
            left = views[first : first + _MOST_VIEWS]
            while left:
                left = _without(left, self._receive(left, end))

    def _receive(self, views: list[memoryview], end: float) -> int:
        while True:
            self._limit(end - time.monotonic())
            try:
                if self._is_encrypted:
                    count = self._decrypt(views[0], end)
                elif len(views) == 1:  # one system call waits for all bytes
                    count = self._sock.recv_into(views[0], 0, socket.MSG_WAITALL)
                else:
                    count = self._sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
            except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
                continue  # until `end`
            if not count:
                raise ConnectionError("the connection was closed")
            return count

    def _decrypt(self, view: memoryview, end: float) -> int:
        """Receive into `view`, which may take many calls, because each returns one TLS record."""
        receive = self._sock.recv_into
        count = receive(view)
        with suppress(TimeoutError, ssl.SSLWantReadError):
            while 0 < count < len(view) and time.monotonic() < end:
                if not (size := receive(view[count:])):
                    break
                count += size
        return count

    def _limit(self, seconds: float) -> None:
        """Limit a system call to `seconds` or somewhat less.

        The limit of an earlier call often serves as well, and setting another takes time.
        """
        if seconds <= 0:
            raise TimeoutError
        if not seconds / 4 < self._timeout <= seconds:
            self._timeout = 0.8 * seconds
            if self._is_encrypted:
                self._sock.settimeout(self._timeout)
            else:
                option = socket.SO_RCVTIMEO
                self._sock.setsockopt(socket.SOL_SOCKET, option, _timeval(self._timeout))


def limit_sends(sock: socket.socket, seconds: float) -> None:
    """Limit the time that a send waits for the receiver."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))


def _send(sock: socket.socket, views: list[Buffer]) -> None:
    if isinstance(sock, ssl.SSLSocket):
        for whole in _in_whole_records(views):
            sock.sendall(whole)
        return
    for first in range(0, len(views), _MOST_VIEWS):
        part = views[first : first + _MOST_VIEWS] if len(views) > _MOST_VIEWS else views
        sent = sock.sendmsg(part)
        if sent < sum(map(len, part)):  # a signal interrupted the call
            sock.sendall(b"".join(part)[sent:])


def _in_whole_records(views: list[Buffer]) -> Iterator[memoryview]:
    """Yield the bytes of all views in one buffer, which has room for several whole TLS records."""
    buffer, at = memoryview(bytearray(min(_BUFFER_BYTES, sum(map(len, views))))), 0
    for view in views:
        rest = memoryview(view)
        while rest:
            end = min(at + len(rest), len(buffer))
            buffer[at:end], rest = rest[: end - at], rest[end - at :]
            at = end % len(buffer)
            if not at:
                yield buffer
    if at:
        yield buffer[:at]


def _without(views: list[memoryview], count: int) -> list[memoryview]:
    """Return the views without their first `count` bytes."""
    for n, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[n + 1 :]]
        count -= len(view)
    return []


def _timeval(seconds: float) -> bytes:
    if seconds == inf:
        return _TIMEVAL.pack(0, 0)  # no limit
    return _TIMEVAL.pack(*divmod(max(1, int(seconds * 1e6)), 1_000_000))
