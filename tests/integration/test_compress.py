"""Compressed tables: served rows equal the table's rows, and the loss is measured."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolhouse import Client
from tolhouse.analysis.evaluate import probed, table_rows
from tolhouse.build.compress import Compressed, Scheme, bytes_at_16_bit, check, compress
from tolhouse.build.job import plan
from tolhouse.errors import InUseError, InvalidArgumentError
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.model.losses import RowsOf, evaluate
from tolhouse.model.transformer import NoCache
from tolhouse.sources.memoryllm import MemoryLLM, select_blocks
from tolhouse.store.base import open_store
from tolhouse.store.overlay import make_overlay
from tolhouse.store.registry import delete, publish
from tolhouse.table.codecs import codec
from tolhouse.table.manifest import Manifest
from tolhouse.testing import build_table, local_cluster

from tests.commands import tolhouse

PROMPT = [5, 17, 40, 3, 99, 7, 300, 5]
COUNTS = {i: 1000 // (1 + i) for i in range(300)}
SCHEMES = {
    "frequent": Scheme("int4", frequent=16),
    "rank": Scheme("bf16", rank=0.5),
    "rank and frequent": Scheme("int8", rank=0.25, frequent=16, frequent_codec="fp32"),
    "ratio": Scheme("int4", ratio=6, frequent=8),
    "int4 rank, int8 frequent": Scheme("int4", rank=0.25, frequent=16, frequent_codec="int8"),
}


def planned(checkpoint: Path, name: str = "squeezed", **options: Any) -> Manifest:
    opened = open_checkpoint(checkpoint)
    source = MemoryLLM(
        opened, select_blocks(opened, **{"embedding": "auto", "absent": (), **options})
    )
    return plan(source, name, "bf16", 4)


def made_of(checkpoint: Path, scheme: Scheme, name: str = "squeezed", **options: Any) -> Compressed:
    manifest = planned(checkpoint, name, **options)
    rows = MemoryLLM(open_checkpoint(checkpoint), manifest.blocks).rows()
    return compress(manifest, rows, COUNTS, scheme)


def alone(checkpoint: Path, rows: RowsOf | None = None) -> list[int]:
    """Tokens after PROMPT by the model in this process with the given rows."""
    model = open_checkpoint(checkpoint).model()
    return list(greedy(model, PROMPT, 20, ignore_eos=True, rows=rows))


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"int4 rank, int8 frequent"}))
def test_a_worker_serves_the_table_s_rows(checkpoint: Path, tmp_path: Path, scheme: str) -> None:
    """Fetched rows and generated tokens follow from the table's rows."""
    url = f"file://{tmp_path}"
    store, made = open_store(url), made_of(checkpoint, SCHEMES[scheme])
    manifest = made.store(store)
    publish(store, manifest.ref)
    opened = open_checkpoint(checkpoint)
    rows = table_rows(opened, url, manifest.ref)
    exact = MemoryLLM(opened).rows()
    assert 0 < np.square(rows - exact).sum() < 0.5 * np.square(exact).sum()
    expected = alone(checkpoint, probed(rows))
    with local_cluster(checkpoint, url, worker_options=("--table", "squeezed")) as cluster:
        with Client(cluster.lookup) as client:
            fetched = client.fetch("squeezed", PROMPT)
            np.testing.assert_allclose(rows[PROMPT], fetched, rtol=1e-5, atol=1e-6)
        with Client(cluster.workers) as client:
            assert expected == list(client.generate(PROMPT, 20, ignore_eos=True))


def test_x0_keeps_its_full_rank(checkpoint: Path, tmp_path: Path) -> None:
    """A worker without an input embedding is served correctly, also with scaled rows, which do not
    scale X0."""
    url = f"file://{tmp_path}"
    store = open_store(url)
    manifest = made_of(checkpoint, SCHEMES["rank and frequent"], embedding="yes").store(store)
    publish(store, manifest.ref)
    assert (5, True, manifest.width) == (manifest.num_blocks, manifest.has_x0, manifest.ranks[0])
    opened = open_checkpoint(checkpoint)
    rows = table_rows(opened, url, manifest.ref)
    with (
        local_cluster(checkpoint, url, worker_options=("--table", "squeezed")) as cluster,
        Client(cluster.workers) as client,
    ):
        for scale in (1.0, 0.5):
            expected = alone(checkpoint, probed(rows, scale, x0=1))
            assert expected == list(client.generate(PROMPT, 20, ignore_eos=True, row_scale=scale))


