"""The life of a table's versions at the command line: states, log, provenance."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tolhouse.store.base import open_store
from tolhouse.store.registry import begin
from tolhouse.testing import build_table

from tests import commands
from tests.tables import manifest_of, records_of

Store = tuple[str, str]


def tolhouse(*arguments: str | Path, code: int = 0) -> str:
    """Run a command that exits with `code`; return its stdout for 0, and else its stderr."""
    ended = commands.tolhouse("", *arguments, code=code)
    return ended.stderr if code else ended.stdout


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """The option of a store of each kind, without tables that other tests left there."""
    yield "--store", store_url
    for line in tolhouse("tables", "list", "--store", store_url).splitlines():
        if not line.startswith("*"):
            tolhouse("tables", "delete", line.split()[0], "--force", "--store", store_url)


def states(store: Store, name: str, *more: str) -> dict[str, str]:
    """The states of all listed versions of a name."""
    lines = tolhouse("tables", "list", *more, *store).splitlines()
    words = [line.removeprefix("* ").split() for line in lines]
    return {ref: state for ref, state, *_ in words if ref.startswith(f"{name}@")}


def log(store: Store, name: str) -> list[dict]:
    return [*map(json.loads, tolhouse("tables", "log", name, "--json", *store).splitlines())]


def test_states_and_log(
    checkpoint: Path, store: Store, store_url: str, request: pytest.FixtureRequest
) -> None:
    """Each step of a version changes its state and appends to the log, which outlives it."""
    name = f"states-{request.node.callspec.id}"
    first, second = (
        build_table(checkpoint, store_url, codec=codec, name=name, publish=False)
        for codec in ("bf16", "int8")
    )
    assert {first: "verified", second: "verified"} == states(store, name)
    tolhouse("publish", first, "--note", "the first one", "--by", "ann", *store)
    tolhouse("publish", second, "--note", "half the bytes", "--by", "ben", *store)
    assert {first: "verified", second: "published"} == states(store, name)
    tolhouse("rollback", name, *store)
    tolhouse("tables", "delete", second, "--note", "too coarse", "--by", "\x1b[31mben", *store)
    assert "\x1b" not in tolhouse("tables", "list", "--all", *store)
    assert {first: "published"} == states(store, name)
    assert {first: "published", second: "deleted"} == states(store, name, "--all")

    entries = log(store, name)
    events = [(entry["event"], f"{name}@{entry['version']}") for entry in entries]
    expected = [("verified", first), ("verified", second), ("published", first)]
    expected += [("published", second), ("published", first), ("deleted", second)]
    assert expected == events
    assert ["ann", "ben"] == [entry["by"] for entry in entries[2:4]]
    notes = [entry.get("note") for entry in entries]
    assert [None, None, "the first one", "half the bytes", None, "too coarse"] == notes
    assert second.endswith(entries[4]["before"])
    assert entries[4]["rollback"] is True
    assert all(entry["by"] for entry in entries)
    assert 3 == len(tolhouse("tables", "log", first, *store).splitlines())
    assert "half the bytes" in tolhouse("tables", "log", second, *store)


def test_an_unfinished_build_is_listed_and_can_be_deleted(store: Store, store_url: str) -> None:
    """A version without a manifest is `building`; only --force deletes its rows."""
    planned = manifest_of("unfinished", 11)
    with closing(open_store(store_url)) as opened:
        begin(opened, planned)
        opened.write_shard(planned, 0, records_of(planned, planned.shard_ids(0)))
        assert {planned.ref: "building"} == states(store, "unfinished")
        assert "--force" in tolhouse("tables", "delete", planned.ref, *store, code=1)
        tolhouse("tables", "delete", planned.ref, "--force", *store)
        assert 0 == opened.count(planned, 0)
    assert {} == states(store, "unfinished")
    assert {planned.ref: "deleted"} == states(store, "unfinished", "--all")


def test_a_torn_line_of_the_log_is_skipped(tmp_path: Path) -> None:
    """A line that a killed process left unfinished hides no later entry."""
    url = f"file://{tmp_path}"
    with closing(open_store(url)) as opened:
        begin(opened, manifest_of("t", 1))
        with (tmp_path / ".log.jsonl").open("ab") as file:
            file.write(b'{"time":"2026')
        begin(opened, manifest_of("t", 2))
    assert 2 == len(log(("--store", url), "t"))


def test_provenance_of_a_build(checkpoint: Path, tmp_path: Path) -> None:
    """The manifest names source, text and builder, and the log says who built it and why."""
    store = ("--store", f"file://{tmp_path}/tables")
    text = tmp_path / "sample.txt"
    text.write_text("def add(a, b): return a + b\n", encoding="utf-8")
    words = ("build", checkpoint, "--name", "t", "--corpus", text, "--codec", "int8", *store)
    ref = tolhouse(*words, "--note", "for the test").strip()
    made = json.loads(tolhouse("tables", "show", ref, *store))["provenance"]
    assert (checkpoint.name, "sample.txt") == (made["source"], made["corpus"])
    assert made["builder"].startswith("tolhouse ")
    found = [(entry["event"], entry["note"]) for entry in log(store, "t")]
    assert [("building", "for the test"), ("verified", "for the test")] == found
    assert ref == tolhouse(*words).strip()
    assert 2 == len(log(store, "t"))  # a complete table is not built again
