"""From logits to token ids and log probabilities. Knows neither sequences nor the cache, only a row of logits for each `State`.

Shapes: B rows of a batch, T tokens of a prompt, V vocabulary, S rows that draw at random, L that are limited,
K likeliest tokens.
Tensors stay on the logits' device. A row's tokens do not depend on the other rows.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tolhouse.worker.sampling import Sampling

_LEAST_TEMPERATURE = 1e-5
_CANDIDATES = 1024  # likeliest tokens in which top-p mostly finds its mass; ordering the whole vocabulary takes ten times as long


@dataclass
class Logprobs:
    """Of T tokens, with the K likeliest in the place of each, likeliest first; flat, as they travel."""

    chosen: list[float]  # [T]
    top_ids: list[int]  # [T * K]
    top: list[float]  # [T * K]

    def __add__(self, other: "Logprobs") -> "Logprobs":
        return Logprobs(self.chosen + other.chosen, self.top_ids + other.top_ids, self.top + other.top)


class State:
    """What the choice of a sequence's next token needs to know of the earlier ones."""

    def __init__(self, sampling: Sampling, prompt_ids: list[int]) -> None:
        self.sampling = sampling
        self.taken = 0  # tokens chosen
        self.random = random.Random(sampling.seed) if sampling.temperature > 0 else None
        self.alters = bool(sampling.penalises or sampling.logit_bias or sampling.min_tokens)
        self.plain = self.random is None and not self.alters and sampling.logprobs is None
        self._prompt_ids = list(prompt_ids) if sampling.penalises else []
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
            logits_V[torch.tensor(sorted(sampling.stop_ids), dtype=torch.long, device=device)] = -math.inf
        if sampling.penalises:
            counts_V, seen_V = self._history(logits_V)
            rate = sampling.repetition_penalty
            logits_V = torch.where(seen_V, torch.where(logits_V > 0, logits_V / rate, logits_V * rate), logits_V)
            logits_V -= sampling.frequency_penalty * counts_V + sampling.presence_penalty * (counts_V > 0)
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
            self._seen_V[torch.tensor(self._prompt_ids, device=logits_V.device)] = True
        return self._counts_V, self._seen_V


def sample(logits_BV: Tensor, states: list[State]) -> tuple[list[int], list[Logprobs | None]]:
    """The next token of each row, and its log probabilities where they are wanted. Advances the states."""
    if all(state.plain for state in states):
        return logits_BV.argmax(-1).tolist(), [None] * len(states)
    altered_BV = logits_BV
    if any(state.alters for state in states):
        rows = zip(logits_BV.float(), states, strict=True)
        altered_BV = torch.stack([state.alter(row_V) if state.alters else row_V for row_V, state in rows])
    tokens_B = altered_BV.argmax(-1)
    drawing = [row for row, state in enumerate(states) if state.random]
    if drawing:
        tokens_B[drawing] = _draw(altered_BV[drawing], [states[row] for row in drawing])
    tokens = tokens_B.tolist()
    for state, token in zip(states, tokens, strict=True):
        state.take(token)
    logprobs: list[Logprobs | None] = [None] * len(states)
    wanting = [(row, state.sampling.logprobs) for row, state in enumerate(states) if state.sampling.logprobs is not None]
    if wanting:
        numbers = [row for row, _ in wanting]
        chosen, top_ids, top = _logprobs(logits_BV[numbers], tokens_B[numbers], max(k for _, k in wanting))
        for place, (row, k) in enumerate(wanting):
            logprobs[row] = Logprobs([chosen[place]], top_ids[place][:k], top[place][:k])
    return tokens, logprobs


def prompt_logprobs(logits_TV: Tensor, next_ids: list[int], k: int) -> Logprobs:
    """Log probabilities of the token after each of T consecutive positions, `next_ids` [T], with the `k` likeliest in its place."""
    chosen, top_ids, top = _logprobs(logits_TV, torch.tensor(next_ids, dtype=torch.long, device=logits_TV.device), k)
    return Logprobs(chosen, [i for row in top_ids for i in row], [p for row in top for p in row])