def test_frequent_rows_are_finer_and_the_ratio_is_met(checkpoint: Path) -> None:
    """Frequent tokens have rows of the finer codec, and the stored size meets the requested
    ratio."""
    exact = MemoryLLM(open_checkpoint(checkpoint)).rows()
    rows = made_of(checkpoint, SCHEMES["rank and frequent"]).rows()
    np.testing.assert_array_equal(exact[:16], rows[:16])  # COUNTS decreases with the id
    assert np.abs(exact[16:] - rows[16:]).max() > 0.01
    ratio = bytes_at_16_bit(planned(checkpoint)) / made_of(checkpoint, SCHEMES["ratio"]).bytes
    assert 6 <= ratio < 6.2


def test_ranks_follow_one_threshold(checkpoint: Path) -> None:
    """Every coefficient that a layer keeps has more energy than any that a layer drops."""
    ranks = made_of(checkpoint, Scheme("fp32", rank=0.3)).manifest.ranks
    assert round(0.3 * 4 * 96) == sum(ranks)
    exact, energies = MemoryLLM(open_checkpoint(checkpoint)).rows(), []
    weights = np.array([COUNTS.get(i, 0) + 0.5 for i in range(len(exact))])
    for block, rank in enumerate(ranks):
        centred = exact[:, block] - np.average(exact[:, block], axis=0, weights=weights)
        values = np.linalg.eigvalsh((centred * weights[:, None] / weights.sum()).T @ centred)[::-1]
        energies.append((values[rank - 1], values[rank]))
    assert max(dropped for _, dropped in energies) <= min(kept for kept, _ in energies) * (1 + 1e-4)


def test_a_frequent_token_has_more_weight(checkpoint: Path) -> None:
    """A token with a higher count is approximated better at the same rank."""
    exact, errors = MemoryLLM(open_checkpoint(checkpoint)).rows(), []
    for counts in ({}, {77: 1000}):
        rows = compress(planned(checkpoint), exact, counts, Scheme("fp32", rank=0.2)).rows()
        errors.append(np.square(rows[77] - exact[77]).sum())
    assert errors[1] < errors[0] / 10


def test_auxiliary_tables_are_deleted_with_their_table(checkpoint: Path, tmp_path: Path) -> None:
    """Auxiliary tables can't be deleted before their table and are deleted with it, unless another
    table needs them."""
    store = open_store(f"file://{tmp_path}")
    first = made_of(checkpoint, SCHEMES["rank and frequent"]).store(store)
    scheme = Scheme("int4", rank=0.25, frequent=16, frequent_codec="fp32")
    second = made_of(checkpoint, scheme).store(store)
    assert (first.frequent_rows, first.basis) == (second.frequent_rows, second.basis)
    assert 4 == len(store.refs())
    with pytest.raises(InUseError, match="is a part of"):
        delete(store, first.frequent_rows)
    delete(store, first.ref)
    assert {second.ref, second.frequent_rows, second.basis} == set(store.refs())
    delete(store, second.ref)
    assert [] == store.refs()


@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {"ratio"}))
def test_edits_of_a_compressed_table_are_stored_in_a_finer_codec(
    checkpoint: Path, tmp_path: Path, scheme: str
) -> None:
    """Edits override frequent rows and the basis, and a later overlay keeps their bits."""
    store = open_store(f"file://{tmp_path}")
    base = made_of(checkpoint, SCHEMES[scheme]).store(store)
    everything = np.arange(base.vocab_size, dtype=np.uint32)
    before = store.rows(base, everything)
    edited = [base.frequent[0] if base.frequent_rows else 3, 300]
    new = np.random.default_rng(0).standard_normal((2, *before.shape[1:]), np.float32)
    made = make_overlay(store, base.ref, np.array(edited), new)
    after = store.rows(made, everything)
    others = np.setdiff1d(everything, edited)
    np.testing.assert_array_equal(before[others], after[others])
    allowed = codec("int8").relative_error * np.abs(new).max() * 1.01
    np.testing.assert_allclose(new, after[edited], atol=allowed)
    for turn in range(3):
        made = make_overlay(store, made.ref, np.array([301 + turn]), new[:1])
        np.testing.assert_array_equal(after[:301], store.rows(made, everything)[:301])
    delete(store, made.ref)
    assert made.edits not in store.refs()


