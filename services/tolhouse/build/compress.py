"""Tables in fewer bytes: low rank by a weighted SVD, and frequent tokens' rows in a finer codec.

The paper quantises, and cuts each layer to one rank by a plain SVD (PAPER section 2). Here the
error of a token's row counts as often as text has the token, ranks differ by layer so that one
error threshold holds for all of them, and the few tokens that make up most of any text are stored
more finely than the others. All rows are in memory at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from tolhouse.errors import InvalidArgument
from tolhouse.store.base import Store
from tolhouse.store.registry import refuse_another
from tolhouse.store.writer import write_table
from tolhouse.table.auxiliary import Basis, load_auxiliary
from tolhouse.table.codecs import CODECS, codec
from tolhouse.table.manifest import MAX_FREQUENT, Manifest, content_id

BASIS_CODEC = "fp16"  # its vectors are of length one
FREQUENT_SHARE = 32  # one token in so many is frequent, by default: 60 to 70% of text


@dataclass(frozen=True)
class Scheme:
    """How a table is compressed; without `rank` or `ratio`, rows keep their full rank."""

    codec: str
    rank: float = 0.0  # share of all values that is kept as coefficients, over all layers; 0: all
    ratio: float = 0.0  # bytes at 16 bit over all that is stored, in place of `rank`
    frequent: int = 0  # tokens whose rows are in the finer codec
    frequent_codec: str = "int8"

    @property
    def low_rank(self) -> bool:
        return bool(self.rank or self.ratio)

    @property
    def finer(self) -> bool:
        """Whether the frequent tokens' codec is finer than that of rows at full rank."""
        return codec(self.frequent_codec).relative_error < codec(self.codec).relative_error


@dataclass(frozen=True)
class Compressed:
    """Manifests and records, not stored yet: auxiliary tables first, the table itself last."""

    tables: tuple[tuple[Manifest, np.ndarray], ...]

    @property
    def manifest(self) -> Manifest:
        return self.tables[-1][0]

    @property
    def bytes(self) -> int:
        return sum(manifest.table_bytes for manifest, _ in self.tables)

    def rows(self) -> np.ndarray:
        """Rows float32 [V, N, D] as a reader of the table has them."""
        by_ref = {manifest.ref: (manifest, records) for manifest, records in self.tables}
        auxiliary = load_auxiliary(self.manifest, by_ref.__getitem__)
        ids = np.arange(self.manifest.vocab_size, dtype=np.uint32)
        return auxiliary.decode(ids, self.tables[-1][1]).astype(np.float32)

    def store(self, store: Store) -> Manifest:
        """Write all of it; InUse: the version is there with other shards."""
        refuse_another(store, self.manifest)
        return [_write(store, *table) for table in self.tables][-1]


def _write(store: Store, manifest: Manifest, records: np.ndarray) -> Manifest:
    return write_table([store], manifest, lambda shard: records[manifest.shard_ids(shard)])


def bytes_at_16_bit(manifest: Manifest) -> int:
    """What a table of the same rows takes at 16 bit, checksums and all."""
    return manifest.vocab_size * (manifest.num_blocks * manifest.width * 2 + 8)


