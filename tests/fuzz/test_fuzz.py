"""A few thousand malformed inputs for each reader; `make fuzz` runs a million."""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.fuzz.mutate import mutations
from tests.fuzz.targets import ALLOWED, RECORDS, Target, folder, read_records, targets

NAMES = "alias,chat,completion,detokenize,fetch request,gguf,keys file,manifest"
NAMES += ",manifest with a new digest,record,row reply,row request,shard file,tokenize"


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Target]]:
    with folder() as name:
        yield targets(Path(name))


@pytest.mark.parametrize("name", NAMES.split(","))
def test_input_is_read_correctly_or_refused(found: dict[str, Target], name: str) -> None:
    """Valid inputs are read, and every mutated input is read or refused with one of Tolhouse's
    errors."""
    target, refused = found[name], 0
    for seed in target.seeds:
        target.read(seed)
    for data in islice(mutations(target.seeds, random.Random(1)), 3000 // target.cost):
        try:
            target.read(data)
        except ALLOWED:
            refused += 1
    assert refused > 0 or name == "detokenize"


def test_all_targets_are_tested(found: dict[str, Target]) -> None:
    """Every target has a test."""
    assert NAMES.split(",") == sorted(found)


def test_a_reader_without_checksums_is_found() -> None:
    """A reader that does not verify checksums is found by the fuzz target of records."""
    altered = bytearray(RECORDS.tobytes())
    altered[0] ^= 1
    with pytest.raises(AssertionError, match="altered"):
        read_records(bytes(altered), verify=lambda *_: None)