def test_edits_of_a_compressed_table_are_served(checkpoint: Path, tmp_path: Path) -> None:
    """A worker generates with the edited rows."""
    url = f"file://{tmp_path}"
    store, made = open_store(url), made_of(checkpoint, SCHEMES["rank and frequent"])
    base = made.store(store)
    rows = 3 * store.rows(base, np.array([9, 8, 7], np.uint32))
    manifest = make_overlay(store, base.ref, np.array(PROMPT[:3]), rows)
    publish(store, manifest.ref)
    opened = open_checkpoint(checkpoint)
    before, rows = (table_rows(opened, url, ref) for ref in (base.ref, manifest.ref))
    expected = alone(checkpoint, probed(rows))
    assert expected != alone(checkpoint, probed(before))
    with (
        local_cluster(checkpoint, url, worker_options=("--table", "squeezed")) as cluster,
        Client(cluster.workers) as client,
    ):
        assert expected == list(client.generate(PROMPT, 20, ignore_eos=True))


def test_a_version_can_not_be_stored_in_other_shards(checkpoint: Path, tmp_path: Path) -> None:
    """Storing a version with another number of shards is refused, because it would leave unnamed
    shards behind."""
    store, made = open_store(f"file://{tmp_path}"), made_of(checkpoint, SCHEMES["frequent"])
    made.store(store)
    *parts, (manifest, records) = made.tables
    with pytest.raises(InUseError, match="with 4 shards"):
        Compressed((*parts, (replace(manifest, num_shards=2), records))).store(store)
    assert made.store(store) == store.manifest(manifest.ref)


def test_auxiliary_tables_can_not_be_published(checkpoint: Path, tmp_path: Path) -> None:
    """Auxiliary tables can't be published."""
    store = open_store(f"file://{tmp_path}")
    base = made_of(checkpoint, SCHEMES["rank and frequent"]).store(store)
    with pytest.raises(InvalidArgumentError, match="is a part of"):
        publish(store, base.frequent_rows)


def test_a_table_may_lack_layers(checkpoint: Path, tmp_path: Path) -> None:
    """A table without some layers is smaller by them, whether built or compressed, and the worker
    runs without them."""
    url = f"file://{tmp_path}"
    store = open_store(url)
    manifest = made_of(checkpoint, Scheme("fp32"), absent=(1, 2)).store(store)
    publish(store, manifest.ref)
    assert ((0, 3), 2) == (manifest.layers, manifest.num_blocks)
    opened = open_checkpoint(checkpoint)
    expected = alone(checkpoint, probed(MemoryLLM(opened).rows(), absent_layers=(1, 2)))
    assert expected != alone(checkpoint)
    with (
        local_cluster(checkpoint, url, worker_options=("--table", "squeezed")) as cluster,
        Client(cluster.workers) as client,
    ):
        assert expected == list(client.generate(PROMPT, 20, ignore_eos=True))
    options = "--absent-layers 1,2 --codec fp32 --shards 4"
    built = tolhouse(f"build {checkpoint} --store {url} {options}").stdout.strip()
    np.testing.assert_array_equal(*(table_rows(opened, url, ref) for ref in (manifest.ref, built)))


