"""Model configurations: the paper's parameter counts, and validation of every field."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.config import PRESETS, ModelConfig, preset
from tolhouse.model.transformer import Transformer, parameter_counts

# table 1 of the paper, corrected: active parameters in millions of base, memory, and flex 1 to 3
PAPER = {
    "250m": (265, 88, 110, 132, 154),
    "750m": (737, 245, 307, 368, 430),
    "1b": (1208, 402, 503, 604, 704),
}
KINDS = (("base", 0), ("memory", 0), ("flex", 1), ("flex", 2), ("flex", 3))
NO_STRING: list[Any] = [1, None, ["base"]]
NO_INTEGER: list[Any] = [True, 1.0, "1", None, [1]]
NO_SWITCH: list[Any] = [1, 0, "true", None]
NO_COUNT: list[Any] = [True, 1.0, "1", [1], -2]
NO_NUMBER: list[Any] = [True, "1", None, 0.0, -1.0, math.nan, math.inf, -math.inf]
WRONG = {
    **{field.name: NO_INTEGER for field in dataclasses.fields(ModelConfig)},
    **dict.fromkeys(("kind", "ffn_c", "ffn_m", "ffn_by"), NO_STRING),
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "ffn_share"), NO_NUMBER),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), NO_COUNT),
    **dict.fromkeys(("tie_word_embeddings", "qkv_bias", "o_bias", "qk_norm"), NO_SWITCH),
    "rope_scaling": [1, "linear", [1]],
    "eos_token_id": [True, 1.0, "1", [True], [1.0], ["1"], [None], [[1]], -1, [-1], {}],
}


def config_of(size: str, kind: str, beta: int, ffn_c: str) -> ModelConfig:
    return preset(size, kind, beta, ffn_c=ffn_c if kind == "flex" else "linear")


@pytest.mark.parametrize("ffn_c", ["linear", "swiglu"])
@pytest.mark.parametrize("size", PAPER)
def test_presets_have_the_paper_s_parameter_counts(size: str, ffn_c: str) -> None:
    """In millions, active parameters equal the paper's table, and totals equal its base model."""
    with torch.device("meta"):
        models = [Transformer(config_of(size, kind, beta, ffn_c)) for kind, beta in KINDS]
    counts = [[count // 10**6 for count in parameter_counts(model)] for model in models]
    assert PAPER[size] == tuple(active for _, active in counts)
    assert {PAPER[size][0]} == {total for total, _ in counts}


@pytest.mark.parametrize("ffn_c", ["linear", "swiglu"])
@pytest.mark.parametrize("size", ["tiny", "demo"])
def test_small_presets_differ_only_by_flex_s_third_norm(size: str, ffn_c: str) -> None:
    """Presets have equal parameter counts, except for flex's third norm."""
    with torch.device("meta"):
        models = [Transformer(config_of(size, kind, beta, ffn_c)) for kind, beta in KINDS]
    base, memory, *flex = [parameter_counts(model)[0] for model in models]
    third = models[0].config.num_hidden_layers * models[0].config.hidden_size
    assert base == memory
    assert [memory + third] * 3 == flex


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name: str) -> None:
    """A preset equals its copy from JSON, and JSON integers are accepted for floats."""
    for kind, beta in (*KINDS, ("wide", 0)):
        config = config_of(name, kind, beta, "swiglu")
        data = json.loads(json.dumps(config.to_json()))
        assert config == ModelConfig.from_json({**data, "rope_theta": 10_000})


@given(data=st.data())
def test_a_field_of_another_type_is_refused_by_name(data: st.DataObject) -> None:
    """A value of another JSON type, NaN or infinity is refused with the field's name."""
    name = data.draw(st.sampled_from(sorted(WRONG)))
    value = data.draw(st.sampled_from(WRONG[name]))
    with pytest.raises(InvalidArgumentError, match=f"model config: {name}:? .*(not|null)"):
        ModelConfig.from_json({**preset("tiny", "flex", 2).to_json(), name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "moe"}, "kind: Input should be 'base', 'memory', 'flex' or 'wide', not 'moe'"),
        ({"model_type": "gemma"}, "model_type is 'gemma'; allowed are 'memoryllm', .* 'llama'"),
        ({"surplus": 1}, "surplus is 1, which a memoryllm model does not support: .*or remove it"),
        ({"vocab_size": 0}, "vocab_size: .* greater than or equal to 1, not 0"),
        ({"vocab_size": 2**31 + 1}, "vocab_size: .* less than or equal to"),
        ({"hidden_size": 97}, "multiple of num_attention_heads"),
        ({"beta": 1}, "beta is 1, 2 or 3 for flex"),
        ({"kind": "flex", "beta": 4}, "beta is 1, 2 or 3 for flex"),
        ({"kind": "flex", "beta": 1, "ffn_c": "conv"}, "ffn_c: .*'linear', 'swiglu'.* or"),
        (
            {"ffn_share": 0.5},
            "ffn_share is for the forms avgk, moc, not for ffn_c linear and ffn_m swiglu",
        ),
        *(
            ({"kind": kind, "ffn_c": form}, f"ffn_c {form} is for kind flex: a {kind} model has no")
            for kind, form in (("base", "moc"), ("memory", "moc"), ("wide", "swiglu"))
        ),
        ({"kind": "base", "ffn_m": "moc"}, "ffn_m moc is for .*: a base model has none"),
        (
            {"kind": "flex", "beta": 1, "flex_layers": [0], "ffn_m": "lookup"},
            "ffn_m lookup is for models with FFN-M: a converted model has none",
        ),
        ({"ffn_m": "moc", "ffn_share": 1.5}, "ffn_share: .* less than or equal to 1"),
        ({"eos_token_id": 10**6}, "eos_token_id 1000000 must be below vocab_size 1024"),
        ({"eos_token_id": [0, 1024]}, "eos_token_id 1024 must be below vocab_size 1024"),
    ],
)
def test_an_invalid_config_is_refused(changes: dict, message: str) -> None:
    """The error names an unknown field or an impossible value."""
    with pytest.raises(InvalidArgumentError, match=message):
        ModelConfig.from_json({**preset("tiny", "memory").to_json(), **changes})


