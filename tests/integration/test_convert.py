"""Conversion of dense models: the closed form, the choice of layers, and the use of tables."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from redis import Redis
from tolhouse import Client
from tolhouse.analysis.evaluate import TableRows, probed, read_by, read_text, table_rows
from tolhouse.build.convert import WINDOW, choose, conversion, rank, shrunk, windows
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.losses import evaluate
from tolhouse.model.transformer import NoCache
from tolhouse.store.base import open_store
from tolhouse.testing import local_cluster, process, redis_server, tiny_model, wait_until

from tests.commands import LOCAL, start, tolhouse

TEXT = Path(__file__)
PROMPT = [5, 17, 40, 3, 99, 7, 300, 5]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose query heads share key-value heads."""
    path = tmp_path_factory.mktemp("checkpoints") / "dense"
    return tiny_model(path, "base", num_key_value_heads=2)


@pytest.fixture(scope="module")
def converted(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The dense model with layers 1 and 3 converted: its checkpoint, store and table."""
    folder = tmp_path_factory.mktemp("converted")
    url = f"file://{folder}/tables"
    done = tolhouse(
        "convert", dense, "--text", TEXT, "--layers", "3,1", "--out", folder / "tiny-converted",
        "--codec", "fp32", "--publish", "--store", url,
    )  # fmt: skip
    assert "2 of 4 layers converted" in done.stderr
    return folder / "tiny-converted", url, done.stdout.strip()


def test_served_probabilities_equal_those_in_process(converted: tuple[Path, str, str]) -> None:
    """A worker with rows over TCP computes the log probabilities of the model in this process."""
    path, url, ref = converted
    checkpoint = open_checkpoint(path)
    assert (1, 3) == checkpoint.config.flex_layers
    rows, ids = table_rows(checkpoint, url, ref), torch.tensor(PROMPT)
    with torch.inference_mode():
        positions, cache = torch.arange(len(ids)), NoCache(len(ids))
        logits = checkpoint.model()(ids, positions, cache, probed(rows)(ids))
    expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].tolist()
    with local_cluster(path, url) as cluster, Client(cluster.workers) as client:
        (output, *_) = client.replies(PROMPT, 1, prompt_logprobs=0)
        assert output.prompt_logprobs
        assert expected == pytest.approx(list(output.prompt_logprobs.chosen), abs=1e-5)
        worker = client.describe_worker()
        assert ("", ()) == ("".join(worker.altered), tuple(worker.absent_layers))


def test_a_table_has_zero_rows_for_unseen_tokens(converted: tuple[Path, str, str]) -> None:
    """A token that the text lacks has a zero row, and other tokens have a row in each block."""
    path, url, ref = converted
    seen = np.unique(read_text(open_checkpoint(path), TEXT))
    store = open_store(url)
    manifest = store.manifest(ref)
    assert ("ffn.1", "ffn.3") == manifest.blocks
    rows = store.rows(manifest, np.arange(manifest.vocab_size, dtype=np.uint32))
    unseen = np.setdiff1d(np.arange(manifest.vocab_size), seen)
    assert len(unseen)
    assert not rows[unseen].any()
    assert rows[list(manifest.frequent[:50])].any(-1).all()


def test_a_converted_layer_is_a_ridge_solution_and_shrunk_means(
    dense: Path, tmp_path: Path
) -> None:
    """FFN-C solves the ridge equations, and rows are means of its residuals, shrunk by count."""
    checkpoint = open_checkpoint(dense)
    ids = read_text(checkpoint, TEXT)[: 16 * WINDOW]
    with conversion(checkpoint, ids, tmp_path, 0, WINDOW) as made:
        new = made.statistics.replacement(0, torch.float32)
        text = torch.cat(_texts(ids, made.held))
        x, y = _inputs_and_outputs(checkpoint, text)
    assert len(text) == int(made.statistics.counts.sum())
    weight, bias = (p.detach().double() for p in new.ffn_c.maps[0].parameters())
    centred = x - x.mean(0)
    ridge = 1e-3 * centred.square().mean() * torch.eye(x.shape[1])
    gradient = weight @ (centred.T @ centred / len(x) + ridge) - (y - y.mean(0)).T @ centred / len(
        x
    )
    assert gradient.abs().max() < 1e-5 * y.abs().max()
    torch.testing.assert_close(bias, (y - x @ weight.T).mean(0), atol=1e-6, rtol=1e-4)
    residuals = y - x @ weight.T - bias
    tokens, places = text.unique(return_inverse=True)
    sums = torch.zeros(len(tokens), x.shape[1]).double().index_add_(0, places, residuals)
    rows = shrunk(sums, places.bincount().double(), float(residuals.square().sum()))
    torch.testing.assert_close(new.rows_SD.double(), rows, atol=1e-6, rtol=1e-3)


def _texts(ids: np.ndarray, held: torch.Tensor) -> list[torch.Tensor]:
    """Return the windows of the text that are not held out."""
    out = {tuple(window.tolist()) for window in held}
    windows = torch.from_numpy(ids).split(held.shape[1])
    return [window for window in windows if tuple(window.tolist()) not in out]


def _inputs_and_outputs(
    checkpoint: Checkpoint, text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    model, found = checkpoint.model(), []
    hook = model.layers[0].mlp.register_forward_hook(lambda _, x, y: found.append((x[0], y)))
    length = WINDOW
    with torch.inference_mode():
        positions = torch.arange(length).repeat(len(text) // length)
        model.hidden(text, positions, NoCache(length), torch.empty(0))
    hook.remove()
    return found[0][0].double(), found[0][1].double()


@pytest.mark.parametrize("most", [0, 600])
def test_perplexity_is_measured_on_later_text(most: int) -> None:
    """Held-out windows follow the text of the statistics, spread over what is left of it."""
    text, held = windows(np.arange(100 * WINDOW + 5), most, 4 * WINDOW)
    assert (most // WINDOW or 96) == len(text)
    firsts = held[:, 0] // WINDOW
    assert [len(text), 99] == [firsts[0], firsts[-1]]
    assert 4 == len(firsts.unique())
    assert (held.diff(dim=1) == 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_converts_as_a_cpu_does(dense: Path, tmp_path: Path) -> None:
    """On a GPU the weights, the rows and the perplexity are those of a CPU, within rounding."""
    checkpoint = open_checkpoint(dense)
    ids, found = read_text(checkpoint, TEXT), []
    for device in ("cpu", "cuda"):
        given = checkpoint, ids, tmp_path, 0, 4 * WINDOW, torch.device(device)
        with conversion(*given) as made:
            new = made.statistics.replacement(1, torch.float32)
            found.append([*new.ffn_c.parameters(), new.rows_SD, made.given([1, 3]).ratio])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)
    url = f"file://{tmp_path}/tables"
    given = ("--text", TEXT, "--layers", "1", "--out", tmp_path / "out", "--store", url)
    tolhouse("convert", dense, *given, "--device", "cuda")
    assert (1,) == open_checkpoint(tmp_path / "out").config.flex_layers


def test_means_are_shrunk_by_the_ratio_of_variances() -> None:
    """The factor of a token with n occurrences is n / (n + within / between), and no variance
    between tokens gives zero rows."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 4, 16, 64] * 200)
    means = 3 * torch.randn(len(counts), 8, generator=generator).double()
    places = torch.arange(len(counts)).repeat_interleave(counts)
    noise = 2 * torch.randn(len(places), 8, generator=generator).double()

    def rows_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sums = torch.zeros(len(counts), 8).double().index_add_(0, places, values)
        return sums, shrunk(sums, counts.double(), float(values.square().sum()))

    sums, rows = rows_of(means[places] + noise)
    expected = sums / (counts[:, None] + 4 / 9)
    assert 0.02 > (rows - expected).norm() / expected.norm()
    assert (rows - means).norm() < (sums / counts[:, None] - means).norm()
    _, rows = rows_of(noise - noise.mean(0))
    assert 0.2 * means.norm() > rows.norm()


def test_nothing_converted_equals_the_dense_model(dense: Path, tmp_path: Path) -> None:
    """With --layers none, logits have the bits of the dense model, and there is no table."""
    out, url = tmp_path / "same", f"file://{tmp_path}/tables"
    done = tolhouse(
        "convert", dense, "--text", TEXT, "--layers", "none", "--out", out, "--store", url
    )
    assert str(out) == done.stdout.strip()
    assert not list(open_store(url).refs())
    ids = torch.arange(100)
    logits = [
        open_checkpoint(path).model()(ids, ids, NoCache(100), torch.empty(0))
        for path in (dense, out)
    ]
    assert torch.equal(*logits)


def test_layers_are_chosen_by_measured_perplexity(dense: Path, tmp_path: Path) -> None:
    """Chosen layers keep to the budget, and the reported ratio is that of the written model."""
    checkpoint, url = open_checkpoint(dense), f"file://{tmp_path}/tables"
    ids = read_text(checkpoint, TEXT)
    with conversion(checkpoint, ids, tmp_path, 0, 4 * WINDOW) as made:
        trials = made.trials()
        single = rank(trials)
        middle = sorted(single.values())[1]
        choice = choose(trials, single, max(middle - 1, 0.001))
        assert choice.steps
        assert choice.ratio <= max(middle, 1.001)
        one = made.write(choice, tmp_path / "chosen", "", "fp32", open_store(url))
        held = made.held
    assert choice.layers == one.checkpoint.config.flex_layers
    assert one.manifest
    rows = probed(table_rows(one.checkpoint, url, one.manifest.ref))
    losses = [
        np.mean([evaluate(model, window.numpy(), rows_).loss for window in held])
        for model, rows_ in ((checkpoint.model(), None), (one.checkpoint.model(), rows))
    ]
    assert choice.ratio == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-4)


