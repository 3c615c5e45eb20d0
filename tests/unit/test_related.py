"""The benchmark of the parts from related papers notices wrong figures."""

import pytest
import torch

from loadtest.related import failures
from loadtest.related_ffn import difference, flashmhf, operations
from loadtest.related_retrieval import BODY, NEEDLE, NEEDLES, TOKENS, texts


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_difference_is_never_not_a_number(wrong: float) -> None:
    """An output or a reference that is not finite fails the benchmark."""
    right = torch.ones(3)
    assert difference(right, right) == 0
    for pair in ((right * wrong, right), (right, right * wrong), (0 * right, 0 * right)):
        with pytest.raises(AssertionError, match="not a number"):
            difference(*pair)


def test_figures_out_of_bounds_are_named() -> None:
    """The command fails for differences above 1e-5 and equalities that do not hold."""
    good = {"moc_full_diff": 1e-5, "score_r1_equal": 1.0, "archive_restore_equal": True}
    assert [] == failures({**good, "moc_half_loss": 0.1})
    bad = {"a_diff": 2e-5, "b_diff": float("nan"), "c_equal": 0.9, "d_equal": False}
    assert [*bad] == failures({**good, **bad})


class Batched(torch.nn.Module):
    """Multiplies each of five 2 by 4 matrices with a 4 by 3 matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(5, 4, 3))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD.view(5, 2, 4) @ self.weights


def test_operations_of_products_are_counted() -> None:
    """A product of numbers in a product of matrices is two operations, in a batch of matrices
    too."""
    x_TD = torch.randn(5, 8)
    assert 2 * 5 * 8 * 3 == operations(torch.nn.Linear(8, 3, bias=False), x_TD)
    assert 2 * 5 * 2 * 4 * 3 == operations(Batched(), x_TD)


def test_flashmhf_is_measured() -> None:
    """The benchmark's figures of flashmhf are in bounds, and its peak is below that of SwiGLU."""
    figures = flashmhf()
    assert [] == failures(figures)
    assert figures["flashmhf_peak_ratio"] < 1


@pytest.mark.parametrize("place", [1, 12, 21])
def test_a_question_is_about_the_needle_at_its_place(place: int) -> None:
    """A text has the needle of its first question at the given place, once, and all its other
    needles elsewhere in the body."""
    random = torch.Generator().manual_seed(0)
    for ids in texts(random, 50, TOKENS, NEEDLES, place).tolist():
        body, tail = ids[:BODY], ids[BODY:]
        assert tail[:NEEDLE] == body[place * NEEDLE : (place + 1) * NEEDLE]
        for start in range(0, NEEDLES * NEEDLE, NEEDLE):
            key, *values = tail[start : start + NEEDLE]
            assert 1 == body.count(key)
            at = body.index(key)
            assert values == body[at + 1 : at + NEEDLE]
