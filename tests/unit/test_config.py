"""Configuration: help and units of options, strict variables, and their precedence."""

from typing import Any, get_args, get_origin

import pytest
from tolhouse import config
from tolhouse.errors import InvalidArgumentError


def required(kind: type[config.Config]) -> dict[str, Any]:
    """Return values for the options of `kind` that have no default."""
    return {name: "given" for name, field in kind.model_fields.items() if field.is_required()}


@pytest.mark.parametrize("kind", config.CONFIGS, ids=lambda kind: kind.__name__)
def test_every_option_has_help_and_a_unit(kind: type[config.Config]) -> None:
    """Each option has a help text, and the name of a float option ends with its unit."""
    for name, field in kind.model_fields.items():
        assert field.description, name
        if field.annotation is float:
            units = "_seconds", "_megabytes", "_share", "_ratio", "_scale", "budget"
            assert name.endswith(units), name
    assert kind(**required(kind))


def test_the_variables_of_every_config_are_known() -> None:
    """CONFIGS has the options of each class that a command loads."""
    kinds = [config.Config]
    for kind in kinds:
        kinds += kind.__subclasses__()
    last = (kind for kind in kinds if not kind.__subclasses__())
    found = {config.variable(kind, field) for kind in last for field in kind.model_fields}
    assert set() == found - config.variables()


def test_every_variable_has_one_meaning() -> None:
    """No two options with different names read the same variable."""
    fields = {(config.variable(kind, f), f) for kind in config.CONFIGS for f in kind.model_fields}
    assert len(fields) == len({variable for variable, _ in fields})
    assert {variable for variable, _ in fields} < config.variables()


def test_former_names_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed option accepts its old name, and the new name takes precedence."""
    old = config.load(config.WorkerConfig, {"lookup": "a:1", "max_running": "3"})
    assert ("a:1", 3) == (old.rows, old.max_num_seqs)
    monkeypatch.setenv("TOLHOUSE_TABLES_STORE", "redis://d")
    assert "redis://d" == config.load(config.EvalConfig, {}).rows
    monkeypatch.setenv("TOLHOUSE_WORKER_LOOKUP", "b:2")
    assert "b:2" == config.load(config.WorkerConfig, {}).rows
    monkeypatch.setenv("TOLHOUSE_WORKER_ROWS", "c:3")
    assert "c:3" == config.load(config.WorkerConfig, {}).rows
    assert "a:1" == config.load(config.WorkerConfig, {"lookup": "a:1"}).rows


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "127.0.0.1:50051"),
        ({"port": "7"}, "127.0.0.1:7"),
        ({"host": "0.0.0.0"}, "0.0.0.0:50051"),
        ({"host": "::1", "port": "0", "listen": "a:2"}, "[::1]:0"),
    ],
)
def test_host_and_port_replace_those_of_listen(given: dict[str, str], expected: str) -> None:
    """--host and --port replace the parts of --listen."""
    assert expected == config.load(config.LookupConfig, given).listen


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options take precedence over variables, and variables over defaults."""
    assert 32 == config.load(config.WorkerConfig, {}).max_num_seqs
    monkeypatch.setenv("TOLHOUSE_WORKER_MAX_NUM_SEQS", "5")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert 5 == config.load(config.WorkerConfig, {}).max_num_seqs
    assert 7 == config.load(config.WorkerConfig, {"max_num_seqs": "7"}).max_num_seqs
    assert "head:6379" == config.load(config.BuildConfig, {}).ray_address
    assert "local" == config.load(config.BuildConfig, {"ray_address": "local"}).ray_address


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_a_bad_value_names_option_and_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a bad value names the option and its variable."""
    monkeypatch.setenv("TOLHOUSE_WORKER_MAX_NUM_SEQS", value)
    with pytest.raises(
        InvalidArgumentError, match=r"--max-num-seqs \(TOLHOUSE_WORKER_MAX_NUM_SEQS\)"
    ):
        config.load(config.WorkerConfig, {})


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable is an error that names the intended one."""
    monkeypatch.setenv("TOLHOUSE_WORKER_MAX_NUM_SEQ", "5")
    with pytest.raises(InvalidArgumentError, match="did you mean TOLHOUSE_WORKER_MAX_NUM_SEQS"):
        config.load(config.LookupConfig, {})


@pytest.mark.parametrize("kind", config.CONFIGS, ids=lambda kind: kind.__name__)
def test_every_option_can_be_given_in_the_environment(
    kind: type[config.Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variable sets its own option only; --host and --port also change --listen."""
    monkeypatch.delenv("TOLHOUSE_WORKER_COMPILE")
    defaults = config.load(kind, required(kind)).model_dump()
    samples = {int: "2", int | None: "2", float: "3.5"}
    for name, field in kind.model_fields.items():
        with monkeypatch.context() as environment:
            parts = [p for a in get_args(field.annotation) for p in (a, *get_args(a))]
            choices = [p for p in parts if isinstance(p, str) and p != field.default]
            text = "text:1" if name.endswith("listen") else "text"
            value = choices[0] if choices else samples.get(field.annotation, text)
            value = "0.75" if name.endswith("_share") else value
            if field.annotation is bool:
                value = "false" if field.default else "true"
            elif get_origin(field.annotation) is tuple:
                value = "3,1"
            environment.setenv(config.variable(kind, name), value)
            given = {n: value for n, value in required(kind).items() if n != name}
            loaded = config.load(kind, given).model_dump()
        changed = {key for key in defaults if defaults[key] != loaded[key]}
        assert {name} == changed - ({"listen"} if name in ("host", "port") else set())


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
def test_a_quantity_is_a_finite_number(value: str) -> None:
    """No option for seconds, megabytes or ratios accepts NaN, infinity or a negative number."""
    for kind in config.CONFIGS:
        for name, field in kind.model_fields.items():
            if field.annotation is float and (name, value) != ("row_scale", "-1"):
                with pytest.raises(InvalidArgumentError, match=config.variable(kind, name)):
                    config.load(kind, required(kind) | {name: value})


@pytest.mark.parametrize("option", ["kv_sinks", "kv_window"])
@pytest.mark.parametrize("kind", [config.WorkerConfig, config.GatesConfig])
def test_numbers_of_places_fit_64_bits(kind: type[config.Config], option: str) -> None:
    """The engine adds them to places in 64 bits, so larger numbers are refused at the start."""
    assert config.load(kind, required(kind) | {option: str(2**31 - 1)})
    with pytest.raises(InvalidArgumentError, match="less than 2147483648"):
        config.load(kind, required(kind) | {option: str(2**63)})