def test_a_table_can_be_copied_compressed_and_edited(
    converted: tuple[Path, str, str], tmp_path: Path
) -> None:
    """Copies, compressed tables and overlays of a converted model's table are served."""
    path, url, ref = converted
    shutil.copytree(url.removeprefix("file://"), tmp_path / "tables")
    copy = f"file://{tmp_path}/tables"
    edited = tolhouse("overlay", ref, "--copy", "5=17", "--store", copy).stdout.strip()
    given = ("--store", copy, "--corpus", TEXT)
    small = tolhouse("compress", path, "--name", "small", "--codec", "int8", *given, "--publish")
    low = tolhouse("compress", path, "--name", "low", "--rank-share", "0.5", *given)
    checkpoint = open_checkpoint(path)
    original, changed, coarse, ranked = (
        table_rows(checkpoint, copy, table)[:, [1, 3]]
        for table in (ref, edited, small.stdout.strip(), low.stdout.strip())
    )
    assert np.array_equal(original[17], changed[5])
    errors = [np.linalg.norm(rows - original) for rows in (coarse, ranked)]
    assert 0 < errors[0] < 0.02 * np.linalg.norm(original)
    assert errors[0] < errors[1] < np.linalg.norm(original)
    with (
        local_cluster(path, copy, worker_options=("--table", "small")) as cluster,
        Client(cluster.workers) as client,
    ):
        assert 4 == len(list(client.generate(PROMPT, 4, ignore_eos=True)))


