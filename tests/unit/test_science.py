"""Figures in the documents equal those of the stored curves and measurements."""

import re
from pathlib import Path

import pytest
from tolhouse.train.corpus import SKIPPED, standard_library

from loadtest import text
from loadtest.science import abroad, kinds
from loadtest.science.__main__ import compared
from loadtest.science.codecs import Model

ROOT = Path(__file__).parent.parent.parent
SCIENCE = (ROOT / "SCIENCE.md").read_text(encoding="utf-8")


def test_the_table_of_kinds_follows_from_the_curves() -> None:
    """SCIENCE.md has the table of kinds and their order for each seed, as `make science` computes
    them from the curves."""
    table, order = compared().split("\n\n")
    assert table in SCIENCE
    assert order in SCIENCE


def test_a_trial_prints_its_own_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With another recipe, table and order are those of its runs, not those of recipe small."""
    folder = tmp_path / "runs/kinds/tiny"
    folder.mkdir(parents=True)
    for kind, loss in (("memory", 1), ("base", 2)):
        text = f"step,held_out_loss\n1,{loss}\n"
        (folder / f"{kind}-0.csv").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kinds", "--recipe", "tiny", "--print", "--seeds", "1"])
    kinds.main()
    out = capsys.readouterr().out
    assert "- FFN-C swiglu, seed 0: memory < base\n" in out
    assert '{"perplexity": {"memory": 2.718, "base": 7.389}}' in out


def test_compression_is_measured_on_two_kinds_of_text(checkpoint: Path) -> None:
    """Without WikiText, compression is compared on English text that every Python has and training
    excludes."""
    _, path = prose = text.foreign(Path("no such file"))
    assert path.is_file()
    assert path.relative_to(standard_library()).parts[0] in SKIPPED
    found = abroad.measure(Model(checkpoint), 600, prose)
    for schemes in found.values():
        assert {len(schemes["int4"].losses)} == {len(s.losses) for s in schemes.values()}
        kl = [schemes[name].kl for name in ("bf16", "int8", "int4", "int4 low rank, 8x")]
        assert sorted(kl) == kl
    assert found["abroad"]["int4, by it"].kl < found["abroad"]["int4"].kl
    lines = abroad.table(found).splitlines()
    assert {7} == {line.count("|") - 1 for line in lines}
    assert len(lines) == 2 + len(found["abroad"])


@pytest.mark.parametrize("name", ["demo-memory", "demo-flex"])
def test_the_held_out_loss_of_a_model_is_the_same_everywhere(name: str) -> None:
    """A model card's held-out loss equals that in docs/benchmarks.md and in SCIENCE.md."""
    card = (ROOT / "models" / name / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"held-out loss \| (\d\.\d{4}) .* over all 86,718 held-out tokens", card)
    assert stated, card
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    column = 2 if name == "demo-memory" else 5
    (row,) = (line for line in benchmarks.splitlines() if line.startswith("| `fp32` |"))
    assert stated[1] == row.split("|")[column + 1].strip()
    assert name == "demo-flex" or f"{stated[1]} nats" in SCIENCE
