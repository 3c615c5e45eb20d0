"""Greedy completion in one process, FFNs in place: the reference for every other route."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tolhouse.errors import InvalidArgument, PromptTooLong
from tolhouse.model.config import ModelConfig
from tolhouse.model.transformer import GrowingCache, Rows, Transformer


def check_prompt(config: ModelConfig, prompt_ids: Iterable[int], max_tokens: int) -> list[int]:
    """The prompt as a list, if it is not empty, of this vocabulary, and fits the context."""
    ids = list(prompt_ids)
    if not ids:
        raise InvalidArgument("the prompt is empty; at least one token is needed")
    if len(ids) + max_tokens > config.max_position_embeddings:
        asked = f"{len(ids)} prompt tokens and max_tokens {max_tokens}"
        context = f"the context of {config.max_position_embeddings} tokens"
        raise PromptTooLong(f"{asked} exceed {context}: shorten the prompt or lower max_tokens")
    if bad := [i for i in ids if not 0 <= i < config.vocab_size]:
        allowed = f"allowed are 0 to {config.vocab_size - 1}"
        raise InvalidArgument(f"token id {bad[0]} is outside the vocabulary: {allowed}")
    return ids


@torch.inference_mode()
def greedy(
    model: Transformer,
    prompt_ids: Iterable[int],
    max_tokens: int,
    ignore_eos: bool = False,
    rows: Callable[[Tensor], Rows] | None = None,
) -> Iterator[int]:
    """Token ids after `prompt_ids`, at most `max_tokens`, up to the end of text unless ignored.

    `rows` gives rows [N, T, D] of ids [T], with or without X0, in place of the model's own.
    """
    if max_tokens < 1:
        raise InvalidArgument(f"max_tokens must be at least 1, not {max_tokens}")
    rows_of, cache, position = rows or model.rows, GrowingCache(), 0
    ids_T = torch.tensor(check_prompt(model.config, prompt_ids, max_tokens))
    for _ in range(max_tokens):
        positions_T = position + torch.arange(len(ids_T))
        hidden_TD = model.hidden(ids_T, positions_T, cache, rows_of(ids_T))
        position += len(ids_T)
        ids_T = model.lm_head(hidden_TD[-1]).argmax(keepdim=True)
        if (token := int(ids_T)) == model.config.eos_token_id and not ignore_eos:
            return
        yield token
