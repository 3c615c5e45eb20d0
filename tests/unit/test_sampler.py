"""The sampler against token-by-token references in plain Python."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolhouse.engine.sampler import State, prompt_logprobs, sample
from tolhouse.sampling import SamplingParams

finite = st.floats(-30, 30, width=32)
rows = st.lists(finite, min_size=2, max_size=40, unique=True).map(torch.tensor)


def draw(logits: torch.Tensor, count: int = 400, **sampling) -> list[int]:
    state = State(SamplingParams(1, **sampling), [1])
    return [sample(logits[None], [state])[0][0] for _ in range(count)]


def allowed(logits: torch.Tensor, **sampling) -> set[int]:
    """The tokens that can be drawn, found by a uniform number within each token's share."""
    shifted = (logits - logits.max()) / max(sampling.get("temperature", 1.0), 1e-5)
    kept = _reference(shifted, **{k: v for k, v in sampling.items() if k != "temperature"})
    mass = sum(math.exp(shifted[i]) for i in sorted(kept))
    middle, below = [], 0.0
    for i in sorted(kept):
        share = math.exp(shifted[i]) / mass
        middle.append(min(below + share / 2, 1 - 2**-53))
        below += share
    places = [0.0, *middle, 1 - 2**-53]
    state = State(SamplingParams(1, **{"temperature": 1.0, **sampling}), [1])
    state.random = SimpleNamespace(random=iter(places).__next__)
    return {sample(logits[None], [state])[0][0] for _ in places}


def _reference(
    shifted: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[int]:
    """The ids that remain after min-p, then top-k, then top-p, for logits with maximum zero."""
    order = sorted(range(len(shifted)), key=lambda i: -shifted[i])
    order = [i for i in order if min_p == 0 or shifted[i] >= math.log(min_p)][: top_k or None]
    total, before, kept = sum(math.exp(shifted[i]) for i in order), 0.0, []
    for i in order:
        if top_p == 1 or before < top_p:
            kept.append(i)
        before += math.exp(shifted[i]) / total
    return kept


def test_sampling_parameters_limit_the_tokens() -> None:
    """top-k, top-p and min-p limit the tokens, temperature flattens the distribution, and a seed
    makes draws reproducible."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert {0} == set(draw(logits))
    assert {0} == set(draw(logits, temperature=1e-6, seed=1))
    for expected, limit in (
        ({0, 1, 2, 3}, {}),
        ({0, 1}, {"top_k": 2}),
        ({0, 1}, {"top_p": 0.79}),
        ({0, 1, 2}, {"top_p": 0.81}),
        ({0}, {"top_p": 1e-6}),
        ({0, 1}, {"min_p": 0.31}),
        ({0, 1, 2}, {"min_p": 0.29}),
    ):
        assert expected == set(draw(logits, temperature=1.0, seed=1, **limit))
    first, again, other = (draw(logits, temperature=1.0, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    for temperature, expected in ((1.0, 0.5), (100.0, 0.25)):
        drawn = draw(logits, count=4000, temperature=temperature, seed=3)
        assert drawn.count(0) / 4000 == pytest.approx(expected, abs=0.05)


@given(
    rows,
    st.integers(0, 45),
    st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
    st.sampled_from([0.0, 1e-4, 0.1, 0.6]),
)
def test_limits_keep_the_tokens_of_the_reference(
    logits: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> None:
    """Only tokens of the reference's set are drawn, and each with sufficient mass can be drawn."""
    shifted = (logits - logits.max()).double()
    sums = torch.tensor([math.exp(x) for x in sorted(shifted.tolist(), reverse=True)]).cumsum(0)
    near = (sums / sums[-1] - top_p).abs().min() < 1e-5 or (
        min_p and (shifted - math.log(min_p)).abs().min() < 1e-5
    )
    kept = set(_reference(shifted.float(), top_k, top_p, min_p))
    drawn = allowed(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    mass = sum(math.exp(shifted[i]) for i in kept)
    if not near and not top_k:
        assert drawn <= kept
        assert {i for i in kept if math.exp(shifted[i]) / mass > 1e-6} <= drawn
    if top_k:
        assert len(drawn) <= top_k


def test_top_p_handles_flat_distributions() -> None:
    """top-p limits a flat distribution whose mass is spread over thousands of tokens."""
    logits = torch.linspace(0, 0.1, 4000)
    drawn = draw(logits, temperature=1.0, seed=2, top_p=0.9)
    kept = _reference(logits - logits.max(), top_p=0.9)
    assert set(drawn) <= set(kept)
    assert set(drawn) & set(kept[1024:])


@given(
    rows,
    st.data(),
    st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    st.sampled_from([-2.0, 0.0, 0.7]),
    st.sampled_from([-1.0, 0.0, 1.5]),
)
def test_penalties_and_bias_equal_the_reference(
    logits, data, repetition: float, presence: float, frequency: float
) -> None:
    """Greedy tokens over many steps equal those of a reference with its own counts."""
    ids = st.integers(0, len(logits) - 1)
    prompt = data.draw(st.lists(ids, min_size=1, max_size=5))
    bias = data.draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=4))
    options = {
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "logit_bias": bias,
    }
    state, answer = State(SamplingParams(20, **options), prompt), []
    for _ in range(6):
        values = []
        for i, logit in enumerate(logits.tolist()):
            value = logit + bias.get(i, 0)
            if i in prompt + answer:
                value = value / repetition if value > 0 else value * repetition
            values.append(value - frequency * answer.count(i) - presence * (i in answer))
        token = sample(logits[None], [state])[0][0]
        assert values[token] == pytest.approx(max(values), abs=1e-3)
        answer.append(token)


