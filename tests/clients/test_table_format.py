"""docs/table-format.md: its examples are correct, and a client written from it reads tables."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import xxhash
from redis import Redis
from tolhouse import Client, Manifest
from tolhouse.build.compress import Scheme, compress
from tolhouse.store.base import open_store
from tolhouse.store.overlay import make_overlay
from tolhouse.store.registry import publish
from tolhouse.store.writer import write_table

from tests.tables import ids, manifest_of, records_of

FOLDER = Path(__file__).parent / "table_format"
PAGE = (FOLDER.parent.parent.parent / "docs" / "table-format.md").read_text(encoding="utf-8")
CODECS = "fp32", "fp16", "bf16", "int8", "int4"
# values of token 3 in the page's examples
VALUES = [[0.0, -1.5, 2.0, 0.25, 3.0], [1.0, 1.0, -1.0, 0.5, -0.125]]

with_node = pytest.mark.skipif(not shutil.which("node"), reason="Node is not installed")


def cells(row: str) -> list[str]:
    """Return the cells of the only table row of the page that matches `row`."""
    (found,) = (line for line in PAGE.splitlines() if re.match(row, line))
    return [cell.strip() for cell in found.strip("|").split("|")]


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.replace("−", "-").split(",")]


def node(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["node", str(FOLDER / "reader.mjs"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")


def read(root: Path, ref: str, wanted: np.ndarray) -> np.ndarray:
    """Return rows as the Node client reads them; float32 [T, N, D]."""
    run = node(str(root), ref, *map(str, wanted.tolist()))
    assert not run.returncode, run.stderr
    return np.array(json.loads(run.stdout)["rows"], np.float32)


@pytest.mark.parametrize("codec", CODECS)
def test_the_example_records_are_correct(codec: str) -> None:
    """Each example record equals the encoded record, and decodes to the stated values."""
    _, size, *parts = cells(rf"\| `{codec}` \| \d+ \|")
    stated = bytes.fromhex("".join(re.findall(r"[0-9a-f]+", " ".join(parts))))
    example = manifest_of("example", codec_name=codec, vocab_size=4, width=5, num_shards=2)
    records = example.encode(ids(3), np.array([VALUES], np.float32))
    assert (int(size), records.tobytes()) == (len(stated), stated)
    decoded = example.decode(records)[0].astype(np.float32)
    if codec in ("int8", "int4"):
        wanted = [numbers(cell) for cell in cells(rf"\| `{codec}` \| 0, ")[1:]]
    else:
        wanted = VALUES
    np.testing.assert_allclose(decoded, wanted, rtol=1e-6)


def test_the_example_manifest_is_correct() -> None:
    """The example manifest is unchanged after a read and a write."""
    (text,) = re.findall(r'```json title="manifest.json"\n(.*\n)```', PAGE)
    assert text == Manifest.from_json(text).to_json()


def test_the_page_lists_every_field_of_the_manifest() -> None:
    """The page's table of fields equals the manifest's fields."""
    table = PAGE.partition("### Fields")[2].partition("### Digest")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(Manifest)} - {"extra", "codec_name"}
    assert fields | {"codec", "format", "digest", "requires"} == listed


def vectors() -> list[tuple[bytes, int, str]]:
    """Return input, seed and hash of each test vector of the page."""
    found = []
    for line in re.findall(r"^\| (?:empty|`abc`|`bytes).*$", PAGE, re.MULTILINE):
        shown, seed, result = (cell.strip(" `") for cell in line.strip("|").split("|"))
        size = int("".join(re.findall(r"\d", shown)) or 0)
        data = b"abc" if shown.startswith("abc") else bytes(i % 251 for i in range(size))
        found.append((data, int(seed, 16), result))
    return found


def test_the_test_vectors_are_correct() -> None:
    """The page's XXH3-64 test vectors equal the library's hashes."""
    assert 6 == len(vectors())
    for data, seed, result in vectors():
        assert result == xxhash.xxh3_64_hexdigest(data, seed)


def test_redis_has_the_documented_keys(redis_url: str) -> None:
    """A table in Redis has the keys, fields and values that the page lists."""
    store, redis = open_store(redis_url), Redis.from_url(redis_url)
    planned = manifest_of("in-redis")
    made = write_table([store], planned, lambda k: records_of(planned, planned.shard_ids(k)))
    publish(store, made.ref)
    key = f"tolhouse:{{{made.ref}:shards-3:1}}"
    assert records_of(planned, ids(7)).tobytes() == redis.hget(key, "7")
    assert {str(i).encode() for i in range(1, 50, 3)} == set(redis.hkeys(key))
    assert made.to_json().encode() == redis.hget("tolhouse:{registry}:manifest", made.ref)
    alias = json.loads(redis.hget("tolhouse:{registry}:alias", "in-redis"))
    assert {"version": made.version, "history": []} == alias
    store.lease(made.ref)
    assert 0 < redis.pttl(f"tolhouse:{{registry}}:lease:{made.ref}") <= 30_000
    redis.close()
    store.close()


@with_node
def test_the_node_client_computes_the_documented_hashes() -> None:
    """The Node client's XXH3-64 gives the page's hash for inputs of each length class."""
    for data, seed, result in vectors():
        assert result == node("--hash", f"{seed:x}", data.hex()).stdout.strip()


@with_node
@pytest.mark.parametrize("codec", CODECS)
def test_the_node_client_reads_a_table_as_the_sdk_does(tmp_path: Path, codec: str) -> None:
    """The Node client reads the same bits as the SDK, also for a partial group of int4."""
    store = open_store(f"file://{tmp_path}")
    planned = manifest_of(codec_name=codec, width=71)
    made = write_table([store], planned, lambda k: records_of(planned, planned.shard_ids(k)))
    publish(store, made.ref)
    wanted = ids(0, 49, 7, 7, 31)
    with Client(store.url) as client:
        rows = client.fetch("t", wanted).astype(np.float32)
    assert rows.tobytes() == read(tmp_path, "t", wanted).tobytes()
    assert rows.tobytes() == read(tmp_path, made.ref, wanted).tobytes()


@with_node
def test_the_node_client_reads_overlays(tmp_path: Path) -> None:
    """The Node client reads edited rows from the overlay, and other rows from its parent."""
    store = open_store(f"file://{tmp_path}")
    planned = manifest_of(width=40)
    made = write_table([store], planned, lambda k: records_of(planned, planned.shard_ids(k)))
    edited = np.random.default_rng(0).standard_normal((2, 2, 40)).astype(np.float32)
    overlay = make_overlay(store, made.ref, ids(9, 4), edited)
    with Client(store.url) as client:
        rows = client.fetch(overlay.ref, ids(4, 5, 9))
    assert rows.tobytes() == read(tmp_path, overlay.ref, ids(4, 5, 9)).tobytes()


@with_node
def test_the_node_client_reads_compressed_tables(tmp_path: Path) -> None:
    """The Node client reads low-rank, frequent and edited rows, apart from rounding."""
    store = open_store(f"file://{tmp_path}")
    rows = np.random.default_rng(1).standard_normal((50, 2, 40)).astype(np.float32)
    scheme = Scheme("int4", rank=0.5, frequent=3)
    compressed = compress(manifest_of(width=40), rows, {7: 9, 8: 5, 9: 2}, scheme)
    made = compressed.store(store)
    assert made.basis
    assert made.frequent_rows
    overlay = make_overlay(store, made.ref, ids(9, 30), rows[:2])
    assert overlay.edits
    wanted = ids(0, 7, 9, 30, 49)
    for ref in (made.ref, overlay.ref):
        with Client(store.url) as client:
            fetched = client.fetch(ref, wanted)
        np.testing.assert_allclose(fetched, read(tmp_path, ref, wanted), atol=1e-5)


@with_node
def test_the_node_client_detects_alterations(tmp_path: Path) -> None:
    """The Node client detects an altered record by its checksum, and a manifest by its digest."""
    store = open_store(f"file://{tmp_path}")
    planned = manifest_of(num_shards=1)
    made = write_table([store], planned, lambda k: records_of(planned, planned.shard_ids(k)))
    folder = tmp_path / "t" / made.version
    (shard,) = folder.glob("shard-*")
    altered = bytearray(shard.read_bytes())
    altered[-9] ^= 1  # the last value of token 49
    shard.write_bytes(altered)
    assert "record 49 fails its checksum" in node(str(tmp_path), made.ref, "49").stderr
    assert not node(str(tmp_path), made.ref, "48").returncode
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    (folder / "manifest.json").write_text(text.replace('"width":6', '"width":7'), encoding="utf-8")
    assert "wrong digest" in node(str(tmp_path), made.ref, "48").stderr
