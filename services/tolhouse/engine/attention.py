"""The paged KV cache, attention over it, and the attention metadata of one step.

Shapes are those of `model/transformer.py`. In addition, B is the number of decoding sequences, C is
the number of blocks of the longest sequence, and S is BLOCK_TOKENS. A page holds keys by dimension
and values by token, so that both products read memory in order.

On a CPU the attention of a token has the same bits for every batch and for every division of its
prompt into chunks. Float32 sums depend on their order, so each sum has one fixed order.
"""

import contextlib
import math
import mmap
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tolhouse.engine.block_manager import BLOCK_TOKENS
from tolhouse.engine.scheduler import ScheduledChunk
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.config import ModelConfig

_TILE_TOKENS = 64  # prompt tokens in a tile on a CPU
_ROWS = 16  # the rows of a tile are a multiple of this, so that CPU kernels split sums alike


def blocks_of(config: ModelConfig, capacity_bytes: int, dtype: torch.dtype) -> int:
    """Return the number of blocks that fit into the memory.

    Raises InvalidArgumentError if none fits.
    """
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    size = values * dtype.itemsize * BLOCK_TOKENS
    if capacity_bytes < size:
        message = f"a KV cache of {capacity_bytes} bytes holds no block"
        raise InvalidArgumentError(f"{message}: {BLOCK_TOKENS} tokens take {size} bytes")
    return capacity_bytes // size


