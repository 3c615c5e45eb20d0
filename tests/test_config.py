"""Configuration: explained, strict, and the command line over the environment over the defaults."""

from typing import get_args

import pytest
from pydantic_settings import BaseSettings
from tolhouse import config
from tolhouse.errors import InvalidArgument


@pytest.mark.parametrize("kind", config.CONFIGS, ids=lambda kind: kind.__name__)
def test_every_option_is_explained_and_has_its_unit(kind: type[BaseSettings]) -> None:
    """Numbers that measure something say in what, by their name; those that count say what they count."""
    for name, field in kind.model_fields.items():
        assert field.description, name
        if field.annotation is float:
            assert name.endswith(("_seconds", "_megabytes", "_share", "_ratio")), name
    assert kind()  # the defaults are allowed


def test_every_variable_has_one_meaning() -> None:
    """No two options read the same variable."""
    names = [config.variable(kind, field) for kind in config.CONFIGS for field in kind.model_fields]
    assert len(names) == len(set(names))
    assert set(names) < config.variables()


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given values, then variables, then defaults; RAY_ADDRESS is Ray's own."""
    assert 32 == config.load(config.WorkerConfig, {}).max_running
    monkeypatch.setenv("TOLHOUSE_WORKER_MAX_RUNNING", "5")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert 5 == config.load(config.WorkerConfig, {}).max_running
    assert 7 == config.load(config.WorkerConfig, {"max_running": "7"}).max_running
    assert "head:6379" == config.load(config.BuildConfig, {}).ray_address
    assert "local" == config.load(config.BuildConfig, {"ray_address": "local"}).ray_address


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_a_bad_value_names_option_and_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever set it finds it."""
    monkeypatch.setenv("TOLHOUSE_WORKER_MAX_RUNNING", value)
    with pytest.raises(InvalidArgument, match=r"--max-running \(TOLHOUSE_WORKER_MAX_RUNNING\)"):
        config.load(config.WorkerConfig, {})


def test_an_unheard_of_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing mistake is told with what was meant; variables of others are left alone."""
    monkeypatch.setenv("TOLHOUSE_WORKER_MAX_RUNING", "5")
    with pytest.raises(InvalidArgument, match="did you mean TOLHOUSE_WORKER_MAX_RUNNING"):
        config.load(config.LookupConfig, {})


@pytest.mark.parametrize("kind", config.CONFIGS, ids=lambda kind: kind.__name__)
def test_every_option_can_be_given_in_the_environment(
    kind: type[config.Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variable changes its own option and no other."""
    monkeypatch.delenv("TOLHOUSE_WORKER_COMPILE")
    defaults = config.load(kind, {}).model_dump()
    for name, field in kind.model_fields.items():
        with monkeypatch.context() as environment:
            choices = [c for c in get_args(field.annotation) if c != field.default]
            environment.setenv(
                config.variable(kind, name),
                choices[0]
                if choices
                else {int: "7", float: "7.5", bool: "true"}.get(field.annotation, "text"),
            )
            loaded = config.load(kind, {}).model_dump()
        assert {name} == {key for key in defaults if defaults[key] != loaded[key]}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
def test_a_quantity_is_a_finite_number(value: str) -> None:
    """Seconds and megabytes that no clock and no memory has are refused, option by option."""
    for kind in config.CONFIGS:
        for name, field in kind.model_fields.items():
            if field.annotation is float:
                with pytest.raises(InvalidArgument, match=config.variable(kind, name)):
                    config.load(kind, {name: value})
