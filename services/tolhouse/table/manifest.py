"""The identity card of a table and the layout of its records.

A record is one token's row: a block per present layer, lowest layer first, then the 8-byte checksum. Where the table
carries X0, the token's embedding, its block stands before them. The checksum is XXH3-64 over the blocks, seeded with the
table's version and the token's id: a record that is altered, torn, of another version or of another token does not pass.

An overlay is a version that holds the changed rows alone, over a parent that holds them all. A row that it has not changed is
the parent's record, checksum and all.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash

from tolhouse.errors import Corrupt, IdOutOfRange, InvalidArgument
from tolhouse.table.codecs import Codec, codec

FORMAT = 1
Buffer = bytes | memoryview  # one record
MAX_RECORD_BYTES = 3 << 20  # a record travels whole, within gRPC's default message of 4 MiB
MAX_SHARDS = 65_536
MAX_FREQUENT = 32_768
MAX_CHANGED = 100_000  # rows of an overlay: its manifest names them, and travels whole
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_VERSION = re.compile(r"[0-9a-f]{16}")
_GOLDEN_64 = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Manifest:
    """What a table is. `shards` holds a digest per shard once the build is complete, and is empty before."""

    name: str
    version: str  # 16 hex digits; see `content_id`
    codec: str
    vocab_size: int
    hidden_size: int
    layers: tuple[int, ...]  # the layers whose rows are present, ascending
    num_shards: int
    model_id: str  # the checkpoint it was built from
    tokenizer_id: str
    shards: tuple[str, ...] = ()
    frequent: tuple[
        int, ...
    ] = ()  # token ids, the most frequent in text first: what a cache is filled with; may be empty
    parent: str = ""  # an overlay's: "name@version" of the table, no overlay itself, whose rows it has where it has none of its own
    changed: tuple[int, ...] = ()  # an overlay's own rows, by token id, ascending
    ranks: tuple[int, ...] = ()  # low rank: coefficients of each block, in place of its values
    basis: str = ""  # low rank: "name@version" of the table of basis vectors; companions.py
    head: str = ""  # "name@version" of the table of the most frequent tokens' rows in a finer codec; companions.py
    edits: str = ""  # a compressed table's overlay: "name@version" of the table of the changed rows in that codec; companions.py
    x0: bool = (
        False  # whether X0 stands in front of the layers: a worker then needs no input embedding
    )
    format: int = FORMAT

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise InvalidArgument(f"manifest: {message}")

        require(
            type(self.format) is int and self.format == FORMAT,
            f"format {self.format!r} is unknown; this version reads {FORMAT}",
        )
        for field in (
            "name",
            "version",
            "codec",
            "model_id",
            "tokenizer_id",
            "parent",
            "basis",
            "head",
            "edits",
        ):
            require(isinstance(getattr(self, field), str), f"{field} must be a string")
        check_name(self.name)
        require(
            bool(_VERSION.fullmatch(self.version)), f"version {self.version!r} is not 16 hex digits"
        )
        codec(self.codec)
        for field, limit in (
            ("vocab_size", 2**32),
            ("hidden_size", 2**20),
            ("num_shards", MAX_SHARDS),
        ):
            value = getattr(self, field)
            require(
                type(value) is int and 0 < value <= limit,
                f"{field} must be from 1 to {limit}, not {value!r}",
            )
        require(
            len(self.layers) > 0
            and all(type(layer) is int and 0 <= layer < 2**16 for layer in self.layers)
            and list(self.layers) == sorted(set(self.layers)),
            f"layers must be ascending layer numbers, not {self.layers!r}",
        )
        require(type(self.x0) is bool, f"x0 must be true or false, not {self.x0!r}")
        require(
            all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in self.shards),
            "shards must be digests of 32 hex digits",
        )
        require(
            len(self.frequent) <= MAX_FREQUENT
            and all(type(i) is int and 0 <= i < self.vocab_size for i in self.frequent)
            and len(set(self.frequent)) == len(self.frequent),
            f"frequent must be at most {MAX_FREQUENT} different token ids below {self.vocab_size}",
        )
        require(
            len(self.changed) <= MAX_CHANGED
            and all(type(i) is int and 0 <= i < self.vocab_size for i in self.changed)
            and list(self.changed) == sorted(set(self.changed))
            and bool(self.changed) == bool(self.parent),
            f"changed must be at most {MAX_CHANGED} token ids below {self.vocab_size}, ascending, if there is a parent, and none otherwise",
        )
        for field in ("parent", "basis", "head", "edits"):
            ref = getattr(self, field)
            require(
                not ref or split_ref(ref)[1] is not None, f"{field} {ref!r} must be name@version"
            )
        require(
            all(type(r) is int and 0 < r <= self.hidden_size for r in self.ranks)
            and len(self.ranks) == (self.num_blocks if self.basis else 0),
            f"ranks must be a number from 1 to {self.hidden_size} for each of {self.num_blocks} blocks, if there is a basis, and none otherwise",
        )
        require(
            not self.edits or bool(self.parent), "edits are an overlay's, and there is no parent"
        )
        require(
            len(self.shards) in (0, self.num_shards),
            f"{len(self.shards)} digests for {self.num_shards} shards",
        )
        require(
            self.record_bytes <= MAX_RECORD_BYTES,
            f"a record of {self.record_bytes} bytes is over the limit of {MAX_RECORD_BYTES}",
        )

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_blocks(self) -> int:
        """N of a row [N, D]: a block per layer, and one for X0 where it is there."""
        return self.num_layers + self.x0

    @cached_property
    def codec_(self) -> Codec:
        return codec(self.codec)

    @property
    def needs(self) -> tuple[str, ...]:
        """ "name@version" of the other tables that its rows are made of."""
        return tuple(ref for ref in (self.parent, *self.companions) if ref)

    @property
    def companions(self) -> tuple[str, ...]:
        """Those of them that are published by nobody and come and go with it; companions.py."""
        return tuple(ref for ref in (self.basis, self.head, self.edits) if ref)

    @cached_property
    def record_dtype(self) -> np.dtype:
        """`blocks`, alike; or with ranks block0, block1 and so on, each of its own size."""
        if not self.ranks:
            return np.dtype(
                [
                    ("blocks", self.codec_.block(self.hidden_size), (self.num_blocks,)),
                    ("checksum", "<u8"),
                ]
            )
        return np.dtype(
            [
                *((f"block{k}", self.codec_.block(rank)) for k, rank in enumerate(self.ranks)),
                ("checksum", "<u8"),
            ]
        )

    @cached_property
    def record_bytes(self) -> int:
        return self.record_dtype.itemsize

    @property
    def num_records(self) -> int:
        """Records of its own."""
        return len(self.changed) if self.parent else self.vocab_size

    @property
    def table_bytes(self) -> int:
        return self.num_records * self.record_bytes

    # ids and shards

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        return ids % self.num_shards

    def shard_ids(self, shard: int) -> np.ndarray:
        """Token ids of one shard, ascending; record i of the shard is that of the i-th."""
        if self.parent:
            return self._changed[self._changed % self.num_shards == shard]
        return np.arange(shard, self.vocab_size, self.num_shards, dtype=np.uint32)

    def positions(self, shard: int, ids: np.ndarray) -> np.ndarray:
        """Where in their shard the records of `ids` are."""
        return (
            np.searchsorted(self.shard_ids(shard), ids) if self.parent else ids // self.num_shards
        )

    def owns(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` [T] have a record of its own; bool [T]."""
        return np.isin(ids, self._changed) if self.parent else np.ones(len(ids), bool)

    @cached_property
    def _changed(self) -> np.ndarray:
        return np.array(self.changed, np.uint32)

    def check_ids(self, ids: np.ndarray) -> None:
        if ids.size and int(ids.max()) >= self.vocab_size:
            bad = int(ids[ids >= self.vocab_size][0])
            raise IdOutOfRange(
                f"token id {bad} is outside table {self.ref}: allowed are 0 to {self.vocab_size - 1}"
            )

    # records: uint8 [T, record_bytes], one per token id of `ids`

    def encode(self, ids: np.ndarray, rows: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Sealed records for float32 rows [T, N, D] of `ids`; with ranks, for each block's coefficients [T, r]."""
        records = np.empty(len(ids), self.record_dtype)
        if self.ranks:
            for k, coefficients in enumerate(rows):
                records[f"block{k}"] = self.codec_.encode(coefficients)
        else:
            records["blocks"] = self.codec_.encode(rows)  # type: ignore[arg-type]
        return self.seal(ids, records.view(np.uint8).reshape(len(ids), self.record_bytes))

    def seal(self, ids: np.ndarray, data: np.ndarray) -> np.ndarray:
        """Records, contiguous, with the checksums that make them this version's records of `ids`, in place."""
        records = data.view(self.record_dtype)[:, 0]
        records["checksum"] = [
            xxhash.xxh3_64_intdigest(r[:-8], seed)
            for r, seed in zip(split(data), self.seeds(ids), strict=True)
        ]
        return data

    def decode(self, records: np.ndarray) -> np.ndarray:
        """Rows [T, N, D] of records: a view of them for the float codecs, float32 values for the others."""
        return self.codec_.decode(records.view(self.record_dtype)[..., 0]["blocks"])

    def coefficients(self, records: np.ndarray) -> list[np.ndarray]:
        """With ranks: coefficients float32 [T, r] of each block."""
        found = records.view(self.record_dtype)[..., 0]
        return [
            self.codec_.decode(np.ascontiguousarray(found[f"block{k}"])).astype(np.float32)
            for k in range(len(self.ranks))
        ]

    def verify(self, ids: np.ndarray, records: Iterable[Buffer]) -> None:
        """Corrupt, naming the first bad token, unless every record is intact, of this version and of its token."""
        for i, seed, record in zip(ids.tolist(), self.seeds(ids), records, strict=True):
            if not passes(record, seed):
                raise Corrupt(f"the row of token {i} in table {self.ref} fails its checksum")

    def take(
        self,
        ids: np.ndarray,
        source: memoryview,
        at: Iterable[int],
        out: memoryview,
        places: Iterable[int],
    ) -> list[int]:
        """Copy the records of `ids` from `source` to `out`, both flat, record `at` to record `place`; indices of the bad ones.

        One copy each, verified while it is in the core's cache. A negative `at` is a record that is not there.
        """
        size, bad, checksum = self.record_bytes, [], xxhash.xxh3_64_intdigest
        for n, (slot, place, seed) in enumerate(zip(at, places, self.seeds(ids), strict=True)):
            if slot >= 0:
                record = out[place * size : place * size + size]
                record[:] = source[slot * size : slot * size + size]
                if checksum(record[:-8], seed) == int.from_bytes(record[-8:], "little"):
                    continue
            bad.append(n)
        return bad

    def seeds(self, ids: np.ndarray) -> list[int]:
        """The seed of each token's checksum, which names the version that the record is of."""
        versions = (
            np.where(self.owns(ids), self._seed, self._parent_seed) if self.parent else self._seed
        )
        return (versions + ids.astype(np.uint64) * np.uint64(_GOLDEN_64)).tolist()

    @cached_property
    def _seed(self) -> np.uint64:
        return np.uint64(int(self.version, 16))

    @cached_property
    def _parent_seed(self) -> np.uint64:
        return np.uint64(int(self.parent.rpartition("@")[2], 16))

    # JSON

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """The manifest in `text`; InvalidArgument where it is malformed."""
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"manifest: not JSON: {error}") from None
        names = {field.name for field in dataclasses.fields(cls)}
        if isinstance(data, dict):
            data = {
                "frequent": [],
                "x0": False,
                "parent": "",
                "changed": [],
                "ranks": [],
                "basis": "",
                "head": "",
                "edits": "",
                **data,
            }  # tables that were built before there were these
        if not isinstance(data, dict) or set(data) != names:
            odd = sorted(set(data) ^ names) if isinstance(data, dict) else "not an object"
            raise InvalidArgument(f"manifest: missing or unknown fields: {odd}")
        lists = ("layers", "shards", "frequent", "changed", "ranks")
        if not all(isinstance(data[name], list) for name in lists):
            raise InvalidArgument(f"manifest: {', '.join(lists)} must be lists")
        return cls(**{**data, **{name: tuple(data[name]) for name in lists}})


