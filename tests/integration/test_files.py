"""Damaged shard files give correct rows or a CorruptError, and repaired files are served again."""

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tolhouse.errors import CorruptError, InUseError, NotFoundError, UnavailableError
from tolhouse.store.files import FileStore
from tolhouse.store.registry import delete, publish, resolve, rollback
from tolhouse.store.writer import shard_digest
from tolhouse.table.manifest import Manifest
from tolhouse.testing import wait_until

from tests.tables import assert_holds, manifest_of, read, records_of, write

IDS = np.arange(10, dtype=np.uint32)


def table(**fields: object) -> Manifest:
    return manifest_of(**{"vocab_size": 10, "num_shards": 2, **fields})


def write_files(root: Path, manifest: Manifest) -> list[Path]:
    """The shard files of a table in the folder `root`."""
    with closing(FileStore(root)) as store:
        write(store, manifest)
    return sorted((root / "t" / manifest.version).glob("shard-*"))


EXPECTED = records_of(table()).tobytes()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_files(tmp_path, table())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    with closing(FileStore(tmp_path)) as opened:
        yield opened


def altered(path: Path) -> None:
    *rest, last = path.read_bytes()
    path.write_bytes(bytes((*rest, last ^ 1)))


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


SHARD = "shard-00001-of-00002.safetensors"
NO_SHARD = f"{SHARD} is truncated, or does not have records of 28 bytes"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, f"{SHARD} is missing"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), NO_SHARD),
    "cut within the header": (lambda path: path.write_bytes(path.read_bytes()[:20]), NO_SHARD),
    "emptied": (lambda path: path.write_bytes(b""), NO_SHARD),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), NO_SHARD),
    "text": (lambda path: path.write_text("x" * 500, encoding="utf-8"), NO_SHARD),
    "lists": (lambda path: path.write_bytes(framed(b"[]")), NO_SHARD),
    "altered": (altered, r"row of token 9 in table t@0123456789abcdef fails its checksum"),
    "another shard": (
        lambda path: path.write_bytes(path.with_name(SHARD.replace("1-of", "0-of")).read_bytes()),
        "row of token 1 ",
    ),
}


# deleted and truncated files in use have tests of their own below
IN_USE = ("longer", "text", "altered", "another shard")


@pytest.mark.parametrize(
    ("damage", "in_use"), [*((d, False) for d in DAMAGE), *((d, True) for d in IN_USE)]
)
def test_damage_is_named_and_repaired_files_are_served(
    store: FileStore, shards: list[Path], damage: str, in_use: bool
) -> None:
    """A damaged shard raises CorruptError, the other shard is served, and so is the repaired
    file."""
    manifest, whole = table(), shards[1].read_bytes()
    if in_use:
        assert_holds(store, manifest)
    make, message = DAMAGE[damage]
    make(shards[1])
    with pytest.raises(CorruptError, match=message if not in_use else "token|while in use"):
        read(store, manifest)
    assert shard_digest(store, manifest, 1) is None
    assert_holds(store, manifest, IDS[::2])
    shards[1].write_bytes(whole)
    assert_holds(store, manifest)


def test_scattered_rows_read_little_else_from_the_device(tmp_path: Path) -> None:
    """Beside rows in the page cache, others are read from the device without their neighbours."""
    manifest = table(vocab_size=600, width=12_288)
    order = np.random.default_rng(0).permutation(600).astype(np.uint32)
    cached, alone, together = np.split(order, (150, 250))

    def device_bytes() -> int:
        text = Path("/proc/self/io").read_text(encoding="utf-8")
        return int(re.search(r"^read_bytes: (\d+)", text, re.MULTILINE)[1])

    shards = write_files(tmp_path, manifest)
    with closing(FileStore(tmp_path)) as store:
        for path in shards:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read(store, manifest, cached)
        for parts in (np.split(alone, len(alone)), np.split(together, 10)):
            before, rows = device_bytes(), sum(map(len, parts))
            for ids in parts:
                read(store, manifest, ids)
            assert device_bytes() - before <= 1.25 * rows * manifest.record_bytes


