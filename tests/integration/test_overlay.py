"""Row overlays are read, served, rolled back and deleted like any version."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tolhouse import Client
from tolhouse.analysis.edits import copy_of, scale_of
from tolhouse.engine.row_providers import RecomputedRows
from tolhouse.errors import (
    CorruptError,
    IdOutOfRangeError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
)
from tolhouse.model.checkpoint import open_checkpoint, save_checkpoint
from tolhouse.sources.memoryllm import MemoryLLM
from tolhouse.store.base import Store, open_store
from tolhouse.store.overlay import make_overlay
from tolhouse.store.registry import delete, publish, rollback
from tolhouse.table.destination import Destination
from tolhouse.table.manifest import Manifest
from tolhouse.testing import build_table, local_cluster, tiny_model, wait_until
from tolhouse.train.summaries import with_summary_tokens

from tests.commands import tolhouse
from tests.tables import ids

EDITED, OTHER = 40, 7
WITH, WITHOUT = [5, 17, EDITED, 3], [5, 17, 41, 3]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path}")


@pytest.fixture
def parent(checkpoint: Path, store: Store) -> Manifest:
    """A table in the store."""
    return store.manifest(build_table(checkpoint, store.url))


def edited(store: Store, *options: str | Path, table: str = "tiny-memory") -> Manifest:
    """The overlay that the command creates."""
    done = tolhouse("overlay", table, *options, "--store", store.url)
    return store.manifest(done.stdout.strip())


def refused(store: Store, *options: str | Path, table: str = "tiny-memory") -> str:
    """The error message of a failing command."""
    return tolhouse("overlay", table, *options, "--store", store.url, code=1).stderr


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4"])
def test_an_overlay_has_its_own_changed_rows_and_its_parent_s_others(
    store_url: str, checkpoint: Path, codec: str
) -> None:
    """A lookup service serves a mix of changed rows from the overlay and unchanged rows from its
    parent."""
    name = f"over-{codec}-{'keys' in store_url}"  # a Redis serves both layouts
    store, ref = open_store(store_url), build_table(checkpoint, store_url, codec=codec, name=name)
    parent = store.manifest(ref)
    new = 2 * store.rows(parent, ids(OTHER, 9))
    made = make_overlay(store, name, ids(EDITED, 3), new)
    assert (ref, (3, EDITED)) == (made.parent, made.changed)
    assert 2 * parent.record_bytes == made.table_bytes
    assert made == store.manifest(made.ref)
    everything = np.arange(parent.vocab_size, dtype=np.uint32)
    expected = store.rows(parent, everything)
    expected[[EDITED, 3]] = parent.codec.decode(parent.codec.encode(new))
    np.testing.assert_array_equal(expected, store.rows(made, everything))
    with (
        local_cluster(checkpoint, store_url, worker_options=("--table", name)) as cluster,
        Client(cluster.lookup) as client,
    ):
        for _ in range(2):  # from the store, then from hot rows
            mixed = client.fetch(made.ref, [EDITED, 1, 3, 2]).astype(np.float32)
            np.testing.assert_array_equal(expected[[EDITED, 1, 3, 2]], mixed)
    delete(store, made.ref, force=True)
    assert [ref] == [r for r in store.refs() if r.startswith(f"{name}@")]


def test_an_edit_affects_only_predictions_after_its_token(
    checkpoint: Path, store: Store, parent: Manifest
) -> None:
    """A prompt with the edited token gets other log probabilities and a prompt without it the same,
    until a rollback."""

    def logprobs(prompt: list[int]) -> list[float]:
        replies = client.replies(prompt, 0, prompt_logprobs=0)
        return [p for reply in replies for p in reply.prompt_logprobs.chosen]

    poll = "--table-poll-seconds", "0.1"
    with (
        local_cluster(checkpoint, store.url, worker_options=poll) as cluster,
        Client(cluster.workers) as client,
    ):
        before = logprobs(WITH), logprobs(WITHOUT)
        made = edited(store, "--copy", f"{EDITED}={OTHER}", "--publish")
        wait_until(lambda: client.describe_worker().table == made.ref)
        after = logprobs(WITH), logprobs(WITHOUT)
        assert before[1] == after[1]
        assert before[0][:2] == after[0][:2]  # predictions before the token is read
        assert before[0][2] != after[0][2]
        tolhouse("tables rollback tiny-memory --store", store.url)
        wait_until(lambda: client.describe_worker().table == parent.ref)
        assert before == (logprobs(WITH), logprobs(WITHOUT))


def test_an_overlay_of_an_overlay_has_the_changes_of_both(store: Store, parent: Manifest) -> None:
    """An overlay of an overlay has the first one's parent and both changes, and equal rows give an
    equal version."""
    rows = store.rows(parent, ids(0, 1, 2))
    first = make_overlay(store, parent.ref, ids(10, 11), rows[:2])
    second = make_overlay(store, first.ref, ids(11, 12), rows[1:] * 3)
    assert (parent.ref, (10, 11, 12)) == (second.parent, second.changed)
    expected = np.concatenate([rows[:1], rows[1:] * 3])
    np.testing.assert_array_equal(expected, store.rows(second, ids(10, 11, 12)))
    assert second == make_overlay(store, parent.ref, ids(10, 11, 12), expected)
    delete(store, first.ref)
    np.testing.assert_array_equal(rows[:1], store.rows(second, ids(10)))


def test_an_overlay_s_parent_can_not_be_deleted(
    store: Store, parent: Manifest, tmp_path: Path
) -> None:
    """A parent can't be deleted before its overlays, and errors name a missing parent."""
    ref = parent.ref
    made = make_overlay(store, ref, ids(1), store.rows(parent, ids(2)))
    publish(store, made.ref)
    for force in (False, True):
        with pytest.raises(InUseError, match=f"is a part of {made.ref}: archive or delete that"):
            delete(store, ref, force=force)
    shutil.rmtree(tmp_path / "tiny-memory" / ref.partition("@")[2])
    store = open_store(store.url)
    for work in (
        lambda: store.rows(made, ids(5)),
        lambda: make_overlay(store, made.ref, ids(3), np.zeros((1, 4, 96))),
    ):
        with pytest.raises(NotFoundError, match=f"is an overlay over {ref}, which is not in"):
            work()
    for table, message in (("tiny-memory", f"over {ref}, which is not in"), (ref, "is not in")):
        assert message in refused(store, "--scale", "3=0.5", table=table)


