"""Keys and values in pages, and one step's view of them: what each token of the step attends to.

Shapes as in `model/transformer.py`; B decoding sequences, C blocks of the longest, S BLOCK_TOKENS.
In a page keys lie dimension by dimension, values token by token: both products run along memory.
"""

import contextlib
import math
import mmap
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tolhouse.engine.block_manager import BLOCK_TOKENS
from tolhouse.engine.scheduler import ScheduledChunk
from tolhouse.errors import InvalidArgument
from tolhouse.model.config import ModelConfig


def blocks_of(config: ModelConfig, capacity_bytes: int, dtype: torch.dtype) -> int:
    """How many blocks fit; InvalidArgument if none does."""
    size = 2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize * BLOCK_TOKENS
    if capacity_bytes < size:
        message = f"a KV cache of {capacity_bytes} bytes holds no block"
        raise InvalidArgument(f"{message}: {BLOCK_TOKENS} tokens take {size} bytes")
    return capacity_bytes // size


class PagedKVCache:
    def __init__(
        self, config: ModelConfig, num_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        layers, heads, size = config.num_hidden_layers, config.num_attention_heads, config.head_dim
        # zeros, as masked values must be numbers; a block's layers side by side, as all are written
        shape = num_blocks, 2, layers, heads, BLOCK_TOKENS * size
        if device.type == "cpu":  # in fresh memory, which is paged in when written, in huge pages
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
            pages = torch.frombuffer(memory, dtype=dtype).view(shape)
        else:
            pages = torch.zeros(shape, dtype=dtype, device=device)
        keys = pages[:, 0].unflatten(-1, (size, BLOCK_TOKENS))
        values = pages[:, 1].unflatten(-1, (BLOCK_TOKENS, size))
        self.keys = keys.transpose(0, 1)  # [N, blocks, H, E, S]
        self.values = values.transpose(0, 1)  # [N, blocks, H, S, E]
        self.layers = list(zip(self.keys, self.values, strict=True))
        self.device = device


@dataclass
class AttentionMetadata:
    """One step's `Cache` (model/transformer.py): decoding sequences, then chunks of prompts."""

    pages: PagedKVCache
    decoding: int  # sequences
    blocks_T: Tensor  # where the step's tokens go
    offsets_T: Tensor
    tables_BC: Tensor
    lengths_B: Tensor
    # tokens, first position, and the blocks of the sequence if it has a past
    chunks: list[tuple[int, int, Tensor | None]] = field(default_factory=list, init=False)

    @classmethod
    def of(cls, pages: PagedKVCache, step: list[ScheduledChunk]) -> "AttentionMetadata":
        decoding = sum(chunk.decodes for chunk in step)
        lengths_B = np.array([chunk.last for chunk in step[:decoding]], np.int64)
        # at least two blocks: one is a case of its own to a compiler
        widest = max(2, -(-int(lengths_B.max(initial=1)) // BLOCK_TOKENS))
        tables_BC = np.zeros((decoding, widest), np.int64)
        for row, chunk in zip(tables_BC, step, strict=False):
            blocks = chunk.sequence.blocks[:widest]
            row[: len(blocks)] = blocks
        prompts = step[decoding:]
        tables = [np.array(chunk.sequence.blocks, np.int64) for chunk in prompts]
        positions = [np.arange(chunk.first, chunk.last) for chunk in prompts]
        last_B = lengths_B - 1
        decoding_blocks = tables_BC[np.arange(decoding), last_B // BLOCK_TOKENS]
        prompt_blocks = [b[p // BLOCK_TOKENS] for b, p in zip(tables, positions, strict=True)]
        blocks_T = np.concatenate([decoding_blocks, *prompt_blocks])
        offsets_T = np.concatenate([last_B, *positions]) % BLOCK_TOKENS
        arrays = blocks_T, offsets_T, tables_BC, lengths_B
        view = cls(pages, decoding, *(torch.from_numpy(x).to(pages.device) for x in arrays))
        for chunk, table in zip(prompts, tables, strict=True):
            past = torch.from_numpy(table[: -(-chunk.last // BLOCK_TOKENS)]).to(pages.device)
            view.chunks.append((chunk.count, chunk.first, past if chunk.first else None))
        return view

    def layer(self, number: int) -> tuple[Tensor, ...]:
        """What `write` and attention need of a layer."""
        tables = self.blocks_T, self.offsets_T, self.tables_BC, self.lengths_B
        return (*self.pages.layers[number], *tables)

    def attend(self, layer: int, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        keys, values = self.pages.layers[layer]
        write(k_THE, v_THE, keys, values, self.blocks_T, self.offsets_T)
        outs, start = [], self.decoding
        if start:
            outs.append(gathered(q_THE[:start], keys, values, self.tables_BC, self.lengths_B))
        for count, first, past in self.chunks:
            part, last, mask_TL = slice(start, start + count), first + count, None
            q_HTE, k_HLE, v_HLE = (x[part].transpose(0, 1) for x in (q_THE, k_THE, v_THE))
            if past is not None:
                k_HLE = keys[past].permute(1, 0, 3, 2).flatten(1, 2)[:, :last]
                v_HLE = values[past].transpose(0, 1).flatten(1, 2)[:, :last]
                mask_TL = q_HTE.new_full((count, last), -math.inf).triu(first + 1)
            q, k, v = q_HTE[None], k_HLE[None], v_HLE[None]
            causal = mask_TL is None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TL, is_causal=causal)
            outs.append(out[0].transpose(0, 1))
            start += count
        return torch.cat(outs) if len(outs) > 1 else outs[0]


def write(
    k_THE: Tensor, v_THE: Tensor, keys: Tensor, values: Tensor, blocks_T: Tensor, offsets_T: Tensor
) -> None:
    """Write tokens' keys and values into their pages: [blocks, H, E, S] and [blocks, H, S, E]."""
    keys[blocks_T, :, :, offsets_T] = k_THE
    values[blocks_T, :, offsets_T] = v_THE


def gathered(
    q_BHE: Tensor, keys: Tensor, values: Tensor, tables_BC: Tensor, lengths_B: Tensor
) -> Tensor:
    """Attention of one token of each sequence to its `lengths_B` tokens in blocks `tables_BC`."""
    k_BHLE = keys[tables_BC].permute(0, 2, 1, 4, 3).flatten(2, 3)
    v_BHLE = values[tables_BC].transpose(1, 2).flatten(2, 3)
    seen_BL = torch.arange(k_BHLE.shape[2], device=q_BHE.device) < lengths_B[:, None]
    q, mask = q_BHE[:, :, None], seen_BL[:, None, None]
    return F.scaled_dot_product_attention(q, k_BHLE, v_BHLE, attn_mask=mask)[:, :, 0]


def streamed(
    q_BHE: Tensor, keys: Tensor, values: Tensor, tables_BC: Tensor, lengths_B: Tensor
) -> Tensor:
    """`gathered` written as plain sums: once compiled, it reads each page once and copies none."""
    # stored first: a compiler would compute q, and all that leads to it, anew for every key
    sequences_B = torch.arange(q_BHE.shape[0], device=q_BHE.device)
    q_BHE = torch.empty_like(q_BHE).index_put((sequences_B,), q_BHE)
    scores_BCHS = (q_BHE[:, None, :, :, None].float() * keys[tables_BC].float()).sum(3)
    scores_BCHS = scores_BCHS * q_BHE.shape[-1] ** -0.5
    positions_L = torch.arange(tables_BC.shape[1] * BLOCK_TOKENS, device=q_BHE.device)
    seen_BC1S = (positions_L.view(-1, BLOCK_TOKENS) < lengths_B[:, None, None])[:, :, None]
    scores_BCHS = torch.where(seen_BC1S, scores_BCHS, -math.inf)
    weights_BCHS = (scores_BCHS - scores_BCHS.amax((1, 3), keepdim=True)).exp()
    mixed_BCHE = (weights_BCHS[..., None] * values[tables_BC].float()).sum(3)
    return (mixed_BCHE.sum(1) / weights_BCHS.sum((1, 3))[..., None]).to(q_BHE.dtype)