def test_evaluation_uses_the_rows_of_the_table(converted: tuple[Path, str, str]) -> None:
    """`eval` measures a converted model with the rows of its table, and compares it with other
    rows only where options ask for them."""
    path, url, ref = converted
    given = ("eval", path, "--text", TEXT, "--most-tokens", 200, "--table", ref, "--rows", url)
    plain, coarse = (
        json.loads(tolhouse(*given, *more, "--json").stdout) for more in ((), ("--through", "int4"))
    )
    checkpoint = open_checkpoint(path)
    ids = read_text(checkpoint, TEXT, 200)
    expected = evaluate(checkpoint.model(), ids, probed(table_rows(checkpoint, url, ref)))
    assert expected.loss == pytest.approx(plain["loss"], abs=1e-6)
    assert "kl" not in plain
    assert 0 < coarse["kl"] < 0.01


def test_evaluation_reads_only_the_rows_of_its_text(converted: tuple[Path, str, str]) -> None:
    """Rows are read from the table as tokens ask for them, each distinct token once."""
    path, url, ref = converted
    checkpoint, asked = open_checkpoint(path), []
    with Client(url) as client:
        stored = TableRows(checkpoint, client, ref)

        def read(ids: np.ndarray) -> np.ndarray:
            asked.extend(ids.tolist())
            return stored(ids)

        rows = read_by(read)(torch.tensor(PROMPT))
    assert sorted(set(PROMPT)) == asked
    expected = probed(table_rows(checkpoint, url, ref))(torch.tensor(PROMPT))
    assert torch.equal(expected, rows)
    assert (4, len(PROMPT), checkpoint.config.hidden_size) == rows.shape


