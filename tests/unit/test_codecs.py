"""Codecs reproduce rows within their documented error and refuse all others."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from tolhouse.errors import InvalidArgumentError
from tolhouse.table.codecs import CODECS, GROUP, codec

ALL = sorted(CODECS)
LARGEST = {"fp32": 2.0**127, "fp16": 65_504.0, "bf16": 2.0**127, "int8": 2.0**127, "int4": 2.0**127}
# half the distance between a codec's smallest numbers: the error of rows below its smallest
# exponent
STEP = {"fp32": 0.0, "fp16": 2.0**-25, "bf16": 2.0**-134, "int8": 2.0**-143, "int4": 2.0**-134}


def bits(rows: np.ndarray) -> bytes:
    return np.ascontiguousarray(rows).tobytes()


def through(name: str, rows: np.ndarray) -> np.ndarray:
    return codec(name).decode(codec(name).encode(rows))


@st.composite
def rows_of(draw: st.DrawFn, name: str) -> np.ndarray:
    """float32 rows with one to three axes and values of every magnitude, including denormals and
    -0.0."""
    top = draw(st.sampled_from([LARGEST[name], 1.0, 2.0**-14, 2.0**-126, 2.0**-149]))
    outer = draw(array_shapes(min_dims=0, max_dims=2, max_side=6))
    width = draw(st.integers(1, 6) | st.sampled_from([31, 32, 33, 64, 71]))
    values = st.floats(-top, top, width=32, allow_subnormal=True)
    return draw(arrays(np.float32, (*outer, width), elements=values))


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_rows_round_trip_within_the_error_bound(name: str, data: st.DataObject) -> None:
    """The error of each value is at most `relative_error` of its row's largest, or `STEP`."""
    rows = data.draw(rows_of(name))
    back = through(name, rows).astype(np.float64)
    largest = np.abs(rows, dtype=np.float64).max(axis=-1, keepdims=True)
    allowed = codec(name).relative_error * largest + STEP[name]
    assert rows.shape == back.shape
    assert (np.abs(back - rows) <= allowed).all()


@given(rows=rows_of("fp32"))
def test_fp32_keeps_every_bit(rows: np.ndarray) -> None:
    """fp32 preserves every bit, including denormals and the sign of zero."""
    assert bits(rows) == bits(through("fp32", rows))


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_a_block_depends_on_its_own_row_alone(name: str, data: st.DataObject) -> None:
    """Encoding rows together or one at a time gives the same bytes."""
    rows = data.draw(rows_of(name)).reshape(-1, 1)
    together = codec(name).encode(rows)
    assert [bits(block) for block in together] == [bits(codec(name).encode(row)) for row in rows]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 2, 5), (0, 2, 5)])
def test_zeros_round_trip(name: str, shape: tuple[int, ...]) -> None:
    """Rows of positive or negative zeros decode to zeros, without a division by a zero scale."""
    for zero in (0.0, -0.0):
        back = through(name, np.full(shape, zero, np.float32))
        assert shape == back.shape
        assert not back.astype(np.float32).any()


SIZES = {"fp32": 4 * 96, "fp16": 2 * 96, "bf16": 2 * 96, "int8": 4 + 96, "int4": 6 + 48}


@pytest.mark.parametrize(("name", "expected"), SIZES.items())
def test_a_block_has_the_documented_size(name: str, expected: int) -> None:
    """Blocks have no padding; int8 stores four bytes for its scale, and int4 two for each of its
    three scales."""
    assert expected == codec(name).block(96).itemsize
    assert (5 * expected) == codec(name).encode(np.ones((5, 96), np.float32)).nbytes


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7, 11])
def test_values_that_are_not_finite_are_refused(name: str, bad: float, place: int) -> None:
    """A single NaN or infinity at any position is refused without a warning."""
    rows = np.ones((2, 2, 3), np.float32)
    rows.flat[place] = bad
    with pytest.raises(InvalidArgumentError, match="not finite"):
        codec(name).encode(rows)


LIMITS = ("fp16", 65_519.0, 65_520.0), ("bf16", 3.389e38, 3.4e38)


