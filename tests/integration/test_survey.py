"""The survey of a model's memory and its report."""

import json
import os
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tolhouse.analysis.explain import coefficients, shared_by
from tolhouse.analysis.report import report
from tolhouse.analysis.survey import OUTLIER, k_means, survey
from tolhouse.errors import InvalidArgumentError
from tolhouse.files import replace_file
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.testing import tiny_model

from tests.commands import tolhouse


def test_clusters_are_found() -> None:
    """Four bundles of vectors become four clusters with nearly all of the variance, and noise does
    not."""
    generator = torch.Generator().manual_seed(1)
    bundles = torch.eye(16)[:4].repeat_interleave(50, 0) + 0.01 * torch.randn(
        200, 16, generator=generator
    )
    found = [k_means(torch.nn.functional.normalize(bundles, dim=1), 12, seed) for seed in range(3)]
    for cluster, explained in found:
        assert explained > 0.98
        for a in range(0, 200, 50):
            for b in range(a + 50, 200, 50):
                assert not set(cluster[a : a + 50].tolist()) & set(cluster[b : b + 50].tolist())
    _, explained = k_means(
        torch.nn.functional.normalize(torch.randn(2000, 64, generator=generator), dim=1), 12, 0
    )
    assert explained < 0.2


def test_figures_follow_their_definitions(checkpoint: Path) -> None:
    """Outliers, norms and ranks of a layer equal values computed from the model."""
    opened = open_checkpoint(checkpoint)
    found = survey(opened, 8, 0)
    model, everything = opened.model(), torch.arange(opened.config.vocab_size)
    assert ("probes" in found, 4) == (False, len(found["layers"]))
    for layer, entry in enumerate(found["layers"]):
        c = coefficients(model, layer, everything).numpy()
        rms = np.sqrt((c**2).mean(1, keepdims=True))
        assert entry["outliers"] == pytest.approx(
            (np.abs(c) > OUTLIER * rms).sum(1).mean(), abs=1e-3
        )
        rows = model.rows(everything)[layer].numpy()
        energy = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
        share = np.cumsum(energy) / energy.sum()
        assert share[entry["rank_90"] - 1] >= 0.9 - 1e-4 > share[entry["rank_90"] - 2] - 1e-3
        assert entry["mean_norm"] == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-3)
        assert 0 < entry["clustering"] < 1


def test_tokens_that_share_a_key_have_its_largest_coefficients(checkpoint: Path) -> None:
    """Tokens that share a key are those with its largest coefficients."""
    model = open_checkpoint(checkpoint).model()
    c = coefficients(model, 1, torch.arange(model.config.vocab_size)).abs()
    keys = torch.tensor([[3, 7], [7, 0]])
    found = shared_by(model, 1, keys, 3)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert c[:, keys[place]].topk(3).indices.tolist() == found[place].tolist()


def test_the_survey_contains_probes(checkpoint: Path) -> None:
    """α = 1 changes nothing, and each layer is removed once."""
    probes = survey(open_checkpoint(checkpoint), 8, 300)["probes"]
    assert (1.0, 4, 300) == (
        probes["row_scale"]["1"],
        len(probes["without_layer"]),
        probes["tokens"],
    )
    assert len(set(probes["row_scale"].values())) > 4


def test_the_report_is_one_file(checkpoint: Path, tmp_path: Path) -> None:
    """The report is one file including its plots, and escapes the text of tokens."""
    page = tmp_path / "report.html"
    options = f"--clusters 8 --probe-tokens 300 --html {page} --json"
    done = tolhouse(f"explain {checkpoint} '<b>def' {options}")
    assert "<" in "".join(entry["token"] for entry in json.loads(done.stdout))
    text = page.read_text(encoding="utf-8")
    assert 5 == text.count("<svg")
    assert "&lt;" in text
    assert not re.search(r"""<script|<b>|(src|href)\s*=\s*["']http""", text)


