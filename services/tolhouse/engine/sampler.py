"""From logits to token ids and log probabilities. Knows neither sequences nor the cache, only a row of logits for each `State`.

Shapes: B rows of a batch, T tokens of a prompt, V vocabulary, S rows that draw at random, L of them in one way, K likeliest
tokens. Tensors stay on the logits' device. A row's tokens do not depend on the other rows.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tolhouse.sampling import SamplingParams

_LEAST_TEMPERATURE = 1e-5
_CANDIDATES = 1024  # likeliest tokens in which top-p mostly finds its mass; ordering the whole vocabulary takes ten times as long


@dataclass
class Logprobs:
    """Of T tokens, with the K likeliest in the place of each, likeliest first; flat, as they travel."""

    chosen: list[float]  # [T]
    top_ids: list[int]  # [T * K]
    top: list[float]  # [T * K]

    def __add__(self, other: "Logprobs") -> "Logprobs":
        return Logprobs(
            self.chosen + other.chosen, self.top_ids + other.top_ids, self.top + other.top
        )


class State:
    """What the choice of a sequence's next token needs to know of the earlier ones."""

    def __init__(self, sampling: SamplingParams, prompt_token_ids: list[int]) -> None:
        self.sampling = sampling
        self.taken = 0  # tokens chosen
        self.random = random.Random(sampling.seed) if sampling.temperature > 0 else None
        self.alters = bool(sampling.penalises or sampling.logit_bias or sampling.min_tokens)
        self.plain = self.random is None and not self.alters and sampling.logprobs is None
        self._prompt_token_ids = list(prompt_token_ids) if sampling.penalises else []
        self._counts_V: Tensor | None = None  # of tokens in the answer
        self._seen_V: Tensor | None = None  # in prompt or answer

    def alter(self, logits_V: Tensor) -> Tensor:
        """The logits after bias, penalties, and the ban on an early end."""
        sampling, device = self.sampling, logits_V.device
        logits_V = logits_V.clone()
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=device)
            logits_V[ids] += torch.tensor(list(sampling.logit_bias.values()), device=device)
        if self.taken < sampling.min_tokens:
            logits_V[
                torch.tensor(sorted(sampling.stop_token_ids), dtype=torch.long, device=device)
            ] = -math.inf
        if sampling.penalises:
            counts_V, seen_V = self._history(logits_V)
            rate = sampling.repetition_penalty
            logits_V = torch.where(
                seen_V, torch.where(logits_V > 0, logits_V / rate, logits_V * rate), logits_V
            )
            logits_V -= sampling.frequency_penalty * counts_V + sampling.presence_penalty * (
                counts_V > 0
            )
        return logits_V

    def take(self, token_id: int) -> None:
        self.taken += 1
        if self._counts_V is not None and self._seen_V is not None:
            self._counts_V[token_id] += 1
            self._seen_V[token_id] = True

    def _history(self, logits_V: Tensor) -> tuple[Tensor, Tensor]:
        if self._counts_V is None or self._seen_V is None:
            self._counts_V = torch.zeros_like(logits_V)
            self._seen_V = torch.zeros_like(logits_V, dtype=torch.bool)
            self._seen_V[torch.tensor(self._prompt_token_ids, device=logits_V.device)] = True
        return self._counts_V, self._seen_V


def sample(logits_BV: Tensor, states: list[State]) -> tuple[list[int], list[Logprobs | None]]:
    """The next token of each row, and its log probabilities where they are wanted. Advances the states."""
    if all(state.plain for state in states):
        return _likeliest(logits_BV).tolist(), [None] * len(states)
    altered_BV = logits_BV
    if any(state.alters for state in states):
        rows = zip(logits_BV.float(), states, strict=True)
        altered_BV = torch.stack(
            [state.alter(row_V) if state.alters else row_V for row_V, state in rows]
        )
    tokens_B = _likeliest(altered_BV)
    drawing = [row for row, state in enumerate(states) if state.random]
    if drawing:
        tokens_B[drawing] = _draw(altered_BV[drawing], [states[row] for row in drawing])
    tokens = tokens_B.tolist()
    for state, token in zip(states, tokens, strict=True):
        state.take(token)
    logprobs: list[Logprobs | None] = [None] * len(states)
    wanting = [
        (row, state.sampling.logprobs)
        for row, state in enumerate(states)
        if state.sampling.logprobs is not None
    ]
    if wanting:
        numbers = [row for row, _ in wanting]
        chosen, top_ids, top = _logprobs(
            logits_BV[numbers], tokens_B[numbers], max(k for _, k in wanting)
        )
        for place, (row, k) in enumerate(wanting):
            logprobs[row] = Logprobs([chosen[place]], top_ids[place][:k], top[place][:k])
    return tokens, logprobs