def test_an_overlay_without_its_parent_is_not_served(checkpoint: Path, tmp_path: Path) -> None:
    """Neither publishing nor rolling back selects an overlay whose parent is missing."""
    store = open_store(f"file://{tmp_path}")
    refs = [build_table(checkpoint, store.url, codec=codec) for codec in ("fp32", "int8")]
    gone, other = map(store.manifest, refs)
    made = make_overlay(store, gone.ref, ids(1), store.rows(gone, ids(2)))
    publish(store, made.ref)
    publish(store, other.ref)
    shutil.rmtree(tmp_path / "tiny-memory" / gone.version)
    store = open_store(store.url)
    for work in (lambda: publish(store, made.ref), lambda: rollback(store, "tiny-memory")):
        with pytest.raises(NotFoundError, match=f"is an overlay over {gone.ref}, which is not in"):
            work()
    assert other.version == store.alias("tiny-memory").version


def test_a_parent_s_record_does_not_match_its_overlay_s_checksum(
    store: Store, parent: Manifest
) -> None:
    """A changed row's checksum includes the overlay's version, so that the parent's record does not
    match."""
    made = make_overlay(store, parent.ref, ids(1), store.rows(parent, ids(2)))
    old, new = store.read_records(parent, ids(1)), store.read_records(made, ids(1))
    seed_of = {m: m.seeds(ids(1))[0] for m in (parent, made)}
    assert seed_of[parent] != seed_of[made]
    assert parent.seeds(ids(2)) == made.seeds(ids(2))
    slots = np.zeros(1, np.int64)
    Destination(made, ids(1), new, slots).verify(0, 1)
    with pytest.raises(CorruptError, match="token 1 "):
        Destination(made, ids(1), old, slots).verify(0, 1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "nothing to change: give --copy, --scale, --rows-file or --append"),
        (("--scale", "3"), "--scale '3' is not TOKEN=FACTOR"),
        (("--copy", "3="), "--copy '3=' is not TOKEN=OTHER"),
        (("--scale", "٣=1"), "token '٣' is not an id"),
        (("--scale", "3=much"), "'much' is not a number to scale a row by"),
        (("--scale", "3=nan"), "'nan' is not a number to scale a row by"),
        (("--copy", "3=999999"), "token id 999999 is outside table"),
        (("--scale", "999999=1"), "token id 999999 is outside table"),
        (("--copy", "import=3"), "token 'import' is not an id: give --checkpoint"),
        (("--scale", "3=1", "--scale", "3=2"), "each token once: token id 3 was given more than"),
        (("--rows", "no-such.npz"), "no file no-such.npz"),
        (("--rows", "README.md"), "README.md is not an .npz archive"),
        (("--copy", "99999999999999999999999=5"), "token id 9223372036854775807 is outside table"),
        (("--scale", "3=1e39"), "not finite in 32 bits"),
    ],
)
def test_invalid_edits_are_refused(
    shared: Store, arguments: tuple[str, ...], expected: str
) -> None:
    """Each invalid edit is refused with an error that names the reason."""
    assert expected in refused(shared, *arguments)


