"""Compresses tables by a weighted SVD of low rank and by a finer codec for frequent tokens.

The paper quantises rows, and truncates each layer to the same rank by a plain SVD (section 2). This
module weights the error of a row by the frequency of its token in text, chooses the rank of each
layer by one common error threshold, and stores the rows of the most frequent tokens in a finer
codec. All rows are in memory at once.
"""

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from tolhouse.errors import InvalidArgumentError
from tolhouse.store.base import Store
from tolhouse.store.registry import refuse_another
from tolhouse.store.writer import shard_count, write_table
from tolhouse.table.auxiliary import Basis, load_auxiliary
from tolhouse.table.codecs import CODECS, codec
from tolhouse.table.manifest import MAX_FREQUENT, Manifest, content_id, part_name

BASIS_CODEC = "fp16"  # the basis consists of unit vectors
FREQUENT_SHARE = 32  # by default 1/32 of the vocabulary is frequent, which is 60 to 70% of text


@dataclass(frozen=True)
class Scheme:
    """How to compress a table. Without `rank` and `ratio`, rows keep their full rank."""

    codec: str
    rank: float = 0.0  # kept coefficients, as a share of all values of all layers; 0: all
    ratio: float = 0.0  # bytes at 16 bits divided by stored bytes; replaces `rank`
    frequent: int = 0  # the number of tokens with rows in the finer codec
    frequent_codec: str = "int8"

    @property
    def low_rank(self) -> bool:
        return bool(self.rank or self.ratio)

    @property
    def finer(self) -> bool:
        """Whether the codec of frequent tokens is finer than the codec of full-rank rows."""
        return codec(self.frequent_codec).relative_error < codec(self.codec).relative_error


@dataclass(frozen=True)
class Compressed:
    """A compressed table that is not stored yet.

    `tables` has manifests and records of the auxiliary tables, then of the table itself.
    """

    tables: tuple[tuple[Manifest, np.ndarray], ...]

    @property
    def manifest(self) -> Manifest:
        return self.tables[-1][0]

    @property
    def bytes(self) -> int:
        return sum(manifest.table_bytes for manifest, _ in self.tables)

    def rows(self) -> np.ndarray:
        """Return the rows, float32 [V, N, D], as a reader decodes them from the table."""
        by_ref = {manifest.ref: (manifest, records) for manifest, records in self.tables}
        auxiliary = load_auxiliary(self.manifest, by_ref.__getitem__)
        ids = np.arange(self.manifest.vocab_size, dtype=np.uint32)
        return auxiliary.decode(ids, self.tables[-1][1]).astype(np.float32)

    def store(self, store: Store) -> Manifest:
        """Write all tables.

        Raises InUseError if the version exists with another number of shards.
        """
        refuse_another(store, self.manifest)
        for m, records in self.tables:
            made = write_table([store], m, lambda k, m=m, r=records: r[m.shard_ids(k)])  # type: ignore[misc]
        return made


def bytes_at_16_bit(manifest: Manifest) -> int:
    """Return the bytes of a table of the same rows at 16 bits, including checksums."""
    return manifest.vocab_size * (manifest.num_blocks * manifest.width * 2 + 8)