def passes(record: Buffer, seed: int) -> bool:
    """Whether a record's checksum is that of its bytes under `seed`."""
    view = memoryview(record)
    return xxhash.xxh3_64_intdigest(view[:-8], seed) == int.from_bytes(view[-8:], "little")


def split(records: np.ndarray) -> Iterator[memoryview]:
    """Each record of a contiguous uint8 [T, record_bytes] as a view."""
    size, flat = records.shape[1], memoryview(records.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer
    return (flat[at : at + size] for at in range(0, len(flat), size))


def content_id(rows_id: str, codec_name: str, layers: Sequence[int], x0: bool = False) -> str:
    """The version of a table: 16 hex digits over what defines its rows, the codec and the blocks present."""
    return hashlib.sha256(
        f"{FORMAT} {rows_id} {codec_name} {list(layers)}{' x0' * x0}".encode()
    ).hexdigest()[:16]


def digest(records: np.ndarray) -> str:
    """The digest of a shard's records that a manifest lists: XXH3-128, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(records).data)


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"table name {name!r} is not allowed: 1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter or digit"
        )
    return name


def split_ref(ref: str) -> tuple[str, str | None]:
    """("name", "version") of "name@version", ("name", None) of "name"; InvalidArgument for anything else."""
    name, at, version = ref.partition("@")
    check_name(name)
    if at and not _VERSION.fullmatch(version):
        raise InvalidArgument(
            f"table {ref!r}: a version is 16 hex digits, as `tolhouse tables list` shows them"
        )
    return name, version if at else None
