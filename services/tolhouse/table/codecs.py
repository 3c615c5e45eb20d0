"""How the rows of one layer are stored: float arrays in, fixed-size blocks out, and back.

A block holds one token's row of one layer. fp32, fp16 and bf16 are the values themselves. int8 is one float32 scale,
then D codes: symmetric, scale = max|x| / 127, x ~ scale * code.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tolhouse.errors import InvalidArgument


@dataclass(frozen=True)
class Codec:
    """`block(D)` is the numpy type of a block. `encode` takes float32 [..., D] to blocks [...]; `decode` takes them back.

    |decode(encode(x)) - x| is at most `relative_error` times the row's largest magnitude, plus `step`: half the distance
    of the codec's smallest numbers, which a row too small for its exponents loses.
    """

    name: str
    block: Callable[[int], np.dtype]
    encode_values: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    relative_error: float
    step: float = 0.0

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Blocks [...] for float32 rows [..., D]; InvalidArgument if a value is not finite or does not fit the codec."""
        if not np.isfinite(np.abs(rows).max(initial=0)):
            raise InvalidArgument("rows hold values that are not finite: this model can't be served")
        blocks = self.encode_values(rows)
        if not np.isfinite(np.abs(self.decode(blocks)).max(initial=0)):
            raise InvalidArgument(f"rows hold values too large for {self.name}; fp32, bf16 and int8 reach 3e38")
        return blocks


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
    scale = (np.abs(rows).max(axis=-1) / 127).astype(np.float32)
    # a row of zeros, or one too small for a scale, is stored as zeros
    scaled = np.divide(rows, scale[..., None], out=np.zeros(rows.shape, np.float32), where=scale[..., None] > 0)
    blocks["scale"] = scale
    with np.errstate(invalid="ignore"):
        blocks["codes"] = np.clip(np.rint(scaled), -127, 127)
    return blocks


def _int8_decode(blocks: np.ndarray) -> np.ndarray:
    return blocks["scale"][..., None] * blocks["codes"].astype(np.float32)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _plain("fp32", np.dtype("<f4"), 0.0),
        _plain("fp16", np.dtype("<f2"), 2**-11 + 2**-24, 2**-25),
        _plain("bf16", np.dtype(ml_dtypes.bfloat16), 2**-8, 2**-134),
        Codec("int8", _int8_block, _int8_encode, _int8_decode, 0.5001 / 127, 2**-143),
    )
}


def codec(name: str) -> Codec:
    if name not in CODECS:
        raise InvalidArgument(f"codec {name!r} is unknown; one of {', '.join(CODECS)}")
    return CODECS[name]