class PagedKVCache:
    def __init__(
        self, config: ModelConfig, num_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        # Zeros, because masked values must be finite. The layers of a block are adjacent, because
        # a step writes all of them.
        shape = num_blocks, 2, layers, heads, BLOCK_TOKENS * size
        if device.type == "cpu":  # anonymous memory in huge pages, allocated on the first write
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
            with contextlib.suppress(OSError):  # the kernel has no huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            pages = torch.frombuffer(memory, dtype=dtype).view(shape)
        else:
            pages = torch.zeros(shape, dtype=dtype, device=device)
        keys = pages[:, 0].unflatten(-1, (size, BLOCK_TOKENS))
        values = pages[:, 1].unflatten(-1, (BLOCK_TOKENS, size))
        self.keys = keys.transpose(0, 1)  # [N, blocks, G, E, S]
        self.values = values.transpose(0, 1)  # [N, blocks, G, S, E]
        self.layers = list(zip(self.keys, self.values, strict=True))
        self.group = config.num_attention_heads // heads  # query heads that share a key-value head
        self.device = device


@dataclass
class Places:
    """Where the tokens of a step are in the pages, as int64 arrays.

    Decoding sequences come first, and prompt chunks follow.
    """

    decoding: int  # the number of decoding sequences
    blocks_T: np.ndarray  # the block that each token of the step is written to
    offsets_T: np.ndarray
    tables_BC: np.ndarray
    lengths_B: np.ndarray
    # For each chunk: the number of tokens, the first position, the blocks up to its last token.
    chunks: list[tuple[int, int, np.ndarray]]

    @classmethod
    def of(cls, step: list[ScheduledChunk]) -> "Places":
        decoding = sum(chunk.decodes for chunk in step)
        lengths_B = np.array([chunk.last for chunk in step[:decoding]], np.int64)
        # At least two blocks, because the compiler would specialise the code for one.
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
        chunks = [
            (chunk.count, chunk.first, table[: -(-chunk.last // BLOCK_TOKENS)])
            for chunk, table in zip(prompts, tables, strict=True)
        ]
        return cls(decoding, blocks_T, offsets_T, tables_BC, lengths_B, chunks)


@dataclass
class AttentionMetadata:
    """The `Cache` (model/transformer.py) of one step: decoding sequences, then prompt chunks."""

    pages: PagedKVCache
    decoding: int  # the number of decoding sequences
    blocks_T: Tensor  # the block that each token of the step is written to
    offsets_T: Tensor
    tables_BC: Tensor
    lengths_B: Tensor
    # For each chunk: the number of tokens, the first position, the blocks up to its last token.
    chunks: list[tuple[int, int, Tensor]] = field(default_factory=list, kw_only=True)

    @classmethod
    def of(cls, pages: PagedKVCache, step: list[ScheduledChunk]) -> "AttentionMetadata":
        places = Places.of(step)
        arrays = places.blocks_T, places.offsets_T, places.tables_BC, places.lengths_B
        tensors = (torch.from_numpy(x).to(pages.device) for x in arrays)
        chunks = [
            (count, first, torch.from_numpy(table).to(pages.device))
            for count, first, table in places.chunks
        ]
        return cls(pages, places.decoding, *tensors, chunks=chunks)

    @cached_property
    def parts(self) -> tuple["AttentionMetadata", "AttentionMetadata"]:
        """The metadata of the decoding sequences, and the metadata of the chunks."""
        n, tables = self.decoding, (self.tables_BC, self.lengths_B)
        first = AttentionMetadata(self.pages, n, self.blocks_T[:n], self.offsets_T[:n], *tables)
        places = self.blocks_T[n:], self.offsets_T[n:], *(table[:0] for table in tables)
        return first, AttentionMetadata(self.pages, 0, *places, chunks=self.chunks)

    def layer(self, number: int) -> tuple[Tensor, ...]:
        """Return the tensors of one layer for `write` and attention."""
        tables = self.blocks_T, self.offsets_T, self.tables_BC, self.lengths_B
        return (*self.pages.layers[number], *tables)

    def attend(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        keys, values = self.pages.layers[layer]
        write(k_TGE, v_TGE, keys, values, self.blocks_T, self.offsets_T)
        outs, start = [], self.decoding
        if start:
            outs.append(gathered(q_THE[:start], keys, values, self.tables_BC, self.lengths_B))
        for count, first, table in self.chunks:
            q_HTE = q_THE[start : start + count].transpose(0, 1)
            k_GLE = keys[table].permute(1, 0, 3, 2).flatten(1, 2)
            v_GLE = values[table].transpose(0, 1).flatten(1, 2)
            outs.append(tiled(q_HTE, k_GLE, v_GLE, first).transpose(0, 1))
            start += count
        return torch.cat(outs) if len(outs) > 1 else outs[0]


def write(
    k_TGE: Tensor, v_TGE: Tensor, keys: Tensor, values: Tensor, blocks_T: Tensor, offsets_T: Tensor
) -> None:
    """Write keys and values of tokens to the pages [blocks, G, E, S] and [blocks, G, S, E]."""
    keys[blocks_T, :, :, offsets_T] = k_TGE
    values[blocks_T, :, offsets_T] = v_TGE


def tiled(q_HTE: Tensor, k_GLE: Tensor, v_GLE: Tensor, first: int) -> Tensor:
    """Compute causal attention [H, T, E] of a prompt chunk that begins at position `first`.

    On a CPU the computation has tiles of positions. A tile attends to all keys up to its own end,
    and missing keys are zeros. CPU kernels split a sum by the number of keys. With tiles this
    number depends only on the position.
    """
    last, on_cpu = first + q_HTE.shape[1], q_HTE.device.type == "cpu"
    tile, rows = (_TILE_TOKENS, _ROWS) if on_cpu else (last, 1)
    pad, group = -(-last // tile) * tile - k_GLE.shape[1], len(q_HTE) // len(k_GLE)
    k_GLE, v_GLE = (F.pad(x, (0, 0, 0, pad)) for x in (k_GLE, v_GLE))
    # Query heads that share keys attend to a repeated copy, with the sums of any other head.
    k_HLE, v_HLE = (x.repeat_interleave(group, 0) if group > 1 else x for x in (k_GLE, v_GLE))
    causal, outs = not (on_cpu or first), []
    for start in range(first // tile * tile, last, tile):
        begin, end = max(first, start), min(last, start + tile)
        q = F.pad(q_HTE[:, begin - first : end - first], (0, 0, 0, (begin - end) % rows))[None]
        k, v = k_HLE[None, :, : start + tile], v_HLE[None, :, : start + tile]
        mask = None if causal else q.new_full((q.shape[2], start + tile), -math.inf)
        mask = None if mask is None else mask.triu(begin + 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        outs.append(out[0, :, : end - begin])
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def gathered(
    q_BHE: Tensor, keys: Tensor, values: Tensor, tables_BC: Tensor, lengths_B: Tensor
) -> Tensor:
    """Compute attention [B, H, E] of one token per sequence.

    It attends to the first `lengths_B` tokens in the blocks `tables_BC` of its sequence.
    """
    k_BGLE = keys[tables_BC].permute(0, 2, 1, 4, 3).flatten(2, 3)
    v_BGLE = values[tables_BC].transpose(1, 2).flatten(2, 3)
    seen_BL = torch.arange(k_BGLE.shape[2], device=q_BHE.device) < lengths_B[:, None]
    q_BGJE, groups = q_BHE.unflatten(1, (k_BGLE.shape[1], -1)), k_BGLE.shape[1]
    if q_BHE.device.type == "cpu":
        # Each head is a product of its own: sums of products with several rows depend on the batch.
        q, k, v = (x.flatten(0, 1).unsqueeze(-3) for x in (q_BGJE, k_BGLE, v_BGLE))
        q, k, v = q.transpose(1, 2), *(x.expand(-1, q.shape[2], -1, -1) for x in (k, v))
        mask = seen_BL.repeat_interleave(groups, 0)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(q_BHE.shape)
    # The query heads that share keys are the rows of one product, which reads them once.
    mask = seen_BL[:, None, None]
    return F.scaled_dot_product_attention(q_BGJE, k_BGLE, v_BGLE, attn_mask=mask).flatten(1, 2)


def streamed(
    q_BHE: Tensor, keys: Tensor, values: Tensor, tables_BC: Tensor, lengths_B: Tensor
) -> Tensor:
    """Compute `gathered` as plain sums. When compiled, it reads each page once and copies none."""
    # Store q first. The compiler would otherwise recompute it for every key.
    sequences_B = torch.arange(q_BHE.shape[0], device=q_BHE.device)
    q_BHE = torch.empty_like(q_BHE).index_put((sequences_B,), q_BHE)
    # J counts the query heads that share a key-value head.
    q_BGJE = q_BHE.unflatten(1, (keys.shape[1], -1))
    k_BCG1ES, v_BCG1SE = keys[tables_BC][:, :, :, None], values[tables_BC][:, :, :, None]
    scores_BCGJS = (q_BGJE[:, None, ..., None].float() * k_BCG1ES.float()).sum(4)
    scores_BCGJS = scores_BCGJS * q_BHE.shape[-1] ** -0.5
    positions_L = torch.arange(tables_BC.shape[1] * BLOCK_TOKENS, device=q_BHE.device)
    seen_BCS = positions_L.view(-1, BLOCK_TOKENS) < lengths_B[:, None, None]
    scores_BCGJS = torch.where(seen_BCS[:, :, None, None], scores_BCGJS, -math.inf)
    weights_BCGJS = (scores_BCGJS - scores_BCGJS.amax((1, 4), keepdim=True)).exp()
    mixed_BCGJE = (weights_BCGJS[..., None] * v_BCG1SE.float()).sum(4)
    out_BGJE = mixed_BCGJE.sum(1) / weights_BCGJS.sum((1, 4))[..., None]
    return out_BGJE.flatten(1, 2).to(q_BHE.dtype)