@given(rows, st.integers(0, 20))
def test_logprobs_are_those_of_the_model(logits: torch.Tensor, k: int) -> None:
    """Log probabilities are those of the raw logits, for the chosen token and the k most likely
    tokens in order."""
    params = SamplingParams(3, logprobs=k, logit_bias={1: 100.0}, temperature=0.5, top_k=1)
    state = State(params, [0])
    tokens, (logprobs,) = sample(logits[None], [state])
    expected = logits.log_softmax(-1)
    assert logprobs is not None
    assert [expected[tokens[0]]] == pytest.approx(logprobs.chosen)
    assert sorted(expected.tolist(), reverse=True)[:k] == pytest.approx(logprobs.top)
    assert [expected[i] for i in logprobs.top_ids] == pytest.approx(logprobs.top)
    assert sum(map(math.exp, logprobs.top)) < 1 + 1e-5


def test_prompt_logprobs_can_be_computed_in_chunks() -> None:
    """The log probabilities of a prompt's chunks concatenate to those of the whole prompt."""
    logits_TV = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    ids = list(range(3, 12))
    whole = prompt_logprobs(logits_TV, ids, 2)
    first, second = (
        prompt_logprobs(logits_TV[part], ids[part], 2) for part in (slice(4), slice(4, 9))
    )
    assert whole == first + second
    assert logits_TV.log_softmax(-1)[torch.arange(9), ids].tolist() == whole.chosen
    assert (18, 18) == (len(whole.top_ids), len(whole.top))


def test_a_row_s_tokens_do_not_depend_on_the_others() -> None:
    """Every kind of sampling gives the same tokens and log probabilities alone and in a batch."""
    kinds = [
        {},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 1.0, "seed": 1, "top_k": 5},
        {"temperature": 1.0, "seed": 1, "top_p": 0.5, "min_p": 0.01},
        {"repetition_penalty": 1.5, "logprobs": 3},
        {"temperature": 2.0, "seed": 4, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 2.0, "seed": 4, "logprobs": 0},
        {"logit_bias": {3: 50.0}, "min_tokens": 2, "stop_token_ids": (3,)},
    ]
    steps = torch.randn(10, len(kinds), 50, generator=torch.Generator().manual_seed(3)) * 2
    together = [State(SamplingParams(10, **kind), [1, 2]) for kind in kinds]
    batched = [sample(logits_BV, together) for logits_BV in steps]
    for row, kind in enumerate(kinds):
        state = State(SamplingParams(10, **kind), [1, 2])
        for step, logits_BV in enumerate(steps):
            (token,), (logprobs,) = sample(logits_BV[row : row + 1], [state])
            assert (token, logprobs) == (batched[step][0][row], batched[step][1][row])


def test_min_tokens_suppresses_stop_tokens() -> None:
    """A likely stop token is suppressed until the minimum number of tokens is reached."""
    state = State(SamplingParams(10, min_tokens=3, stop_token_ids=(2,)), [0])
    logits_1V = torch.tensor([[0.0, 1.0, 9.0, -1.0]])
    assert [1, 1, 1, 2, 2] == [sample(logits_1V, [state])[0][0] for _ in range(5)]


@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_nan_logits_do_not_affect_other_sequences(how: dict) -> None:
    """NaN logits yield some token of the vocabulary and do not affect the other sequence."""
    rows_BV = torch.zeros(2, 64)
    rows_BV[0], rows_BV[1, 7] = math.nan, 50.0
    states = [State(SamplingParams(1, temperature=1.0, **how), [1]) for _ in range(2)]
    (first, second), _ = sample(rows_BV, states)
    assert 0 <= first < 64
    assert 7 == second