def test_a_missing_file_among_many_costs_only_its_own_rows(tmp_path: Path) -> None:
    """A request for rows of 60 shards, one of which is missing, reads the rows of all others."""
    manifest = table(vocab_size=180, num_shards=60)
    shards = write_files(tmp_path, manifest)
    ids = np.arange(0, 180, dtype=np.uint32)[::-1].copy()
    with closing(FileStore(tmp_path, open_files=2)) as store:
        assert_holds(store, manifest, ids)
        shards[31].unlink()
    with closing(FileStore(tmp_path, open_files=2)) as store:
        out = np.zeros((180, manifest.record_bytes), np.uint8)
        with pytest.raises(CorruptError, match=r"00031-of-00060\.safetensors is missing") as caught:
            store.read_records(manifest, ids, out)
        assert {31, 91, 151} == set(caught.value.token_ids)
        intact = ids % 60 != 31
        assert records_of(manifest, ids)[intact].tobytes() == out[intact].tobytes()


def test_a_file_truncated_in_use_is_corrupt(store: FileStore, shards: list[Path]) -> None:
    """The store raises CorruptError for a file that was truncated while open, and serves it once it
    is restored."""
    path = shards[0]
    whole = path.read_bytes()
    for size in (len(whole) - 1, 200, 0):
        assert_holds(store, table())
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptError, match=f"{path.name} changed its size while it was in use"):
            read(store, table())
        path.write_bytes(whole)
    assert_holds(store, table())


def test_replacing_a_file_in_use_changes_nothing(store: FileStore, shards: list[Path]) -> None:
    """Files are replaced by renaming, so that an open file stays intact, even after it is
    deleted."""
    assert_holds(store, table())
    write_files(store.root, table())
    assert_holds(store, table())
    for path in shards:
        path.unlink()
    assert_holds(store, table())


def test_threads_share_few_open_files(tmp_path: Path, shards: list[Path]) -> None:
    """A file is not closed while another thread reads it."""
    with closing(FileStore(tmp_path, open_files=1)) as store, ThreadPoolExecutor(8) as pool:
        assert {EXPECTED} == set(pool.map(lambda _: read(store, table()), range(200)))
        opened = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()]
        assert 1 >= sum(path in opened for path in shards)


def test_another_program_s_header_is_read(store: FileStore, shards: list[Path]) -> None:
    """A header with metadata, other padding and another order of keys is valid."""
    data = shards[1].read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    tensor = dict(reversed(json.loads(data[8:length])["records"].items()))
    header = json.dumps({"__metadata__": {"by": "another"}, "records": tensor}, indent=3)
    shards[1].write_bytes(framed(header.encode()) + data[length:])
    assert (records_of(table())[1::2] == load_file(shards[1])["records"]).all()
    assert_holds(store, table())
    assert 5 == store.count(table(), 1)


