"""What the rows of a table need besides its own records: tables of their own, published by nobody.

basis          low rank: a block's row is its mean plus coefficients times basis vectors. A record
               of this table is a vector: for each block the mean, then its vectors.
frequent_rows  the rows of the most frequent tokens in a finer codec, in the order of `frequent`.
edits          changed rows of an overlay, in the same codec or a finer one, as `changed` has them.
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
    """Means float32 [N, D], and orthonormal vectors float32 [r, D] of each block."""

    means: np.ndarray
    vectors: tuple[np.ndarray, ...]

    def coefficients(self, rows: np.ndarray) -> list[np.ndarray]:
        """[T, r] of each block, of rows float32 [T, N, D]."""
        blocks = zip(rows.swapaxes(0, 1), self.means, self.vectors, strict=True)
        return [np.ascontiguousarray((row - mean) @ v.T) for row, mean, v in blocks]

    def rows(self, coefficients: list[np.ndarray]) -> np.ndarray:
        """Rows float32 [T, N, D]."""
        blocks = zip(self.means, coefficients, self.vectors, strict=True)
        return np.stack([mean + c @ v for mean, c, v in blocks], axis=1)

    def table(self) -> np.ndarray:
        """Rows float32 [R, 1, D] of its table: for each block the mean, then the vectors."""
        parts = zip(self.means, self.vectors, strict=True)
        return np.concatenate([part for mean, v in parts for part in (mean[None], v)])[:, None]

    @classmethod
    def of(cls, rows: np.ndarray, ranks: tuple[int, ...]) -> "Basis":
        """The basis that `table` turned into rows [R, 1, D]."""
        ends = np.cumsum([1 + rank for rank in ranks])
        parts = np.split(np.ascontiguousarray(rows[:, 0], np.float32), ends[:-1])
        return cls(np.stack([part[0] for part in parts]), tuple(part[1:] for part in parts))


@dataclass(frozen=True)
class AuxiliaryTables:
    """The auxiliary tables of one table; all fields are None if it has none."""

    manifest: Manifest
    basis: Basis | None = None
    finer: Manifest | None = None  # how `finer_records` are laid out
    finer_records: np.ndarray | None = None  # uint8 [F, .]: frequent rows, then edits

    def encode(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Records of the table itself for rows float32 [T, N, D]."""
        return self.manifest.encode(ids, self.basis.coefficients(rows) if self.basis else rows)

    def decode(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Rows [T, N, D] of `ids` [T] from the table's own records; a view of them if it can be."""
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
        """Where in `finer_records` each token's row is, -1 where it has none; int32 [V]."""
        slots = np.full(self.manifest.vocab_size, -1, np.int32)
        if self.finer_records is not None:
            edited = self.manifest.changed if self.manifest.edits else ()
            count = len(self.finer_records) - len(edited)
            slots[list(self.manifest.frequent[:count])] = np.arange(count)
            slots[list(edited)] = np.arange(count, count + len(edited))
        return slots


def load_auxiliary(manifest: Manifest, fetch: Fetch) -> AuxiliaryTables:
    """The auxiliary tables of a table; CorruptError where they are not what it says."""

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
