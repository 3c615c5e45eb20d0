"""Greedy completion in one process, FFNs in place: the reference for every other route."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tolhouse.errors import InvalidArgument, PromptTooLong
from tolhouse.model.config import ModelConfig
from tolhouse.model.kv import GrowingCache
from tolhouse.model.transformer import Rows, Transformer


def check_prompt(config: ModelConfig, prompt_ids: Iterable[int], max_tokens: int) -> list[int]:
    """The prompt as a list, if it is not empty, of this vocabulary, and fits the context."""
    ids = list(prompt_ids)
    if not ids:
        raise InvalidArgument("the prompt is empty; at least one token is needed")
    if len(ids) + max_tokens > config.max_position_embeddings:
        raise PromptTooLong(
            f"{len(ids)} prompt tokens and max_tokens {max_tokens} exceed the context of "
            f"{config.max_position_embeddings} tokens: shorten the prompt or lower max_tokens"
        )
    if bad := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise InvalidArgument(
            f"token id {bad[0]} is outside the vocabulary: allowed are 0 to {config.vocab_size - 1}"
        )
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
    rows = rows or model.rows
    ids, cache, position = check_prompt(model.config, prompt_ids, max_tokens), GrowingCache(), 0
    for _ in range(max_tokens):
        ids_T = torch.tensor(ids)
        positions_T = torch.arange(position, position + len(ids))
        hidden_TD = model.hidden(ids_T, positions_T, cache, rows(ids_T))
        position += len(ids)
        ids = [int(model.lm_head(hidden_TD[-1]).argmax())]
        if ids[0] == model.config.eos_token_id and not ignore_eos:
            return
        yield ids[0]
