"""Records as bytes: each ends with its checksum, XXH3-64 over the rest.

The checksum is seeded with the table's version and the token's id: a record that is altered, torn,
of another version or of another token does not pass.
"""

from collections.abc import Iterator

import numpy as np
import xxhash

Buffer = bytes | memoryview  # one record


def checksum(record: memoryview, seed: int) -> int:
    """The checksum that belongs at the end of a record."""
    return xxhash.xxh3_64_intdigest(record[:-8], seed)


def checksum_ok(record: Buffer, seed: int) -> bool:
    """Whether a record's checksum is that of its bytes under `seed`."""
    view = memoryview(record)
    return xxhash.xxh3_64_intdigest(view[:-8], seed) == int.from_bytes(view[-8:], "little")


def record_views(records: np.ndarray) -> Iterator[memoryview]:
    """Each record of a contiguous uint8 [T, record_bytes] as a view."""
    size = records.shape[1]
    flat = memoryview(records.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer
    return (flat[at : at + size] for at in range(0, len(flat), size))


def digest(records: np.ndarray) -> str:
    """The digest of a shard's records that a manifest lists: XXH3-128, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(records).data)