def test_requests_in_a_batch_scale_rows_separately(checkpoint: Path, tmp_path: Path) -> None:
    """Scales and absent layers apply to each request separately, within one batch and with a shared
    prefix."""
    url = f"file://{tmp_path}"
    build_table(checkpoint, url)
    opened = open_checkpoint(checkpoint)
    model, rows, prompt = opened.model(), MemoryLLM(opened).rows(), PROMPT * 6
    wanted: list[dict] = [
        {},
        {"row_scale": 0.5},
        {"absent_layers": (0,)},
        {"row_scale": 0.0},
        {"row_scale": -1.5, "absent_layers": (2, 3)},
        {"layer_scales": (1, 0.5, 2, -1)},
        {"row_scale": 0.5, "absent_layers": (1,), "layer_scales": (1, 3, 2, 0)},
    ]

    expected = []
    for options in wanted:
        scales = np.array(options.get("layer_scales", (1,) * 4), np.float32)
        scales[list(options.get("absent_layers", ()))] = 0
        scaled = probed(rows * scales[:, None] * options.get("row_scale", 1.0))
        expected.append(list(greedy(model, prompt, 12, ignore_eos=True, rows=scaled)))
    assert len(wanted) == len(set(map(tuple, expected)))
    with local_cluster(checkpoint, url) as cluster, Client(cluster.workers) as client:
        for _ in range(2):
            running = [client.generate(prompt, 12, ignore_eos=True, **more) for more in wanted]
            first = [next(iterator) for iterator in running]  # all requests are in the batch
            assert expected == [[token, *rest] for token, rest in zip(first, running, strict=True)]
        bad_scales = ({"layer_scales": scales} for scales in ([17.0] * 4, [1.0], [1.0] * 5))
        nan = float("nan")
        for bad in ({"row_scale": 17.0}, {"row_scale": nan}, {"absent_layers": [4]}, *bad_scales):
            with pytest.raises(InvalidArgumentError, match=r"row_scale|layer_scales"):
                list(client.generate(prompt, 1, **bad))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (Scheme("int8", rank=0.5, ratio=2), "can't both be given"),
        (Scheme("int8", rank=1.5), "from 0 to 1, not 1.5"),
        (Scheme("int8", frequent=100_000), "from 0 to .* may be frequent"),
        (Scheme("int9"), "codec 'int9' is unknown"),
        (Scheme("int8", ratio=1000), "a ratio of 1000 is out of reach: .* reaches 2"),
        (Scheme("int8", ratio=1), "over 1, not 1"),
        (
            Scheme("int8", frequent=16),
            "no finer than int8; .* low rank: fp32 or fp16 or bf16 or none",
        ),
        (Scheme("fp32", frequent=16, frequent_codec="fp32"), "allowed without low rank: none"),
    ],
)
def test_impossible_schemes_are_refused(checkpoint: Path, scheme: Scheme, expected: str) -> None:
    """Impossible schemes are refused before rows or counts are computed."""
    with pytest.raises(InvalidArgumentError, match=expected):
        check(planned(checkpoint), scheme)
    with pytest.raises(InvalidArgumentError, match=expected):
        made_of(checkpoint, scheme)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (Scheme("bf16", rank=1, frequent=16), Scheme("bf16")),
        (Scheme("int8", ratio=1.5, frequent=16), Scheme("int8")),
        (Scheme("int4", ratio=2, frequent=16), Scheme("int4", frequent=16)),
    ],
)
def test_a_basis_of_full_rank_is_omitted(
    checkpoint: Path, scheme: Scheme, expected: Scheme
) -> None:
    """A basis of full rank and frequent rows without a finer codec are omitted, so that the table
    is that of the codec alone."""
    assert made_of(checkpoint, expected).manifest == made_of(checkpoint, scheme).manifest


def test_the_largest_ratio_is_reached(checkpoint: Path) -> None:
    """The largest ratio that the error names is reached with one coefficient per layer."""
    with pytest.raises(InvalidArgumentError, match="out of reach") as caught:
        made_of(checkpoint, Scheme("int8", ratio=1000))
    furthest = float(re.search(r"reaches ([\d.]+)", str(caught.value))[1]) - 0.01
    made = made_of(checkpoint, Scheme("int8", ratio=furthest))
    assert (1, 1, 1, 1) == made.manifest.ranks
    assert bytes_at_16_bit(planned(checkpoint)) / made.bytes >= furthest


def test_low_rank_rows_are_not_recomputed(checkpoint: Path, tmp_path: Path) -> None:
    """A worker that would have to recompute low-rank rows fails at start."""
    url = f"file://{tmp_path}"
    store = open_store(url)
    publish(store, made_of(checkpoint, SCHEMES["rank"], "tiny-memory").store(store).ref)
    command = f"worker {checkpoint} --rows {url} --listen 127.0.0.1:0 --fallback recompute"
    message = "fallback `recompute` cannot compute the coefficients of low-rank table"
    assert message in tolhouse(command, code=1).stderr


# the commands