@pytest.mark.parametrize(("name", "fits", "too_large"), LIMITS)
def test_values_beyond_a_codec_s_range_are_refused(
    name: str, fits: float, too_large: float
) -> None:
    """The largest value that rounds into the codec's range is stored, and a larger one is
    refused."""
    rows = np.array([1.0, fits, -fits], np.float32)
    assert np.isfinite(through(name, rows).astype(np.float32)).all()
    with pytest.raises(InvalidArgumentError, match=f"too large for {name}"):
        codec(name).encode(np.array([1.0, -too_large], np.float32))


@pytest.mark.parametrize(("name", "scale"), [("int8", "scale"), ("int4", "scales")])
@given(data=st.data())
def test_integer_codecs_are_symmetric(name: str, scale: str, data: st.DataObject) -> None:
    """Negated rows have the same scales and negated values; the lowest code is never used."""
    rows = data.draw(rows_of(name))
    blocks, negated = codec(name).encode(rows), codec(name).encode(-rows)
    assert bits(blocks[scale]) == bits(negated[scale])
    assert (-codec(name).decode(blocks)).tolist() == codec(name).decode(negated).tolist()
    codes = blocks["codes"].ravel().tolist()
    if name == "int8":
        assert min(codes) >= -127
    else:
        assert -8 not in [code for byte in codes for code in nibbles(byte)]
        assert (np.abs(blocks["last"]) <= 7).all()


def test_int8_has_one_scale_per_row_and_layer() -> None:
    """The largest value of each layer of each row has code 127 and its own scale."""
    largest = np.array([[127, 254], [1270, 63.5]], np.float32)
    blocks = codec("int8").encode(np.stack([largest, -largest / 2, 0 * largest], axis=-1))
    assert [[1, 2], [10, 0.5]] == blocks["scale"].tolist()
    assert [[[127, -64, 0]] * 2] * 2 == blocks["codes"].tolist()


def nibbles(byte: int) -> tuple[int, int]:
    """The low and high nibble as two's complement."""
    return (byte & 15 ^ 8) - 8, byte >> 4


def test_int4_stores_a_scale_per_32_values_and_two_values_per_byte() -> None:
    """A row of 67 values has three in its last group, and byte i holds values i and 33 + i."""
    row = np.concatenate([np.full(32, 7), np.full(32, -14), [0.25, 1.75, -0.5]]).astype(np.float32)
    block = codec("int4").encode(row)
    assert [1, 2, 0.25] == block["scales"].astype(np.float32).tolist()
    low, high = zip(*map(nibbles, block["codes"].tolist()), strict=True)
    assert [*[7] * 32, -7] == list(low)
    assert [*[-7] * 31, 1, 7] == list(high)
    assert [-2] == block["last"].tolist()
    assert row.tolist() == codec("int4").decode(block).tolist()


@given(rows=rows_of("int4"))
def test_an_int4_group_depends_on_its_own_values_alone(rows: np.ndarray) -> None:
    """Each group of a row decodes to the same values as it does as a row of its own."""
    parts = [rows[..., start : start + GROUP] for start in range(0, rows.shape[-1], GROUP)]
    apart = np.concatenate([through("int4", part) for part in parts], axis=-1)
    assert apart.tolist() == through("int4", rows).tolist()


def test_int4_holds_the_largest_floats() -> None:
    """A scale that would decode to infinity is rounded down, so that every finite row can be
    stored."""
    largest = np.finfo(np.float32).max
    rows = np.array([largest, -largest, 3.39e38, 0], np.float32)
    back = through("int4", rows)
    assert np.isfinite(back).all()
    assert (np.abs(back / largest - rows / largest) < 0.01).all()


def test_many_rows_are_encoded_like_single_rows() -> None:
    """int4 encodes large arrays in parts with the same result as row by row."""
    rows = np.random.default_rng(0).standard_normal((300, 3, 517)).astype(np.float32)
    together = codec("int4").encode(rows)
    assert [bits(codec("int4").encode(row)) for row in rows] == [bits(block) for block in together]


def test_an_unknown_codec_is_refused() -> None:
    """The error for an unknown codec lists the known ones."""
    with pytest.raises(InvalidArgumentError, match=r"unknown; one of fp32, fp16, bf16, int8, int4"):
        codec("int3")


@given(rows=rows_of("bf16"))
def test_bf16_rounds_as_ml_dtypes_does(rows: np.ndarray) -> None:
    """bf16 rounds to nearest with ties to even, including denormals and the sign of zero."""
    assert bits(rows.astype(ml_dtypes.bfloat16)) == bits(codec("bf16").encode(rows)["values"])
