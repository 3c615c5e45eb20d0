"""Tables in fewer bytes: low rank by a frequency-weighted SVD, and the frequent tokens' rows in a finer codec.

The paper quantises, and cuts each layer to one rank by a plain SVD (PAPER section 2). Here what is kept is chosen by what text reads: the
error of a token's row counts as often as the token comes, ranks differ by layer so that one error threshold holds for all of them, and
the few tokens that make up most of any text are stored more finely than the tail. All rows are in memory at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from tolhouse.errors import InvalidArgument
from tolhouse.store.base import Store
from tolhouse.store.registry import refuse_another
from tolhouse.store.writer import write_table
from tolhouse.table.auxiliary import AuxiliaryTables, Basis
from tolhouse.table.codecs import CODECS, codec
from tolhouse.table.manifest import MAX_FREQUENT, Manifest, content_id

BASIS_CODEC = "fp16"  # its vectors are of length one
HEAD_SHARE = 32  # of the vocabulary, one token in so many is in the head, unless told otherwise: 60 to 70% of text


@dataclass(frozen=True)
class Scheme:
    """How a table is compressed. Exactly one of `rank` and `ratio` may be given; without either, rows keep their full rank."""

    codec: str
    rank: float = 0.0  # share of all values that are kept as coefficients, over all layers; 0: all
    ratio: float = 0.0  # bytes at 16 bit over those of all that is stored, companions and checksums too; a rank is chosen if it takes one
    head: int = 0  # tokens
    head_codec: str = "int8"

    @property
    def low_rank(self) -> bool:
        return bool(self.rank or self.ratio)

    @property
    def finer(self) -> bool:
        """Whether the head's codec is finer than that of rows at full rank."""
        return codec(self.head_codec).relative_error < codec(self.codec).relative_error


@dataclass(frozen=True)
class Compressed:
    """A table and its companions with all their records, not stored yet."""

    companions: AuxiliaryTables
    records: np.ndarray
    basis: Manifest | None = None
    basis_records: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        return sum(
            m.table_bytes
            for m in (self.companions.manifest, self.companions.finer, self.basis)
            if m
        )

    def store(self, store: Store) -> Manifest:
        """Write the auxiliary tables first; InUse: the version is there with other shards."""
        tables = self.companions
        refuse_another(store, tables.manifest)
        for manifest, records in (
            (self.basis, self.basis_records),
            (tables.finer, tables.finer_records),
            (tables.manifest, self.records),
        ):
            if manifest is not None and records is not None:
                stored = _write(store, manifest, records)
        return stored


def _write(store: Store, manifest: Manifest, records: np.ndarray) -> Manifest:
    return write_table([store], manifest, lambda shard: records[manifest.shard_ids(shard)])


def bytes_at_16_bit(manifest: Manifest) -> int:
    """What a table of the same rows takes at 16 bit, checksums and all."""
    return manifest.vocab_size * (manifest.num_blocks * manifest.width * 2 + 8)