def _likeliest(logits_BV: Tensor) -> Tensor:
    """Token ids int64 [B]; on a CPU by NumPy, which takes a sixth of torch's time."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return torch.from_numpy(logits_BV.numpy().argmax(-1))
    return logits_BV.argmax(-1)


def prompt_logprobs(logits_TV: Tensor, next_ids: list[int], k: int) -> Logprobs:
    """Log probabilities of the token after each of T consecutive positions, `next_ids` [T], with the `k` likeliest in its place."""
    chosen, top_ids, top = _logprobs(
        logits_TV, torch.tensor(next_ids, dtype=torch.long, device=logits_TV.device), k
    )
    return Logprobs(chosen, [i for row in top_ids for i in row], [p for row in top for p in row])


def _logprobs(
    logits_TV: Tensor, ids_T: Tensor, k: int
) -> tuple[list[float], list[list[int]], list[list[float]]]:
    logprobs_TV = logits_TV.float().log_softmax(-1)
    chosen_T = logprobs_TV.gather(-1, ids_T[:, None])[:, 0]
    top_TK, ids_TK = logprobs_TV.topk(min(k, logprobs_TV.shape[-1]))
    return chosen_T.tolist(), ids_TK.tolist(), top_TK.tolist()


def _draw(logits_SV: Tensor, states: list[State]) -> Tensor:
    """A token for each row from what temperature, min-p, top-k and top-p leave of its distribution.

    How a row draws follows from its own sampling: among its `top_k`, among as many as `top_p` may need, or among all.
    """
    tokens_S = torch.empty(len(states), dtype=torch.long, device=logits_SV.device)
    ways = [
        _of_top_k if s.sampling.top_k else _of_top_p if s.sampling.top_p < 1 else _of_all
        for s in states
    ]
    for way in (_of_top_k, _of_top_p, _of_all):
        rows = [row for row, own in enumerate(ways) if own is way]
        if rows:
            tokens_S[rows] = way(logits_SV[rows].float(), [states[row] for row in rows])
    return tokens_S


def _of_all(logits_LV: Tensor, states: list[State]) -> Tensor:
    return _pick(_scaled(logits_LV, states), states)


def _of_top_k(logits_LV: Tensor, states: list[State]) -> Tensor:
    counts = [state.sampling.top_k for state in states]
    top_LK, ids_LK = logits_LV.topk(min(max(counts), logits_LV.shape[-1]))  # likeliest first
    ranks_K = torch.arange(top_LK.shape[-1], device=top_LK.device)
    top_LK = _scaled(top_LK.masked_fill(ranks_K >= _column(counts, top_LK), -math.inf), states)
    kept_LK = _within_mass(top_LK, top_LK.exp().sum(-1, keepdim=True, dtype=torch.float64), states)
    return ids_LK.gather(-1, _pick(top_LK.masked_fill(~kept_LK, -math.inf), states)[:, None])[:, 0]


def _of_top_p(logits_LV: Tensor, states: list[State]) -> Tensor:
    logits_LV = _scaled(logits_LV, states)
    total_L1 = logits_LV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    for candidates in (min(_CANDIDATES, logits_LV.shape[-1]), logits_LV.shape[-1]):
        top_LK, ids_LK = logits_LV.topk(candidates)
        kept_LK = _within_mass(top_LK, total_L1, states)
        if not kept_LK[:, -1].any():
            break
    return ids_LK.gather(-1, _pick(top_LK.masked_fill(~kept_LK, -math.inf), states)[:, None])[:, 0]


def _scaled(logits_LK: Tensor, states: list[State]) -> Tensor:
    """Logits by temperature, with the largest as zero, and minus infinity for those that min-p leaves out."""
    samplings = [state.sampling for state in states]
    logits_LK = logits_LK - logits_LK.amax(
        -1, keepdim=True
    )  # before the division: a small temperature can't overflow
    logits_LK /= _column([max(s.temperature, _LEAST_TEMPERATURE) for s in samplings], logits_LK)
    if any(s.min_p for s in samplings):
        least_L1 = _column(
            [math.log(s.min_p) if s.min_p else -math.inf for s in samplings], logits_LK
        )
        logits_LK.masked_fill_(logits_LK < least_L1, -math.inf)
    return logits_LK


def _within_mass(top_LK: Tensor, total_L1: Tensor, states: list[State]) -> Tensor:
    """Which of the likeliest, in their order, belong to the fewest whose mass, of a total, reaches top-p."""
    # sums of floats may reach 1 early: who has no top-p keeps all
    top_p_L1 = _column(
        [s.sampling.top_p if s.sampling.top_p < 1 else math.inf for s in states], total_L1
    )
    parts_LK = top_LK.exp().double() / total_L1
    return parts_LK.cumsum(-1) - parts_LK < top_p_L1


def _pick(logits_LK: Tensor, states: list[State]) -> Tensor:
    """Where each row's own uniform number falls: the first place beyond it, so never one of no probability."""
    mass_LK = logits_LK.exp().cumsum(-1, dtype=torch.float64)
    total_L1 = mass_LK[:, -1:]
    uniform_L1 = _column([state.random.random() for state in states if state.random], mass_LK)
    target_L1 = torch.minimum(
        uniform_L1 * total_L1, torch.nextafter(total_L1, torch.zeros_like(total_L1))
    )
    # a broken model's NaN, which nothing is beyond, ends in some token: it must not be the other sequences' failure
    return torch.searchsorted(mass_LK, target_L1, right=True)[:, 0].clamp_(
        max=mass_LK.shape[-1] - 1
    )


def _column(values: list[float] | list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
