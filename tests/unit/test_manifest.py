"""The manifest and the bytes of a record, on which all processes must agree."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tolhouse.errors import CorruptError, IdOutOfRangeError, InvalidArgumentError
from tolhouse.store.base import open_store
from tolhouse.store.writer import digest
from tolhouse.table.manifest import Manifest, check_name, content_id, split_ref

from tests.tables import digest_of, manifest_of, records_of


def golden(codec_name: str = "fp32", **changes: Any) -> Manifest:
    fields = {"vocab_size": 5, "blocks": ("ffn.0", "ffn.2"), "width": 3, "num_shards": 2}
    return manifest_of("golden", codec_name=codec_name, **{**fields, **changes})


def text_of(**changes: Any) -> str:
    """The JSON of a manifest with changed fields and a matching digest. None removes a field."""
    data = {**json.loads(golden().to_json()), **changes}
    data = {name: value for name, value in data.items() if value is not None}
    return json.dumps({**data, "digest": digest_of(data)})


IDS = np.array([1, 3], np.uint32)
ROWS = np.array(
    [[[0.0, -1.5, 2.0], [0.25, 3.0, -0.125]], [[1.0, 1.0, -1.0], [0.0, 0.0, 0.0]]], np.float32
)
WORDS = [
    "fp32",
    "000000000000c0bf000000400000803e00004040000000be598818cbd91b692e",
    "0000803f0000803f000080bf00000000000000000000000070b0af5283a55d9d",
    "ffdb27497ed5c97374fff80031049505",
    "fp16",
    "000000be00400034004200b07970b42685dfcec8",
    "003c003c00bc000000000000c90c8cd256b5ee05",
    "b73ecbc7bf4bcc4d8afb4127a375f728",
    "bf16",
    "0000c0bf0040803e404000beda5b3fec144d98c1",
    "803f803f80bf0000000000008b98dd1ec28e13ba",
    "15e422c0744913a9ff76cb2c9d5ccc90",
    "int8",
    "0402813c00a17f0683c13c0b7ffb7f79625029ba2fde",
    "0402013c7f7f81000000000000007479ab747b204e4b",
    "ea6e72a80bc5c113324b87caac9976be",
    "int4",
    "933eb007dc3e7100414a64b707918e8a",
    "133e77f900000000f9269f4a1a437fb7",
    "90c7081a05f2e4e7e68a27cc55c02454",
]
# by codec: the records of IDS and their digest
GOLDEN = {WORDS[n]: tuple(WORDS[n + 1 : n + 4]) for n in range(0, len(WORDS), 4)}


@pytest.mark.parametrize("codec", GOLDEN)
def test_the_bytes_of_a_record_are_fixed(codec: str) -> None:
    """A record is its blocks in order and then the checksum; any change of these bytes changes the
    format."""
    records = golden(codec).encode(IDS, ROWS)
    assert GOLDEN[codec] == (*(bytes(record).hex() for record in records), digest(records))


def test_blocks_are_found_by_name() -> None:
    """Layers and X0 are found by name, and X0 is a block with the same codec as others."""
    manifest = golden("int8", blocks=("x0", "ffn.2"))
    assert (True, (2,), 2) == (manifest.has_x0, manifest.layers, manifest.num_blocks)
    assert (False, (0, 2)) == (golden().has_x0, golden().layers)
    others = golden(blocks=("ffn.10", "expert.3.1", "x0", "ple.3", "ffn.2"))
    assert (True, (2, 10), 5) == (others.has_x0, others.layers, others.num_blocks)
    assert GOLDEN["int8"][:2] == tuple(bytes(record).hex() for record in manifest.encode(IDS, ROWS))
    assert (2, 2, 3) == manifest.decode(manifest.encode(IDS, ROWS)).shape


def test_the_checksum_is_as_documented() -> None:
    """The checksum is XXH3-64 over the blocks, seeded with version and token id, stored last in
    little-endian order."""
    record = bytes.fromhex(GOLDEN["fp32"][1])
    seed = (0x0123456789ABCDEF + 3 * 0x9E3779B97F4A7C15) % 2**64
    assert xxhash.xxh3_64_intdigest(record[:-8], seed) == int.from_bytes(record[-8:], "little")


def test_the_version_is_a_content_id() -> None:
    """The version depends on each part and on the boundaries between parts."""
    blocks = "ffn.0", "ffn.1"
    assert "856059ab85679855" == content_id("ab" * 32, "bf16", blocks)
    others = {
        content_id("ac" * 32, "bf16", blocks),
        content_id("ab" * 32, "int8", blocks),
        content_id("ab" * 32, "bf16", blocks[:1]),
        content_id("ab" * 32, "bf16", ("x0", *blocks)),
        content_id("ab" * 32 + "bf16", "", blocks),
        content_id("ab" * 32, "bf16", blocks, IDS),
        content_id("ab" * 32, "bf16", blocks, IDS[:1], IDS[1:]),
    }
    assert 7 == len(others - {"856059ab85679855"})


def test_a_shard_file_is_plain_safetensors(tmp_path: Path) -> None:
    """A shard file is a safetensors file with one uint8 tensor of records, readable by other
    libraries."""
    store, manifest = open_store(f"file://{tmp_path}"), golden()
    records = manifest.encode(IDS, ROWS)
    store.write_shard(manifest, 1, records)
    file = tmp_path / "golden" / "0123456789abcdef" / "shard-00001-of-00002.safetensors"
    (tensor,) = load_file(file).items()
    assert ("records", np.uint8) == (tensor[0], tensor[1].dtype)
    assert records.tobytes() == tensor[1].tobytes()
    assert GOLDEN_FILE == hashlib.sha256(file.read_bytes()).hexdigest()


GOLDEN_FILE = "19d14c4693f756ad213d06722b9fb0b3649e07e700a7f5b2135e27d76a85e390"

MANIFESTS = st.builds(
    golden,
    codec_name=st.sampled_from(list(GOLDEN)),
    vocab_size=st.integers(1, 400),
    width=st.integers(1, 9),
    blocks=st.lists(
        st.sampled_from(["x0", "ffn.0", "ffn.7", "ple.3", "expert.3.1"]), min_size=1, unique=True
    ).map(tuple),
    num_shards=st.integers(1, 9),
    frequent=st.sampled_from([(), (0,)]),
    version=st.integers(0, 2**64 - 1),
    extra=st.dictionaries(st.sampled_from(["note", "later"]), st.integers()),
)


@given(MANIFESTS)
def test_a_manifest_survives_json(manifest: Manifest) -> None:
    """A manifest is equal after writing and reading, with and without digests, including unknown
    fields."""
    assert manifest == Manifest.from_json(manifest.to_json())
    complete = dataclasses.replace(manifest, shards=("0" * 32,) * manifest.num_shards)
    assert complete == Manifest.from_json(complete.to_json())
    assert digest_of(json.loads(complete.to_json())) == json.loads(complete.to_json())["digest"]


def test_defaults_are_omitted_and_essential_fields_are_required() -> None:
    """A plain table's JSON has only the required fields; an overlay requires readers to understand
    its parent."""
    plain = {"blocks", "codec", "digest", "format", "model_id", "name", "num_shards"}
    plain |= {"tokenizer_id", "version", "vocab_size", "width"}
    assert plain == set(json.loads(golden().to_json()))
    overlay = golden(parent=f"golden@{'1' * 16}", changed=(2,), frequent=(1,), num_shards=1)
    data = json.loads(overlay.to_json())
    assert plain | {"parent", "changed", "frequent", "requires"} == set(data)
    assert ["parent", "changed"] == data["requires"]
    size = golden().vocab_size
    larger = dataclasses.replace(overlay, vocab_size=size + 1, changed=(2, size), appended=1)
    assert ["parent", "changed", "appended"] == json.loads(larger.to_json())["requires"]


def test_unknown_fields_are_kept_unless_required() -> None:
    """Unknown fields of later versions are kept, and those listed in `requires` are refused."""
    manifest = Manifest.from_json(text_of(later={"a": [1, 2.5]}))
    assert {"later": {"a": [1, 2.5]}} == manifest.extra
    assert {"a": [1, 2.5]} == json.loads(manifest.to_json())["later"]
    with pytest.raises(InvalidArgumentError, match=r"requires \['later'\].*upgrade"):
        Manifest.from_json(text_of(later=1, requires=["parent", "later"]))


@given(MANIFESTS, st.data())
def test_any_altered_field_is_found(manifest: Manifest, data: st.DataObject) -> None:
    """A changed, added or removed field does not match the digest."""
    fields = json.loads(manifest.to_json())
    name = data.draw(st.sampled_from([*fields, "edits", "surplus"]))
    values = st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=3) | st.just([0])
    value = data.draw(values)
    altered = {**fields, name: value}
    if data.draw(st.booleans()):
        altered.pop(name)
    if altered != fields:
        with pytest.raises((CorruptError, InvalidArgumentError), match="manifest"):
            Manifest.from_json(json.dumps(altered))


@given(MANIFESTS)
def test_shards_divide_the_vocabulary(manifest: Manifest) -> None:
    """Each token is in the shard that shard_of names, at the index id // shards."""
    parts = [manifest.shard_ids(shard) for shard in range(manifest.num_shards)]
    assert list(range(manifest.vocab_size)) == sorted(np.concatenate(parts).tolist())
    for shard, ids in enumerate(parts):
        assert (manifest.shard_of(ids) == shard).all()
        assert list(range(len(ids))) == (ids // manifest.num_shards).tolist()


@given(MANIFESTS, st.data())
def test_any_altered_byte_is_found(manifest: Manifest, data: st.DataObject) -> None:
    """A record with a changed byte, or of another token or version, does not match its checksum."""
    ids = np.array([data.draw(st.integers(0, manifest.vocab_size - 1))], np.uint32)
    records = records_of(manifest, ids)
    manifest.verify(ids, records)
    altered = records.copy()
    place = data.draw(st.integers(0, manifest.record_bytes - 1))
    altered[0, place] ^= data.draw(st.integers(1, 255))
    other = dataclasses.replace(manifest, version=f"{int(manifest.version, 16) ^ 1:016x}")
    for wrong_manifest, wrong_ids, wrong in (
        (manifest, ids, altered),
        (manifest, ids + np.uint32(1), records),
        (other, ids, records),
    ):
        with pytest.raises(CorruptError, match=f"token {wrong_ids[0]} "):
            wrong_manifest.verify(wrong_ids, wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("format", bad) for bad in (3, "2", True, 2.5, [])),
        ("name", 7),
        ("version", "xyz"),
        *(("vocab_size", bad) for bad in (0, 2.0, True, "5")),
        *(("width", bad) for bad in (-1, 2**20 + 1, 2**20)),  # no message could carry such a record
        ("num_shards", 65_537),
        *(("blocks", bad) for bad in ([], ["x0", "x0"], ["ffn.0", "x0", "ffn.0"], ["ffn.-1"])),
        *(("blocks", bad) for bad in (["ffn."], ["ffn.01"], ["ffn.1.x"], "01", [1], {"x0": 1})),
        ("layout", "records"),
        ("tokenizer_id", 1),
        *(("shards", bad) for bad in (["a"], [1, 2], ["zz", "z" * 32], {"a": 1}, ["0" * 32])),
        *(("frequent", bad) for bad in ([5], [-1], [1, 1], [True], [1.0], [[1]], "1", {"1": 1})),
        *(("changed", bad) for bad in ([1, 0], [5], [1])),  # [1] lacks a parent
        ("ranks", [1, 1]),
        *(("frequent_rows", f"{bad}@{'1' * 16}") for bad in ("golden", "other.frequent_rows")),
        ("requires", "parent"),
        *((field, None) for field in ("name", "version", "blocks", "width", "model_id")),
    ],
)
def test_a_malformed_manifest_is_refused(field: str, value: object) -> None:
    """The error names the wrong or missing field, also if only its type is wrong."""
    other = {"width": "bytes a record", "shards": "digests"}.get(field, field)
    with pytest.raises(InvalidArgumentError, match=f"manifest: .*({field}|{other})"):
        Manifest.from_json(text_of(**{field: value}))


