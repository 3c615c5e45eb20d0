"""Gates of the compressed memory: training, and the file that a worker reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tolhouse.engine.kv_policy import Compressive
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.config import preset
from tolhouse.testing import process, tiny_model
from tolhouse.train.gates import GatedMemory, loss_of, train_gates
from tolhouse.worker.run import gate_of

from tests.commands import LOCAL, tolhouse
from tests.engines import Request, engine_of, serve


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "numbers.txt"
    words = np.random.default_rng(0).integers(0, 1000, 2000)
    file.write_text(" ".join(map(str, words)), encoding="utf-8")
    return file


OPTIONS = "--kv-sinks 2 --kv-window 24 --sequence-tokens 64 --steps 4 --batch-sequences 2"


@pytest.mark.parametrize("kind", ["base", "checkpoint"])
def test_a_worker_reads_trained_gates(
    kind: str, request: pytest.FixtureRequest, text: Path, tmp_path: Path
) -> None:
    """`tolhouse train-gates` writes gates that `--kv-gate` accepts, the same for the same seed, and
    prints the held-out loss of each policy."""
    path, files = request.getfixturevalue(kind), [tmp_path / name for name in ("first", "second")]
    shape = open_checkpoint(path).config
    for file in files:
        ended = tolhouse(f"train-gates {path} --text {text} --out {file} {OPTIONS}")
        assert str(file) == ended.stdout.strip()
        assert all(f"\n  {name} " in ended.stderr for name in ("window", "compressive", "full"))
    first, second = (gate_of(str(file), shape) for file in files)
    assert first.equal(second)
    assert (shape.num_hidden_layers, shape.num_attention_heads) == first.shape
    assert first.ne(0.5).any()
    serve(engine_of(path, policy=Compressive(2, 24, first)), one := Request(range(1, 80), 3))
    assert 3 == len(one.tokens)


def test_training_logs_its_progress(base: Path, text: Path, tmp_path: Path) -> None:
    """Without a terminal, `tolhouse train-gates` logs the loss at every tenth of its steps."""
    line = f"train-gates {base} --text {text} --out {tmp_path / 'gates'} {OPTIONS} --steps 20"
    logged = [json.loads(one) for one in tolhouse(line).stderr.splitlines() if one[0] == "{"]
    assert [*range(2, 21, 2)] == [one["step"] for one in logged]
    assert all(one["loss"] > 0 for one in logged)


@pytest.mark.parametrize(
    ("options", "count"),
    [("", 0), ("--kv-window 32", 1), ("--kv-sinks 4", 1)],
)
def test_a_worker_warns_if_its_window_differs(
    options: str, count: int, base: Path, text: Path, tmp_path: Path
) -> None:
    """A worker logs a warning if its sinks or window are not those of the training."""
    file, same = tmp_path / "gates", "--kv-sinks 2 --kv-window 24"
    tolhouse(f"train-gates {base} --text {text} --out {file} {OPTIONS} --steps 1")
    gates = f"--kv-policy compressive --kv-gate {file} {same} {options}"
    with process("worker", base, *gates.split(), *LOCAL) as worker:
        assert count == worker.log.read_text(encoding="utf-8").count("trained with other options")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/tmp", "--kv-gate /tmp is a folder: give a number or a file"),
        ("", "--kv-gate is empty: give a number or a file"),
        (" ", "--kv-gate is empty: give a number or a file"),
        ("/nothing", "--kv-gate /nothing: No such file"),
        ("long" * 100, "File name too long"),
        ("tokenizer.json", "--kv-gate tokenizer.json: "),
        ("model.safetensors", "does not contain tensor gate"),
    ],
)
def test_unsuitable_files_of_gates_are_refused(
    given: str, message: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the option and says what the value is."""
    monkeypatch.chdir(base)
    with pytest.raises(InvalidArgumentError, match=message):
        gate_of(given, open_checkpoint(base).config)


def test_a_model_with_summary_tokens_is_refused(text: Path, tmp_path: Path) -> None:
    """Gates are not trained on text without the summary tokens that a model needs."""
    summaries = {"vocab_size": 400, "summary_tokens": 2, "summary_segment": 16}
    path = tiny_model(tmp_path / "model", "base", **summaries)
    line = f"train-gates {path} --text {text} --out {tmp_path / 'gates'} {OPTIONS}"
    assert "the model has 2 summary tokens" in tolhouse(line, code=1).stderr


def test_training_lowers_the_loss_and_keeps_the_model(base: Path) -> None:
    """Trained gates have a lower loss than those at the start, and the weights do not change."""
    model = open_checkpoint(base).model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(1, 200, (2, 80), generator=torch.Generator().manual_seed(0))
    batch = ids[:, :-1], ids[:, 1:]
    gate_NH = train_gates(model, [batch] * 20, 20, 2, 16)
    half = torch.full_like(gate_NH, 0.5)
    with torch.inference_mode():
        trained, untrained = (
            loss_of(model, batch, GatedMemory(model.config, 79, 2, 16, gate))
            for gate in (gate_NH, half)
        )
    assert trained < untrained
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kv-window 256", "nothing to train"),
        ("--kv-window 16 --sequence-tokens 64000", "at least 514 are needed"),
        ("--kv-window 16 --text /nothing", "/nothing"),
        ("--out /nothing/gates", "/nothing/gates can't be written"),
    ],
)
def test_unsuitable_options_are_refused(
    options: str, message: str, base: Path, tmp_path: Path
) -> None:
    """`tolhouse train-gates` exits with 1 and one line on stderr, and writes no file."""
    (short := tmp_path / "short.txt").write_text("a few words", encoding="utf-8")
    out = tmp_path / "gates"
    ended = tolhouse(f"train-gates {base} --text {short} --out {out} {options}", code=1)
    (line,) = ended.stderr.splitlines()
    assert message in line
    assert not out.exists()


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "int32"])
def test_gates_of_another_type_are_refused(dtype: str, tmp_path: Path) -> None:
    """Gates are numbers of a common type. The error says which types are allowed."""
    shape, file = preset("tiny", "base"), tmp_path / "gates"
    size = shape.num_hidden_layers, shape.num_attention_heads
    save_file({"gate": torch.ones(size).to(getattr(torch, dtype))}, file)
    with pytest.raises(InvalidArgumentError, match=f"gates are {dtype}; allowed are float32,"):
        gate_of(str(file), shape)
