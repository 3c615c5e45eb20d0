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
from collections.abc import Sequence
from math import inf
from typing import BinaryIO

from tolhouse.errors import InvalidArgumentError
from tolhouse.table.manifest import Buffer
from tolhouse.v1 import lookup_pb2 as pb

MAX_IDS_PER_FETCH = 65_536
MAX_REQUEST_BYTES = 4 * MAX_IDS_PER_FETCH + (16 << 10)  # ids, and the limit of gRPC's headers
_LENGTH, _HEADER = struct.Struct("<I"), struct.Struct("<II")
_TIMEVAL = struct.Struct("@ll")
_MOST_VIEWS = 1024  # IOV_MAX
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


def receive_header(sock: socket.socket, end: float) -> tuple[int, int]:
    """Receive the number of bytes of records and of an error that follow."""
    head = memoryview(bytearray(_HEADER.size))
    receive(sock, [head], end)
    records, error = _HEADER.unpack(head)
    return records, error


def receive(sock: socket.socket, views: list[memoryview], end: float) -> None:
    """Receive bytes until all views are full.

    Raises:
        TimeoutError: They are not full at the monotonic time `end`.
        ConnectionError: The stream has ended.
    """
    for first in range(0, len(views), _MOST_VIEWS):
        left = views[first : first + _MOST_VIEWS]
        while left:
            left = _without(left, _receive_some(sock, left, end))


def send(sock: socket.socket, data: bytes, end: float) -> None:
    """Send `data`. Raises TimeoutError or another OSError at the monotonic time `end`."""
    seconds = max(0.001, end - time.monotonic())
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(None if seconds == inf else seconds)
    else:
        limit_sends(sock, seconds)
    sock.sendall(data)


def limit_sends(sock: socket.socket, seconds: float) -> None:
    """Limit the time that a send waits for the receiver."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))


def _send(sock: socket.socket, views: list[Buffer]) -> None:
    if isinstance(sock, ssl.SSLSocket):
        sock.sendall(b"".join(views))
        return
    for first in range(0, len(views), _MOST_VIEWS):
        part = views[first : first + _MOST_VIEWS]
        sent = sock.sendmsg(part)
        if sent < sum(map(len, part)):  # a signal interrupted the call
            sock.sendall(b"".join(part)[sent:])


def _receive_some(sock: socket.socket, views: list[memoryview], end: float) -> int:
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(None if seconds == inf else seconds)
        count = sock.recv_into(views[0])
    else:  # one system call waits for all bytes
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))
        try:
            if len(views) == 1:
                count = sock.recv_into(views[0], 0, socket.MSG_WAITALL)
            else:
                count = sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            raise TimeoutError from None
    if not count:
        raise ConnectionError("the connection was closed")
    return count


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
