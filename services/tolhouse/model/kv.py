"""Two plain caches: none, for training, and a growing one for a single sequence.

The worker's paged cache is in `engine/attention.py`. Shapes as in `transformer.py`, with B
sequences of S tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class NoCache:
    """T = B * S tokens are B whole sequences; each token sees its own sequence up to itself."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length

    def attend(self, layer: int, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        def heads_first(x_THE: Tensor) -> Tensor:  # [B, H, S, E]
            return x_THE.view(-1, self.sequence_length, *x_THE.shape[1:]).transpose(1, 2)

        q, k, v = (heads_first(x) for x in (q_THE, k_THE, v_THE))
        out_BHSE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out_BHSE.transpose(1, 2).reshape(q_THE.shape)


class GrowingCache:
    """One sequence, fed in pieces: a token sees everything before it."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        if layer in self.kv:
            k_seen, v_seen = self.kv[layer]
            k_THE, v_THE = torch.cat((k_seen, k_THE)), torch.cat((v_seen, v_THE))
        self.kv[layer] = k_THE, v_THE
        new, total = len(q_THE), len(k_THE)
        mask = torch.ones(new, total, dtype=torch.bool, device=q_THE.device).tril(total - new)
        q, k, v = (x.transpose(0, 1) for x in (q_THE, k_THE, v_THE))  # [H, ., E]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
