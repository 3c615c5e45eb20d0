"""Hand-made replies are protobuf's own: equal to the generated code, both ways."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tolhouse.errors import Internal
from tolhouse.net import fetch_reply
from tolhouse.v1 import lookup_pb2

NUMBERS = st.integers(0, 2**64 - 1)


@given(
    NUMBERS,
    st.integers(0, 2**32 - 1),
    st.lists(st.binary(max_size=300), max_size=5),
    st.booleans(),
)
@example(2**64 - 1, 2**32 - 1, [b"x" * 70_000], True)
def test_a_reply_is_what_the_generated_code_reads(
    request_id: int,
    first: int,
    records: list[bytes],
    last: bool,
) -> None:
    """A stock client gets the same fields, and our own reader too."""
    whole = b"".join(records)
    data = fetch_reply.reply(request_id, first, [memoryview(r) for r in records], len(whole), last)
    expected = lookup_pb2.FetchReply(request_id=request_id, first=first, records=whole, last=last)
    assert expected == lookup_pb2.FetchReply.FromString(data)
    assert (
        expected.ByteSize() == len(data) or request_id == 0
    )  # the number of a request is always written
    parsed = fetch_reply.parse(data)
    assert (request_id, first, whole, last, None) == parsed._replace(records=bytes(parsed.records))


@given(
    NUMBERS,
    st.integers(0, 2**32 - 1),
    st.binary(max_size=300),
    st.booleans(),
    st.none() | st.tuples(st.text(), st.text()),
)
def test_a_reply_of_the_generated_code_is_read(
    request_id: int,
    first: int,
    records: bytes,
    last: bool,
    error: tuple[str, str] | None,
) -> None:
    """Whatever a stock server sends, fields in its own order, is understood."""
    told = lookup_pb2.Error(status=error[0], message=error[1]) if error else None
    fields = {"request_id": request_id, "first": first, "records": records, "last": last}
    parsed = fetch_reply.parse(lookup_pb2.FetchReply(**fields, error=told).SerializeToString())
    assert (request_id, first, records, last, told) == parsed._replace(
        records=bytes(parsed.records)
    )


def test_a_failure_is_a_last_reply() -> None:
    """Its status and message are those of the generated code."""
    parsed = fetch_reply.parse(fetch_reply.failed(7, "NOT_FOUND", "nö"))
    assert (7, True, "NOT_FOUND", "nö") == (
        parsed.request_id,
        parsed.last,
        parsed.error.status,
        parsed.error.message,
    )


@given(st.binary(max_size=100))
def test_any_bytes_are_a_reply_or_told(data: bytes) -> None:
    """Nothing but Internal comes of bytes that are no reply, and what is read is what the generated code would read."""
    try:
        parsed = fetch_reply.parse(data)
    except Internal:
        return
    stock = lookup_pb2.FetchReply.FromString(data)
    assert (stock.request_id, stock.records) == (parsed.request_id % 2**64, bytes(parsed.records))


def test_a_reply_cut_short_is_told() -> None:
    """Every proper prefix that ends within a field is refused."""
    data = fetch_reply.reply(300, 7, [b"abcdef"], 6, True)
    for size in (1, 2, 4, 6, len(data) - 1):
        with pytest.raises(Internal, match="can't be read"):
            fetch_reply.parse(data[:size])
