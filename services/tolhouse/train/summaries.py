"""Adds summary tokens to a model, and attends as `--kv-policy summary` does, for training."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tolhouse.errors import InvalidArgumentError
from tolhouse.model.transformer import Transformer, for_queries


@torch.no_grad()
def with_summary_tokens(model: Transformer, count: int, segment: int) -> Transformer:
    """Return a copy of a model with `count` summary tokens after every `segment` tokens of text.

    They are new ids after those of the model. Their embeddings are near the mean embedding. A table
    of the model holds for the copy until FFN-M or other embeddings are trained. Raises
    InvalidArgumentError if the model has summary tokens, or no embedding.
    """
    if model.config.summary_tokens or model.embed_tokens is None:
        raise InvalidArgumentError("summary tokens need a model with an embedding and without them")
    size = model.config.vocab_size + count
    made = Transformer(
        replace(model.config, vocab_size=size, summary_tokens=count, summary_segment=segment)
    )
    state = model.state_dict()
    for name in ("embed_tokens.weight", "lm_head.weight"):
        mean_D, std_D = state[name].mean(0), state[name].std(0)
        new_KD = mean_D + std_D * torch.randn(count, len(mean_D))
        state[name] = torch.cat((state[name], new_KD))
    if made.config.tie_word_embeddings:
        del state["lm_head.weight"]
    made.load_state_dict(state, strict=False)
    return made


class SummaryCache:
    """A cache for T = B * S tokens of B whole sequences, whose tokens include summary tokens.

    A token sees the summary tokens before it, and its own segment up to itself.
    """

    def __init__(self, sequence_length: int, segment: int, count: int) -> None:
        places_S = torch.arange(sequence_length)
        group = segment + count
        same_SS = places_S[:, None] // group == places_S // group
        self.seen_SS = (same_SS | (places_S % group >= segment)).tril()

    def attend(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        every = q_THE, for_queries(k_TGE, q_THE), for_queries(v_TGE, q_THE)
        shape = -1, len(self.seen_SS), *q_THE.shape[1:]
        q, k, v = (x_THE.reshape(shape).transpose(1, 2) for x_THE in every)
        mask_SS = self.seen_SS.to(q_THE.device)
        out_BHSE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SS)
        return out_BHSE.transpose(1, 2).reshape(q_THE.shape)
