"""Replies that are encoded and decoded with fewer copies equal those of the generated code."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tolhouse.errors import InternalError
from tolhouse.net.fetch_reply import parse, serialize
from tolhouse.v1.lookup_pb2 import Error, FetchReply

HEADERS = st.builds(
    FetchReply,
    request_id=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**32 - 1),
    last=st.booleans(),
    error=st.none() | st.builds(Error, status=st.text(), message=st.text()),
)


@given(HEADERS, st.lists(st.binary(max_size=300), max_size=5))
@example(FetchReply(request_id=2**64 - 1, first=2**32 - 1, last=True), [b"x" * 70_000])
@example(FetchReply(), [b"x" * 127])
@example(FetchReply(), [b"x" * 128])
def test_replies_equal_those_of_the_generated_code(
    header: FetchReply, records: list[bytes]
) -> None:
    """A standard client reads replies of this encoder, and this decoder reads replies of a standard
    server."""
    whole = b"".join(records)
    stock = FetchReply(records=whole)
    stock.MergeFrom(header)
    made = serialize(header, [memoryview(r) for r in records], len(whole))
    assert stock == FetchReply.FromString(made)
    assert stock.ByteSize() == len(made)
    for data in (made, stock.SerializeToString()):
        parsed, found = parse(data)
        assert (header, whole) == (parsed, bytes(found))


@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_raise_an_error(data: bytes) -> None:
    """Invalid bytes raise InternalError; other bytes are read like the generated code reads
    them."""
    try:
        header, records = parse(data)
    except InternalError:
        return
    stock = FetchReply.FromString(data)
    assert stock.records == bytes(records)
    stock.ClearField("records")
    assert stock == header


def test_a_truncated_reply_raises_an_error() -> None:
    """Every proper prefix that ends within a field is refused."""
    data = serialize(FetchReply(request_id=300, first=7, last=True), [b"abcdef"], 6)
    for size in (1, 2, 4, 6, len(data) - 1):
        with pytest.raises(InternalError, match="malformed"):
            parse(data[:size])
