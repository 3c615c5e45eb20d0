"""Keys and values in pages, and one step's view of them: what each token of the step attends to.

Shapes as in `model/transformer.py`; besides B sequences that decode, C blocks of the longest of them, S = BLOCK_TOKENS. In a page, keys
lie dimension by dimension and values token by token: so both products of attention run along memory, without a sum across a register.
"""

import contextlib
import math
import mmap

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tolhouse.engine.block_manager import BLOCK_TOKENS
from tolhouse.engine.scheduler import Chunk
from tolhouse.errors import InvalidArgument
from tolhouse.model.config import ModelConfig

_FEWEST_BLOCKS = 2  # in a table: one is a case of its own to a compiler


def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory of one block, all layers."""
    return 2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize * BLOCK_TOKENS


def blocks_of(config: ModelConfig, capacity_bytes: int, dtype: torch.dtype) -> int:
    """How many blocks fit; InvalidArgument if none does."""
    count = capacity_bytes // block_bytes(config, dtype)
    if not count:
        raise InvalidArgument(
            f"a KV cache of {capacity_bytes} bytes holds no block: {BLOCK_TOKENS} tokens take {block_bytes(config, dtype)} bytes"
        )
    return count


class PagedKVCache:
    def __init__(
        self, config: ModelConfig, num_blocks: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        layers, heads, size = config.num_hidden_layers, config.num_attention_heads, config.head_dim
        # zeros, as what is masked must be numbers all the same; a block's layers side by side, as they are taken together
        pages = _zeros((num_blocks, 2, layers, heads, BLOCK_TOKENS * size), device, dtype)
        self.keys = (
            pages[:, 0].unflatten(-1, (size, BLOCK_TOKENS)).transpose(0, 1)
        )  # [N, blocks, H, E, S]
        self.values = (
            pages[:, 1].unflatten(-1, (BLOCK_TOKENS, size)).transpose(0, 1)
        )  # [N, blocks, H, S, E]
        self.layers = list(zip(self.keys, self.values, strict=True))
        self.device = device


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """On a CPU in fresh memory of the system's, which takes no room before it is written, and then a huge page at a time."""
    if device.type == "cpu":
        memory = mmap.mmap(
            -1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


class AttentionMetadata:
    """The cache of one step (`Cache` of `model/transformer.py`): tokens of sequences that decode first, then chunks of prompts."""

    def __init__(
        self,
        pages: PagedKVCache,
        decoding: int,
        blocks_T: Tensor,
        offsets_T: Tensor,
        tables_BC: Tensor,
        lengths_B: Tensor,
    ) -> None:
        self.pages, self.decoding = pages, decoding
        self.blocks_T, self.offsets_T = blocks_T, offsets_T  # where the step's tokens go
        self.tables_BC, self.lengths_B = tables_BC, lengths_B
        self.chunks: list[
            tuple[int, int, Tensor | None]
        ] = []  # tokens, first position, blocks of its sequence if there is a past

    @classmethod
    def of(cls, pages: PagedKVCache, step: list[Chunk]) -> "AttentionMetadata":
        decoding = sum(chunk.decodes for chunk in step)
        lengths_B = np.array([chunk.last for chunk in step[:decoding]], np.int64)
        widest = max(_FEWEST_BLOCKS, -(-int(lengths_B.max(initial=1)) // BLOCK_TOKENS))
        tables_BC = np.zeros((decoding, widest), np.int64)
        for row, chunk in zip(tables_BC, step, strict=False):
            blocks = chunk.sequence.blocks[:widest]
            row[: len(blocks)] = blocks
        chunks = [
            (chunk, np.array(chunk.sequence.blocks, np.int64), np.arange(chunk.first, chunk.last))
            for chunk in step[decoding:]
        ]
        last_B = lengths_B - 1
        blocks_T = np.concatenate(
            [
                tables_BC[np.arange(decoding), last_B // BLOCK_TOKENS],
                *(table[p // BLOCK_TOKENS] for _, table, p in chunks),
            ]
        )
        offsets_T = np.concatenate([last_B, *(p for _, _, p in chunks)]) % BLOCK_TOKENS
        view = cls(
            pages,
            decoding,
            *(
                torch.from_numpy(x).to(pages.device)
                for x in (blocks_T, offsets_T, tables_BC, lengths_B)
            ),
        )
        for chunk, table, _ in chunks:
            past = (
                torch.from_numpy(table[: -(-chunk.last // BLOCK_TOKENS)]).to(pages.device)
                if chunk.first
                else None
            )
            view.chunks.append((chunk.last - chunk.first, chunk.first, past))
        return view

    def layer(self, number: int) -> tuple[Tensor, ...]:
        """What `write` and attention want of a layer."""
        return (
            *self.pages.layers[number],
            self.blocks_T,
            self.offsets_T,
            self.tables_BC,
            self.lengths_B,
        )

    def attend(self, layer: int, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        keys, values = self.pages.layers[layer]
        write(k_THE, v_THE, keys, values, self.blocks_T, self.offsets_T)
        if not self.chunks:
            return gathered(q_THE, keys, values, self.tables_BC, self.lengths_B)
        outs, start = [], self.decoding
        if start:
            outs.append(gathered(q_THE[:start], keys, values, self.tables_BC, self.lengths_B))
        for count, first, past in self.chunks:
            part = slice(start, start + count)
            if past is None:
                k_HLE, v_HLE = k_THE[part].transpose(0, 1), v_THE[part].transpose(0, 1)
            else:
                k_HLE = keys[past].permute(1, 0, 3, 2).flatten(1, 2)[:, : first + count]
                v_HLE = values[past].transpose(0, 1).flatten(1, 2)[:, : first + count]
            outs.append(_chunk(q_THE[part].transpose(0, 1), k_HLE, v_HLE, first).transpose(0, 1))
            start += count
        return torch.cat(outs) if len(outs) > 1 else outs[0]


def _chunk(q_HTE: Tensor, k_HLE: Tensor, v_HLE: Tensor, first: int) -> Tensor:
    """Attention of T consecutive tokens, the first at position `first`, to the L = first + T up to the last of them."""
    if not first:
        return F.scaled_dot_product_attention(
            q_HTE[None], k_HLE[None], v_HLE[None], is_causal=True
        )[0]
    count, total = q_HTE.shape[1], k_HLE.shape[1]
    mask_TL = torch.full((count, total), -math.inf, dtype=q_HTE.dtype, device=q_HTE.device).triu(
        first + 1
    )
    return F.scaled_dot_product_attention(q_HTE[None], k_HLE[None], v_HLE[None], attn_mask=mask_TL)[
        0
    ]


def write(
    k_THE: Tensor, v_THE: Tensor, keys: Tensor, values: Tensor, blocks_T: Tensor, offsets_T: Tensor
) -> None:
    """Take tokens' keys and values into their places: keys [blocks, H, E, S], values [blocks, H, S, E]."""
    keys[blocks_T, :, :, offsets_T] = k_THE
    values[blocks_T, :, offsets_T] = v_THE


def gathered(
    q_BHE: Tensor, keys: Tensor, values: Tensor, tables_BC: Tensor, lengths_B: Tensor
) -> Tensor:
    """Attention of one token of each of B sequences to all of its own: `lengths_B` tokens in the blocks `tables_BC`."""
    k_BHLE = keys[tables_BC].permute(0, 2, 1, 4, 3).flatten(2, 3)
    v_BHLE = values[tables_BC].transpose(1, 2).flatten(2, 3)
    seen_BL = torch.arange(k_BHLE.shape[2], device=q_BHE.device) < lengths_B[:, None]
    return F.scaled_dot_product_attention(
        q_BHE[:, :, None], k_BHLE, v_BHLE, attn_mask=seen_BL[:, None, None]
    )[:, :, 0]


def streamed(
    q_BHE: Tensor, keys: Tensor, values: Tensor, tables_BC: Tensor, lengths_B: Tensor
) -> Tensor:
    """The same as plain sums for a compiler, which reads each page once and copies none."""
    # put, not used as it comes: a compiler would work out q, with all before it, anew for every key
    q_BHE = torch.empty_like(q_BHE).index_put(
        (torch.arange(q_BHE.shape[0], device=q_BHE.device),), q_BHE
    )
    scores_BCHS = (q_BHE[:, None, :, :, None].float() * keys[tables_BC].float()).sum(
        3
    ) * q_BHE.shape[-1] ** -0.5
    places_CS = torch.arange(tables_BC.shape[1] * BLOCK_TOKENS, device=q_BHE.device).view(
        -1, BLOCK_TOKENS
    )
    seen_BC1S = (places_CS < lengths_B[:, None, None])[:, :, None]
    scores_BCHS = torch.where(seen_BC1S, scores_BCHS, -math.inf)
    weights_BCHS = (scores_BCHS - scores_BCHS.amax((1, 3), keepdim=True)).exp()
    mixed_BCHE = (weights_BCHS[..., None] * values[tables_BC].float()).sum(3)
    return (mixed_BCHE.sum(1) / weights_BCHS.sum((1, 3))[..., None]).to(q_BHE.dtype)