def check(planned: Manifest, scheme: Scheme) -> None:
    """Raise InvalidArgumentError if no table of this shape can be compressed with `scheme`."""
    codec(scheme.codec), codec(scheme.frequent_codec)
    rank, ratio, size = scheme.rank, scheme.ratio, planned.vocab_size
    wrong, most = "", min(size // 2, MAX_FREQUENT)
    if not 0 <= scheme.frequent <= most:
        wrong = f"from 0 to {most} of {size} tokens may be frequent, not {scheme.frequent}"
    elif rank and ratio:
        wrong = "a rank and a ratio can't both be given: the ratio chooses the rank"
    elif not 0 <= rank <= 1:
        wrong = f"the rank is a share of all values, from 0 to 1, not {rank:g}"
    elif scheme.frequent and not scheme.low_rank and not scheme.finer:
        finer = [name for name in CODECS if replace(scheme, frequent_codec=name).finer]
        allowed = f"allowed without low rank: {' or '.join([*finer, 'none'])}"
        wrong = f"{scheme.frequent_codec} is no finer than {scheme.codec}; {allowed}"
    elif ratio and not ratio > 1:
        wrong = f"the ratio is how many times fewer bytes than at 16 bit, over 1, not {ratio:g}"
    elif ratio and not _suffices(planned, scheme):
        reached = bytes_at_16_bit(planned) / _bytes(planned, scheme, _least_ranks(planned))
        if reached < ratio:
            wrong = f"a ratio of {ratio:g} is out of reach: rank 1 reaches {reached:.2f}"
    if wrong:
        raise InvalidArgumentError(wrong)


def compress(
    planned: Manifest, rows: np.ndarray, counts: Mapping[int, int], scheme: Scheme
) -> Compressed:
    """Compress `rows` [V, N, D] of the table `planned`; `counts` are token frequencies in text.

    The result has no basis if the codec alone reaches the ratio, or if every layer would keep its
    full rank. In that case, frequent rows are stored only if their codec is finer.
    """
    check(planned, scheme)
    vocabulary, blocks, size = rows.shape
    order = sorted(range(vocabulary), key=lambda i: (-counts.get(i, 0), i))
    frequent, auxiliary = order[: scheme.frequent], []
    own: Any = rows
    fields: dict[str, Any] = {}
    if scheme.low_rank and not _suffices(planned, scheme):
        # Every token gets a weight, because an unseen token may still occur.
        weights = np.array([counts.get(i, 0) + 0.5 for i in range(vocabulary)])
        weights[frequent] = 0
        # Shown only on a terminal.
        look: Any = {"leave": False, "dynamic_ncols": True, "disable": None}
        bar = tqdm(range(blocks), desc="low rank", unit="layer", **look)
        parts = [_components(rows[:, block], weights) for block in bar]
        ranks = _ranks(planned, scheme, [energies for _, energies, _ in parts])
        if min(ranks) < size:
            vectors = tuple(v[:rank] for (_, _, v), rank in zip(parts, ranks, strict=True))
            exact = Basis(np.stack([mean for mean, _, _ in parts]), vectors).table()
            manifest, records = _table(planned, exact, BASIS_CODEC, "basis", blocks=("basis",))
            # This is the basis that readers decode.
            basis = Basis.of(manifest.decode(records).astype(np.float32), ranks)
            auxiliary, own = [(manifest, records)], basis.coefficients(rows)
            fields = {"ranks": ranks, "basis": manifest.ref}
    if frequent and (auxiliary or scheme.finer):
        auxiliary.append(_table(planned, rows[frequent], scheme.frequent_codec, "frequent_rows"))
        fields["frequent_rows"] = auxiliary[-1][0].ref
    seen = [i for i in order[:MAX_FREQUENT] if "frequent_rows" in fields or counts.get(i, 0)]
    own_table = _table(planned, own, scheme.codec, **fields, frequent=tuple(seen))
    return Compressed((*auxiliary, own_table))


def _table(
    planned: Manifest, rows: Any, codec_name: str, part: str = "", **fields: Any
) -> tuple[Manifest, np.ndarray]:
    """Return the manifest and the records of a table like `planned`, or of an auxiliary table.

    The version is the id of its contents.
    """
    arrays = [np.asarray(r, np.float32) for r in (rows if isinstance(rows, list) else [rows])]
    if part:
        fields |= {"name": part_name(planned.name, part), "num_shards": 1, "frequent": ()}
    ids = np.arange(len(arrays[0]), dtype=np.uint32)
    table = replace(planned, codec_name=codec(codec_name).name, vocab_size=len(ids), **fields)
    if part:
        table = replace(table, num_shards=shard_count(len(ids), table.record_bytes, least=1))
    identity = part, table.codec_name, table.blocks, table.ranks, table.dependencies
    table = replace(table, version=content_id(*identity, *arrays))
    return table, table.encode(ids, rows)


def _components(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weighted mean [D], the energies [D] and the directions [D, D] of rows [V, D].

    The energies are in descending order.
    """
    share = weights / weights.sum()
    mean = share @ rows
    centred = rows - mean
    values, vectors = np.linalg.eigh((centred * share[:, None]).T @ centred)
    directions = vectors.T[::-1].astype(np.float32)
    return mean.astype(np.float32), np.maximum(values[::-1], 0), directions


def _ranks(planned: Manifest, scheme: Scheme, energies: list[np.ndarray]) -> tuple[int, ...]:
    """Return the rank of each layer, which is the number of energies above a common threshold.

    A rank is at least 1. The threshold follows from the rank or the ratio of the scheme.
    """
    size, x0 = planned.width, planned.has_x0
    if x0:  # X0 keeps its full rank, because every layer reads it
        energies[planned.blocks.index("x0")] = np.full(size, np.inf)
    falling = np.sort(np.concatenate(energies))[::-1]

    def ranks(total: int) -> tuple[int, ...]:
        counts = (int((e >= falling[total - 1]).sum()) for e in energies)
        return tuple(min(size, max(1, count)) for count in counts)

    least = sum(_least_ranks(planned))
    if not scheme.ratio:
        return ranks(max(round(scheme.rank * len(planned.layers) * size) + size * x0, least))
    allowed, totals = bytes_at_16_bit(planned) / scheme.ratio, range(least, len(falling) + 1)
    fitting = bisect(totals, False, key=lambda n: _bytes(planned, scheme, ranks(n)) > allowed)
    # `check` made sure that the lowest ranks fit.
    return ranks(totals[fitting - 1]) if fitting else _least_ranks(planned)


def _least_ranks(planned: Manifest) -> tuple[int, ...]:
    return tuple(planned.width if block == "x0" else 1 for block in planned.blocks)


def _bytes(planned: Manifest, scheme: Scheme, ranks: tuple[int, ...] = ()) -> int:
    """Return the bytes of a table with its frequent rows and, with `ranks`, its basis."""
    table = replace(planned, codec_name=scheme.codec)
    size = replace(planned, codec_name=scheme.frequent_codec).record_bytes * scheme.frequent
    if not ranks:
        return size + table.table_bytes
    table = replace(table, ranks=ranks, basis=f"{part_name(planned.name, 'basis')}@{'0' * 16}")
    vector = codec(BASIS_CODEC).block(planned.width).itemsize + 8
    return size + table.table_bytes + (sum(ranks) + len(ranks)) * vector


def _suffices(planned: Manifest, scheme: Scheme) -> bool:
    """Return whether rows keep their full rank.

    This is the case by request, or if the codec alone makes the table small enough.
    """
    if scheme.ratio:
        plain = scheme if scheme.finer else replace(scheme, frequent=0)
        return _bytes(planned, plain) <= bytes_at_16_bit(planned) / scheme.ratio
    values = len(planned.layers) * planned.width
    return round(scheme.rank * values) == values