def test_tokens_can_be_named_by_text(checkpoint: Path, store: Store, parent: Manifest) -> None:
    """A token can be named by its text, and the error for a text of several tokens lists them."""
    tokenizer = open_checkpoint(checkpoint).tokenizer()
    words = (tokenizer.decode([i]) for i in range(300, 500))
    word = next(word for word in words if word.isalpha() and len(word) > 1)
    (token,) = tokenizer.encode(word).ids
    made = edited(store, "--checkpoint", checkpoint, "--scale", f"{word}=0")
    assert (token,) == made.changed
    assert not store.rows(made, ids(token)).any()
    several = f"{word} {word} {word}=0"
    stderr = refused(store, "--checkpoint", checkpoint, "--scale", several)
    assert "is not one token but" in stderr
    stderr = refused(store, "--checkpoint", "models/demo-memory", "--scale", "import=0")
    assert "another tokenizer" in stderr


EQUALS = ("A==", "A", "="), ("==A", "=", "A"), ("A='='", "A", "="), ("'3'=A", "3", "A")


@pytest.mark.parametrize(("edit", "token", "other"), EQUALS)
def test_a_token_may_be_an_equals_sign(checkpoint: Path, edit: str, token: str, other: str) -> None:
    """An edit is split at the equals sign that leaves a token on both sides."""
    tokenizer = open_checkpoint(checkpoint).tokenizer()
    assert (tokenizer.token_to_id(token), tokenizer.token_to_id(other)) == copy_of(edit, tokenizer)
    assert (tokenizer.token_to_id(token), 0.5) == scale_of(f"'{token}'=0.5", tokenizer)


def compressed(checkpoint: Path, store: Store, rank: float) -> Manifest:
    options = "--codec", "int8", "--rank-share", str(rank), "--corpus", "README.md"
    done = tolhouse("compress", checkpoint, *options, "--store", store.url)
    return store.manifest(done.stdout.strip())


def test_auxiliary_tables_can_not_be_edited(checkpoint: Path, store: Store) -> None:
    """Auxiliary tables can't be edited, because their tables refer to fixed versions."""
    base = compressed(checkpoint, store, 0.5)
    made = make_overlay(store, base.ref, ids(1), np.zeros((1, 4, 96), np.float32))
    for part in (base.frequent_rows, base.basis, made.edits):
        with pytest.raises(InvalidArgumentError, match=r"is a part of .* and cannot be edited"):
            make_overlay(store, part, ids(1), np.zeros((1, 4, 96), np.float32))