def test_commands_compress_and_evaluate(checkpoint: Path, tmp_path: Path) -> None:
    """A compressed and published table is evaluated, as text and as JSON."""
    url, text = f"file://{tmp_path / 'tables'}", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 30, encoding="utf-8")
    options = "--codec int4 --size-ratio 6 --frequent-rows 8 --publish"
    done = tolhouse(f"compress {checkpoint} {options} --store {url} --corpus {text}")
    assert "1/6." in done.stderr
    common = f"eval {checkpoint} --text {text} --rows {url}"
    plain, squeezed, through, half, old = (
        json.loads(tolhouse(f"{common} {more} --json").stdout)
        for more in (
            *("", "--table tiny-memory", "--through int8"),
            *("--row-scale 0.5 --absent-layers 1,2", "--alpha 0.5 --without 1,2"),
        )
    )
    assert half == old
    assert plain["tokens"] == squeezed["tokens"] > 100
    assert 10 == len(plain["deciles"])
    assert plain["perplexity"] == pytest.approx(np.exp(plain["loss"]))
    assert plain["loss"] == pytest.approx(np.mean([d["loss"] for d in plain["deciles"]]), rel=0.02)
    assert 0 < abs(through["loss"] - plain["loss"]) < abs(squeezed["loss"] - plain["loss"])
    assert plain["loss"] != half["loss"]
    assert not {"kl", "top1_agreement"} & set(plain)
    assert 0 < through["kl"] < squeezed["kl"] < half["kl"]
    assert 1 >= through["top1_agreement"] >= half["top1_agreement"] > 0
    assert "perplexity" in tolhouse(f"{common} --most-tokens 50").stdout
    stdout = tolhouse(f"{common} --most-tokens 50 --through int4").stdout
    assert "beside the checkpoint's own rows: KL 0." in stdout


@pytest.mark.parametrize(
    ("options", "frequent", "expected"),
    [
        ("--codec fp16", False, "1/1.00 of 16 bit"),
        ("--codec int8", False, "1/1."),
        ("--codec int4", True, "1/3."),
        ("--codec int4 --size-ratio 2", True, "int4 alone meets --size-ratio: rows have their"),
        ("--codec int8 --rank-share 1", False, "--rank-share keeps all of it: rows have their"),
        ("--codec int8 --rank-share 0.5", True, "ranks "),
    ],
)
def test_default_frequent_rows_are_finer(
    checkpoint: Path, tmp_path: Path, options: str, frequent: bool, expected: str
) -> None:
    """Frequent rows are stored only with a finer codec, and a basis of full rank is omitted."""
    url = f"file://{tmp_path}"
    done = tolhouse(f"compress {checkpoint} --store {url} --corpus README.md {options}")
    assert expected in done.stderr
    assert frequent == bool(open_store(url).manifest(done.stdout.strip()).frequent_rows)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--table nothing", "table 'nothing' is not published"),
        ("--absent-layers 9", "there is no layer 9"),
        ("--absent-layers one", "--absent-layers (TOLHOUSE_CLIENT_ABSENT_LAYERS)"),
        ("--row-scale nan", "--row-scale (TOLHOUSE_CLIENT_ROW_SCALE)"),
        ("--row-scale 1e300", "less than or equal to 16; 1e+300"),
        ("--text no-such-file", "no corpus at no-such-file"),
    ],
)
def test_wrong_options_of_eval_are_refused(
    checkpoint: Path, tmp_path: Path, arguments: str, expected: str
) -> None:
    """One line of error names the wrong option and the reason."""
    command = f"eval {checkpoint} --rows file://{tmp_path} {arguments}"
    assert expected in tolhouse(command, code=1).stderr


def test_an_auxiliary_table_is_not_evaluated(checkpoint: Path, tmp_path: Path) -> None:
    """An auxiliary table can't be evaluated, because it has no row for each token."""
    url = f"file://{tmp_path}"
    made = made_of(checkpoint, SCHEMES["rank and frequent"]).store(open_store(url))
    for part in made.auxiliary:
        done = tolhouse(f"eval {checkpoint} --table {part} --rows {url}", code=1)
        assert "may be an auxiliary table" in done.stderr


def test_the_loss_equals_the_model_s(checkpoint: Path) -> None:
    """Losses equal those of one forward per window."""
    opened = open_checkpoint(checkpoint)
    model = opened.model()
    ids = np.random.default_rng(0).integers(0, opened.config.vocab_size, 256 + 41)
    found = evaluate(model, ids)
    assert 256 + 40 == len(found.losses)
    with torch.inference_mode():
        expected = []
        for start, size in ((0, 256), (256, 40)):
            window = torch.tensor(ids[start : start + size + 1])
            logits = model(window[:-1], torch.arange(size), NoCache(size), model.rows(window[:-1]))
            expected.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    np.testing.assert_allclose(torch.cat(expected).numpy(), found.losses, rtol=1e-4)
