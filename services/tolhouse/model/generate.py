"""Greedy completion in one process with the model's own layers. Tests compare workers with it."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tolhouse.errors import InvalidArgumentError
from tolhouse.model.transformer import GrowingCache, Rows, Transformer
from tolhouse.sampling import check_prompt


@torch.inference_mode()
def greedy(
    model: Transformer,
    prompt_ids: Iterable[int],
    max_tokens: int,
    ignore_eos: bool = False,
    rows: Callable[[Tensor], Rows] | None = None,
) -> Iterator[int]:
    """Yield at most `max_tokens` ids after `prompt_ids`, up to the end token unless ignored.

    `rows` maps ids [T] to rows [N, T, D], with or without X0. It replaces `model.rows`.
    """
    if max_tokens < 1:
        raise InvalidArgumentError(f"max_tokens must be at least 1, not {max_tokens}")
    config, rows_of, cache, position = model.config, rows or model.rows, GrowingCache(), 0
    bounds = config.text_vocab_size, config.context_tokens
    ids_T = torch.tensor(check_prompt(prompt_ids, max_tokens, *bounds))
    for _ in range(max_tokens):
        positions_T = position + torch.arange(len(ids_T))
        hidden_TD = model.hidden(ids_T, positions_T, cache, rows_of(ids_T))
        position += len(ids_T)
        logits_V = model.lm_head(hidden_TD[-1])[: config.text_vocab_size]
        ids_T = logits_V.argmax(keepdim=True)
        if (token := int(ids_T)) in config.end_token_ids and not ignore_eos:
            return
        yield token
