"""Training runs of a small recipe are deterministic and resumable, on any text."""

import csv
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tolhouse.errors import InvalidArgumentError, MismatchError, NotFoundError
from tolhouse.files import locked
from tolhouse.model.checkpoint import WEIGHTS, open_checkpoint
from tolhouse.model.losses import evaluate
from tolhouse.train import corpus
from tolhouse.train.recipes import RECIPES, Recipe, recipe
from tolhouse.train.trainer import Trainer, rate

from tests.commands import start, tolhouse


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few modules of the standard library and a binary file, which is skipped."""
    folder = tmp_path_factory.mktemp("corpus")
    modules = "argparse ast dataclasses difflib inspect subprocess tarfile typing"
    for name in modules.split(" "):
        (folder / f"{name}.txt").write_text(
            (corpus.standard_library() / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8"
        )
    (folder / "binary").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(scope="module")
def small() -> Recipe:
    tiny = recipe("tiny", "memory", 0)
    return replace(
        tiny,
        config=replace(tiny.config, vocab_size=512),
        steps=12,
        sequence_tokens=32,
        eval_every_steps=4,
        warmup_steps=3,
    )


def train(small: Recipe, text: Path, out: Path, seed: int = 0) -> tuple[float, bytes]:
    """Held-out loss and weights of a run."""
    out.mkdir(exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_ids, valid_ids = corpus.prepare(text, out, small.config.vocab_size, small.sequence_tokens)
    loss = Trainer(small, train_ids, valid_ids, out, seed=seed).run().loss
    torch.set_num_threads(threads)
    return loss, (out / WEIGHTS).read_bytes()


def test_a_seed_determines_the_checkpoint(small: Recipe, text: Path, tmp_path: Path) -> None:
    """Two runs with the same seed give the same bytes, another seed gives others, and the loss
    falls."""
    first, again, other = (
        train(small, text, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first[1] != other[1]
    with (tmp_path / "a" / "loss.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [str(step) for step in range(1, 13)] == [row["step"] for row in rows]
    assert float(rows[0]["loss"]) == pytest.approx(math.log(512), abs=0.5)
    assert first[0] < float(rows[0]["loss"])
    assert first[0] == pytest.approx(float(rows[-1]["held_out_loss"]), rel=0.2)
    assert (tmp_path / "a" / "loss.png").read_bytes().startswith(b"\x89PNG")
    open_checkpoint(tmp_path / "a")


def test_a_run_resumes_from_its_last_save(small: Recipe, text: Path, tmp_path: Path) -> None:
    """A run that was interrupted after a save ends with the same bytes as an uninterrupted one."""

    class InterruptedRunError(Exception):
        pass

    class Interrupting(Trainer):
        def batch(self, ids: np.ndarray, *seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            if ids is self.train_ids and seed[-1] == 9:  # one step after the second save
                raise InterruptedRunError
            return super().batch(ids, *seed)

    out = tmp_path / "resumed"
    out.mkdir()
    torch.set_num_threads(1)
    ids = corpus.prepare(text, out, small.config.vocab_size, small.sequence_tokens)
    with pytest.raises(InterruptedRunError):
        Interrupting(small, *ids, out).run()
    assert not (out / WEIGHTS).exists()
    assert train(small, text, tmp_path / "whole") == train(small, text, out)
    whole, resumed = (
        (tmp_path / name / "loss.csv").read_text(encoding="utf-8") for name in ("whole", "resumed")
    )
    assert whole == resumed
    with pytest.raises(MismatchError, match="differs in seed"):
        train(small, text, out, seed=3)


@pytest.mark.timeout(600)
def test_a_killed_command_resumes(text: Path, tmp_path: Path) -> None:
    """`tolhouse train` gives the checkpoint of a complete run after it was killed and restarted.
    The model card has the form of FFN-M."""
    command = f"train tiny --ffn-m moc --no-compile --steps 70 --corpus {text} --out"
    tolhouse(command, tmp_path / "whole")
    killed = tmp_path / "killed"
    popen = start(command, killed)
    while not (killed / "training-state.safetensors").exists():  # the first save is after 50 steps
        assert popen.poll() is None
        time.sleep(0.01)
    popen.kill()
    popen.communicate()
    assert not (killed / WEIGHTS).exists()
    with locked(killed):  # as if the first process were still running
        assert "another process holds the lock" in tolhouse(command, killed, code=1).stderr
    tolhouse(command, killed)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (killed / WEIGHTS).read_bytes()
    card = (killed / "README.md").read_text(encoding="utf-8")
    assert "tolhouse train tiny --out" in card
    assert "| kind | memory, FFN-M moc |" in card
    assert "--steps 70 --no-compile" in card
    _, ids = corpus.prepare(text, killed, 4096, 128)
    held_out = evaluate(open_checkpoint(killed).model(), ids)
    result = f"{held_out.loss:.4f} nats per token, perplexity {held_out.perplexity:.2f}"
    assert f"| held-out loss | {result}, over all {len(ids) - 1:,} held-out tokens |" in card
    assert (tmp_path / "whole" / "loss.csv").read_text(encoding="utf-8") == (
        killed / "loss.csv"
    ).read_text(encoding="utf-8")
    (killed / "training-state.safetensors").unlink()
    assert "holds a finished checkpoint" in tolhouse(command, killed, code=1).stderr


def test_shared_rows_give_the_same_loss_and_gradients(
    small: Recipe, text: Path, tmp_path: Path
) -> None:
    """Computing rows once per distinct token gives the same loss and gradients as computing them
    for every token."""
    ids = corpus.prepare(text, tmp_path, small.config.vocab_size, small.sequence_tokens)
    trainer = Trainer(small, *ids, tmp_path)
    replace_steps = replace(small, steps=1)
    trainer.recipe = replace_steps
    trainer.run()
    inputs, targets = trainer.batch(ids[0], 0, 5)
    model, length = trainer.model, small.sequence_tokens
    from tolhouse.model.transformer import NoCache

    logits = model(
        inputs,
        torch.arange(length).repeat(len(inputs) // length),
        NoCache(length),
        model.rows(inputs),
    )
    direct = torch.nn.functional.cross_entropy(logits, targets)
    shared = trainer.loss(inputs, targets, z_loss=False)
    torch.testing.assert_close(direct, shared, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(loss, list(model.ffn_m.parameters())) for loss in (direct, shared)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_the_learning_rate_warms_up_and_decays() -> None:
    """The learning rate rises linearly to its peak and falls as a cosine to its final value (PAPER
    section 3)."""
    chosen = recipe("paper-1b", "memory", 0)
    rates = [rate(chosen, step) for step in range(0, chosen.steps + 1, 500)]
    assert max(rates) == pytest.approx(1e-4)
    assert rate(chosen, chosen.steps) == pytest.approx(1e-5)
    assert rate(chosen, 4999) == pytest.approx(1e-4)
    peak = rates.index(max(rates))
    assert sorted(rates[: peak + 1]) == rates[: peak + 1]
    assert sorted(rates[peak:], reverse=True) == rates[peak:]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_every_kind(name: str) -> None:
    """Every recipe describes a run of each kind, and the error for an unknown recipe lists the
    known ones."""
    for kind, beta in (("base", 0), ("memory", 0), ("flex", 1), ("flex", 3), ("wide", 0)):
        assert kind == recipe(name, kind, beta).config.kind
    with pytest.raises(InvalidArgumentError, match="one of tiny, small"):
        recipe("huge", "base", 0)


def test_a_corpus_is_split_by_name_and_text_round_trips(text: Path, tmp_path: Path) -> None:
    """A document belongs to one part, binary files are skipped, and the tokenizer reproduces any
    text."""
    names = [name for name, _ in corpus.documents(text)]
    assert not any(name.startswith("binary") for name in names)
    assert len(set(names)) == len(names) > 8
    assert 0 < sum(map(corpus.is_held_out, (f"{n}.py:0" for n in range(4000)))) < 200
    corpus.prepare(text, tmp_path, 512, 32)
    from tolhouse.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    sample = "def f(x):\n\treturn 'für 世界 🙂'\r\n  # ok"
    assert sample == tokenizer.decode(tokenizer.encode(sample).ids)


def test_an_unsuitable_corpus_is_refused(tmp_path: Path) -> None:
    """A missing or too small corpus is refused."""
    with pytest.raises(NotFoundError, match="no corpus at"):
        corpus.prepare(tmp_path / "nothing", tmp_path, 512, 32)
    (tmp_path / "short.txt").write_text("import os", encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="too small"):
        corpus.prepare(tmp_path / "short.txt", tmp_path, 512, 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises((InvalidArgumentError, NotFoundError)):
        corpus.prepare(tmp_path / "empty", tmp_path, 512, 32)
