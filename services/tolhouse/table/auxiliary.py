"""Auxiliary tables, which the rows of a table need besides its own records. They have no alias.

basis          low rank: the row of a block is its mean plus coefficients times basis vectors. Each
               record of this table is a vector: for each block its mean, then its basis vectors.
frequent_rows  rows of the most frequent tokens in a finer codec, in the order of `frequent`.
edits          changed rows of an overlay, in the same codec or a finer one, in the order of
               `changed`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tolhouse.errors import CorruptError
from tolhouse.table.manifest import Manifest

Fetch = Callable[[str], tuple[Manifest, np.ndarray]]  # "name@version" to manifest and all records


@dataclass(frozen=True)
class Basis:
    """Means float32 [N, D], and for each block orthonormal vectors float32 [r, D]."""

    means: np.ndarray
    vectors: tuple[np.ndarray, ...]

    def coefficients(self, rows: np.ndarray) -> list[np.ndarray]:
        """Compute the coefficients [T, r] of each block for rows float32 [T, N, D]."""
        blocks = zip(rows.swapaxes(0, 1), self.means, self.vectors, strict=True)
        return [np.ascontiguousarray((row - mean) @ v.T) for row, mean, v in blocks]

    def rows(self, coefficients: list[np.ndarray]) -> np.ndarray:
        """Compute rows float32 [T, N, D] from the coefficients [T, r] of each block."""
        blocks = zip(self.means, coefficients, self.vectors, strict=True)
        return np.stack([mean + c @ v for mean, c, v in blocks], axis=1)

    def table(self) -> np.ndarray:
        """Return the rows float32 [R, 1, D] of the basis table.

        For each block they are the mean, then the vectors.
        """
        parts = zip(self.means, self.vectors, strict=True)
        return np.concatenate([part for mean, v in parts for part in (mean[None], v)])[:, None]

    @classmethod
    def of(cls, rows: np.ndarray, ranks: tuple[int, ...]) -> "Basis":
        """Return the basis with the table `rows` [R, 1, D]."""
        ends = np.cumsum([1 + rank for rank in ranks])
        parts = np.split(np.ascontiguousarray(rows[:, 0], np.float32), ends[:-1])
        return cls(np.stack([part[0] for part in parts]), tuple(part[1:] for part in parts))


@dataclass(frozen=True)
class AuxiliaryTables:
    """The auxiliary tables of one table. Fields of missing tables are None."""

    manifest: Manifest
    basis: Basis | None = None
    finer: Manifest | None = None  # has the layout of `finer_records`
    finer_records: np.ndarray | None = None  # uint8 [F, .]: frequent rows, then edits

    def encode(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Encode rows float32 [T, N, D] as records of the table itself."""
        return self.manifest.encode(ids, self.basis.coefficients(rows) if self.basis else rows)

    def decode(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Decode the table's own records of `ids` [T] to rows [T, N, D], as a view if possible."""
        if self.basis:
            rows = self.basis.rows(self.manifest.coefficients(records))
        else:
            rows = self.manifest.decode(records)
        if self.finer is None or self.finer_records is None:
            return rows
        rows, slots = rows.astype(np.float32), self.finer_slots[ids]
        rows[slots >= 0] = self.finer.decode(self.finer_records[slots[slots >= 0]])
        return rows

    @cached_property
    def finer_slots(self) -> np.ndarray:
        """The index of each token's row in `finer_records`, or -1. Its type is int32 [V]."""
        slots = np.full(self.manifest.vocab_size, -1, np.int32)
        if self.finer_records is not None:
            edited = self.manifest.changed if self.manifest.edits else ()
            count = len(self.finer_records) - len(edited)
            slots[list(self.manifest.frequent[:count])] = np.arange(count)
            slots[list(edited)] = np.arange(count, count + len(edited))
        return slots


def load_auxiliary(manifest: Manifest, fetch: Fetch) -> AuxiliaryTables:
    """Load the auxiliary tables of a table. Raises CorruptError if they do not fit it."""

    def load(ref: str, num_blocks: int, least: int, most: int) -> tuple[Manifest, np.ndarray]:
        table, records = fetch(ref)
        fits = (table.width, table.num_blocks) == (manifest.width, num_blocks)
        if not (fits and least <= table.vocab_size <= most):
            raise CorruptError(f"table {ref} does not fit {manifest.ref}, which needs it")
        return table, records

    basis, parts, blocks = None, [], manifest.num_blocks
    if manifest.basis:
        count = sum(manifest.ranks) + blocks
        table, records = load(manifest.basis, 1, count, count)
        basis = Basis.of(table.decode(records).astype(np.float32), manifest.ranks)
    if manifest.frequent_rows:
        parts.append(load(manifest.frequent_rows, blocks, 1, len(manifest.frequent)))
    if manifest.edits:
        count = len(manifest.changed)
        parts.append(load(manifest.edits, blocks, count, count))
    if len({table.record_dtype for table, _ in parts}) > 1:
        raise CorruptError(
            f"tables {' and '.join(manifest.auxiliary)} of {manifest.ref} do not fit"
        )
    if not parts:
        return AuxiliaryTables(manifest, basis)
    finer_records = np.concatenate([records for _, records in parts])
    return AuxiliaryTables(manifest, basis, parts[0][0], finer_records)
