"""Training runs: settings, resumption, damaged states, and missing corpora."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolhouse.errors import MismatchError, TolhouseError
from tolhouse.model.checkpoint import WEIGHTS, open_checkpoint
from tolhouse.model.losses import evaluate
from tolhouse.model.transformer import Transformer
from tolhouse.train.recipes import Recipe, recipe
from tolhouse.train.trainer import STATE, Trainer, initialise, rate
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import Parameter

from tests.commands import tolhouse

IDS = np.random.default_rng(0).integers(0, 300, 4000).astype(np.int32)


def small(kind: str = "memory", beta: int = 0, **changes) -> Recipe:
    tiny = recipe("tiny", kind, beta)
    config = replace(tiny.config, vocab_size=512, num_hidden_layers=2)
    return replace(
        tiny,
        config=config,
        **{"steps": 3, "batch_sequences": 2, "sequence_tokens": 16, "warmup_steps": 1, **changes},
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The default number of threads of `tolhouse train`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def out(checkpoint: Path, tmp_path: Path) -> Path:
    """A run's folder with a tokenizer."""
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "beta", "autocast"),
    [
        ("base", 0, False),
        ("memory", 0, False),
        ("memory", 0, True),
        ("flex", 3, True),
        ("wide", 0, True),
    ],
)
def test_every_kind_learns(kind: str, beta: int, autocast: bool, out: Path) -> None:
    """In either precision every weight changes, and the loss on sixteen tokens falls."""
    text = np.tile(IDS[:16], 20)
    trainer = Trainer(small(kind, beta, steps=30, autocast=autocast), text, text, out)
    trainer.run()
    first, *_, last = (
        float(line.split(",")[2])
        for line in (out / "loss.csv").read_text(encoding="utf-8").splitlines()[1:]
    )
    assert first == pytest.approx(math.log(512), abs=0.3)
    assert last < first - 2
    torch.manual_seed(trainer.seed)
    untrained = Transformer(trainer.recipe.config)
    initialise(untrained)
    before = dict(untrained.named_parameters())
    assert not [
        name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])
    ]


def test_a_finished_run_is_not_trained_further(out: Path) -> None:
    """Running a finished run again gives the same loss and leaves weights and curve unchanged."""
    loss = Trainer(small(), IDS, IDS, out).run().loss
    before = [(out / name).read_bytes() for name in (WEIGHTS, STATE, "loss.csv")]
    assert loss == Trainer(small(), IDS, IDS, out).run().loss
    assert before == [(out / name).read_bytes() for name in (WEIGHTS, STATE, "loss.csv")]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"recipe": small(steps=4)}, "recipe"),
        ({"recipe": small(peak_rate=1e-3)}, "recipe"),
        ({"recipe": small("flex", 1)}, "recipe"),
        ({"seed": 1}, "seed"),
        ({"train_ids": IDS[:-1]}, "train"),
        ({"train_ids": IDS[::-1].copy()}, "train"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(other: dict, message: str, out: Path) -> None:
    """A run with another recipe, seed or text raises a MismatchError that names the difference and
    keeps the state."""
    settings = {"recipe": small(), "train_ids": IDS, "valid_ids": IDS, "out": out}
    Trainer(**settings).run()
    before = (out / STATE).read_bytes()
    with pytest.raises(MismatchError, match=f"differs in .*{message}"):
        Trainer(**{**settings, **other}).run()
    assert before == (out / STATE).read_bytes()


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_state_is_refused(size: int, out: Path) -> None:
    """A truncated training state raises an error that names the file."""
    Trainer(small(), IDS, IDS, out).run()
    (out / STATE).write_bytes((out / STATE).read_bytes()[:size])
    with pytest.raises(TolhouseError, match=STATE):
        Trainer(small(), IDS, IDS, out).run()


@given(st.integers(1, 50), st.integers(0, 200), st.integers(0, 250))
def test_the_learning_rate_follows_its_schedule(warmup: int, more: int, step: int) -> None:
    """The learning rate rises linearly to its peak and then falls to its final value at the last
    step."""
    run = replace(small(), warmup_steps=warmup, steps=warmup + more)
    step = min(step, run.steps)
    if step < warmup:
        assert run.peak_rate * (step + 1) / warmup == pytest.approx(rate(run, step))
    else:
        assert run.final_rate <= rate(run, step) <= run.peak_rate
        assert rate(run, step + 1) <= rate(run, step) or step == run.steps
    assert (run.final_rate if more else run.peak_rate) == pytest.approx(rate(run, run.steps))


@pytest.mark.parametrize(
    ("corpus", "message"),
    [("nothing", "no corpus at"), ("short.txt", "is too small"), ("empty", "is too small")],
)
def test_an_unsuitable_corpus_is_refused_in_one_line(
    corpus: str, message: str, tmp_path: Path
) -> None:
    """`tolhouse train` exits with 1 and one line on stderr, and writes no checkpoint."""
    (tmp_path / "short.txt").write_text("import os\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    options = f"--corpus {tmp_path / corpus} --out {tmp_path / 'out'}"
    ended = tolhouse(f"train tiny --no-compile {options}", code=1)
    assert "" == ended.stdout
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: the corpus" if corpus != "nothing" else "error: no corpus")
    assert message in line
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_the_held_out_loss_covers_the_whole_part(out: Path) -> None:
    """A run's loss covers every held-out token, and the curve's is an estimate."""
    found = Trainer(small(), IDS, IDS[::-1].copy(), out).run()
    assert IDS[::-1][1:].tolist() == found.targets.tolist()
    assert evaluate(open_checkpoint(out).model(), IDS[::-1].copy()).loss == found.loss
    estimate = float((out / "loss.csv").read_text(encoding="utf-8").splitlines()[-1].split(",")[3])
    assert estimate != round(found.loss, 5)


@pytest.mark.parametrize(("kind", "beta"), [("base", 0), ("memory", 0), ("flex", 3), ("wide", 0)])
def test_a_step_runs_on_the_model_s_device(
    kind: str, beta: int, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches, loss and gradients are on the model's device; no tensor stays on the CPU.

    torch's fake tensors refuse operations over two devices. Without a GPU, `meta` is the only other
    device that they can represent, and it has no autocast.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    trainer = Trainer(small(kind, beta), IDS, IDS, out, device="meta")
    with torch.device("meta"):
        trainer.model = Transformer(trainer.recipe.config)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    for module in trainer.model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, Parameter(FakeTensor(mode, p.detach(), torch.device("meta"))))
    with mode:
        inputs, targets = trainer.batch(IDS, 0, 1)
        trainer.loss(inputs, targets).backward()
        devices = {p.grad.device.type for p in trainer.model.parameters() if p.grad is not None}
    assert {"meta"} == {inputs.device.type, targets.device.type, *devices}


def test_a_missing_device_is_refused(tmp_path: Path) -> None:
    """The error for a missing device names the option and its value."""
    options = f"--no-compile --device cuda:99 --out {tmp_path / 'out'}"
    stderr = tolhouse(f"train tiny {options}", code=1).stderr
    assert "--device 'cuda:99' is not on this machine" in stderr


def test_weights_are_stored_as_they_were_trained(out: Path) -> None:
    """The checkpoint holds the trained weights, rounded to bfloat16."""
    trainer = Trainer(small("flex", 2), IDS, IDS, out)
    trainer.run()
    stored = open_checkpoint(out).model().state_dict()
    assert all(
        torch.equal(p.bfloat16().float(), stored[name])
        for name, p in trainer.model.state_dict().items()
    )
