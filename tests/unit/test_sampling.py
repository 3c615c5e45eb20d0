"""Sampling parameters: every interface has the same list."""

import math

import pytest
from click.testing import CliRunner
from tolhouse.cli import main
from tolhouse.errors import InvalidArgumentError
from tolhouse.gateway.schemas import ChatRequest, CompletionRequest
from tolhouse.sampling import SamplingOptions, SamplingParams
from tolhouse.v1.generation_pb2 import GenerateRequest

EXTREMES = (
    {"temperature": 100, "top_k": -1, "top_p": 1e-300, "min_p": 1.0, "seed": -1},
    {"top_k": 2**31, "seed": 2**64 - 1, "logprobs": 20, "prompt_logprobs": 0, "max_tokens": 0},
    {"repetition_penalty": 2**-7, "presence_penalty": -2, "frequency_penalty": 2},
    {"logit_bias": {2**32 - 1: -100}, "stop_token_ids": (2**32 - 1,) * 256, "ignore_eos": True},
    {"row_scale": -16, "absent_layers": {3}, "layer_scales": [16.0] * 1024, "min_tokens": 16},
)


def test_every_interface_has_the_list() -> None:
    """The proto and both request bodies have the fields of the list, with their bounds."""
    proto = set(GenerateRequest.DESCRIPTOR.fields_by_name) - {"request_id", "prompt_token_ids"}
    assert set(SamplingParams.model_fields) == proto
    for body in (CompletionRequest, ChatRequest):
        for name, field in SamplingOptions.model_fields.items():
            assert field.metadata == body.model_fields[name].metadata
            assert name == "temperature" or field.default == body.model_fields[name].default
    told = CliRunner().invoke(main, ["generate", "--help"]).output
    assert "--row-scale" in told


@pytest.mark.parametrize("options", [{}, *EXTREMES])
def test_a_request_carries_them_all(options: dict) -> None:
    """A value at a bound crosses the wire and is accepted on the other side."""
    sent = SamplingParams(**options)
    wire = sent.to_proto([1]).SerializeToString()
    arrived = SamplingParams.from_proto(GenerateRequest.FromString(wire))
    assert {**dict(sent), "top_p": 0} == {**dict(arrived), "top_p": 0}
    assert sent.top_p == pytest.approx(arrived.top_p)


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": value} for value in (-0.1, math.nan, "1")),
        *({"top_k": value} for value in (-2, 1.5)),
        *({"top_p": value} for value in (0, 1.1)),
        {"min_p": 2},
        *({"repetition_penalty": value} for value in (0, math.inf)),
        {"presence_penalty": 2.5},
        {"frequency_penalty": math.nan},
        *({"logit_bias": value} for value in ({1: 101}, {-1: 0}, dict.fromkeys(range(1025), 1))),
        {"seed": 2**64},
        {"stop_token_ids": range(257)},
        *({"logprobs": value} for value in (21, True)),
        {"prompt_logprobs": -1},
        {"min_tokens": 17},
        *({"max_tokens": value} for value in (0, 2**32)),
        {"row_scale": 17.0},
        {"layer_scales": [1.0, math.nan]},
        {"temprature": 1.0},
    ],
    ids=str,
)
def test_values_are_checked(options: dict) -> None:
    """Values out of bounds and unknown names are refused by name."""
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        SamplingParams(**options)


def test_a_prompt_of_other_things_is_refused() -> None:
    """The prompt must be a list of token ids of 32 bits."""
    for prompt in ([-1], [2**32], ["a"], [1.5]):
        with pytest.raises(InvalidArgumentError, match="token ids"):
            SamplingParams().to_proto(prompt)
