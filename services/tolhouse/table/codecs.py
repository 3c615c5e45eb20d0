"""Codecs, which store the D values of a block in a fixed number of bytes.

fp32, fp16 and bf16 store the values themselves. int8 stores a float32 scale and then D codes:
scale = max|x| / 127, x ~ scale * code. int4 stores a bfloat16 scale for each group of 32 values,
and then codes from -7 to 7 in two's complement, two per byte. The last group may be smaller. The
low nibbles are the first half of the values, and the high nibbles the second half. If D is odd, the
last code has its own byte.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tolhouse.errors import InvalidArgumentError


@dataclass(frozen=True)
class Codec:
    """Converts float32 [..., D] to blocks [...] of type `block(D)`, and back.

    |decode(encode(x)) - x| is at most `relative_error` times the largest magnitude of the row, plus
    `step`. `step` is half the distance between the smallest numbers of the codec.
    """

    name: str
    block: Callable[[int], np.dtype]
    encode_values: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    relative_error: float
    step: float = 0.0

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Encode float32 rows [..., D] as blocks [...].

        Raises InvalidArgumentError if values are too large or not finite.
        """
        top = np.maximum(rows.max(initial=0), -rows.min(initial=0))
        if not np.isfinite(top):
            raise InvalidArgumentError("rows hold values that are not finite")
        largest = self.decode(self.encode_values(top.reshape(1)))  # if it fits, all values fit
        if not np.isfinite(largest.astype(np.float32)).all():
            allowed = "fp32, bf16, int8 and int4 reach 3e38"
            raise InvalidArgumentError(f"rows hold values too large for {self.name}; {allowed}")
        return self.encode_values(rows)


def _plain(name: str, dtype: np.dtype, relative_error: float, step: float = 0.0) -> Codec:
    def block(size: int) -> np.dtype:
        return np.dtype([("values", dtype, (size,))])

    def encode(rows: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(rows.astype(dtype))
        return values.view(block(rows.shape[-1]))[..., 0]

    return Codec(name, block, encode, lambda blocks: blocks["values"], relative_error, step)


def _int8_block(size: int) -> np.dtype:
    return np.dtype([("scale", "<f4"), ("codes", "i1", (size,))])


def _int8_encode(rows: np.ndarray) -> np.ndarray:
    blocks = np.empty(rows.shape[:-1], _int8_block(rows.shape[-1]))
    blocks["scale"] = scale = (np.abs(rows).max(axis=-1) / 127).astype(np.float32)
    # Rows of zeros, and rows that are too small for a scale, become zeros.
    scaled = rows / np.where(scale > 0, scale, np.float32(np.inf))[..., None]
    blocks["codes"] = np.clip(np.rint(scaled), -127, 127)
    return blocks


def _int8_decode(blocks: np.ndarray) -> np.ndarray:
    return blocks["scale"][..., None] * blocks["codes"].astype(np.float32)


GROUP = 32  # values that share an int4 scale
_CACHED = 2**17  # values that int4 encodes at a time, which fit into the CPU cache
_TOP = np.uint16(0x7E12)  # the largest bfloat16 x for which 7 x is finite


def _int4_block(size: int) -> np.dtype:
    scales = ("scales", ml_dtypes.bfloat16, (-(-size // GROUP),))
    return np.dtype([scales, ("codes", "i1", (size // 2,)), ("last", "i1", (size % 2,))])


def _groups(values: np.ndarray, scales: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield views of values [R, D] and scales [R, G]: the whole groups, then the shorter group."""
    whole = values.shape[1] // GROUP
    yield values[:, : whole * GROUP].reshape(len(values), whole, GROUP), scales[:, :whole, None]
    yield values[:, whole * GROUP :], scales[:, whole:]


def _int4_encode(rows: np.ndarray) -> np.ndarray:
    size, half = rows.shape[-1], rows.shape[-1] // 2
    blocks = np.empty(rows.shape[:-1], _int4_block(size))
    flat, step = rows.reshape(-1, size), max(1, _CACHED // size)
    for start in range(0, len(flat), step):
        part, out = flat[start : start + step], blocks.reshape(-1)[start : start + step]
        scaled = np.abs(part)
        largest = np.maximum.reduceat(scaled, np.arange(0, size, GROUP), axis=1)
        # Round up, so that no code exceeds 7, but keep 7 times the scale finite.
        bits = (largest / np.float32(7)).view(np.uint32) + np.uint32(0xFFFF)
        bits = np.minimum(bits >> np.uint32(16), _TOP)
        out["scales"] = bits.astype(np.uint16).view(ml_dtypes.bfloat16)
        scales = (bits << np.uint32(16)).view(np.float32)
        # Groups of zeros, and groups that are too small for a scale, become zeros.
        scales[scales == 0] = np.inf
        for (values, scale), (quotient, _) in zip(
            _groups(part, scales), _groups(scaled, scales), strict=True
        ):
            np.divide(values, scale, out=quotient)
        codes = np.rint(scaled, out=scaled).astype(np.int8)
        out["codes"] = codes[:, :half] & 15 | codes[:, half : 2 * half] * 16
        out["last"] = codes[:, 2 * half :]
    return blocks


def _int4_decode(blocks: np.ndarray) -> np.ndarray:
    flat = blocks.reshape(-1)
    half, odd = flat["codes"].shape[1], flat["last"].shape[1]
    codes = np.empty((len(flat), 2 * half + odd), np.int8)
    # A high nibble is its code times 16. Use 16 * code and scale / 16, which are exact.
    np.multiply(flat["codes"], np.int8(16), out=codes[:, :half])
    np.bitwise_and(flat["codes"], np.int8(-16), out=codes[:, half : 2 * half])
    np.multiply(flat["last"], np.int8(16), out=codes[:, 2 * half :])
    values = codes.astype(np.float32)
    for part, scale in _groups(values, flat["scales"].astype(np.float32) / 16):
        np.multiply(part, scale, out=part)
    return values.reshape(*blocks.shape, 2 * half + odd)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _plain("fp32", np.dtype("<f4"), 0.0),
        _plain("fp16", np.dtype("<f2"), 2**-11 + 2**-24, 2**-25),
        _plain("bf16", np.dtype(ml_dtypes.bfloat16), 2**-8, 2**-134),
        Codec("int8", _int8_block, _int8_encode, _int8_decode, 0.5001 / 127, 2**-143),
        Codec("int4", _int4_block, _int4_encode, _int4_decode, 0.501 * (1 + 2**-7) / 7, 2**-134),
    )
}


def codec(name: str) -> Codec:
    """Return the codec with this name. Raises InvalidArgumentError if there is none."""
    if name not in CODECS:
        raise InvalidArgumentError(f"codec {name!r} is unknown; one of {', '.join(CODECS)}")
    return CODECS[name]
