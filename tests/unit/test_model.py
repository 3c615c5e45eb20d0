"""The model as a function of rows."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tolhouse.errors import InvalidArgumentError, PromptTooLongError
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.config import preset
from tolhouse.model.generate import greedy
from tolhouse.model.transformer import GrowingCache, NoCache, Transformer
from tolhouse.testing import tiny_model

KINDS = [
    ("base", 0, "linear"),
    ("memory", 0, "linear"),
    ("wide", 0, "linear"),
    *(("flex", beta, form) for beta in (1, 2, 3) for form in ("linear", "swiglu")),
]
IDS = torch.arange(6)


def model_of(kind: str, beta: int = 0, ffn_c: str = "linear") -> Transformer:
    torch.manual_seed(0)
    model = Transformer(preset("tiny", kind, beta, ffn_c=ffn_c, vocab_size=64))
    return model.eval().requires_grad_(False)


def logits(model: Transformer, rows: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens 0 to 5."""
    return model(IDS, IDS, NoCache(6), rows)


@pytest.mark.parametrize(("kind", "beta", "ffn_c"), KINDS)
def test_rows_are_a_function_of_the_token_alone(kind: str, beta: int, ffn_c: str) -> None:
    """Rows have the shape [N, T, D], and a token's row does not depend on its position or
    neighbours."""
    model = model_of(kind, beta, ffn_c)
    ids = torch.tensor([3, 60, 3, 0, 7])
    rows = model.rows(ids)
    assert ({"base": 0, "wide": 1}.get(kind, 4), 5, 96) == tuple(rows.shape)
    assert torch.equal(rows, model.rows(ids))
    torch.testing.assert_close(rows, torch.stack([model.rows(i[None])[:, 0] for i in ids], dim=1))


@pytest.mark.parametrize(("kind", "beta", "ffn_c"), KINDS)
def test_a_sequence_in_chunks_has_the_same_logits(kind: str, beta: int, ffn_c: str) -> None:
    """Logits do not depend on how a sequence is divided, or on later tokens."""
    model = model_of(kind, beta, ffn_c)
    ids, positions = torch.arange(5, 29), torch.arange(24)
    whole = model(ids, positions, NoCache(24), model.rows(ids))
    cache, pieces = GrowingCache(), []
    for start, end in pairwise((0, 7, 8, 9, 24)):
        part = ids[start:end]
        pieces.append(model(part, positions[start:end], cache, model.rows(part)))
    torch.testing.assert_close(whole, torch.cat(pieces), atol=1e-5, rtol=1e-4)
    ids = torch.cat((ids[:12], ids[12:].flip(0)))
    other = model(ids, positions, NoCache(24), model.rows(ids))
    torch.testing.assert_close(whole[:12], other[:12])


def test_the_forward_never_computes_the_token_memory() -> None:
    """The forward works on given rows without FFN-M's weights, and rows() then names the missing
    weights."""
    model = model_of("memory")
    rows = model.rows(IDS)
    expected = logits(model, rows)
    del model.ffn_m[:]
    assert torch.equal(expected, logits(model, rows))
    assert not torch.allclose(expected, logits(model, torch.zeros_like(rows)))
    with pytest.raises(InvalidArgumentError, match="needs rows from a table"):
        model.rows(IDS)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_may_carry_x0(tied: bool, tmp_path: Path) -> None:
    """A model without its embedding gives the same logits if X0 precedes its rows."""
    opened = open_checkpoint(tiny_model(tmp_path / "m", tie_word_embeddings=tied))
    full, bare = opened.model(), opened.model(ffn_m=False, embedding=False)
    rows = full.rows(IDS, x0=True)
    assert torch.equal(rows, torch.cat((full.embed_tokens(IDS)[None], full.rows(IDS))))
    expected = logits(full, full.rows(IDS))
    assert torch.equal(expected, logits(bare, rows))
    assert torch.equal(expected, logits(full, rows))
    assert not torch.allclose(expected, logits(bare, torch.cat((rows[:1] * 2, rows[1:]))))
    names = [name for name, _ in bare.named_parameters()]
    assert not [name for name in names if name.startswith(("embed_tokens", "ffn_m"))]
    with pytest.raises(InvalidArgumentError, match="needs X0 from a table"):
        logits(bare, rows[1:])


def test_each_layer_adds_its_own_row() -> None:
    """Exchanging the rows of two layers changes the logits."""
    model = model_of("memory")
    rows = model.rows(IDS) * 5
    swapped = logits(model, rows[[1, 0, 2, 3]])
    assert not torch.allclose(logits(model, rows), swapped, atol=1e-3)


def test_greedy_completion_checks_its_limits(checkpoint: Path) -> None:
    """Empty, out-of-range and too long prompts are refused, and the end-of-text token can be
    ignored."""
    model = open_checkpoint(checkpoint).model()
    assert 5 == len(list(greedy(model, [1, 2], 5, ignore_eos=True)))
    for prompt, count, error in (
        ([], 1, InvalidArgumentError),
        ([999_999], 1, InvalidArgumentError),
        ([1], 0, InvalidArgumentError),
        ([1], 256, PromptTooLongError),
    ):
        with pytest.raises(error):
            list(greedy(model, prompt, count))
