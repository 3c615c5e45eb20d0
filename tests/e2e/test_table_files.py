"""Versions in files at the command line: export, import, archive, restore."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis
from redis.cluster import RedisCluster
from safetensors import safe_open
from safetensors.numpy import save_file
from tolhouse.errors import CorruptError, InUseError
from tolhouse.store.base import open_store
from tolhouse.store.table_file import TableFile, archive, export
from tolhouse.store.writer import write_table
from tolhouse.testing import build_table

from tests.e2e.test_tables import Store, log, states, tolhouse
from tests.interleaving import finish
from tests.tables import digest_of, manifest_of, records_of, write


def rows_of(url: str, ref: str) -> bytes:
    """The records of all tokens of a version."""
    with closing(open_store(url)) as store:
        manifest = store.manifest(ref)
        ids = np.arange(manifest.vocab_size, dtype=np.uint32)
        return store.read_records(manifest, ids).tobytes()


@pytest.fixture
def exported(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """A version, the URL of its store, and its exported file."""
    url, file = f"file://{tmp_path}/tables", tmp_path / "t.safetensors"
    ref = build_table(checkpoint, url, name="t", codec="int8", publish=False)
    tolhouse("tables", "export", ref, file, "--store", url)
    return ref, url, file


def test_a_version_moves_to_another_installation(
    exported: tuple[str, str, Path], store_url: str, tmp_path: Path
) -> None:
    """An exported version is imported into each kind of store with identical bytes, manifest and
    history."""
    ref, url, file = exported
    there = "--store", store_url if store_url.startswith("redis") else f"file://{tmp_path}/there"
    assert ref == tolhouse("tables", "import", file, "--note", "from the lab", *there).strip()
    assert rows_of(url, ref) == rows_of(there[1], ref)
    own, other = (
        json.loads(tolhouse("tables", "show", ref, "--store", u)) for u in (url, there[1])
    )
    about = {"layout", "requires", "digest"}  # of the store
    assert {k: own[k] for k in own.keys() - about} == {k: other[k] for k in other.keys() - about}
    entry = log(there, ref)[-1]
    assert ("imported", "from the lab") == (entry["event"], entry["note"])
    assert log(("--store", url), ref) == entry["history"]
    before = len(log(there, ref))
    tolhouse("tables", "import", file, *there)  # changes nothing
    assert before == len(log(there, ref))
    tolhouse("tables", "delete", ref, *there)


def test_the_file_is_a_safetensors_file(exported: tuple[str, str, Path]) -> None:
    """The safetensors library reads the manifest and the records of each shard."""
    ref, url, file = exported
    with safe_open(file, "np") as opened:
        (text,) = json.loads(opened.metadata()["manifests"])
        assert ref == f"{json.loads(text)['name']}@{json.loads(text)['version']}"
        with closing(open_store(url)) as store:
            manifest = store.manifest(ref)
            for shard in range(manifest.num_shards):
                records = store.read_records(manifest, manifest.shard_ids(shard))
                assert records.tobytes() == opened.get_tensor(f"{ref}/{shard}").tobytes()


def _foreign(file: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, file)


def _edited(old: bytes, new: bytes) -> Callable[[Path], object]:
    def edit(file: Path) -> None:
        data = file.read_bytes()
        assert data.count(old) >= 1
        file.write_bytes(data.replace(old, new, 1))

    return edit


def _flip(at: int) -> Callable[[Path], object]:
    def edit(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)

    return edit


def _rewritten(fields: dict[str, Any], log: str = "[]") -> Callable[[Path], object]:
    """Returns a function that writes a file again with other fields of its last manifest."""

    def edit(file: Path) -> None:
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        about = header["__metadata__"]
        *parts, last = json.loads(about["manifests"])
        own = {**json.loads(last), **fields}
        own["digest"] = digest_of(own)
        about |= {"manifests": json.dumps([*parts, json.dumps(own)]), "log": log}
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return edit


OTHER = f"other@{'1' * 16}"
OVER_OTHER = {"parent": OTHER, "changed": [1], "requires": ["parent", "changed"], "num_shards": 1}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_rewritten({**OVER_OTHER, "shards": []}), "parent other"),
        (
            _rewritten({**OVER_OTHER, "shards": [], "parent": f"t@{'1' * 16}", "edits": OTHER}),
            "edits other",
        ),
        (
            _rewritten({"frequent_rows": OTHER, "requires": ["frequent_rows"]}),
            "frequent_rows other",
        ),
        (
            _rewritten({"basis": OTHER, "ranks": [1] * 4, "requires": ["basis", "ranks"]}),
            "basis other",
        ),
        (_rewritten({"shards": []}), "has no digests"),
        (_rewritten({}, log=f"[{'1' * 5000}]"), "the header is damaged"),
        (_rewritten({}, log='[{"event": "verified"}]'), "not an entry of a log"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is truncated"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "ends within its header"),
        (lambda file: file.write_bytes(file.read_bytes()[:5]), "is not a table exported"),
        (lambda file: file.write_bytes(b""), "is not a table exported"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "is damaged"),
        (_flip(-1), "is damaged: the row of token"),
        (_flip(-30), "is damaged: the row of token"),
        (_edited(b"vocab_size", b"vocab_sizE"), "digest does not match"),
        (_edited(b'"dtype":"U8"', b'"dtype":"I8"'), "do not fit together"),
        (_edited(b"tolhouse-table-1", b"tolhouse-table-9"), "needs a newer tolhouse"),
        (_foreign, "is not a table exported"),
        (lambda file: file.write_bytes(b"a,b\n1,2\n"), "is not a table exported"),
        (lambda file: file.unlink(), "there is no file"),
    ],
    ids=[
        "parent",
        "edits",
        "frequent rows",
        "basis",
        "no digests",
        "number in the log",
        "entry of the log",
        "end",
        "header",
        "prefix",
        "empty",
        "longer",
        "checksum",
        "record",
        "manifest",
        "tensor",
        "newer",
        "foreign",
        "text",
        "none",
    ],
)
def test_a_bad_file_is_refused(
    damage: Callable[[Path], object],
    message: str,
    exported: tuple[str, str, Path],
    tmp_path: Path,
) -> None:
    """A damaged, truncated or foreign file is refused with the reason, and nothing is written."""
    _, _, file = exported
    damage(file)
    url = f"file://{tmp_path}/there"
    error = tolhouse("tables", "import", file, "--store", url, code=1)
    assert message in error
    assert str(file) in error
    assert {} == states(("--store", url), "t", "--all")


def test_a_version_without_digests_is_not_exported(tmp_path: Path) -> None:
    """A version without digests of its shards is not exported, because no reader could check it."""
    with closing(open_store(f"file://{tmp_path}/tables")) as store:
        ref = write(store, manifest_of()).ref
        to = tmp_path / "file", "--store", store.url
        assert "has no digests" in tolhouse("tables", "export", ref, *to, code=1)


def test_a_file_that_claims_many_rows_takes_no_memory_for_them(
    exported: tuple[str, str, Path],
) -> None:
    """A small file whose manifest claims many rows is refused before memory for them is taken."""
    _, _, file = exported
    claimed = {"vocab_size": 1 << 26, "num_shards": 1, "shards": ["0" * 32]}
    _rewritten(claimed)(file)
    tracemalloc.start()
    with pytest.raises(CorruptError, match="do not fit together"):
        TableFile(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 26


def test_empty_shards_travel(tmp_path: Path) -> None:
    """A version with more shards than rows is exported and imported."""
    here, there = (f"file://{tmp_path}/{name}" for name in ("here", "there"))
    with closing(open_store(here)) as store:
        manifest = manifest_of(num_shards=51)
        finish(store, manifest)
        export(store, manifest.ref, tmp_path / "file")
    tolhouse("tables", "import", tmp_path / "file", "--store", there)
    assert rows_of(here, manifest.ref) == rows_of(there, manifest.ref)


def test_a_file_with_another_hash_is_refused(
    exported: tuple[str, str, Path], tmp_path: Path
) -> None:
    """`import --sha256` takes only the file with the hash that `export` prints."""
    ref, url, file = exported
    words = tolhouse("tables", "export", ref, tmp_path / "again", "--store", url).split()
    there = "--store", f"file://{tmp_path}/there"
    wrong = "0" * 64
    assert "was altered" in tolhouse("tables", "import", file, "--sha256", wrong, *there, code=1)
    tolhouse("tables", "import", tmp_path / "again", "--sha256", words[-1], *there)
    assert "exists" in tolhouse("tables", "export", ref, file, "--store", url, code=1)


def test_parts_travel_with_a_version(checkpoint: Path, tmp_path: Path) -> None:
    """A compressed table has its basis and its frequent rows in the file, and an overlay needs its
    parent."""
    here, there = (("--store", f"file://{tmp_path}/{name}") for name in ("here", "there"))
    small = ("--rank-share", "0.5", "--frequent-rows", "20", "--codec", "int4", "--name", "t")
    text = tmp_path / "sample.txt"
    text.write_text("def add(a, b): return a + b\n" * 9, encoding="utf-8")
    ref = tolhouse("compress", checkpoint, *small, "--corpus", text, *here).strip()
    over = tolhouse("overlay", ref, "--copy", "3=5", *here).strip()
    for name, version in (("ref", ref), ("over", over)):
        tolhouse("tables", "export", version, tmp_path / name, *here)
    refused = tolhouse("tables", "import", tmp_path / "over", *there, code=1)
    assert f"needs {ref}" in refused
    for name in ("ref", "over"):
        tolhouse("tables", "import", tmp_path / name, *there)
    for version in (ref, over):
        with closing(open_store(here[1])) as one, closing(open_store(there[1])) as other:
            manifest, ids = one.manifest(version), np.arange(300, dtype=np.uint32)
            assert manifest == other.manifest(version)
            assert one.rows(manifest, ids).tobytes() == other.rows(manifest, ids).tobytes()


def redis_of(url: str, kind: str) -> Redis | RedisCluster:
    client = RedisCluster if kind.startswith("cluster") else Redis
    return client.from_url(url.partition("?")[0])


def test_archive_and_restore(
    checkpoint: Path, store_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """An archived version leaves the store, and is restored with identical bytes."""
    store: Store = ("--store", store_url)
    kind, archives = request.node.callspec.id, tmp_path / "archives"
    name = f"archived-{kind}"  # other tests use the same server
    ref, published = (
        build_table(checkpoint, store_url, codec=codec, name=name, publish=codec == "bf16")
        for codec in ("int8", "bf16")
    )
    to = ("--to", archives)
    assert "is published" in tolhouse("tables", "archive", published, *to, *store, code=1)
    with closing(open_store(store_url)) as opened:
        opened.lease(ref)
        assert "is in use" in tolhouse("tables", "archive", ref, *to, *store, code=1)
    assert not archives.exists()
    if kind != "file":  # a lease on a file ends with its process
        with closing(redis_of(store_url, kind)) as redis:
            redis.delete(f"tolhouse:{{registry}}:lease:{ref}")
    before = rows_of(store_url, ref)
    tolhouse("tables", "archive", ref, *to, "--note", "rarely used", *store)
    assert {ref: "archived", published: "published"} == states(store, name)
    if kind != "file":
        with closing(redis_of(store_url, kind)) as redis:
            assert [] == [*redis.scan_iter(match=f"tolhouse:{{{ref}[:}}]*")]
    (file,) = archives.iterdir()
    assert str(file) in tolhouse("tables", "list", *store)
    tolhouse("tables", "restore", ref, *store)
    assert {ref: "verified", published: "published"} == states(store, name)
    assert before == rows_of(store_url, ref)
    events = [entry["event"] for entry in log(store, ref)]
    assert ["verified", "archived", "building", "restored"] == events
    tolhouse("tables", "delete", ref, *store)


def test_an_altered_archive_is_not_restored(checkpoint: Path, tmp_path: Path) -> None:
    """`restore` requires the file that the log names, and takes a moved one with the same hash."""
    store = ("--store", f"file://{tmp_path}/tables")
    refs = [
        build_table(checkpoint, store[1], name=name, publish=False, codec="int8")
        for name in ("a", "b")
    ]
    for ref in refs:
        tolhouse("tables", "archive", ref, "--to", tmp_path / "archives", *store)
    first, second = (tmp_path / "archives" / f"{ref}.safetensors" for ref in refs)
    moved = first.rename(tmp_path / "moved")
    assert "there is no file" in tolhouse("tables", "restore", refs[0], *store, code=1)
    other = tolhouse("tables", "restore", refs[0], "--from", second, *store, code=1)
    assert f"has table {refs[1]}" in other
    _edited(b"builder", b"bUilder")(second)
    assert "digest does not match" in tolhouse("tables", "restore", refs[1], *store, code=1)
    tolhouse("tables", "restore", refs[0], "--from", moved, *store)
    assert {refs[0]: "verified"} == states(store, "a")
    elsewhere = "--from", moved, "--store", f"file://{tmp_path}/elsewhere"
    for words in ((f"c@{'0' * 16}", *store), (refs[0], *elsewhere)):
        assert "tables import" in tolhouse("tables", "restore", *words, code=1)


def test_the_log_grows_by_the_same_lines_with_each_archive(
    checkpoint: Path, tmp_path: Path
) -> None:
    """An archive and a restoration add no copies of earlier entries to the log, and an imported
    history has no histories of its own."""
    store, there = (("--store", f"file://{tmp_path}/{name}") for name in ("tables", "there"))
    ref, sizes = build_table(checkpoint, store[1], name="t", publish=False), list[int]()
    for _ in range(3):
        before = len(json.dumps(log(store, ref)))
        tolhouse("tables", "archive", ref, "--to", tmp_path / f"archive{len(sizes)}", *store)
        tolhouse("tables", "restore", ref, *store)
        sizes.append(len(json.dumps(log(store, ref))) - before)
    assert 1 == len({*sizes})
    tolhouse("tables", "export", ref, tmp_path / "first", *store)
    tolhouse("tables", "import", tmp_path / "first", *there)
    tolhouse("tables", "export", ref, tmp_path / "second", *there)
    tolhouse("tables", "delete", ref, *store)
    tolhouse("tables", "import", tmp_path / "second", *store)
    history = log(store, ref)[-1]["history"]
    assert "imported" == history[-1]["event"]
    assert not any("history" in entry for entry in history)


@pytest.mark.parametrize(
    ("method", "calls"), [("delete_records", 0), ("_append", 0), ("_append", 1)]
)
def test_an_interrupted_archive_is_completed(
    checkpoint: Path, tmp_path: Path, method: str, calls: int
) -> None:
    """An archive that was killed while it removed rows or wrote the log is completed when it is
    started again, with the auxiliary tables, and the version can be restored."""
    store, to = ("--store", f"file://{tmp_path}/tables"), ("--to", tmp_path / "archives")
    small = ("--frequent-rows", "20", "--codec", "int4", "--name", "t")
    text = tmp_path / "sample.txt"
    text.write_text("def add(a, b): return a + b\n" * 9, encoding="utf-8")
    ref = tolhouse("compress", checkpoint, *small, "--corpus", text, *store).strip()
    before = rows_of(store[1], ref)
    with closing(open_store(store[1])) as opened:
        setattr(opened, method, _killed_after(calls, getattr(opened, method)))
        with pytest.raises(KeyboardInterrupt):
            archive(opened, ref, to[1])
    tolhouse("tables", "archive", ref, *to, *store)
    with closing(open_store(store[1])) as opened:
        part = TableFile(to[1] / f"{ref}.safetensors").manifests[0].ref
        assert not any(opened.is_being_deleted(one) for one in (ref, part))
    tolhouse("tables", "restore", ref, *store)
    assert before == rows_of(store[1], ref)
    for one in (ref, part):
        events = [entry["event"] for entry in log(store, one)]
        assert ["archived", "building", "restored"] == events[-3:]
        assert 1 == events.count("archived")


def _killed_after(calls: int, method: Callable[..., Any]) -> Callable[..., Any]:
    left = iter(range(calls))

    def call(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return method(*arguments)

    return call


def test_an_existing_archive_must_have_all_parts(tmp_path: Path) -> None:
    """An existing file in the folder of archives is refused if one of its parts differs from that
    in the store."""
    part = manifest_of("t.frequent_rows", 5)
    whole = manifest_of("t", 6, frequent_rows=part.ref, frequent=(1,))
    with closing(open_store(f"file://{tmp_path}/other")) as store:
        for manifest in (replace(part, model_id="2" * 64), whole):
            finish(store, manifest)
        export(store, whole.ref, tmp_path / f"{whole.ref}.safetensors")
    with closing(open_store(f"file://{tmp_path}/tables")) as store:
        for manifest in (part, whole):
            finish(store, manifest)
        with pytest.raises(InUseError, match="exists, with another table"):
            archive(store, whole.ref, tmp_path)
        assert {part.ref, whole.ref} == {*store.refs()}


def test_memory_is_bounded_by_chunks(tmp_path: Path) -> None:
    """Export and verification of a large shard hold a chunk of it in memory."""
    fields = {"codec_name": "fp32", "width": 1024, "blocks": tuple(f"ffn.{n}" for n in range(24))}
    manifest = manifest_of("large", 1, vocab_size=1000, num_shards=1, **fields)
    with closing(open_store(f"file://{tmp_path}/tables")) as store:
        made = write_table([store], manifest, lambda _: records_of(manifest))
        tracemalloc.start()
        export(store, made.ref, tmp_path / "file")
        TableFile(tmp_path / "file").verify()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < made.table_bytes / 2
