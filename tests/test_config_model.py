"""Model shapes: the paper's numbers to the million, and no field that is taken on trust."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolhouse.errors import InvalidArgument
from tolhouse.model.config import ModelConfig, preset
from tolhouse.model.transformer import Transformer, active_parameters, total_parameters

# PAPER table 1, corrected: millions of active parameters of base, MemoryLLM, and Flex with beta 1, 2, 3; base is everyone's total
PAPER = {
    "250m": (265, 88, 110, 132, 154),
    "750m": (737, 245, 307, 368, 430),
    "1b": (1208, 402, 503, 604, 704),
}
KINDS = (("base", 0), ("memory", 0), ("flex", 1), ("flex", 2), ("flex", 3))
WRONG = {
    int: [True, 1.0, "1", None, [1]],
    float: [True, "1", None],
    str: [1, None, ["base"]],
    bool: [1, 0, "true", None],
}


@pytest.mark.parametrize("ffn_c", ["linear", "swiglu"])
@pytest.mark.parametrize("size", PAPER)
def test_presets_print_the_paper_s_numbers(size: str, ffn_c: str) -> None:
    """Cut to millions, as the paper prints them, active parameters are its table's, and totals those of its base model."""
    with torch.device("meta"):
        models = [Transformer(preset(size, kind, beta, ffn_c=ffn_c)) for kind, beta in KINDS]
    assert PAPER[size] == tuple(active_parameters(model) // 10**6 for model in models)
    assert {PAPER[size][0]} == {total_parameters(model) // 10**6 for model in models}


@pytest.mark.parametrize("size", ["tiny", "demo"])
def test_our_presets_differ_by_flex_s_third_norm_alone(size: str) -> None:
    """Every kind has two norms per layer and equal matrices; flex has a third norm, for FFN-C."""
    with torch.device("meta"):
        models = [Transformer(preset(size, kind, beta)) for kind, beta in KINDS]
    base, memory, *flex = [total_parameters(model) for model in models]
    third = models[0].config.num_hidden_layers * models[0].config.hidden_size
    assert base == memory
    assert [memory + third] * 3 == flex


@given(data=st.data())
def test_a_field_of_another_type_is_refused_by_name(data: st.DataObject) -> None:
    """No number passes for a string, no string for a number, no boolean for an integer."""
    field = data.draw(st.sampled_from(dataclasses.fields(ModelConfig)))
    value = data.draw(st.sampled_from(WRONG[field.type]))
    with pytest.raises(InvalidArgument, match=f"{field.name} must be"):
        ModelConfig.from_json({**preset("tiny", "flex", 2).to_json(), field.name: value})


def test_an_integer_is_a_float() -> None:
    """JSON writers drop the point of 10000.0."""
    config = preset("tiny", "memory")
    assert config == ModelConfig.from_json({**config.to_json(), "rope_theta": 10_000})


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
)
def test_a_missing_field_is_named(name: str) -> None:
    """What has no default has to be there."""
    data = preset("tiny", "memory").to_json()
    del data[name]
    with pytest.raises(InvalidArgument, match=rf"missing fields \['{name}'\]"):
        ModelConfig.from_json(data)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
def test_a_number_that_no_model_can_compute_with_is_refused(name: str, value: float) -> None:
    """JSON readers take NaN and Infinity; a model of them, or of a negative base, gives NaN."""
    with pytest.raises(InvalidArgument, match=name):
        ModelConfig.from_json({**preset("tiny", "memory").to_json(), name: value})


@pytest.mark.parametrize(
    ("kind", "beta"),
    [("base", 1), ("memory", 3), ("flex", 0), ("flex", 4), ("flex", -1), ("moe", 0)],
)
def test_a_preset_keeps_to_the_kinds(kind: str, beta: int) -> None:
    """beta is flex's alone, from 1 to 3, and there are three kinds."""
    with pytest.raises(
        InvalidArgument, match=r"beta is 1, 2 or 3 for flex|one of base, memory, flex"
    ):
        preset("tiny", kind, beta)


def test_an_unknown_preset_is_refused() -> None:
    """The error names the presets there are."""
    with pytest.raises(
        InvalidArgument, match="'huge' is unknown; one of tiny, small, small-active, demo, 250m"
    ):
        preset("huge", "memory")
