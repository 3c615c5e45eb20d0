"""The manifest, which describes a table and the places and the layout of its records.

A record is the row of a token: its blocks in the order of the manifest, then their XXH3-64
checksum, seeded with version and token. The check therefore fails for a changed record, and for a
record of another version or token. An overlay stores only changed rows. Its parent has all others.

In JSON, a manifest contains a digest of its other fields, and omits fields with default values.
`requires` lists the optional fields that a reader must understand to return correct rows. Readers
keep unknown fields, and refuse a table that requires an unknown field.
"""

import dataclasses
import hashlib
import json
import re
import struct
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
MAX_RECORD_BYTES = 3 << 20  # a message has whole records, and gRPC's default limit is 4 MiB
MAX_SHARDS = 65_536
MAX_FREQUENT = 32_768
MAX_CHANGED = 100_000  # rows of an overlay, which its manifest lists in one message
PARTS = "basis", "frequent_rows", "edits"  # the auxiliary tables that a table may have
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_VERSION = r"[0-9a-f]{16}"
_GOLDEN_64 = 0x9E3779B97F4A7C15
checksum_at = struct.Struct("<Q").unpack_from  # of a buffer and the checksum's offset

Buffer = bytes | memoryview  # one record


def content_id(*parts: object) -> str:
    """Return a version: the hash of `parts`, which are arrays or JSON values, as 16 hex digits."""
    hashed = hashlib.sha256()
    for part in (FORMAT, *parts):
        is_array = isinstance(part, np.ndarray)
        data = np.ascontiguousarray(part).data if is_array else json.dumps(part).encode()
        hashed.update(memoryview(data).nbytes.to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()[:16]


def check_name(name: str) -> str:
    """Check and return the name of a table. Raises InvalidArgumentError if it is not allowed."""
    if not re.fullmatch(_NAME, name):
        allowed = "a letter or digit, then up to 63 letters, digits, dots, dashes and underscores"
        raise InvalidArgumentError(f"table name {name!r} is not allowed; use {allowed}")
    return name


def split_ref(ref: str) -> tuple[str, str | None]:
    """Split "name@version" into ("name", "version"), and "name" into ("name", None).

    Raises:
        InvalidArgumentError: `ref` has another form.
    """
    name, at, version = ref.partition("@")
    check_name(name)
    if at and not re.fullmatch(_VERSION, version):
        what = "a version is 16 hex digits, as `tolhouse tables list` shows them"
        raise InvalidArgumentError(f"table {ref!r}: {what}")
    return name, version if at else None


def part_name(name: str, part: str) -> str:
    """Return the name of an auxiliary table of `name`, which is cut if it is long. See `PARTS`."""
    return f"{name[: 63 - len(part)]}.{part}"


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
    """The description of a table, with validated fields.

    Attributes:
        name: Name of the table.
        version: Content id, 16 hexadecimal digits.
        codec_name: "fp32", "fp16", "bf16", "int8" or "int4".
        vocab_size: Number of token ids.
        blocks: Names of the N blocks of a row, in order: "x0" for embeddings, "ffn.LAYER".
        width: Number of values of a block, D.
        num_shards: A token is in shard `id % num_shards`.
        model_id: Hash of the checkpoint that the table was built from.
        tokenizer_id: Hash of the checkpoint's tokenizer.
        shards: Digest of each shard; empty until all are written.
        layout: Arrangement of the records in one store, which sets it only in its own copy.
        frequent: The most frequent token ids, most frequent first.
        parent: For an overlay: the version of the same name with all unchanged rows.
        changed: For an overlay: the ids of its own rows, ascending.
        appended: For an overlay: the number of its last token ids, which its parent lacks.
        ranks: For low rank: the number of coefficients of each block.
        basis: For low rank: the table of basis vectors.
        frequent_rows: The table with the rows of `frequent` tokens in a finer codec.
        edits: For an overlay over a compressed table: the table of the changed rows.
        provenance: What the table was made of. Readers need none of it: `source`, the name of the
            checkpoint; `corpus`, the text that tokens were counted in; `builder`, the program.
        extra: Fields that this version of Tolhouse does not define.

    Raises:
        InvalidArgumentError: The fields do not describe a table.
    """

    name: Annotated[str, AfterValidator(check_name)]
    version: Annotated[str, Field(pattern=f"^{_VERSION}$")]  # the result of `content_id`
    codec_name: Annotated[str, AfterValidator(lambda name: codec(name).name)]
    vocab_size: Annotated[int, Field(gt=0, le=2**32)]
    blocks: Annotated[tuple[Block, ...], Field(strict=False, min_length=1)]
    width: Annotated[int, Field(gt=0, le=2**20)]
    num_shards: Annotated[int, Field(gt=0, le=MAX_SHARDS)]
    model_id: str
    tokenizer_id: str
    shards: Annotated[tuple[Digest, ...], Field(strict=False)] = ()
    layout: Literal["shards", "keys"] = "shards"
    frequent: Annotated[Ids, Field(max_length=MAX_FREQUENT)] = ()
    parent: Ref = ""
    changed: Annotated[Ids, Field(max_length=MAX_CHANGED)] = ()
    appended: Annotated[int, Field(ge=0, le=MAX_CHANGED)] = 0
    ranks: Ids = ()
    basis: Ref = ""
    frequent_rows: Ref = ""
    edits: Ref = ""
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

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
        last = tuple(range(size - self.appended, size))
        fits = self.appended < size and self.changed[len(self.changed) - self.appended :] == last
        _require(fits, f"the {self.appended} appended ids must be the last ones, and changed")
        ranked = len(self.ranks) == count * bool(self.basis)
        ranked = ranked and all(0 < rank <= width for rank in self.ranks)
        _require(ranked, f"ranks must be from 1 to {width} for each block, only with a basis")
        # Tokens grant names, so a table must not lead to rows of another name.
        own = {part: part_name(self.name, part) for part in PARTS} | {"parent": self.name}
        for part, name in own.items():
            ref = getattr(self, part)
            fits = ref.partition("@")[0] in ("", name)
            _require(fits, f"{part} {ref} must be a version of {name}")
        shards = len(self.shards)
        _require(shards in (0, self.num_shards), f"{shards} digests for {self.num_shards} shards")
        # A value needs at least half a byte.
        fits = count * width <= 2 * MAX_RECORD_BYTES and self.record_bytes <= MAX_RECORD_BYTES
        _require(fits, f"{count} blocks of {width} values exceed {MAX_RECORD_BYTES} bytes a record")

    @property
    def ref(self) -> str:
        """The table as "name@version"."""
        return f"{self.name}@{self.version}"

    @cached_property
    def codec(self) -> Codec:
        """The codec of `codec_name`."""
        return codec(self.codec_name)

    @property
    def num_blocks(self) -> int:
        """N, the number of blocks of a row [N, D]."""
        return len(self.blocks)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers with feed-forward rows in the table, ascending."""
        found = (re.fullmatch(r"ffn\.(\d+)", block) for block in self.blocks)
        return tuple(sorted(int(match[1]) for match in found if match))

    @property
    def has_x0(self) -> bool:
        """Whether rows contain the embedding, so that a worker needs none of its own."""
        return "x0" in self.blocks

    def model_blocks(self, num_rows: int) -> tuple[str, ...]:
        """Return the blocks that a model with `num_rows` rows reads, in order.

        The table may lack some of them.
        """
        return (*["x0"] * self.has_x0, *(f"ffn.{layer}" for layer in range(num_rows)))

    @property
    def auxiliary(self) -> tuple[str, ...]:
        """The auxiliary tables. They are stored and deleted with the table, and have no alias."""
        return tuple(ref for part in PARTS if (ref := getattr(self, part)))

    @property
    def dependencies(self) -> tuple[str, ...]:
        """All other tables on which its rows depend."""
        return (self.parent, *self.auxiliary) if self.parent else self.auxiliary

    @cached_property
    def record_dtype(self) -> np.dtype:
        """The type of a record: `blocks` of one size, or with ranks block0, block1 and so on."""
        sized = [(f"block{k}", self.codec.block(rank)) for k, rank in enumerate(self.ranks)]
        alike = [("blocks", self.codec.block(self.width), (self.num_blocks,))]
        return np.dtype([*(sized or alike), ("checksum", "<u8")])

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of a record, including its checksum."""
        return self.record_dtype.itemsize

    @property
    def is_edited(self) -> bool:
        """Whether an overlay changes rows of its parent, and does not only append some."""
        return len(self.changed) > self.appended

    @property
    def num_records(self) -> int:
        """Number of records that the table stores itself."""
        return len(self.changed) if self.parent else self.vocab_size

    @property
    def table_bytes(self) -> int:
        """Bytes of the records that the table stores itself."""
        return self.num_records * self.record_bytes

    # ids and shards

    def shard_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the shard of each token id [T]."""
        return ids % self.num_shards

    def shard_size(self, shard: int) -> int:
        """Return the number of records of one shard."""
        return self.num_records if self.parent else len(self._own_ids(shard))

    def shard_ids(self, shard: int, start: int = 0, end: int | None = None) -> np.ndarray:
        """Return the token ids of the records `start` to `end` of one shard, ascending."""
        if self.parent:
            return self._changed[start:end]
        ids = self._own_ids(shard)[start:end]
        return np.arange(ids.start, ids.stop, ids.step, dtype=np.uint32)

    def _own_ids(self, shard: int) -> range:
        return range(shard, self.vocab_size, self.num_shards)

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Return the index of each id's record in its shard, [T]."""
        return np.searchsorted(self._changed, ids) if self.parent else ids // self.num_shards

    def owns(self, ids: np.ndarray) -> np.ndarray:
        """Return which of `ids` [T] the table stores itself, as bool [T]."""
        return np.isin(ids, self._changed) if self.parent else np.ones(len(ids), bool)

    @cached_property
    def _changed(self) -> np.ndarray:
        return np.array(self.changed, np.uint32)

    def check_ids(self, ids: np.ndarray) -> None:
        """Raise IdOutOfRangeError if an id is not below the size of the vocabulary."""
        if ids.size and np.maximum.reduce(ids) >= self.vocab_size:
            bad = int(ids[ids >= self.vocab_size][0])
            allowed = f"allowed are 0 to {self.vocab_size - 1}"
            raise IdOutOfRangeError(f"token id {bad} is outside table {self.ref}: {allowed}")

    # records: uint8 [T, record_bytes], one per token id of `ids`

    def encode(self, ids: np.ndarray, rows: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
        """Encode float32 rows [T, N, D], or with ranks the coefficients [T, r] of each block.

        Raises InvalidArgumentError if values are not finite, or too large for the codec.
        """
        records = np.empty(len(ids), self.record_dtype)
        if self.ranks:
            for k, coefficients in enumerate(rows):
                records[f"block{k}"] = self.codec.encode(coefficients)
        else:
            rows = np.asarray(rows)
            if not (finite := np.isfinite(rows).all(axis=(1, 2))).all():
                what = f"the row of token {ids[finite.argmin()]} has values that are not finite"
                raise InvalidArgumentError(f"{what}: check the weights of the model")
            records["blocks"] = self.codec.encode(rows)
        return self.add_checksums(ids, records.view(np.uint8).reshape(len(ids), self.record_bytes))

    def add_checksums(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Set the checksums of contiguous records in place, for this version and `ids`."""
        seeded = zip(record_views(records), self.seeds(ids), strict=True)
        checksums = [xxhash.xxh3_64_intdigest(record[:-8], seed) for record, seed in seeded]
        records.view(self.record_dtype)[:, 0]["checksum"] = checksums
        return records

    def decode(self, records: np.ndarray) -> np.ndarray:
        """Decode to rows [T, N, D]: float32, or for float codecs a view of the records."""
        return self.codec.decode(records.view(self.record_dtype)[..., 0]["blocks"])

    def coefficients(self, records: np.ndarray) -> list[np.ndarray]:
        """Decode, with ranks, to the coefficients float32 [T, r] of each block."""
        fields = records.view(self.record_dtype)[..., 0]
        blocks = (np.ascontiguousarray(fields[f"block{k}"]) for k in range(len(self.ranks)))
        return [self.codec.decode(block).astype(np.float32) for block in blocks]

    def verify(self, ids: np.ndarray, records: Iterable[Buffer | str]) -> None:
        """Check that each record is intact, and belongs to this version and its token.

        A text in place of a record is the reason why the record is missing.

        Raises:
            CorruptError: With the tokens of all bad records.
        """
        reasons = zip(ids.tolist(), self.reasons(ids, records), strict=True)
        if bad := {i: why for i, why in reasons if why}:
            raise self.corrupt(bad)

    def corrupt(self, bad: dict[int, str]) -> CorruptError:
        """Return the error for bad rows, with the reason of each token."""
        first, *others = bad.values()
        more = f"; rows of {len(others)} other tokens cannot be read either" if others else ""
        return CorruptError(first + more, bad)

    def reasons(self, ids: np.ndarray, records: Iterable[Buffer | str]) -> Iterator[str]:
        """Yield for each record why it is bad, or "" if it is intact. See `verify`."""
        for i, seed, record in zip(ids.tolist(), self.seeds(ids), records, strict=True):
            if isinstance(record, str):
                yield record
                continue
            data = len(record) - 8
            found = xxhash.xxh3_64_intdigest(memoryview(record)[:data], seed)
            is_intact = found == checksum_at(record, data)[0]
            yield (
                "" if is_intact else f"the row of token {i} in table {self.ref} fails its checksum"
            )

    def seeds(self, ids: np.ndarray) -> list[int]:
        """Return the seed of each token's checksum, which depends on version and token id."""
        seeds = ids.astype(np.uint64)
        seeds *= _GOLDEN_64
        if self.parent:
            own = self.owns(ids)
            seeds[own] += self._seed
            seeds[~own] += np.uint64(int(self.parent.rpartition("@")[2], 16))
        else:
            seeds += self._seed
        return seeds.tolist()

    @cached_property
    def _seed(self) -> np.uint64:
        return np.uint64(int(self.version, 16))

    # JSON

    def to_json(self) -> str:
        """Return the manifest as JSON, with its digest."""
        fields = ((name, getattr(self, name)) for name in _FIELDS)
        data = {name: value for name, value in fields if value != _FIELDS[name]}
        data["codec"] = data.pop("codec_name")
        if required := [name for name in _REQUIRED if name in data]:
            data["requires"] = required
        data |= {**self.extra, "format": FORMAT}
        return _canonical({**data, "digest": _digest(data)}) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Read a manifest.

        Raises:
            InvalidArgumentError: The text is malformed.
            CorruptError: The digest does not match.
        """
        try:
            data: Any = json.loads(text)
            given = data.pop("digest", None) if isinstance(data, dict) else None
            own = _digest(data)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"manifest: not JSON: {error}") from None
        _require(isinstance(data, dict), "not a JSON object")
        number, required = data.pop("format", None), data.pop("requires", [])
        advice = "build the table again, and remove this one with `tolhouse tables delete`"
        advice = advice if number == 1 else "a newer format needs a newer tolhouse"
        _require(number == FORMAT, f"format {number!r:.60} is not {FORMAT}: {advice}")
        if given != own:
            raise CorruptError("manifest: the digest does not match the fields")
        _require(isinstance(required, list), f"requires must be a list, not {required!r:.60}")
        unknown = [name for name in required if name not in _REQUIRED]
        _require(
            not unknown,
            f"the table requires {unknown}, which this version does not know: upgrade tolhouse",
        )
        if "codec" in data:
            data["codec_name"] = data.pop("codec")
        extra = {name: data.pop(name) for name in data.keys() - _FIELDS.keys()}
        return cls(**data, extra=extra)


_FIELDS = {f.name: f.default for f in dataclasses.fields(Manifest) if f.name != "extra"}
_FIELDS["provenance"] = {}
_REQUIRED = ("layout", "parent", "changed", "appended", "ranks", "basis", "frequent_rows", "edits")


def record_views(records: np.ndarray) -> Iterator[memoryview]:
    """Return a view of each record in a contiguous array uint8 [T, record_bytes]."""
    size, flat = records.shape[1], memoryview(records.reshape(-1))  # type: ignore[arg-type]  # a buffer
    return (flat[at : at + size] for at in range(0, len(flat), size))


def _canonical(data: dict[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(data).encode()).hexdigest()