@given(
    shard=st.integers(0, 1), place=st.integers(0, 400), flip=st.integers(1, 255), cut=st.booleans()
)
def test_no_damage_gives_wrong_rows(shard: int, place: int, flip: int, cut: bool) -> None:
    """Any changed byte or truncation of a shard gives the correct rows or a CorruptError."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_files(Path(folder), table())[shard]
        data = bytearray(path.read_bytes())
        place %= len(data)
        data[place] ^= flip
        path.write_bytes(data[:place] if cut else data)
        with closing(FileStore(folder)) as store:
            try:
                assert_holds(store, table())
            except CorruptError as error:
                assert str(path) in str(error) or "row of token" in str(error)  # noqa: PT017


def test_a_version_rebuilt_with_other_shards_is_read(store: FileStore, shards: list[Path]) -> None:
    """A rebuilt version with another number of shards is read, because that number is not part of
    the version."""
    assert_holds(store, table())
    with closing(FileStore(store.root)) as other:
        delete(other, table().ref)
    write_files(store.root, table(num_shards=1))
    assert_holds(store, store.manifest(table().ref))


def test_shards_and_manifest_have_the_same_mode(shards: list[Path]) -> None:
    """Shards and manifest have the mode of the umask, so that another user can serve them."""
    manifest = shards[0].with_name("manifest.json")
    assert stat.filemode(manifest.stat().st_mode) == stat.filemode(shards[0].stat().st_mode)


def test_the_log_is_not_ahead_of_the_store(tmp_path: Path) -> None:
    """A change that fails while it writes a manifest has not appended its line to the log."""
    (tmp_path / "t").touch()
    store = FileStore(tmp_path)
    with pytest.raises(UnavailableError):
        store.update(lambda: {("log", table().ref): b"{}", ("manifest", table().ref): b"{}"})
    assert [] == [*tmp_path.glob("*log*")]


def test_writing_leaves_complete_files_and_nothing_else(
    store: FileStore, shards: list[Path]
) -> None:
    """Tables consist of shards, manifest, lease and alias, beside a lock and a log, and deleting a
    version removes its folder."""
    other = table(version=2**64 - 1)
    write_files(store.root, other)
    for manifest in (table(), other):
        publish(store, manifest.ref)
    files = ["manifest.json", "lease", *(path.name for path in shards)]
    names = {f"t/{manifest.version}/{file}" for manifest in (table(), other) for file in files}
    found = [path.relative_to(store.root) for path in store.root.rglob("*") if path.is_file()]
    assert {".lock", ".log.jsonl", "t/alias.json", *names} == {path.as_posix() for path in found}
    delete(store, table().ref)
    assert ["alias.json", "f" * 16] == sorted(p.name for p in (store.root / "t").iterdir())


def test_a_lease_ends_with_its_process_regardless_of_the_clock(
    store: FileStore, shards: list[Path]
) -> None:
    """A version is in use while a process that leased it runs, regardless of file times."""
    ref, path = table().ref, shards[0].parent / "lease"
    code = """if True:
        import sys
        from tolhouse.store.files import FileStore

        FileStore(sys.argv[1]).lease(sys.argv[2])
        print("leased", flush=True)
        sys.stdin.read()
    """
    assert not store.leased(ref)
    command, pipe = [sys.executable, "-c", code, str(store.root), ref], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as user:
        assert user.stdout
        assert b"leased\n" == user.stdout.readline()
        for moved in (0, 10**10):  # the clock jumps
            os.utime(path, (moved, moved))
            with pytest.raises(InUseError, match="in use"):
                delete(store, ref)
        user.kill()
    delete(store, ref)


def timers() -> int:
    return sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_a_lease_that_is_not_renewed_expires(tmp_path: Path) -> None:
    """A lease that is not renewed expires in a running process, independently of other leases,
    which share one timer."""
    before = timers()
    with closing(FileStore(tmp_path, lease_seconds=0.2)) as store:
        one, two = (write(store, manifest_of("t", version)) for version in (1, 2))
        store.lease(one.ref)
        counts = []
        for _ in range(50):
            store.lease(two.ref)
            time.sleep(0.02)
            counts.append(timers())
        # Renewals start no further timers. A timer of another store may start at the end.
        assert min(counts[25:]) <= before + 1
        assert (False, True) == (store.leased(one.ref), store.leased(two.ref))
        wait_until(lambda: not store.leased(two.ref))


BAD = '{"version": 1, "history": []}', '{"version": "0123456789abcdef", "history": null}'


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", *BAD])
def test_publishing_repairs_a_malformed_alias(
    store: FileStore, shards: list[Path], text: str
) -> None:
    """A malformed alias raises CorruptError with advice to publish a version, which repairs it."""
    alias = store.root / "t" / "alias.json"
    alias.write_text(text, encoding="utf-8")
    for work in (resolve, rollback):
        with pytest.raises(CorruptError, match=r"alias of 't' .* is malformed; publish a version"):
            work(store, "t")
    assert table() == publish(store, table().ref)
    assert table() == resolve(store, "t")


def test_the_error_of_an_empty_store_names_the_build(tmp_path: Path) -> None:
    """A missing folder is an empty store, which reading does not create."""
    with closing(FileStore(tmp_path / "none")) as store:
        assert [] == store.refs()
        with pytest.raises(NotFoundError, match="no tables here yet; `tolhouse build`"):
            resolve(store, "t")
    assert [] == list(tmp_path.iterdir())


def test_a_damaged_record_keeps_files_open(shards: list[Path], store: FileStore) -> None:
    """Shard files stay open when a read finds a damaged record, and a repaired file is read
    again."""

    def opened() -> list[str]:
        links = [
            str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
        ]
        return sorted(path for path in links if path.startswith(str(shards[0].parent)))

    read(store, table())
    assert list(map(str, shards)) == opened()
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptError, match="token 8 ") as caught:
        read(store, table())
    assert (8,) == caught.value.token_ids
    assert list(map(str, shards)) == opened()
    shards[0].unlink()
    shards[0].write_bytes(whole)
    with pytest.raises(CorruptError, match="token 8 "):  # from the file that is still open
        read(store, table())
    assert_holds(store, table())