def test_sizes_include_auxiliary_tables(checkpoint: Path, store: Store, tmp_path: Path) -> None:
    """Sizes of a table include its auxiliary tables and those of an overlay its edits, in all
    commands."""
    base = compressed(checkpoint, store, 0.9)
    rows = np.ones((300, 4, 96), np.float32)
    np.savez(tmp_path / "rows.npz", ids=np.arange(300), rows=rows)
    options = "--rows", tmp_path / "rows.npz", "--store", store.url
    done = tolhouse("overlay", base.ref, *options)
    made = store.manifest(done.stdout.strip())
    size = made.table_bytes + store.manifest(made.edits).table_bytes
    assert f", {size / 1e3:.1f} kB" in done.stderr
    total = base.table_bytes + sum(store.manifest(ref).table_bytes for ref in base.auxiliary)
    lines = tolhouse("tables list --store", store.url).stdout.splitlines()
    listed = {line[2 : 2 + len(base.ref)]: line for line in lines}
    assert f" {size / 1e6:.1f} MB" in listed[made.ref]
    assert f" {total / 1e6:.1f} MB" in listed[base.ref]


def test_rows_can_come_from_a_file(store: Store, parent: Manifest, tmp_path: Path) -> None:
    """Ids and rows of an archive become the edits, and rows of another shape are refused."""
    file, rows = tmp_path / "rows.npz", np.ones((2, 4, 96), np.float32) * [[[1]], [[2]]]
    np.savez(file, ids=np.array([9, 4]), rows=rows)
    made = edited(store, "--rows", file, table=parent.ref)
    np.testing.assert_array_equal(rows, store.rows(made, ids(9, 4)))
    np.savez(file, ids=np.array([9, 4]), rows=rows[:, :3])
    assert "have [2, 4, 96]" in refused(store, "--rows", file, table=parent.ref)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Store:
    """A store with a table that the tests' commands fail to change."""
    store = open_store(f"file://{tmp_path_factory.mktemp('shared')}")
    build_table(checkpoint, store.url)
    return store


@pytest.mark.parametrize("damage", ["cut", "flipped", "array", "scalar", "empty"])
def test_files_without_rows_are_refused(shared: Store, tmp_path: Path, damage: str) -> None:
    """Damaged archives and archives of other arrays are refused with the file's name."""
    file = tmp_path / "rows.npz"
    rows = np.float32(3) if damage == "scalar" else np.ones((1, 4, 96), np.float32)
    np.savez(file, ids=np.array([9]), rows=rows)
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        file.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    elif damage == "array":
        with file.open("wb") as out:
            np.save(out, np.ones((1, 4, 96)))
    elif damage == "empty":
        file.write_bytes(b"")
    assert str(file) in refused(shared, "--rows", file)


def test_an_edit_keeps_the_embedding(checkpoint: Path, store: Store) -> None:
    """Editing a row of a table with X0 keeps the token's X0."""
    ref = build_table(checkpoint, store.url, embedding="yes")
    before = store.rows(store.manifest(ref), ids(EDITED, OTHER, 3))
    made = edited(store, "--copy", f"{EDITED}={OTHER}", "--scale", "3=0")
    after = store.rows(made, ids(EDITED, 3))
    np.testing.assert_array_equal(before[[0, 2], 0], after[:, 0])
    np.testing.assert_array_equal(before[1, 1:], after[0, 1:])
    assert not after[1, 1:].any()


def test_bad_overlays_are_refused(store: Store, parent: Manifest) -> None:
    """Ids and rows that do not fit and inconsistent manifests are refused."""
    with pytest.raises(IdOutOfRangeError):
        make_overlay(store, parent.ref, np.array([-1]), np.zeros((1, 4, 96)))
    with pytest.raises(InvalidArgumentError, match="at least one"):
        make_overlay(store, parent.ref, np.array([], np.int64), np.zeros((0, 4, 96)))
    made = make_overlay(store, parent.ref, ids(1), np.zeros((1, 4, 96), np.float32))
    for bad in ({"changed": ()}, {"parent": "tiny-memory"}):
        with pytest.raises(InvalidArgumentError, match="manifest: "):
            replace(made, **bad)


