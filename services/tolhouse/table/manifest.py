"""The manifest: what a table is, where its records are and how they are laid out.

A record is one token's row: its blocks in the manifest's order, then XXH3-64 of them, seeded by
version and token: a record that is altered or of another version or token does not pass. An overlay
holds the changed rows alone, over a parent that holds all: other rows are the parent's records.

In JSON a manifest carries the digest of all its other fields. Fields at their default are not
written. `requires` names the optional fields without which a reader would give wrong rows; fields
that a reader does not know are kept unless they are required.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import xxhash
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from tolhouse.errors import CorruptError, IdOutOfRangeError, InvalidArgumentError
from tolhouse.table.codecs import Codec, codec
from tolhouse.validation import validated

FORMAT = 2
MAX_RECORD_BYTES = 3 << 20  # a record travels whole, within gRPC's default message of 4 MiB
MAX_SHARDS = 65_536
MAX_FREQUENT = 32_768
MAX_CHANGED = 100_000  # rows of an overlay: its manifest names them, and travels whole
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_VERSION = r"[0-9a-f]{16}"
_GOLDEN_64 = 0x9E3779B97F4A7C15

Buffer = bytes | memoryview  # one record


def content_id(*parts: object) -> str:
    """A version: 16 hex digits over `parts`, each an array (its bytes) or what JSON can hold."""
    hashed = hashlib.sha256()
    for part in (FORMAT, *parts):
        is_array = isinstance(part, np.ndarray)
        data = np.ascontiguousarray(part).data if is_array else json.dumps(part).encode()
        hashed.update(memoryview(data).nbytes.to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()[:16]


def check_name(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        allowed = "a letter or digit, then up to 63 letters, digits, dots, dashes and underscores"
        raise InvalidArgumentError(f"table name {name!r} is not allowed: it is {allowed}")
    return name


def split_ref(ref: str) -> tuple[str, str | None]:
    """("name", "version") of "name@version", ("name", None) of "name"; else
    InvalidArgumentError."""
    name, at, version = ref.partition("@")
    check_name(name)
    if at and not re.fullmatch(_VERSION, version):
        what = "a version is 16 hex digits, as `tolhouse tables list` shows them"
        raise InvalidArgumentError(f"table {ref!r}: {what}")
    return name, version if at else None


def _require(ok: object, message: str) -> None:
    if not ok:
        raise InvalidArgumentError(f"manifest: {message}")


Ids = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
Ref = Annotated[str, Field(pattern=f"^({_NAME}@{_VERSION})?$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Block = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}(\.(0|[1-9][0-9]{0,4})){0,4}$")]


@validated("manifest")
@dataclass(frozen=True, config=ConfigDict(strict=True))
class Manifest:
    """What a table is; InvalidArgumentError where the fields do not make a table."""

    name: Annotated[str, AfterValidator(check_name)]
    version: Annotated[str, Field(pattern=f"^{_VERSION}$")]  # see `content_id`
    codec_name: Annotated[str, AfterValidator(lambda name: codec(name).name)]
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    blocks: Annotated[tuple[Block, ...], Field(strict=False, min_length=1)]  # x0, ffn.LAYER…
    width: Annotated[int, Field(gt=0, le=2**20)]  # values of a block
    num_shards: Annotated[int, Field(gt=0, le=MAX_SHARDS)]
    model_id: str  # the checkpoint it was built from
    tokenizer_id: str
    shards: Annotated[tuple[Digest, ...], Field(strict=False)] = ()  # empty before all are written
    layout: Literal["shards"] = "shards"  # how a store lays out the records
    frequent: Annotated[Ids, Field(max_length=MAX_FREQUENT)] = ()  # the most frequent in text first
    parent: Ref = ""  # an overlay's: the table whose rows it has where it has none of its own
    changed: Annotated[Ids, Field(max_length=MAX_CHANGED)] = ()  # an overlay's own rows
    ranks: Ids = ()  # low rank: coefficients of each block, in place of its values
    basis: Ref = ""  # low rank: the table of basis vectors; auxiliary.py
    frequent_rows: Ref = ""  # the table of the most frequent tokens' rows in a finer codec
    edits: Ref = ""  # a compressed table's overlay: the table of the changed rows in that codec
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # unknown fields

    def __post_init__(self) -> None:
        count, width, size = self.num_blocks, self.width, self.vocab_size
        _require(len(set(self.blocks)) == count, f"blocks must be distinct, not {self.blocks}")
        _require(len(set(self.frequent)) == len(self.frequent), "frequent must be distinct ids")
        below = max((*self.frequent, *self.changed), default=0) < size
        _require(below, f"frequent and changed must be ids below {size}")
        ascending = list(self.changed) == sorted(set(self.changed))
        _require(ascending, "changed must be ascending ids")
        overlay = bool(self.changed) and self.num_shards == 1
        fits = overlay if self.parent else not self.changed and not self.edits
        _require(fits, "an overlay has a parent and changed ids, in one shard; others have neither")
        ranked = len(self.ranks) == count * bool(self.basis)
        ranked = ranked and all(0 < rank <= width for rank in self.ranks)
        _require(ranked, f"ranks must be from 1 to {width} for each block, only with a basis")
        shards = len(self.shards)
        _require(shards in (0, self.num_shards), f"{shards} digests for {self.num_shards} shards")
        # a value takes half a byte at least
        fits = count * width <= 2 * MAX_RECORD_BYTES and self.record_bytes <= MAX_RECORD_BYTES
        _require(fits, f"{count} blocks of {width} values exceed {MAX_RECORD_BYTES} bytes a record")

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.version}"

    @cached_property
    def codec(self) -> Codec:
        return codec(self.codec_name)

    @property
    def num_blocks(self) -> int:
        """N of a row [N, D]."""
        return len(self.blocks)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers whose feed-forward rows are present, ascending."""
        found = (re.fullmatch(r"ffn\.(\d+)", block) for block in self.blocks)
        return tuple(sorted(int(match[1]) for match in found if match))

    @property
    def has_x0(self) -> bool:
        """Whether rows have the embedding: a worker then needs none of its own."""
        return "x0" in self.blocks

    def model_blocks(self, num_rows: int) -> tuple[str, ...]:
        """The blocks that a model with `num_rows` rows reads, in its order, present or not."""
        return (*["x0"] * self.has_x0, *(f"ffn.{layer}" for layer in range(num_rows)))

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """Tables that its rows are made of, published by nobody, which come and go with it."""
        return tuple(ref for ref in (self.basis, self.frequent_rows, self.edits) if ref)

    @property
    def dependencies(self) -> tuple[str, ...]:
        """All other tables that its rows are made of."""
        return (self.parent, *self.auxiliary) if self.parent else self.auxiliary

    @cached_property
    def record_dtype(self) -> np.dtype:
        """`blocks`, alike; or with ranks block0, block1 and so on, each of its own size."""
        sized = [(f"block{k}", self.codec.block(rank)) for k, rank in enumerate(self.ranks)]
        alike = [("blocks", self.codec.block(self.width), (self.num_blocks,))]
        return np.dtype([*(sized or alike), ("checksum", "<u8")])

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
        """Token ids of one shard, ascending, as its records are."""
        if self.parent:
            return self._changed
        return np.arange(shard, self.vocab_size, self.num_shards, dtype=np.uint32)

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Where in their shards the records of `ids` are."""
        return np.searchsorted(self._changed, ids) if self.parent else ids // self.num_shards

    def owns(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` [T] have a record of its own; bool [T]."""
        return np.isin(ids, self._changed) if self.parent else np.ones(len(ids), bool)

    @cached_property
    def _changed(self) -> np.ndarray:
        return np.array(self.changed, np.uint32)

    def check_ids(self, ids: np.ndarray) -> None:
        if ids.size and int(ids.max()) >= self.vocab_size:
            bad = int(ids[ids >= self.vocab_size][0])
            allowed = f"allowed are 0 to {self.vocab_size - 1}"
            raise IdOutOfRangeError(f"token id {bad} is outside table {self.ref}: {allowed}")

    # records: uint8 [T, record_bytes], one per token id of `ids`

    def encode(self, ids: np.ndarray, rows: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Records of `ids` for float32 rows [T, N, D]; with ranks, for each block's [T, r]."""
        records = np.empty(len(ids), self.record_dtype)
        if self.ranks:
            for k, coefficients in enumerate(rows):
                records[f"block{k}"] = self.codec.encode(coefficients)
        else:
            records["blocks"] = self.codec.encode(np.asarray(rows))
        return self.add_checksums(ids, records.view(np.uint8).reshape(len(ids), self.record_bytes))

    def add_checksums(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        """The records, contiguous, with the checksums of this version and `ids`, set in place."""
        seeded = zip(record_views(records), self.seeds(ids), strict=True)
        checksums = [xxhash.xxh3_64_intdigest(record[:-8], seed) for record, seed in seeded]
        records.view(self.record_dtype)[:, 0]["checksum"] = checksums
        return records

    def decode(self, records: np.ndarray) -> np.ndarray:
        """Rows [T, N, D]: a view of the records for float codecs, float32 values for others."""
        return self.codec.decode(records.view(self.record_dtype)[..., 0]["blocks"])

    def coefficients(self, records: np.ndarray) -> list[np.ndarray]:
        """With ranks: coefficients float32 [T, r] of each block."""
        fields = records.view(self.record_dtype)[..., 0]
        blocks = (np.ascontiguousarray(fields[f"block{k}"]) for k in range(len(self.ranks)))
        return [self.codec.decode(block).astype(np.float32) for block in blocks]

    def verify(self, ids: np.ndarray, records: Iterable[Buffer | str]) -> None:
        """CorruptError, with all bad tokens, unless each record is intact, of this version and
        token.

        A text in place of a record says why there is none.
        """
        bad: dict[int, str] = {}
        for i, seed, record in zip(ids.tolist(), self.seeds(ids), records, strict=True):
            if isinstance(record, str):
                bad[i] = record
                continue
            checksum = int.from_bytes(record[-8:], "little")
            if xxhash.xxh3_64_intdigest(memoryview(record)[:-8], seed) != checksum:
                bad[i] = f"the row of token {i} in table {self.ref} fails its checksum"
        if bad:
            first, *others = bad.values()
            more = f"; rows of {len(others)} other tokens can't be read either" if others else ""
            raise CorruptError(first + more, bad)

    def copy_records(
        self, ids: np.ndarray, source: memoryview, out: memoryview, slots: Iterable[int]
    ) -> None:
        """Copy consecutive records to slots of `out`, both flat; CorruptError as of `verify`."""
        size = self.record_bytes

        def copied() -> Iterator[memoryview]:  # each is verified while it is in the core's cache
            for n, slot in enumerate(slots):
                record = out[slot * size : slot * size + size]
                record[:] = source[n * size : n * size + size]
                yield record

        self.verify(ids, copied())

    def seeds(self, ids: np.ndarray) -> list[int]:
        """The seed of each token's checksum: its version's and its own."""
        versions = np.full(len(ids), int(self.version, 16), np.uint64)
        if self.parent:
            versions[~self.owns(ids)] = int(self.parent.rpartition("@")[2], 16)
        return (versions + ids.astype(np.uint64) * np.uint64(_GOLDEN_64)).tolist()

    # JSON

    def to_json(self) -> str:
        fields = ((name, getattr(self, name)) for name in _FIELDS)
        data = {name: value for name, value in fields if value != _FIELDS[name]}
        data["codec"] = data.pop("codec_name")
        if required := [name for name in _REQUIRED if name in data]:
            data["requires"] = required
        data |= {**self.extra, "format": FORMAT}
        return _canonical({**data, "digest": _digest(data)}) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """The manifest in `text`; InvalidArgumentError if it is malformed, CorruptError if
        altered."""
        try:
            data: Any = json.loads(text)
            given = data.pop("digest", None) if isinstance(data, dict) else None
            own = _digest(data)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"manifest: not JSON: {error}") from None
        _require(isinstance(data, dict), "not a JSON object")
        number, required = data.pop("format", None), data.pop("requires", [])
        advice = "build the table again, and remove this one by `tolhouse tables delete`"
        advice = advice if number == 1 else "a later one needs a later tolhouse"
        _require(number == FORMAT, f"format {number!r:.60} is not {FORMAT}: {advice}")
        if given != own:
            raise CorruptError("manifest: its fields are not those that its digest was made of")
        _require(isinstance(required, list), f"requires must be a list, not {required!r:.60}")
        unknown = [name for name in required if name not in _REQUIRED]
        _require(not unknown, f"the table needs {unknown}, unknown here: upgrade tolhouse")
        if "codec" in data:
            data["codec_name"] = data.pop("codec")
        extra = {name: data.pop(name) for name in data.keys() - _FIELDS.keys()}
        return cls(**data, extra=extra)


_FIELDS = {f.name: f.default for f in dataclasses.fields(Manifest) if f.name != "extra"}
_REQUIRED = ("layout", "parent", "changed", "ranks", "basis", "frequent_rows", "edits")


def record_views(records: np.ndarray) -> Iterator[memoryview]:
    """Each record of a contiguous uint8 [T, record_bytes] as a view."""
    size, flat = records.shape[1], memoryview(records.reshape(-1))  # type: ignore[arg-type]  # is one
    return (flat[at : at + size] for at in range(0, len(flat), size))


def _canonical(data: dict[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(data).encode()).hexdigest()
