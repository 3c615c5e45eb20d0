"""The output of `explain` equals what the model computes."""

from pathlib import Path

import pytest
import torch
from tolhouse.analysis.explain import coefficients, explain_text, nearest
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.testing import tiny_model


def test_coefficients_and_values_give_the_row(checkpoint: Path) -> None:
    """Each layer's row is the sum of its values weighted by the coefficients (PAPER section 5)."""
    model, ids = open_checkpoint(checkpoint).model(), torch.arange(20)
    for layer, row in enumerate(model.rows(ids)):
        torch.testing.assert_close(
            row, model.ffn_m[layer].mlp.down_proj(coefficients(model, layer, ids))
        )


def test_neighbours_are_the_nearest_by_cosine(checkpoint: Path) -> None:
    """Neighbours are sorted by cosine similarity over all layers, without the token itself."""
    model = open_checkpoint(checkpoint).model()
    flat = model.rows(torch.arange(model.config.vocab_size)).transpose(0, 1).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(flat[7], flat, dim=-1)
    expected = [i for i in cosines.argsort(descending=True).tolist() if i != 7][:5]
    assert (
        expected
        == nearest(model.rows, model.config.vocab_size, torch.tensor([7]), 5).indices[0].tolist()
    )


def test_each_distinct_token_has_one_entry(checkpoint: Path) -> None:
    """Each distinct token of a text has one entry with id, norms and keys, in the order of the
    text."""
    opened = open_checkpoint(checkpoint)
    found = explain_text(opened, "def add def", keys=2, neighbours=3)
    ids = list(dict.fromkeys(opened.tokenizer().encode("def add def").ids))
    assert ids == [entry["id"] for entry in found]
    norms = opened.model().rows(torch.tensor(ids)).norm(dim=-1).T
    torch.testing.assert_close(
        norms, torch.tensor([entry["norms"] for entry in found]), atol=1e-3, rtol=1e-3
    )
    strongest = coefficients(opened.model(), 2, torch.tensor(ids[:1])).abs()[0]
    assert strongest.argmax() == found[0]["keys"][2][0]["key"]


def test_a_base_model_is_refused(tmp_path: Path) -> None:
    """A base model has no token memory to explain."""
    with pytest.raises(InvalidArgumentError, match="no token memory"):
        explain_text(open_checkpoint(tiny_model(tmp_path / "base", "base")), "def", 1, 1)


def test_a_coefficient_keeps_its_sign(checkpoint: Path) -> None:
    """Keys are sorted by the magnitude of their coefficients, which may be negative."""
    opened = open_checkpoint(checkpoint)
    entry = explain_text(opened, "d", keys=20, neighbours=1)[0]
    for layer, keys in enumerate(entry["keys"]):
        exact = coefficients(opened.model(), layer, torch.tensor([entry["id"]]))[0]
        strongest = exact.abs().argsort(descending=True)[:20].tolist()
        assert strongest == [key["key"] for key in keys]
        assert [round(exact[key].item(), 4) for key in strongest] == [
            key["coefficient"] for key in keys
        ]


def test_counts_beyond_the_maximum_return_everything(checkpoint: Path) -> None:
    """Requests for more keys or neighbours than exist return all of them; an empty text is
    refused."""
    opened = open_checkpoint(checkpoint)
    entry = explain_text(opened, "d", keys=10**6, neighbours=10**6)[0]
    assert [opened.config.intermediate_size] * 4 == [len(keys) for keys in entry["keys"]]
    assert set(range(opened.config.vocab_size)) - {entry["id"]} == {
        near["id"] for near in entry["nearest"]
    }
    with pytest.raises(InvalidArgumentError, match="the text is empty"):
        explain_text(opened, "", 1, 1)