def test_a_layer_without_effect_is_plotted(checkpoint: Path) -> None:
    """A layer without effect and a model of one layer are plotted without warnings."""
    found = survey(open_checkpoint(checkpoint), 8, 300)
    found["layers"], found["probes"]["without_layer"] = found["layers"][:1], [0.99]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 5 == report(found, []).count("<svg")


def test_invalid_surveys_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Models without a memory, too many clusters and too few tokens are refused."""
    with pytest.raises(InvalidArgumentError, match="no token memory"):
        survey(open_checkpoint(tiny_model(tmp_path / "base", "base")), 8, 0)
    with pytest.raises(InvalidArgumentError, match="the number of clusters must be"):
        survey(open_checkpoint(checkpoint), 100_000, 0)
    with pytest.raises(InvalidArgumentError, match="at least 2 tokens"):
        survey(open_checkpoint(checkpoint), 8, 1)


def test_a_table_s_rows_can_be_surveyed(checkpoint: Path, tmp_path: Path) -> None:
    """For a layer that a table lacks, the survey shows zero norms, and for the others the
    model's."""
    url, made = f"file://{tmp_path}", "--codec fp32 --frequent-rows 0 --absent-layers 1"
    options = f"{made} --embedding yes --publish --corpus README.md"
    tolhouse(f"compress {checkpoint} --store {url} {options}")
    command = f"explain {checkpoint} --clusters 4 --probe-tokens 100 --json"
    mine, its = (
        json.loads(tolhouse(f"{command} {more}").stdout)
        for more in ("", f"--table tiny-memory --rows {url}")
    )
    norms = [layer["mean_norm"] for layer in its["layers"]]
    assert [*norms[:1], *norms[2:]] == pytest.approx(
        [layer["mean_norm"] for n, layer in enumerate(mine["layers"]) if n != 1], rel=1e-2
    )
    assert 0 == norms[1]
    assert its["probes"]["without_layer"][1] == 1
    assert its["definitions"] == mine["definitions"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("{}", "--html", "no-folder/report.html"), "no-folder/report.html can't be written"),
        (("{}", "--explorer", "no-folder/memory.npz"), "No such file"),
        (("{}", "--html", "tests"), "tests is a folder"),
        (("{}", "--explorer", "tests"), "tests is a folder"),
        (("{}", "--html", "/proc/report.html"), "/proc/report.html can't be written"),
        (("tiny-memory@0123456789abcdef",), "is a table, without keys"),
        (("{}", "def", "--table", "nothing", "--store", "file:///nowhere"), "nowhere"),
        (("{}", b"\xff\xfe"), "is not UTF-8"),
    ],
)
def test_invalid_explanations_are_refused(
    checkpoint: Path, arguments: tuple, expected: str
) -> None:
    """One line of error names the problem."""
    given = [str(checkpoint) if a == "{}" else a for a in arguments]
    assert expected in tolhouse("explain", *given, code=1).stderr


def test_output_files_may_be_links_or_pipes(tmp_path: Path) -> None:
    """A symbolic link stays a link to a new file, and a pipe stays a pipe."""
    (tmp_path / "folder").mkdir()
    target, link, pipe = tmp_path / "folder" / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    for data in (b"new", b"newer"):
        replace_file(link, data)
        assert (data, True, [target]) == (
            target.read_bytes(),
            link.is_symlink(),
            [*target.parent.iterdir()],
        )
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    replace_file(pipe, b"data")
    reader.join(30)
    assert ([b"data"], True) == (read, pipe.is_fifo())
    with pytest.raises(InvalidArgumentError, match="/proc/target cannot be written"):
        replace_file(Path("/proc/target"), b"")


def test_a_failed_export_keeps_the_existing_file(tmp_path: Path) -> None:
    """A failed export does not change an existing file."""
    (tmp_path / "memory.npz").write_bytes(b"precious")
    base = tiny_model(tmp_path / "base", "base")
    tolhouse(f"explain {base} --explorer {tmp_path}/memory.npz", code=1)
    assert b"precious" == (tmp_path / "memory.npz").read_bytes()