def check(planned: Manifest, scheme: Scheme) -> None:
    """InvalidArgument where the table `planned` can't be compressed by `scheme`, whatever its rows are."""
    codec(scheme.codec), codec(scheme.head_codec)
    vocabulary = planned.vocab_size
    most = min(vocabulary // 2, MAX_FREQUENT)
    if not 0 <= scheme.head <= most:
        raise InvalidArgument(
            f"the head may have from 0 to {most} tokens of a vocabulary of {vocabulary}, not {scheme.head}"
        )
    if scheme.rank and scheme.ratio:
        raise InvalidArgument("a rank and a ratio can't both be given: the ratio chooses the rank")
    if not 0 <= scheme.rank <= 1:
        raise InvalidArgument(
            f"the rank is a share of all values, from 0 to 1, not {scheme.rank:g}"
        )
    if scheme.head and not scheme.low_rank and not scheme.finer:
        allowed = [*(name for name in CODECS if replace(scheme, head_codec=name).finer), "no head"]
        raise InvalidArgument(
            f"a head in {scheme.head_codec} is no finer than rows in {scheme.codec}; allowed without low rank: {' or '.join(allowed)}"
        )
    if not scheme.ratio:
        return
    if not scheme.ratio > 1:
        raise InvalidArgument(
            f"the ratio is how many times fewer bytes than at 16 bit, over 1, not {scheme.ratio:g}"
        )
    needed, whole = _bytes(planned, scheme, _least_ranks(planned)), bytes_at_16_bit(planned)
    if needed > whole / scheme.ratio and not _suffices(planned, scheme):
        raise InvalidArgument(
            f"a ratio of {scheme.ratio:g} is out of reach: with this codec and head, rank 1 reaches {whole / needed:.2f}"
        )


def compress(
    planned: Manifest, rows: np.ndarray, counts: Mapping[int, int], scheme: Scheme
) -> Compressed:
    """The table `planned`, whose rows are `rows` [V, N, D], by `scheme`. `counts`: how often text has each token.

    Where the codec alone is small enough for the ratio, or every layer would keep its full rank, there is no basis, and a head only if its
    codec is finer. InvalidArgument as of `check`.
    """
    check(planned, scheme)
    vocabulary, blocks, size = rows.shape
    order = sorted(range(vocabulary), key=lambda i: (-counts.get(i, 0), i))
    low_rank = scheme.low_rank and not _suffices(planned, scheme)
    if low_rank:
        weights = np.array(
            [counts.get(i, 0) + 0.5 for i in range(vocabulary)]
        )  # a token that was not seen may yet come
        weights[order[: scheme.head]] = 0
        parts = [
            _components(rows[:, block], weights)
            for block in tqdm(
                range(blocks), desc="low rank", unit="layer", leave=False, dynamic_ncols=True
            )
        ]
        energies = [values for _, values, _ in parts]
        if planned.has_x0:
            energies[0] = np.full(
                size, np.inf
            )  # all of X0: every layer reads it, and no other row's error compares with its
        total = round(scheme.rank * len(planned.layers) * size) + size * planned.has_x0
        ranks = _affordable(planned, energies, scheme) if scheme.ratio else _ranks(energies, total)
        low_rank = min(ranks) < size
    if not low_rank and not scheme.finer:
        scheme = replace(scheme, head=0)
    frequent = (
        tuple(i for i in order[:MAX_FREQUENT] if counts.get(i, 0))
        if not scheme.head
        else tuple(order[:MAX_FREQUENT])
    )
    base = replace(planned, codec_name=codec(scheme.codec).name, frequent=frequent)

    head, head_records = None, None
    if scheme.head:
        head = replace(
            planned, codec_name=scheme.head_codec, vocab_size=scheme.head, num_shards=1, frequent=()
        )
        head, head_records = _sealed(head, rows[order[: scheme.head]], "frequent_rows")
        base = replace(base, frequent_rows=head.ref)
    basis, basis_table, basis_records = None, None, None
    if low_rank:
        means = np.stack([mean for mean, _, _ in parts]).astype(np.float32)
        exact = Basis(
            means,
            tuple(
                vectors[:rank].astype(np.float32)
                for (_, _, vectors), rank in zip(parts, ranks, strict=True)
            ),
        )
        basis_table = replace(
            planned,
            codec_name=BASIS_CODEC,
            vocab_size=sum(ranks) + blocks,
            num_shards=1,
            frequent=(),
            blocks=("basis",),
        )
        basis_table, basis_records = _sealed(basis_table, exact.table(), "basis")
        basis = Basis.of(
            basis_table.decode(basis_records).astype(np.float32), ranks
        )  # as a reader has it
        base = replace(base, ranks=ranks, basis=basis_table.ref)
    contents = basis.coefficients(rows) if basis else rows
    table, records = _sealed(base, contents)
    return Compressed(
        AuxiliaryTables(table, basis, head, head_records), records, basis_table, basis_records
    )


def _sealed(
    manifest: Manifest, rows: np.ndarray | list[np.ndarray], what: str = ""
) -> tuple[Manifest, np.ndarray]:
    """A manifest with the version that its contents give it, and its records."""
    ids = np.arange(manifest.vocab_size, dtype=np.uint32)
    parts = [np.asarray(part, np.float32) for part in (rows if isinstance(rows, list) else [rows])]
    identity = what, manifest.codec_name, manifest.blocks, manifest.ranks, manifest.dependencies
    name = f"{manifest.name[: 63 - len(what)]}.{what}" if what else manifest.name
    manifest = replace(manifest, name=name, version=content_id(*identity, *parts))
    return manifest, manifest.encode(ids, rows)


def _components(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of rows [V, D]: their weighted mean [D], the energy [D] of each principal direction, largest first, and the directions [D, D]."""
    share = weights / weights.sum()
    mean = share @ rows
    centred = rows - mean
    values, vectors = np.linalg.eigh((centred * share[:, None]).T @ centred)
    return mean, np.maximum(values[::-1], 0), vectors.T[::-1]


def _ranks(energies: list[np.ndarray], total: int) -> tuple[int, ...]:
    """How many directions each layer keeps: those above one threshold, by which there are `total` over all layers; at least one each."""
    size = len(energies[0])
    total = min(max(total, len(energies)), size * len(energies))
    threshold = np.sort(np.concatenate(energies))[::-1][total - 1]
    return tuple(min(size, max(1, int((e >= threshold).sum()))) for e in energies)


def _least_ranks(planned: Manifest) -> tuple[int, ...]:
    return (planned.width,) * planned.has_x0 + (1,) * len(planned.layers)


def _bytes(planned: Manifest, scheme: Scheme, ranks: tuple[int, ...] = ()) -> int:
    """Of a table with its head, and with `ranks` its basis."""
    head = (
        replace(planned, codec_name=scheme.head_codec).record_bytes * scheme.head
        if scheme.head
        else 0
    )
    if not ranks:
        return replace(planned, codec_name=scheme.codec).table_bytes + head
    sized = replace(
        planned, codec_name=scheme.codec, ranks=ranks, basis=f"{planned.name}@{'0' * 16}"
    )
    return (
        head
        + sized.table_bytes
        + (sum(ranks) + len(ranks)) * (codec(BASIS_CODEC).block(planned.width).itemsize + 8)
    )


def _suffices(planned: Manifest, scheme: Scheme) -> bool:
    """Whether rows may keep their full rank: all of it was asked for, or the codec alone is small enough."""
    if scheme.ratio:
        plain = scheme if scheme.finer else replace(scheme, head=0)
        return _bytes(planned, plain) <= bytes_at_16_bit(planned) / scheme.ratio
    return (
        round(scheme.rank * len(planned.layers) * planned.width)
        == len(planned.layers) * planned.width
    )


def _affordable(planned: Manifest, energies: list[np.ndarray], scheme: Scheme) -> tuple[int, ...]:
    """The ranks by one threshold that keep the most coefficients with which all that is stored has the ratio; `check` has seen that rank 1 has."""
    least, most = max(len(energies), sum(_least_ranks(planned))), len(energies) * len(energies[0])
    allowed = bytes_at_16_bit(planned) / scheme.ratio
    if _bytes(planned, scheme, _ranks(energies, least)) > allowed:
        return _least_ranks(planned)
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (
            (middle, most)
            if _bytes(planned, scheme, _ranks(energies, middle)) <= allowed
            else (least, middle - 1)
        )
    return _ranks(energies, least)
