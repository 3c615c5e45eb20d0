"""What the rows of a compressed table need besides its own records; both are tables of their own, published by nobody.

basis   low rank: a layer's row is its mean plus coefficients times basis vectors, and a record holds coefficients alone. Record i of the
        table `basis` is a vector: for each block the mean, then its vectors.
head    the rows of the most frequent tokens in a finer codec: record i is that of the i-th of `frequent`.
edits   the rows that an overlay of such a table changes, in the head's codec or one as fine: record i is that of the i-th of `changed`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tolhouse.errors import Corrupt
from tolhouse.table.manifest import Manifest

Fetch = Callable[
    [str], tuple[Manifest, np.ndarray]
]  # "name@version" to the manifest and all records, verified


@dataclass(frozen=True)
class Basis:
    """Means float32 [N, D], and orthonormal vectors float32 [r, D] of each block."""

    means: np.ndarray
    vectors: tuple[np.ndarray, ...]

    def coefficients(self, rows: np.ndarray) -> list[np.ndarray]:
        """[T, r] of each block, of rows float32 [T, N, D]."""
        return [
            np.ascontiguousarray((rows[:, k] - self.means[k]) @ v.T)
            for k, v in enumerate(self.vectors)
        ]

    def rows(self, coefficients: list[np.ndarray]) -> np.ndarray:
        """Rows float32 [T, N, D]."""
        return np.stack(
            [
                self.means[k] + c @ v
                for k, (c, v) in enumerate(zip(coefficients, self.vectors, strict=True))
            ],
            axis=1,
        )

    def table(self) -> np.ndarray:
        """The same as rows float32 [R, 1, D] of a table."""
        return np.concatenate(
            [part for k, v in enumerate(self.vectors) for part in (self.means[k : k + 1], v)]
        )[:, None]

    @classmethod
    def of(cls, rows: np.ndarray, ranks: tuple[int, ...]) -> "Basis":
        """Back from rows [R, 1, D]."""
        ends = np.cumsum([1 + rank for rank in ranks])
        parts = np.split(np.ascontiguousarray(rows[:, 0], np.float32), ends[:-1])
        return cls(np.stack([part[0] for part in parts]), tuple(part[1:] for part in parts))


@dataclass(frozen=True)
class AuxiliaryTables:
    """Of one table; empty for one that is not compressed so."""

    manifest: Manifest
    basis: Basis | None = None
    head: Manifest | None = None  # how its records and those of edits are laid out
    head_records: np.ndarray | None = (
        None  # uint8 [H, its record_bytes], those of edits behind them
    )

    def encode(self, ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Sealed records of the table itself for rows float32 [T, N, D]."""
        return self.manifest.encode(ids, self.basis.coefficients(rows) if self.basis else rows)

    def decode(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Rows [T, N, D] of `ids` [T] from the table's own records; a view of them where nothing is compressed and the codec is a float's."""
        rows = (
            self.basis.rows(self.manifest.coefficients(records))
            if self.basis
            else self.manifest.decode(records)
        )
        if self.head is None or self.head_records is None:
            return rows
        rows = rows.astype(np.float32)
        places = self.places[ids]
        rows[places >= 0] = self.head.decode(self.head_records[places[places >= 0]])
        return rows

    @cached_property
    def places(self) -> np.ndarray:
        """Where in the head each token's row is, -1 where it has none; int32 [V]."""
        places = np.full(self.manifest.vocab_size, -1, np.int32)
        if self.head_records is not None:
            edited = len(self.manifest.changed) if self.manifest.edits else 0
            head = len(self.head_records) - edited
            places[list(self.manifest.frequent[:head])] = np.arange(head)
            places[list(self.manifest.changed)] = np.arange(head, head + edited) if edited else -1
        return places


def load_auxiliary(manifest: Manifest, fetch: Fetch) -> AuxiliaryTables:
    """The companions of a table; Corrupt where they are not what it says."""
    if not manifest.companions:
        return AuxiliaryTables(manifest)

    def fit(ok: bool, found: Manifest) -> None:
        if not ok or found.hidden_size != manifest.hidden_size:
            raise Corrupt(f"table {found.ref} does not fit {manifest.ref}, which needs it")

    basis, head, head_records = None, None, None
    if manifest.basis:
        found, records = fetch(manifest.basis)
        fit(
            found.vocab_size == sum(manifest.ranks) + manifest.num_blocks and found.num_blocks == 1,
            found,
        )
        basis = Basis.of(found.decode(records).astype(np.float32), manifest.ranks)
    if manifest.head:
        head, head_records = fetch(manifest.head)
        fit(
            head.vocab_size <= len(manifest.frequent) and head.num_blocks == manifest.num_blocks,
            head,
        )
    if manifest.edits:
        edits, records = fetch(manifest.edits)
        fit(
            edits.vocab_size == len(manifest.changed) and edits.num_blocks == manifest.num_blocks,
            edits,
        )
        fit(head is None or edits.record_dtype == head.record_dtype, edits)
        head, head_records = (
            edits,
            records if head_records is None else np.concatenate([head_records, records]),
        )
    return AuxiliaryTables(manifest, basis, head, head_records)
