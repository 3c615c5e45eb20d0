"""From logits to token ids. Each sequence draws from its own generator: its tokens do not depend on who else runs."""

import torch
from torch import Tensor

from tolhouse.worker.sequence import Sampling, Sequence


def sample(logits_BV: Tensor, batch: list[Sequence]) -> list[int]:
    """The next token id of each sequence."""
    greedy = logits_BV.argmax(-1).tolist()
    return [
        token if sequence.generator is None else _draw(logits_V, sequence.sampling, sequence.generator)
        for token, logits_V, sequence in zip(greedy, logits_BV, batch, strict=True)
    ]


def _draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn after temperature, then top-k, then top-p: the fewest likeliest tokens whose mass reaches it."""
    logits_V = logits_V.float().cpu()
    # the largest logit as zero first: a small temperature can't overflow
    logits_V = (logits_V - logits_V.max()) / max(sampling.temperature, 1e-5)
    count = min(sampling.top_k or len(logits_V), len(logits_V))
    top_K, ids_K = logits_V.topk(count)  # likeliest first
    probabilities_K = top_K.softmax(-1)
    if sampling.top_p < 1:
        before_K = probabilities_K.cumsum(-1) - probabilities_K
        probabilities_K = probabilities_K * (before_K < sampling.top_p)
    return int(ids_K[torch.multinomial(probabilities_K, 1, generator=generator)])
