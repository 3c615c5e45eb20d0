"""Hot rows in shared memory: what a reader takes is verified, and what it can't take is left to the ordinary way."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tolhouse import Client, Manifest
from tolhouse.table.shared import Segment
from tolhouse.testing import build_table, process

IDENTITY = {"version": "0123456789abcdef", "model_id": "0" * 64, "tokenizer_id": "0" * 64}
MANIFEST = Manifest(
    name="shared",
    codec="fp32",
    vocab_size=50,
    hidden_size=6,
    layers=(0, 1),
    num_shards=1,
    **IDENTITY,
)
IDS = np.arange(8, dtype=np.uint32)
RECORDS = MANIFEST.encode(
    IDS, np.random.default_rng(0).standard_normal((8, 2, 6)).astype(np.float32)
)


@pytest.fixture
def owner() -> Segment:
    """A segment in which the even ids are hot."""
    segment = Segment.create(MANIFEST, 10)
    for slot, i in enumerate((0, 2, 4, 6)):
        segment.slab[slot], segment.slot_of[i] = RECORDS[i], slot
    return segment


def reader_of(owner: Segment, **changes: int) -> Segment | None:
    return Segment.attach(
        MANIFEST, 10, **{"number": owner.id, "pid": os.getpid(), "fd": owner.fd, **changes}
    )


def taken(segment: Segment, ids: np.ndarray) -> tuple[list[int], np.ndarray]:
    out = np.zeros((len(ids), MANIFEST.record_bytes), np.uint8)
    return segment.take(ids, memoryview(out.reshape(-1)), range(len(ids))), out


def test_a_reader_takes_what_is_hot(owner: Segment) -> None:
    """The hot records come whole, the others are named; rows and uses are counted where the owner sees them."""
    reader = reader_of(owner)
    left, out = taken(reader, IDS)
    assert [1, 3, 5, 7] == left
    assert RECORDS[::2].tobytes() == out[::2].tobytes()
    assert 4 == owner.taken[0]
    for _ in range(5):
        taken(reader, IDS[:1])
    assert [3, 1, 1, 1, 0, 0, 0, 0, 0, 0] == owner.uses.tolist()


def test_a_row_that_was_replaced_or_is_half_there_is_not_taken(owner: Segment) -> None:
    """A record of another token, a torn one and an empty slot fail their checksum, and are left."""
    reader = reader_of(owner)
    owner.slab[0] = RECORDS[3]
    owner.slab[1, :20] = RECORDS[5, :20]
    owner.slot_of[6] = 7
    left, out = taken(reader, IDS)
    assert [0, 1, 2, 3, 5, 6, 7] == left
    assert RECORDS[4].tobytes() == out[4].tobytes()


def test_a_reader_can_not_write_rows(owner: Segment) -> None:
    """Its view of slots and records is read-only."""
    reader = reader_of(owner)
    assert not reader.slab.flags.writeable
    assert not reader.slot_of.flags.writeable


def test_what_is_no_segment_is_not_mapped(owner: Segment, tmp_path: Path) -> None:
    """Another number, a file descriptor of something else, a process that is not there: nothing is opened."""
    assert reader_of(owner, number=owner.id + 1) is None
    with (tmp_path / "file").open("w") as file:
        assert reader_of(owner, fd=file.fileno()) is None
    assert reader_of(owner, pid=2**22 + 1) is None
    fd = owner.fd
    owner.close()
    assert reader_of(owner, fd=fd) is None


def test_who_reads_from_memory_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows taken from a neighbour's memory are no requests: the version is said to be in use all the same, in the background."""
    monkeypatch.setattr("tolhouse.client.client._SAY_SECONDS", 0.05)
    url = f"file://{tmp_path}"
    ref = build_table(checkpoint, url)
    with (
        process("lookup", "--store", url, "--listen", "127.0.0.1:0") as running,
        Client(running.address) as client,
    ):
        manifest, held, hold = client.describe(ref), [], client.hold
        monkeypatch.setattr(client, "hold", lambda of: (hold(of), held.append(of)))
        deadline = time.monotonic() + 30
        while len(held) < 3:
            client.fetch(manifest, [1, 2, 3])
            assert time.monotonic() < deadline
        assert {ref} == set(held)


def test_rows_are_right_while_they_are_being_replaced(checkpoint: Path, tmp_path: Path) -> None:
    """Several clients read from a slab a tenth of what they ask for, as its rows come and go: every row is its token's."""
    url = f"file://{tmp_path}"
    ref = build_table(checkpoint, url, codec="bf16", shards=4)
    with process(
        "lookup", "--store", url, "--hot-megabytes", "0.03", "--listen", "127.0.0.1:0"
    ) as running:
        with Client(running.address, map_hot_rows=False) as client:
            expected = client.fetch(ref, range(300))

        def hammer(seed: int) -> bool:
            random = np.random.default_rng(seed)
            with Client(running.address) as client:
                batches = [(random.zipf(1.3, 20) % 300).astype(np.uint32) for _ in range(200)]
                return all(
                    expected[ids].tobytes() == client.fetch(ref, ids).tobytes() for ids in batches
                )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(hammer, range(4)))