def _logprobs(logits_TV: Tensor, ids_T: Tensor, k: int) -> tuple[list[float], list[list[int]], list[list[float]]]:
    logprobs_TV = logits_TV.float().log_softmax(-1)
    chosen_T = logprobs_TV.gather(-1, ids_T[:, None])[:, 0]
    top_TK, ids_TK = logprobs_TV.topk(min(k, logprobs_TV.shape[-1]))
    return chosen_T.tolist(), ids_TK.tolist(), top_TK.tolist()


def _draw(logits_SV: Tensor, states: list[State]) -> Tensor:
    """A token for each row: where its own uniform number falls in what temperature, min-p, top-k and top-p leave of its distribution."""
    device, samplings = logits_SV.device, [state.sampling for state in states]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    logits_SV = logits_SV.float()
    # the largest logit as zero first: a small temperature can't overflow
    logits_SV = (logits_SV - logits_SV.amax(-1, keepdim=True)) / column([max(s.temperature, _LEAST_TEMPERATURE) for s in samplings])
    if any(s.min_p for s in samplings):
        least_S1 = column([math.log(s.min_p) if s.min_p else -math.inf for s in samplings])
        logits_SV = logits_SV.masked_fill(logits_SV < least_S1, -math.inf)
    if rows := [row for row, s in enumerate(samplings) if s.top_k]:
        logits_SV[rows] = _top_k(logits_SV[rows], [samplings[row].top_k for row in rows])
    if rows := [row for row, s in enumerate(samplings) if s.top_p < 1]:
        logits_SV[rows] = _top_p(logits_SV[rows], [samplings[row].top_p for row in rows])
    cdf_SV = logits_SV.softmax(-1).cumsum(-1, dtype=torch.float64)
    total_S1 = cdf_SV[:, -1:]
    uniform_S1 = torch.tensor([state.random.random() for state in states if state.random], dtype=torch.float64, device=device)[:, None]
    target_S1 = torch.minimum(uniform_S1 * total_S1, torch.nextafter(total_S1, torch.zeros_like(total_S1)))
    return torch.searchsorted(cdf_SV, target_S1, right=True)[:, 0]  # the first token beyond it: never one of no probability


def _top_k(logits_LV: Tensor, counts: list[int]) -> Tensor:
    """The logits of each row's so many likeliest tokens; minus infinity for the rest."""
    top_LK, ids_LK = logits_LV.topk(min(max(counts), logits_LV.shape[-1]))
    ranks_K = torch.arange(top_LK.shape[-1], device=top_LK.device)
    return _only(logits_LV, top_LK, ids_LK, ranks_K < torch.tensor(counts, device=top_LK.device)[:, None])


def _top_p(logits_LV: Tensor, masses: list[float]) -> Tensor:
    """The logits of the fewest likeliest tokens whose probabilities add up to each row's mass; minus infinity for the rest."""
    mass_L1 = torch.tensor(masses, dtype=torch.float64, device=logits_LV.device)[:, None]
    total_L1 = logits_LV.exp().sum(-1, keepdim=True, dtype=torch.float64)  # the largest logit is zero
    for candidates in (min(_CANDIDATES, logits_LV.shape[-1]), logits_LV.shape[-1]):
        top_LK, ids_LK = logits_LV.topk(candidates)
        parts_LK = top_LK.exp().double() / total_L1
        kept_LK = parts_LK.cumsum(-1) - parts_LK < mass_L1
        if not kept_LK[:, -1].any():
            break
    return _only(logits_LV, top_LK, ids_LK, kept_LK)


def _only(logits_LV: Tensor, top_LK: Tensor, ids_LK: Tensor, kept_LK: Tensor) -> Tensor:
    return torch.full_like(logits_LV, -math.inf).scatter_(-1, ids_LK, top_LK.masked_fill(~kept_LK, -math.inf))
