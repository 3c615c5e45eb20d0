"""Fetch replies in protobuf's own bytes, made and read by hand: a record is copied once on the way in and once out.

The generated code copies `records` into the message, then the message into its serialised form, and back again. Here a
reply is one join of a header and the records where they lie, and is read as a view of the bytes that gRPC hands over.
The bytes are plain protobuf: `tests/test_wire.py` holds them against the generated code, which any stock client may use.
`records` comes last: protobuf leaves the order of fields to the writer, and so the header is all that precedes it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from tolhouse.errors import Internal
from tolhouse.table.manifest import Buffer
from tolhouse.v1 import lookup_pb2

_REQUEST_ID, _FIRST, _LAST = 1 << 3, 2 << 3, 4 << 3  # varints
_RECORDS, _ERROR = 3 << 3 | 2, 5 << 3 | 2  # with a length


class Reply(NamedTuple):
    request_id: int
    first: int
    records: memoryview
    last: bool
    error: lookup_pb2.Error | None


def reply(
    request_id: int,
    first: int,
    records: Sequence[Buffer],
    size: int,
    last: bool,
) -> bytes:
    """A serialised FetchReply with whole `records`, `size` bytes in all."""
    header = bytearray((_REQUEST_ID,))
    _put(header, request_id)
    if first:
        header.append(_FIRST)
        _put(header, first)
    if last:
        header += bytes((_LAST, 1))
    if size:
        header.append(_RECORDS)
        _put(header, size)
    return b"".join((header, *records))


def failed(request_id: int, status: str, message: str) -> bytes:
    """A serialised FetchReply that ends a request with an error."""
    error = lookup_pb2.Error(status=status, message=message)
    return lookup_pb2.FetchReply(request_id=request_id, error=error, last=True).SerializeToString()


def parse(data: bytes) -> Reply:
    """The FetchReply in `data`, with its records as a view; Internal if it is none."""
    request_id = first = last = at = 0
    records, error, view = memoryview(b""), None, memoryview(data)
    try:
        while at < len(data):
            tag = data[at]
            value, at = _get(data, at + 1)
            if tag == _REQUEST_ID:
                request_id = value
            elif tag == _FIRST:
                first = value
            elif tag == _LAST:
                last = value
            elif tag in (_RECORDS, _ERROR):
                body = view[at : at + value]
                at += value
                if tag == _RECORDS:
                    records = body
                else:
                    error = lookup_pb2.Error.FromString(bytes(body))
            else:
                raise ValueError(f"field {tag >> 3}")
        if at != len(data):
            raise ValueError("cut short")
    except (IndexError, ValueError, DecodeError) as problem:
        raise Internal(f"the lookup service sent a reply that can't be read: {problem}") from None
    return Reply(request_id, first, records, bool(last), error)


def _put(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _get(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while byte > 0x7F:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 70:
            raise ValueError("number too long")
    return value, at + 1
