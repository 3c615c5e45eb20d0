"""Recipes have the paper's hyperparameters, and every run fits its model."""

import pytest
from tolhouse.train.recipes import RECIPES, recipe


@pytest.mark.parametrize("size", ["250m", "750m", "1b"])
def test_paper_recipes_have_the_paper_s_hyperparameters(size: str) -> None:
    """The paper's runs have 50B tokens in sequences of 2048 and its rates, betas, decay and z-loss
    (PAPER section 3)."""
    run = recipe(f"paper-{size}", "memory", 0)
    assert (2048, 5000, 1e-4, 1e-5) == (
        run.sequence_tokens,
        run.warmup_steps,
        run.peak_rate,
        run.final_rate,
    )
    assert ((0.9, 0.95), 0.1, 1e-6) == (run.betas, run.weight_decay, run.z_loss)
    assert 50 == round(run.steps * run.step_tokens / 1e9)


@pytest.mark.parametrize(
    ("kind", "beta"),
    [("base", 0), ("memory", 0), ("wide", 0), ("flex", 1), ("flex", 2), ("flex", 3)],
)
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_fits_its_model(name: str, kind: str, beta: int) -> None:
    """Sequences fit the context, the warm-up ends before the run, and the loss is evaluated during
    the run."""
    run = recipe(name, kind, beta)
    assert (kind, beta) == (run.config.kind, run.config.beta)
    assert run.sequence_tokens <= run.config.max_position_embeddings
    assert 0 < run.warmup_steps < run.steps
    assert 0 < run.eval_every_steps < run.steps
    assert run.final_rate < run.peak_rate


@pytest.mark.parametrize("name", RECIPES)
def test_kinds_of_a_recipe_differ_only_in_the_model(name: str) -> None:
    """All kinds of a recipe have the same steps, tokens and rates."""
    runs = [
        vars(recipe(name, kind, beta)) for kind, beta in (("base", 0), ("memory", 0), ("flex", 3))
    ]
    assert all(
        {k: v for k, v in run.items() if k != "config"}
        == {k: v for k, v in runs[0].items() if k != "config"}
        for run in runs
    )
    assert 3 == len({run["config"] for run in runs})
