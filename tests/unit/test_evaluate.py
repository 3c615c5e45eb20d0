"""The text for evaluation: a user's text without changes, and the held-out part as in training."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolhouse.analysis.evaluate import probed, read_text, through
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.losses import compare, evaluate
from tolhouse.model.transformer import NoCache
from tolhouse.sources.memoryllm import MemoryLLM
from tolhouse.testing import tiny_model
from tolhouse.train.corpus import END_OF_TEXT, documents, is_held_out, standard_library

LONG = "def name(value):\n    return value + 1\n" * 1000


def test_a_given_text_is_tokenised_without_changes(checkpoint: Path, tmp_path: Path) -> None:
    """A given file is not divided; end-of-text tokens separate files."""
    opened = open_checkpoint(checkpoint)
    tokenizer = opened.tokenizer()
    end = tokenizer.token_to_id(END_OF_TEXT)
    (tmp_path / "a.txt").write_text(LONG, encoding="utf-8")
    assert tokenizer.encode(LONG).ids == read_text(opened, tmp_path / "a.txt").tolist()
    (tmp_path / "b.txt").write_text("import os", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "d.txt").touch()
    expected = [*tokenizer.encode(LONG).ids, end, *tokenizer.encode("import os").ids]
    assert expected == read_text(opened, tmp_path).tolist()
    assert expected[:7] == read_text(opened, tmp_path, 7).tolist()


def test_the_held_out_part_equals_that_of_training(checkpoint: Path) -> None:
    """The held-out part consists of documents, each followed by an end-of-text token, as in
    training."""
    opened = open_checkpoint(checkpoint)
    end = opened.tokenizer().token_to_id(END_OF_TEXT)
    texts = [text for name, text in documents(standard_library()) if is_held_out(name)]
    expected = [
        i for encoding in opened.tokenizer().encode_batch(texts) for i in (*encoding.ids, end)
    ]
    assert expected == read_text(opened, None).tolist()


@pytest.mark.parametrize(
    ("contents", "most_tokens", "expected"),
    [
        (b"x", 0, "gives 1 token; at least 2 are needed"),
        (b"", 0, "gives 0 tokens; at least 2 are needed"),
        (b"\xff\xfe", 0, "text.txt is not UTF-8"),
        (b"import os", 1, "the most tokens must be at least 2"),
    ],
)
def test_a_text_without_predictions_is_refused(
    checkpoint: Path, tmp_path: Path, contents: bytes, most_tokens: int, expected: str
) -> None:
    """A text with fewer than two tokens or in another encoding is refused."""
    (tmp_path / "text.txt").write_bytes(contents)
    with pytest.raises(InvalidArgumentError, match=expected):
        read_text(open_checkpoint(checkpoint), tmp_path / "text.txt", most_tokens)


def test_a_folder_without_text_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A folder without UTF-8 text is refused."""
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgumentError, match="holds no text that is UTF-8"):
        read_text(open_checkpoint(checkpoint), tmp_path)


def test_each_token_after_the_first_is_predicted(checkpoint: Path, tmp_path: Path) -> None:
    """Two tokens give one prediction."""
    opened = open_checkpoint(checkpoint)
    (tmp_path / "text.txt").write_text("xy z", encoding="utf-8")
    ids = read_text(opened, tmp_path / "text.txt", 2)
    found = evaluate(opened.model(), ids)
    assert ids[1:].tolist() == found.targets.tolist()
    assert 1 == len(found.losses)


def test_losses_are_of_text_tokens_only(tmp_path: Path) -> None:
    """The probabilities of the text tokens add up to 1 in a model with summary tokens, too."""
    summaries = {"vocab_size": 500, "summary_tokens": 100, "summary_segment": 16}
    model = open_checkpoint(tiny_model(tmp_path, "base", **summaries)).model()
    ids = np.arange(1, 42)
    inputs_T, targets_T = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    with torch.inference_mode():
        logits_TV = model(inputs_T, torch.arange(40), NoCache(40), model.rows(inputs_T))
    expected = F.cross_entropy(logits_TV[:, :-100], targets_T, reduction="none")
    np.testing.assert_allclose(evaluate(model, ids).losses, expected, rtol=1e-5)


def test_divergence_and_agreement_follow_from_the_logits(checkpoint: Path) -> None:
    """KL divergence and agreement equal those computed from the logits of one forward."""
    opened = open_checkpoint(checkpoint)
    model, rows = opened.model(), MemoryLLM(opened).rows()
    ids = np.random.default_rng(0).integers(0, opened.config.vocab_size, 256 + 41)
    exact, others = probed(rows), [probed(through("int4", rows)), probed(rows, 0.5), probed(rows)]
    found = compare(model, ids, exact, others)
    for other, result in zip(others, found, strict=True):
        expected = []
        for start, size in ((0, 256), (256, 40)):
            inputs = torch.tensor(ids[start : start + size])
            with torch.inference_mode():
                p, q = (
                    model(inputs, torch.arange(size), NoCache(size), r(inputs)).double().softmax(-1)
                    for r in (exact, other)
                )
            same = p.argmax(-1) == q.argmax(-1)
            expected.append(torch.stack([(p * (p / q).log()).sum(-1), same]))
        kl, agrees = torch.cat(expected, 1).numpy()
        np.testing.assert_allclose(result.divergences, kl, rtol=1e-3, atol=1e-5)
        assert kl.mean() == pytest.approx(result.kl, rel=1e-3, abs=1e-6)
        assert agrees.mean() == result.agreement
        alone = evaluate(model, ids, other)
        np.testing.assert_allclose(result.losses, alone.losses, rtol=1e-5)
    assert 0 < found[0].kl < found[1].kl
    assert (0.0, 1.0) == (found[2].kl, found[2].agreement)