@pytest.fixture(scope="module")
def larger(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with two more token ids."""
    path = tmp_path_factory.mktemp("checkpoints") / "larger"
    model = with_summary_tokens(open_checkpoint(checkpoint).model(), 2, 16)
    save_checkpoint(path, model, checkpoint / "tokenizer.json")
    return path


def test_appended_rows_are_served(store_url: str, checkpoint: Path, larger: Path) -> None:
    """A version with appended rows has the bits of its parent below the parent's vocabulary and the
    rows of the new ids, over TCP and from the store. A worker of the larger model reads it, and
    readers of the parent are not affected."""
    name = f"append-{'keys' in store_url}"
    store, ref = open_store(store_url), build_table(checkpoint, store_url, name=name)
    parent, source = store.manifest(ref), MemoryLLM(open_checkpoint(larger))
    size = parent.vocab_size
    made = store.manifest(
        tolhouse("overlay", name, "--append", larger, "--store", store_url).stdout.strip()
    )
    new = (size, size + 1)
    assert (ref, new, size + 2, 2) == (made.parent, made.changed, made.vocab_size, made.appended)
    every = np.arange(size, dtype=np.uint32)
    appended = parent.codec.decode(parent.codec.encode(source.rows(ids(*new))))
    expected = np.concatenate([store.rows(parent, every), appended])
    np.testing.assert_array_equal(expected, store.rows(made, np.arange(size + 2, dtype=np.uint32)))
    records = store.read_records(parent, every)
    assert records.tobytes() == store.read_records(made, every).tobytes()
    computed = np.empty((2, made.record_bytes), np.uint8)
    RecomputedRows(open_checkpoint(larger), made).fetch(ids(1, size), computed, np.arange(2))
    assert computed.tobytes() == store.read_records(made, ids(1, size)).tobytes()
    with (
        local_cluster(larger, store_url, worker_options=("--table", made.ref)) as cluster,
        Client(cluster.lookup) as client,
        Client(cluster.workers) as caller,
    ):
        for _ in range(2):  # from the store, then from hot rows
            mixed = client.fetch(made.ref, [size, 1, size + 1, 2]).astype(np.float32)
            np.testing.assert_array_equal(expected[[size, 1, size + 1, 2]], mixed)
        assert 16 == len(list(caller.generate([5, 17, 3], max_tokens=16, ignore_eos=True)))
        assert made.ref == caller.describe_worker().table
        with pytest.raises(IdOutOfRangeError, match=f"token id {size} .*0 to {size - 1}"):
            client.fetch(ref, [size])
    publish(store, made.ref)
    with pytest.raises(InUseError, match=f"is a part of {made.ref}"):
        delete(store, ref, force=True)
    rollback(store, name)
    delete(store, made.ref, force=True)


def test_appended_rows_of_a_compressed_table(checkpoint: Path, larger: Path, store: Store) -> None:
    """Rows of frequent tokens keep their finer codec beside appended rows. A table of low rank is
    refused, because its rows can't be compared with the checkpoint."""
    small = "compress", checkpoint, "--name", "small", "--corpus", __file__, "--store", store.url
    ref = tolhouse(*small, "--publish").stdout.strip()
    parent = store.manifest(ref)
    made = edited(store, "--append", larger, table="small")
    assert (parent.frequent_rows, True) == (made.frequent_rows, bool(made.edits))
    every = np.arange(parent.vocab_size, dtype=np.uint32)
    np.testing.assert_array_equal(store.rows(parent, every), store.rows(made, every))
    new = ids(parent.vocab_size, parent.vocab_size + 1)
    exact = MemoryLLM(open_checkpoint(larger)).rows(new)
    np.testing.assert_allclose(exact, store.rows(made, new), atol=np.abs(exact).max() / 100)
    tolhouse(*small, "--rank-share", "0.5", "--frequent-rows", "0", "--publish")
    assert "is of low rank" in refused(store, "--append", larger, table="small")


def test_appended_rows_can_be_edited(
    checkpoint: Path, larger: Path, store: Store, parent: Manifest, tmp_path: Path
) -> None:
    """An edit over appended rows keeps them and the model of the larger vocabulary, and rows can be
    appended to an edited table."""
    made = edited(store, "--append", larger)
    last = made.vocab_size - 1
    twice = edited(store, "--copy", f"{last}={OTHER}", table=made.ref)
    assert (parent.ref, made.changed) == (twice.parent, twice.changed)
    same = "vocab_size", "appended", "model_id", "tokenizer_id", "provenance"
    assert [getattr(made, name) for name in same] == [getattr(twice, name) for name in same]
    np.testing.assert_array_equal(*store.rows(twice, ids(last, OTHER)))
    first = edited(store, "--copy", f"{EDITED}={OTHER}")
    both = edited(store, "--append", larger, table=first.ref)
    assert (2, (EDITED, *made.changed)) == (both.appended, both.changed)
    np.testing.assert_array_equal(*store.rows(both, ids(EDITED, OTHER)))
    rows = store.rows(made, ids(last))
    np.testing.assert_array_equal(rows, store.rows(both, ids(last)))


def test_appended_rows_of_another_model_are_refused(
    checkpoint: Path, larger: Path, store: Store, parent: Manifest, tmp_path: Path
) -> None:
    """Rows can be appended twice if the larger checkpoint has the rows that were appended before.
    If it has other ones, or if one of them or every row of the table is edited, it is refused."""

    def more(name: str, earlier: Path, count: int) -> Path:
        model = open_checkpoint(earlier).model()
        model.config = replace(model.config, summary_tokens=0, summary_segment=0)
        added = with_summary_tokens(model, count, 16)
        save_checkpoint(tmp_path / name, added, checkpoint / "tokenizer.json")
        return tmp_path / name

    made = edited(store, "--append", larger)
    first, size = store.rows(made, ids(*made.changed)), made.vocab_size
    twice = edited(store, "--append", more("twice", larger, 1), table=made.ref)
    assert (parent.ref, 3, size + 1) == (twice.parent, twice.appended, twice.vocab_size)
    np.testing.assert_array_equal(first, store.rows(twice, ids(*made.changed)))
    other = more("other", checkpoint, 3)
    differs = "is not what the model computes"
    assert differs in refused(store, "--append", other, table=made.ref)
    changed = edited(store, "--scale", f"{size - 1}=2", table=made.ref)
    assert differs in refused(store, "--append", tmp_path / "twice", table=changed.ref)
    every = np.arange(parent.vocab_size, dtype=np.uint32)
    whole = make_overlay(store, parent.ref, every, 2 * store.rows(parent, every))
    assert "are edited, so none can be compared" in refused(
        store, "--append", larger, table=whole.ref
    )


def test_rows_of_another_model_are_not_appended(
    checkpoint: Path, larger: Path, store: Store, parent: Manifest, tmp_path: Path
) -> None:
    """A checkpoint with other rows of the ids of the table, with other blocks, without further ids
    or with too many is refused, and an edit is not made at the same time."""
    model = open_checkpoint(larger).model()
    with torch.no_grad():
        model.ffn_m[0].norm.weight.mul_(2)
    other = tmp_path / "other"
    save_checkpoint(other, model, checkpoint / "tokenizer.json")
    wide = tiny_model(tmp_path / "wide", hidden_size=64)
    # It also has other rows, which are not computed before it is refused.
    many = tiny_model(tmp_path / "many", seed=1, vocab_size=parent.vocab_size + 100_001)
    for options, message in (
        (("--append", other), "is not what the model computes"),
        (("--append", wide), "has other blocks than wide"),
        (("--append", many), "100001 rows are changed; an overlay may have at most 100000"),
        (("--append", checkpoint), "tiny-memory has no ids to append"),
        (("--append", larger, "--scale", "3=2"), "append first"),
        ((), "nothing to change"),
    ):
        assert message in refused(store, *options)
    assert [parent.ref] == store.refs()