def check(planned: Manifest, scheme: Scheme) -> None:
    """InvalidArgument where the table can't be compressed by `scheme`, whatever its rows are."""
    codec(scheme.codec), codec(scheme.frequent_codec)
    rank, ratio, frequent = scheme.rank, scheme.ratio, scheme.frequent
    most = min(planned.vocab_size // 2, MAX_FREQUENT)
    if not 0 <= frequent <= most:
        raise InvalidArgument(
            f"there may be from 0 to {most} frequent tokens in a vocabulary of "
            f"{planned.vocab_size}, not {frequent}"
        )
    if rank and ratio:
        raise InvalidArgument("a rank and a ratio can't both be given: the ratio chooses the rank")
    if not 0 <= rank <= 1:
        raise InvalidArgument(f"the rank is a share of all values, from 0 to 1, not {rank:g}")
    if frequent and not scheme.low_rank and not scheme.finer:
        finer = [name for name in CODECS if replace(scheme, frequent_codec=name).finer]
        raise InvalidArgument(
            f"frequent rows in {scheme.frequent_codec} are no finer than rows in {scheme.codec}; "
            f"allowed without low rank: {' or '.join([*finer, 'none'])}"
        )
    if ratio and not ratio > 1:
        raise InvalidArgument(
            f"the ratio is how many times fewer bytes than at 16 bit, over 1, not {ratio:g}"
        )
    if ratio and not _suffices(planned, scheme):
        reached = bytes_at_16_bit(planned) / _bytes(planned, scheme, _least_ranks(planned))
        if reached < ratio:
            raise InvalidArgument(
                f"a ratio of {ratio:g} is out of reach: with these codecs and frequent rows, "
                f"rank 1 reaches {reached:.2f}"
            )


def compress(
    planned: Manifest, rows: np.ndarray, counts: Mapping[int, int], scheme: Scheme
) -> Compressed:
    """The table `planned` of `rows` [V, N, D] by `scheme`; `counts`: how often text has a token.

    There is no basis where the codec alone is small enough for the ratio, or every layer would
    keep its full rank; then frequent rows are stored only if their codec is finer.
    """
    check(planned, scheme)
    vocabulary, blocks, size = rows.shape
    order = sorted(range(vocabulary), key=lambda i: (-counts.get(i, 0), i))
    low_rank = scheme.low_rank and not _suffices(planned, scheme)
    if low_rank:
        # a token that was not seen may yet come
        weights = np.array([counts.get(i, 0) + 0.5 for i in range(vocabulary)])
        weights[order[: scheme.frequent]] = 0
        bar = tqdm(range(blocks), desc="low rank", unit="layer", leave=False, dynamic_ncols=True)
        parts = [_components(rows[:, block], weights) for block in bar]
        energies = [values for _, values, _ in parts]
        if planned.has_x0:  # every layer reads it, and no row's error compares with its: all of it
            energies[0] = np.full(size, np.inf)
        total = round(scheme.rank * len(planned.layers) * size) + size * planned.has_x0
        ranks = _affordable(planned, energies, scheme) if scheme.ratio else _ranks(energies, total)
        low_rank = min(ranks) < size
    if not low_rank and not scheme.finer:
        scheme = replace(scheme, frequent=0)
    seen = [i for i in order[:MAX_FREQUENT] if scheme.frequent or counts.get(i, 0)]
    table = replace(planned, codec_name=codec(scheme.codec).name, frequent=tuple(seen))
    auxiliary = []
    if low_rank:
        means = np.stack([mean for mean, _, _ in parts]).astype(np.float32)
        vectors = [
            v[:rank].astype(np.float32) for (_, _, v), rank in zip(parts, ranks, strict=True)
        ]
        part = {"codec_name": BASIS_CODEC, "vocab_size": sum(ranks) + blocks, "blocks": ("basis",)}
        exact = Basis(means, tuple(vectors)).table()
        manifest, records = _encoded(_part(planned, **part), exact, "basis")
        auxiliary.append((manifest, records))
        basis = Basis.of(manifest.decode(records).astype(np.float32), ranks)  # as a reader has it
        table = replace(table, ranks=ranks, basis=manifest.ref)
    if scheme.frequent:
        part = {"codec_name": scheme.frequent_codec, "vocab_size": scheme.frequent}
        finer = rows[order[: scheme.frequent]]
        auxiliary.append(_encoded(_part(planned, **part), finer, "frequent_rows"))
        table = replace(table, frequent_rows=auxiliary[-1][0].ref)
    return Compressed((*auxiliary, _encoded(table, basis.coefficients(rows) if low_rank else rows)))


def _part(planned: Manifest, **fields: object) -> Manifest:
    return replace(planned, num_shards=1, frequent=(), **fields)  # type: ignore[arg-type]


def _encoded(
    manifest: Manifest, rows: np.ndarray | list[np.ndarray], part: str = ""
) -> tuple[Manifest, np.ndarray]:
    """A manifest with the version that its contents give it, and its records."""
    ids = np.arange(manifest.vocab_size, dtype=np.uint32)
    arrays = [np.asarray(r, np.float32) for r in (rows if isinstance(rows, list) else [rows])]
    identity = part, manifest.codec_name, manifest.blocks, manifest.ranks, manifest.dependencies
    name = f"{manifest.name[: 63 - len(part)]}.{part}" if part else manifest.name
    manifest = replace(manifest, name=name, version=content_id(*identity, *arrays))
    return manifest, manifest.encode(ids, rows)


def _components(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted mean [D] of rows [V, D], energies [D], largest first, and directions [D, D]."""
    share = weights / weights.sum()
    mean = share @ rows
    centred = rows - mean
    values, vectors = np.linalg.eigh((centred * share[:, None]).T @ centred)
    return mean, np.maximum(values[::-1], 0), vectors.T[::-1]


def _ranks(energies: list[np.ndarray], total: int) -> tuple[int, ...]:
    """Directions that each layer keeps, at least one: `total` over all, above one threshold."""
    size = len(energies[0])
    total = min(max(total, len(energies)), size * len(energies))
    threshold = np.sort(np.concatenate(energies))[::-1][total - 1]
    return tuple(min(size, max(1, int((e >= threshold).sum()))) for e in energies)


def _least_ranks(planned: Manifest) -> tuple[int, ...]:
    return (planned.width,) * planned.has_x0 + (1,) * len(planned.layers)


def _bytes(planned: Manifest, scheme: Scheme, ranks: tuple[int, ...] = ()) -> int:
    """Of a table with its frequent rows, and with `ranks` its basis."""
    table = replace(planned, codec_name=scheme.codec)
    size = replace(planned, codec_name=scheme.frequent_codec).record_bytes * scheme.frequent
    if not ranks:
        return size + table.table_bytes
    table = replace(table, ranks=ranks, basis=f"{planned.name}@{'0' * 16}")
    vector = codec(BASIS_CODEC).block(planned.width).itemsize + 8
    return size + table.table_bytes + (sum(ranks) + len(ranks)) * vector


def _suffices(planned: Manifest, scheme: Scheme) -> bool:
    """Whether rows may keep their full rank: as was asked, or the codec alone is small enough."""
    if scheme.ratio:
        plain = scheme if scheme.finer else replace(scheme, frequent=0)
        return _bytes(planned, plain) <= bytes_at_16_bit(planned) / scheme.ratio
    values = len(planned.layers) * planned.width
    return round(scheme.rank * values) == values


def _affordable(planned: Manifest, energies: list[np.ndarray], scheme: Scheme) -> tuple[int, ...]:
    """The ranks by one threshold with the most coefficients that reach the ratio."""
    allowed = bytes_at_16_bit(planned) / scheme.ratio

    def fits(total: int) -> bool:
        return _bytes(planned, scheme, _ranks(energies, total)) <= allowed

    least, most = max(len(energies), sum(_least_ranks(planned))), len(energies) * len(energies[0])
    if not fits(least):
        return _least_ranks(planned)  # which `check` has seen to fit
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return _ranks(energies, least)