@pytest.mark.parametrize(("field", "value"), [("name", "a/b"), ("codec", "int3"), ("parent", "t")])
def test_errors_state_the_allowed_values(field: str, value: str) -> None:
    """Errors for names, codecs and references state what is allowed."""
    with pytest.raises(
        InvalidArgumentError, match=r"letters, digits|one of fp32|parent: .*pattern"
    ):
        Manifest.from_json(text_of(**{field: value}))


def test_a_table_of_format_1_is_refused_with_advice() -> None:
    """The error for a table of format 1 says to build it again and to delete the old one."""
    with pytest.raises(
        InvalidArgumentError, match=r"build the table again.*`tolhouse tables delete`"
    ):
        Manifest.from_json(json.dumps({"format": 1, "layers": [0], "hidden_size": 3}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", b"\xff\xfe", "[" * 100_000])
def test_text_that_is_not_a_manifest_is_refused(text: str | bytes) -> None:
    """Text that is not JSON, not an object, lacks fields, or is nested too deeply is refused."""
    with pytest.raises(InvalidArgumentError, match="manifest"):
        Manifest.from_json(text)


def test_ids_outside_the_vocabulary_are_named() -> None:
    """The error names the first id beyond the vocabulary and the allowed range."""
    golden().check_ids(np.array([0, 4], np.uint32))
    with pytest.raises(IdOutOfRangeError, match=r"token id 5 .* allowed are 0 to 4"):
        golden().check_ids(np.array([0, 5, 9], np.uint32))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "-a", "a b", "a" * 65, "a\n", "ä", "a:b", "a{b}", "a@b"]
)
def test_unsafe_names_are_refused(name: str) -> None:
    """Names that are unsafe as a folder or in a Redis key are refused."""
    with pytest.raises(InvalidArgumentError, match="letters, digits"):
        check_name(name)


def test_a_reference_is_a_name_with_an_optional_version() -> None:
    """A reference is a name or name@version; anything else is refused."""
    assert ("a", None) == split_ref("a")
    assert ("a", "0123456789abcdef") == split_ref("a@0123456789abcdef")
    for bad in ("a@", "a@0123", "a@0123456789ABCDEF", "a@0123456789abcdef@", "@0123456789abcdef"):
        with pytest.raises(InvalidArgumentError):
            split_ref(bad)


def test_a_record_stores_its_blocks_contiguously() -> None:
    """A record is block after block, scale before codes, and eight bytes of checksum, without
    padding."""
    manifest = golden("int8")
    (record,) = manifest.encode(IDS[:1], ROWS[:1])
    blocks = [manifest.codec.encode(layer).tobytes() for layer in ROWS[0]]
    assert [4 + 3, 4 + 3] == [len(block) for block in blocks]
    assert b"".join(blocks) == record[:-8].tobytes()
    assert 2 * 7 + 8 == manifest.record_bytes == len(record)


def test_a_record_may_be_as_large_as_a_message_allows() -> None:
    """A record may have up to 3 MiB including its checksum."""
    size = (3 * 2**20 - 8) // 4
    assert 3 * 2**20 == golden(blocks=("ffn.0",), width=size).record_bytes
    with pytest.raises(
        InvalidArgumentError, match="1 blocks of 786431 values exceed 3145728 bytes"
    ):
        golden(blocks=("ffn.0",), width=size + 1)
