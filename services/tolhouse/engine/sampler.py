"""Samples token ids from logits, and computes log probabilities. It needs only logits and `State`.

Shapes: B rows of a batch, T tokens of a prompt, V vocabulary, S rows that sample at random, L rows
of S with the same method, K most likely tokens. The tokens of a row do not depend on other rows.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from tolhouse.sampling import SamplingParams

_LEAST_TEMPERATURE = 1e-5
# Top-p usually finds its mass in this many tokens. Sorting the vocabulary takes ten times as long.
_CANDIDATES = 1024


@dataclass
class Logprobs:
    """Log probabilities of T tokens, and of the K most likely tokens at each position.

    The most likely token comes first. The lists are flat, as in the protocol.
    """

    chosen: list[float]  # [T]
    top_ids: list[int]  # [T * K]
    top: list[float]  # [T * K]

    def __add__(self, other: "Logprobs") -> "Logprobs":
        top_ids, top = self.top_ids + other.top_ids, self.top + other.top
        return Logprobs(self.chosen + other.chosen, top_ids, top)


class State:
    """The sampling state of one sequence: its parameters, generator and token counts."""

    def __init__(self, sampling: SamplingParams, prompt_token_ids: list[int]) -> None:
        self.sampling = sampling
        self.count = 0  # sampled tokens
        self.random = random.Random(sampling.seed) if sampling.temperature > 0 else None
        self.alters = bool(sampling.penalises or sampling.logit_bias or sampling.min_tokens)
        self.plain = self.random is None and not self.alters and sampling.logprobs is None
        self._prompt_token_ids = list(prompt_token_ids) if sampling.penalises else []
        self._counts_2V: Tensor | None = None  # token counts of the answer, and of the sequence

    def alter(self, logits_V: Tensor) -> Tensor:
        """Apply logit_bias, penalties and min_tokens, and return the logits."""
        sampling, device = self.sampling, logits_V.device
        logits_V = logits_V.clone()
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias), device=device)
            logits_V[ids] += torch.tensor(list(sampling.logit_bias.values()), device=device)
        if self.count < sampling.min_tokens:
            ends = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)
            logits_V[ends] = -math.inf
        if sampling.penalises:
            if self._counts_2V is None:
                self._counts_2V = torch.zeros(2, len(logits_V), device=device)
                self._counts_2V[1, torch.tensor(self._prompt_token_ids, device=device)] = 1
            answer_V, all_V = self._counts_2V
            rate = sampling.repetition_penalty
            penalised_V = torch.where(logits_V > 0, logits_V / rate, logits_V * rate)
            logits_V = torch.where(all_V > 0, penalised_V, logits_V)
            logits_V -= sampling.frequency_penalty * answer_V
            logits_V -= sampling.presence_penalty * (answer_V > 0)
        return logits_V

    def append(self, token_id: int) -> None:
        self.count += 1
        if self._counts_2V is not None:
            self._counts_2V[:, token_id] += 1


def sample(logits_BV: Tensor, states: list[State]) -> tuple[list[int], list[Logprobs | None]]:
    """Sample the next token of each row. Returns tokens, and log probabilities if requested.

    The states advance by the token.
    """
    logprobs: list[Logprobs | None] = [None] * len(states)
    if all(state.plain for state in states):
        return _likeliest(logits_BV).tolist(), logprobs
    altered_BV = logits_BV
    if any(state.alters for state in states):
        rows = zip(logits_BV.float(), states, strict=True)
        altered = [state.alter(row_V) if state.alters else row_V for row_V, state in rows]
        altered_BV = torch.stack(altered)
    tokens_B = _likeliest(altered_BV)
    drawing = [row for row, state in enumerate(states) if state.random]
    if drawing:
        tokens_B[drawing] = _draw(altered_BV[drawing], [states[row] for row in drawing])
    tokens = tokens_B.tolist()
    for state, token in zip(states, tokens, strict=True):
        state.append(token)
    wanted = [row for row, state in enumerate(states) if state.sampling.logprobs is not None]
    if wanted:
        counts = [states[row].sampling.logprobs or 0 for row in wanted]
        scored = _logprobs(logits_BV[wanted], tokens_B[wanted], max(counts))
        lists = (wanted, counts, *map(Tensor.tolist, scored))
        for row, k, chosen, ids, top in zip(*lists, strict=True):
            logprobs[row] = Logprobs([chosen], ids[:k], top[:k])
    return tokens, logprobs


def _likeliest(logits_BV: Tensor) -> Tensor:
    """Return the most likely token ids, int64 [B].

    A CPU uses NumPy, which is six times faster here.
    """
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return torch.from_numpy(logits_BV.numpy().argmax(-1))
    return logits_BV.argmax(-1)


def prompt_logprobs(logits_TV: Tensor, next_ids: list[int], k: int) -> Logprobs:
    """Return log probabilities of the tokens `next_ids` [T] and of the `k` most likely tokens."""
    next_T = torch.tensor(next_ids, dtype=torch.long, device=logits_TV.device)
    return Logprobs(*(x.flatten().tolist() for x in _logprobs(logits_TV, next_T, k)))


def _logprobs(logits_TV: Tensor, ids_T: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_TV = logits_TV.float().log_softmax(-1)
    top_TK, ids_TK = logprobs_TV.topk(min(k, logprobs_TV.shape[-1]))
    return logprobs_TV.gather(-1, ids_T[:, None])[:, 0], ids_TK, top_TK


def _draw(logits_SV: Tensor, states: list[State]) -> Tensor:
    """Sample a token for each row after temperature, min-p, top-k and top-p.

    The parameters of a row decide the number of candidates: `top_k` tokens, as many as `top_p` may
    need, or all.
    """
    tokens_S = torch.empty(len(states), dtype=torch.long, device=logits_SV.device)
    params = [state.sampling for state in states]
    ways = [_of_top_k if p.top_k else _of_top_p if p.top_p < 1 else _of_all for p in params]
    for way in dict.fromkeys(ways):
        rows = [row for row, own in enumerate(ways) if own is way]
        tokens_S[rows] = way(logits_SV[rows].float(), [states[row] for row in rows])
    return tokens_S


def _of_all(logits_LV: Tensor, states: list[State]) -> Tensor:
    return _pick(_scaled(logits_LV, states), states)


def _of_top_k(logits_LV: Tensor, states: list[State]) -> Tensor:
    counts = [state.sampling.top_k for state in states]
    top_LK, ids_LK = logits_LV.topk(min(max(counts), logits_LV.shape[-1]))  # most likely first
    ranks_K = torch.arange(top_LK.shape[-1], device=top_LK.device)
    top_LK = _scaled(top_LK.masked_fill(ranks_K >= _column(counts, top_LK), -math.inf), states)
    total_L1 = top_LK.exp().sum(-1, keepdim=True, dtype=torch.float64)
    return _pick_within(_within_mass(top_LK, total_L1, states), top_LK, ids_LK, states)


def _of_top_p(logits_LV: Tensor, states: list[State]) -> Tensor:
    logits_LV = _scaled(logits_LV, states)
    total_L1 = logits_LV.exp().sum(-1, keepdim=True, dtype=torch.float64)
    for candidates in (min(_CANDIDATES, logits_LV.shape[-1]), logits_LV.shape[-1]):
        top_LK, ids_LK = logits_LV.topk(candidates)
        kept_LK = _within_mass(top_LK, total_L1, states)
        if not kept_LK[:, -1].any():
            break
    return _pick_within(kept_LK, top_LK, ids_LK, states)


def _pick_within(kept_LK: Tensor, top_LK: Tensor, ids_LK: Tensor, states: list[State]) -> Tensor:
    picked_L = _pick(top_LK.masked_fill(~kept_LK, -math.inf), states)
    return ids_LK.gather(-1, picked_L[:, None])[:, 0]


def _scaled(logits_LK: Tensor, states: list[State]) -> Tensor:
    """Divide logits by the temperature and shift their maximum to 0.

    Tokens that min-p removes get -inf.
    """
    # Subtract the maximum first, so that a small temperature does not overflow.
    logits_LK = logits_LK - logits_LK.amax(-1, keepdim=True)
    temperatures = [max(state.sampling.temperature, _LEAST_TEMPERATURE) for state in states]
    logits_LK /= _column(temperatures, logits_LK)
    shares = [state.sampling.min_p for state in states]
    if any(shares):
        least = [math.log(share) if share else -math.inf for share in shares]
        logits_LK.masked_fill_(logits_LK < _column(least, logits_LK), -math.inf)
    return logits_LK


def _within_mass(top_LK: Tensor, total_L1: Tensor, states: list[State]) -> Tensor:
    """Return a mask of the smallest set of most likely tokens whose probability reaches top-p."""
    # A float sum may reach 1 early, so top_p = 1 keeps all tokens explicitly.
    shares = [p if (p := state.sampling.top_p) < 1 else math.inf for state in states]
    parts_LK = top_LK.exp().double() / total_L1
    return parts_LK.cumsum(-1) - parts_LK < _column(shares, total_L1)


def _pick(logits_LK: Tensor, states: list[State]) -> Tensor:
    """Return the first index of each row whose cumulative mass exceeds the row's uniform number.

    The index never has mass 0.
    """
    mass_LK = logits_LK.exp().cumsum(-1, dtype=torch.float64)
    total_L1 = mass_LK[:, -1:]
    uniform_L1 = _column([state.random.random() for state in states if state.random], mass_LK)
    most_L1 = torch.nextafter(total_L1, torch.zeros_like(total_L1))
    target_L1 = torch.minimum(uniform_L1 * total_L1, most_L1)
    # A model that outputs NaN gets an arbitrary token and does not fail other sequences.
    last = mass_LK.shape[-1] - 1
    return torch.searchsorted(mass_LK, target_L1, right=True)[:, 0].clamp_(max=last)


def _column(values: list[float] | list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