def test_a_lost_table_is_refilled_from_a_copy(converted: tuple[Path, str, str]) -> None:
    """A lookup service restores a converted table, which nothing can compute again, from files."""
    _, url, ref = converted
    ids = range(300)
    with redis_server() as redis, Client(url) as kept:
        expected = kept.fetch(ref, ids).tobytes()
        given = ("--store", redis, "--refill", url)
        with process("lookup", *given, *LOCAL) as lookup, Client(lookup.address) as client:
            wait_until(lambda: ref in [table.ref for table in client.tables()])
            assert expected == client.fetch(ref, ids).tobytes()
            Redis.from_url(redis).flushall()
            wait_until(lambda: client.fetch(ref, ids).tobytes() == expected)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("build", "is converted: its rows come from no FFN-M"),
        ("eval", "is converted, so it needs the rows of a --table"),
        ("explain", "is converted, so it has no FFN-M to explain"),
        ("generate", "is converted, so it needs a --worker with its table"),
        ("compress", "no table of the converted model"),
        ("worker", "fallback `recompute` cannot compute the rows of the converted model"),
    ],
)
def test_a_converted_model_refuses_what_needs_ffn_m(
    command: str, why: str, converted: tuple[Path, str, str], tmp_path: Path
) -> None:
    """Commands that compute rows refuse a converted checkpoint, and say what to do."""
    path, url, _ = converted
    more = {
        "build": ("--store", f"file://{tmp_path}"),
        "eval": ("--text", TEXT),
        "generate": ("import",),
        "compress": ("--store", f"file://{tmp_path}"),
        "worker": ("--rows", url, "--fallback", "recompute", "--listen", "127.0.0.1:0"),
    }
    assert why in tolhouse(command, path, *more.get(command, ()), code=1).stderr


def test_a_table_of_another_model_is_refused(
    dense: Path, converted: tuple[Path, str, str], tmp_path: Path
) -> None:
    """A worker refuses the table of a model with other converted layers."""
    _, url, ref = converted
    other, mine = tmp_path / "other", f"file://{tmp_path}/tables"
    given = ("--text", TEXT, "--layers", "0", "--out", other)
    tolhouse("convert", dense, *given, "--store", mine)
    done = tolhouse("worker", other, "--rows", url, "--table", ref, code=1)
    assert "was built from model" in done.stderr


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("--layers", "1,4"), "there is no layer 4; allowed are auto, none, or layers from 0 to 3"),
        (("--layers", "all"), "allowed are auto, none, or layers from 0 to 3"),
        (("--budget", "0"), "budget"),
        (("--out", "{dense}"), "give a new or empty folder"),
        (("--text", "/nowhere"), "/nowhere"),
        (("--device", "tpu"), "is not on this machine"),
        (("--store", "file:///tmp/a,file:///tmp/b"), "must be one store"),
    ],
)
def test_bad_options_are_refused(
    given: tuple[str, str], why: str, dense: Path, tmp_path: Path
) -> None:
    """Options that are out of range are refused before the computation."""
    options = {"--text": str(TEXT), "--out": str(tmp_path / "out"), given[0]: given[1]}
    options.setdefault("--store", f"file://{tmp_path}")
    words = [word.format(dense=dense) for pair in options.items() for word in pair]
    popen = start("convert", dense, *words)
    assert why in popen.communicate(timeout=60)[1]
    assert popen.returncode in (1, 2)


def test_a_model_with_rows_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Only dense models are converted."""
    done = tolhouse("convert", checkpoint, "--text", TEXT, "--out", tmp_path / "out", code=1)
    assert "is of kind memory: only dense models can be converted" in done.stderr
