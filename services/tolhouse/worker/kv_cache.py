"""Keys and values of running sequences, in blocks of tokens. Owns the blocks and knows which are free.

Shapes as in `model/transformer.py`; B sequences, S slots (one per token that the cache can hold).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tolhouse.errors import InvalidArgument
from tolhouse.model.config import ModelConfig
from tolhouse.worker.sequence import Sequence

BLOCK_TOKENS = 16


class KVCache:
    def __init__(self, config: ModelConfig, capacity_bytes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        token_bytes = 2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize
        self.num_blocks = capacity_bytes // (token_bytes * BLOCK_TOKENS)
        if not self.num_blocks:
            raise InvalidArgument(
                f"a KV cache of {capacity_bytes} bytes holds no block: {BLOCK_TOKENS} tokens take {token_bytes * BLOCK_TOKENS} bytes"
            )
        shape = (config.num_hidden_layers, self.num_blocks * BLOCK_TOKENS, config.num_attention_heads, config.head_dim)
        # pages are taken when written
        self.k_NSHE, self.v_NSHE = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.free = list(range(self.num_blocks - 1, -1, -1))

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * BLOCK_TOKENS

    def has_room(self, tokens: int) -> bool:
        return -(-tokens // BLOCK_TOKENS) <= len(self.free)

    def reserve(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // BLOCK_TOKENS))]

    def release(self, blocks: list[int]) -> None:
        self.free.extend(blocks)

    def slots(self, sequence: Sequence, first: int, last: int) -> Tensor:
        """Slots of tokens `first` to `last` (not included) of a sequence."""
        tokens = torch.arange(first, last)
        return torch.tensor(sequence.blocks)[tokens // BLOCK_TOKENS] * BLOCK_TOKENS + tokens % BLOCK_TOKENS


class Prefill:
    """One step's view of the cache in which each sequence brings all its tokens; each sees its own, up to itself."""

    def __init__(self, cache: KVCache, batch: list[Sequence]) -> None:
        self.cache = cache
        self.lengths = [len(s.ids) for s in batch]
        self.slots_T = torch.cat([cache.slots(s, 0, len(s.ids)) for s in batch]).to(cache.k_NSHE.device)

    def attend(self, layer: int, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        self.cache.k_NSHE[layer, self.slots_T], self.cache.v_NSHE[layer, self.slots_T] = k_THE, v_THE
        heads_first = (x.transpose(0, 1).split(self.lengths, dim=1) for x in (q_THE, k_THE, v_THE))
        outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in zip(*heads_first, strict=True)]
        return torch.cat(outs, dim=1).transpose(0, 1)


class Decode:
    """One step's view of the cache in which each of B sequences brings one token, and sees all of its own."""

    def __init__(self, cache: KVCache, batch: list[Sequence]) -> None:
        self.cache = cache
        lengths = [len(s.ids) for s in batch]
        slots = [cache.slots(s, 0, n) for s, n in zip(batch, lengths, strict=True)]
        device = cache.k_NSHE.device
        self.new_B = torch.stack([s[-1] for s in slots]).to(device)
        self.slots_BS = torch.nn.utils.rnn.pad_sequence(slots, batch_first=True).to(device)
        # a sequence shorter than the longest doesn't see its padding
        ends_B = torch.tensor(lengths, device=device)
        self.mask_B11S = (torch.arange(max(lengths), device=device) < ends_B[:, None])[:, None, None] if len(batch) > 1 else None

    def attend(self, layer: int, q_BHE: Tensor, k_BHE: Tensor, v_BHE: Tensor) -> Tensor:
        keys_SHE, values_SHE = self.cache.k_NSHE[layer], self.cache.v_NSHE[layer]
        keys_SHE[self.new_B], values_SHE[self.new_B] = k_BHE, v_BHE
        keys, values = (x[self.slots_BS].transpose(1, 2) for x in (keys_SHE, values_SHE))  # [B, H, S, E]
        return F.scaled_dot_product_attention(q_BHE[:, :, None], keys, values, attn_mask=self.mask_B11S)[:, :, 0]