@pytest.mark.parametrize("field", dataclasses.fields(ModelConfig), ids=lambda field: field.name)
def test_a_missing_field_is_an_error_or_has_a_default(field: dataclasses.Field) -> None:
    """A missing field without a default is an error, and so is a config that is not an object."""
    data = preset("tiny", "memory").to_json()
    data.pop(field.name, None)
    if field.default is not dataclasses.MISSING:
        derived = {"num_key_value_heads": 4, "head_dim": 24}
        expected = derived.get(field.name, field.default)
        assert expected == getattr(ModelConfig.from_json(data), field.name)
        return
    with pytest.raises(InvalidArgumentError, match=f"{field.name}: Field required"):
        ModelConfig.from_json(data)
    for other in ([], None, "memoryllm"):
        with pytest.raises(InvalidArgumentError, match="must be a JSON object"):
            ModelConfig.from_json(other)


@pytest.mark.parametrize(
    ("name", "kind", "beta", "message"),
    [
        ("tiny", "base", 1, "beta is 1, 2 or 3 for flex"),
        ("tiny", "memory", 3, "beta is 1, 2 or 3 for flex"),
        ("tiny", "flex", 0, "beta is 1, 2 or 3 for flex"),
        ("tiny", "flex", 4, "beta is 1, 2 or 3 for flex"),
        ("tiny", "flex", -1, "beta is 1, 2 or 3 for flex"),
        ("tiny", "moe", 0, "'base', 'memory', 'flex' or 'wide'"),
        ("huge", "memory", 0, "'huge' is unknown; one of tiny, small, small-active, demo, 250m"),
    ],
)
def test_an_invalid_preset_is_refused(name: str, kind: str, beta: int, message: str) -> None:
    """beta is valid only for flex, from 1 to 3, and errors list the presets and kinds."""
    with pytest.raises(InvalidArgumentError, match=message):
        preset(name, kind, beta)
