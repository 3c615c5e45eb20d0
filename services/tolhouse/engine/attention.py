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
from tolhouse.engine.kv_policy import Compressive, Full
from tolhouse.engine.scheduler import ScheduledChunk
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.config import ModelConfig
from tolhouse.model.transformer import rotary, rotate

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
        self.device, self.config = device, config

    def move(self, step: list[ScheduledChunk]) -> None:
        """Move the places that policies keep of segments that end in a step."""
        for chunk in step:
            policy, last = chunk.sequence.policy, chunk.places[1]
            if count := policy.moved(chunk.last):
                blocks = torch.tensor(chunk.sequence.blocks, device=self.device)
                old_K = torch.arange(last - count, last, device=self.device)
                new_K = old_K - policy.segment
                (old, at), (new, to) = (
                    (blocks[places_K // BLOCK_TOKENS], places_K % BLOCK_TOKENS)
                    for places_K in (old_K, new_K)
                )
                self.keys[:, new, :, :, to] = self.keys[:, old, :, :, at]
                self.values[:, new, :, to] = self.values[:, old, :, at]


@dataclass
class ChunkPlaces:
    """Where the tokens of a prompt chunk are, and what they see."""

    count: int
    first: int  # the place of the first token
    policy: Full
    copy: np.ndarray  # the blocks for the places that the policy keeps at the end of the prompt


@dataclass
class Places:
    """Where the tokens of a step are in the pages, as int64 arrays.

    Decoding sequences come first, and prompt chunks follow. The rows of `spans_3B` are the number
    of places up to the decoding token, and how many of the first and of the last places it sees.
    """

    decoding: int  # the number of decoding sequences
    blocks_T: np.ndarray  # the block that each token of the step is written to
    offsets_T: np.ndarray
    tables_BC: np.ndarray
    spans_3B: np.ndarray
    chunks: list[tuple[ChunkPlaces, np.ndarray]]  # with the blocks up to the chunk's last token

    @classmethod
    def of(cls, step: list[ScheduledChunk]) -> "Places":
        decoding = sum(chunk.decodes for chunk in step)
        spans_3B = np.array([span_of(chunk) for chunk in step[:decoding]], np.int64)
        spans_3B = spans_3B.reshape(decoding, 3).T.copy()
        # At least two blocks, because the compiler would specialise the code for one.
        widest = max(2, -(-int(spans_3B[0].max(initial=1)) // BLOCK_TOKENS))
        tables_BC = np.zeros((decoding, widest), np.int64)
        for row, chunk in zip(tables_BC, step, strict=False):
            blocks = chunk.sequence.blocks[:widest]
            row[: len(blocks)] = blocks
        prompts = step[decoding:]
        tables = [np.array(chunk.sequence.blocks, np.int64) for chunk in prompts]
        places = [np.arange(*chunk.places) for chunk in prompts]
        last_B = spans_3B[0] - 1
        decoding_blocks = tables_BC[np.arange(decoding), last_B // BLOCK_TOKENS]
        prompt_blocks = [b[p // BLOCK_TOKENS] for b, p in zip(tables, places, strict=True)]
        blocks_T = np.concatenate([decoding_blocks, *prompt_blocks])
        offsets_T = np.concatenate([last_B, *places]) % BLOCK_TOKENS
        chunks = []
        for chunk, table in zip(prompts, tables, strict=True):
            first, last = chunk.places
            sequence = chunk.sequence
            copy = np.array(sequence.copy, np.int64)
            part = ChunkPlaces(chunk.count, first, sequence.policy, copy)
            chunks.append((part, table[: -(-last // BLOCK_TOKENS)]))
        return cls(decoding, blocks_T, offsets_T, tables_BC, spans_3B, chunks)


def span_of(chunk: ScheduledChunk) -> tuple[int, int, int]:
    """Return how many places there are up to the last token, and how many it sees at both ends."""
    policy = chunk.sequence.policy
    return chunk.places[1], policy.sinks, policy.window


@dataclass
class AttentionMetadata:
    """The `Cache` (model/transformer.py) of one step: decoding sequences, then prompt chunks."""

    pages: PagedKVCache
    decoding: int  # the number of decoding sequences
    blocks_T: Tensor  # the block that each token of the step is written to
    offsets_T: Tensor
    tables_BC: Tensor
    spans_3B: Tensor
    # With the blocks up to the chunk's last token.
    chunks: list[tuple[ChunkPlaces, Tensor]] = field(default_factory=list, kw_only=True)
    recalls: list["Recall"] = field(default_factory=list, kw_only=True)

    @classmethod
    def of(cls, pages: PagedKVCache, step: list[ScheduledChunk]) -> "AttentionMetadata":
        places = Places.of(step)
        arrays = places.blocks_T, places.offsets_T, places.tables_BC, places.spans_3B
        tensors = (torch.from_numpy(x).to(pages.device) for x in arrays)
        chunks = [(part, torch.from_numpy(x).to(pages.device)) for part, x in places.chunks]
        recalls = Recall.of(pages, step)
        return cls(pages, places.decoding, *tensors, chunks=chunks, recalls=recalls)

    @cached_property
    def seen_BL(self) -> Tensor:
        """Whether decoding tokens see the places in their blocks."""
        places_L = torch.arange(self.tables_BC.shape[1] * BLOCK_TOKENS, device=self.pages.device)
        return seen(places_L, self.spans_3B[..., None])

    @cached_property
    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """For each chunk: the block and the offset that each kept place is copied to."""
        found = []
        for part, _ in self.chunks:
            kept = part.policy.copied(part.first + part.count) if len(part.copy) else 0
            places = np.arange(kept)
            arrays = part.copy[places // BLOCK_TOKENS], places % BLOCK_TOKENS
            blocks, offsets = (torch.from_numpy(x).to(self.pages.device) for x in arrays)
            found.append((blocks, offsets))
        return found

    @cached_property
    def parts(self) -> tuple["AttentionMetadata", "AttentionMetadata"]:
        """The metadata of the decoding sequences, and the metadata of the chunks."""
        n, tables = self.decoding, (self.tables_BC, self.spans_3B)
        first = AttentionMetadata(self.pages, n, self.blocks_T[:n], self.offsets_T[:n], *tables)
        none = self.tables_BC[:0], self.spans_3B[:, :0]
        places = self.blocks_T[n:], self.offsets_T[n:], *none
        return first, AttentionMetadata(self.pages, 0, *places, chunks=self.chunks)

    def layer(self, number: int) -> tuple[Tensor, ...]:
        """Return the tensors of one layer for `write` and attention."""
        tables = self.blocks_T, self.offsets_T, self.tables_BC, self.spans_3B
        return (*self.pages.layers[number], *tables)

    def attend(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        keys, values = self.pages.layers[layer]
        write(k_TGE, v_TGE, keys, values, self.blocks_T, self.offsets_T)
        outs, start = [], self.decoding
        if start:
            outs.append(gathered(q_THE[:start], keys, values, self.tables_BC, self.seen_BL))
        for part, table in self.chunks:
            q_HTE = q_THE[start : start + part.count].transpose(0, 1)
            k_GLE, v_GLE = contiguous(keys, values, table)
            outs.append(tiled(q_HTE, k_GLE, v_GLE, part).transpose(0, 1))
            start += part.count
        self.copy_kept(layer, q_THE)
        out_THE = torch.cat(outs) if len(outs) > 1 else outs[0]
        for recall in self.recalls:
            own = recall.part
            out_THE[own] = recall.mix(layer, q_THE[own], out_THE[own])
        return out_THE

    def copy_kept(self, layer: int, q_THE: Tensor) -> None:
        """Copy the places that the policies keep of the prompts that end in this step."""
        end = self.decoding
        for (part, table), (blocks, offsets) in zip(self.chunks, self.copies, strict=True):
            end += part.count
            if len(blocks):
                keys, values = self.pages.layers[layer]
                length = part.first + part.count
                k_GLE, v_GLE = (x[:, :length] for x in contiguous(keys, values, table))
                q_OHE = q_THE[max(end - part.count, end - part.policy.observed) : end]
                places_GKE = part.policy.select(q_OHE, k_GLE)[..., None]
                places_GKE = places_GKE.expand(-1, -1, k_GLE.shape[2])
                k_KGE, v_KGE = (x.gather(1, places_GKE).transpose(0, 1) for x in (k_GLE, v_GLE))
                write(k_KGE, v_KGE, keys, values, blocks, offsets)


@dataclass
class Recall:
    """The part of a step that belongs to a sequence with a memory (kv_policy.Compressive)."""

    pages: PagedKVCache
    policy: Compressive
    memory: Tensor  # [N, G, E, E + 1]; `mix` adds the tokens that are dropped after this step
    part: slice  # its tokens in the step
    table: Tensor
    first: int  # the place of its first token
    positions_L: Tensor  # the position of each place, up to its last token
    passed_TL: Tensor  # whether the window of a token has passed a place
    dropping: slice  # the places that are dropped after this step

    @classmethod
    def of(cls, pages: PagedKVCache, step: list[ScheduledChunk]) -> list["Recall"]:
        start, found = 0, []
        for chunk in step:
            sequence, policy = chunk.sequence, chunk.sequence.policy
            part = slice(start, start := start + chunk.count)
            if not isinstance(policy, Compressive):
                continue
            if sequence.memory is None:
                layers, _, groups, size, _ = pages.keys.shape
                sequence.memory = torch.zeros(layers, groups, size, size + 1)
            first, last = chunk.places
            head = policy.head_blocks * BLOCK_TOKENS
            places_L, own_T1 = torch.arange(last), torch.arange(first, last)[:, None]
            passed_TL = (places_L >= policy.sinks) & (places_L <= own_T1 - policy.window)
            positions_L = places_L + (places_L >= head) * sequence.dropped
            dropping = slice(head, head + policy.dropped(chunk.last) - sequence.dropped)
            table = torch.tensor(sequence.blocks[: -(-last // BLOCK_TOKENS)])
            ours = sequence.memory, part, table, first, positions_L, passed_TL, dropping
            found.append(cls(pages, policy, *ours))
        return found

    def mix(self, layer: int, q_THE: Tensor, local_THE: Tensor) -> Tensor:
        """Return the output [T, H, E] of attention to the window and of the memory."""
        k_GLE, v_GLE = contiguous(*self.pages.layers[layer], self.table)
        length, groups = len(self.positions_L), len(k_GLE)
        k_GLE, v_GLE = k_GLE[:, :length].float(), v_GLE[:, :length].float()
        rope = rotary(-self.positions_L, self.pages.config, torch.float32)  # turns back
        k_LGE = F.elu(rotate(k_GLE.transpose(0, 1), rope)) + 1
        cos, sin = (x[self.first :] for x in rope)
        q_THE = F.elu(rotate(q_THE.float(), (cos, sin))) + 1
        q_GJTE = q_THE.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        k_GLE, v_GLX = k_LGE.transpose(0, 1), F.pad(v_GLE, (0, 1), value=1.0)
        weights_GJTL = q_GJTE @ k_GLE.transpose(1, 2)[:, None] * self.passed_TL
        sums_GJTX = weights_GJTL @ v_GLX[:, None] + q_GJTE @ self.memory[layer][:, None]
        totals_GJT1 = sums_GJTX[..., -1:]
        recalled_GJTE = sums_GJTX[..., :-1] / totals_GJT1.clamp_min(1e-30)
        gate_GJ11 = self.policy.gate_NH[layer].view(groups, -1, 1, 1)
        local_GJTE = local_THE.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        mixed = torch.lerp(local_GJTE.float(), recalled_GJTE, gate_GJ11)
        mixed = torch.where(totals_GJT1 > 0, mixed, local_GJTE)
        self.memory[layer] += k_GLE[:, self.dropping].transpose(1, 2) @ v_GLX[:, self.dropping]
        return mixed.permute(2, 0, 1, 3).flatten(1, 2).to(local_THE.dtype)


def contiguous(keys: Tensor, values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies of the keys and values [G, L, E] in blocks of one sequence."""
    k_GLE = keys[table].permute(1, 0, 3, 2).flatten(1, 2)
    return k_GLE, values[table].transpose(0, 1).flatten(1, 2)


def write(
    k_TGE: Tensor, v_TGE: Tensor, keys: Tensor, values: Tensor, blocks_T: Tensor, offsets_T: Tensor
) -> None:
    """Write keys and values of tokens to the pages [blocks, G, E, S] and [blocks, G, S, E]."""
    keys[blocks_T, :, :, offsets_T] = k_TGE
    values[blocks_T, :, offsets_T] = v_TGE


def tiled(q_HTE: Tensor, k_GLE: Tensor, v_GLE: Tensor, part: ChunkPlaces) -> Tensor:
    """Compute causal attention [H, T, E] of a prompt chunk.

    On a CPU the computation has tiles of places. A tile attends to all keys up to its own end, and
    missing keys are zeros. CPU kernels split a sum by the number of keys. With tiles this number
    depends only on the place.
    """
    first, on_cpu = part.first, q_HTE.device.type == "cpu"
    last = first + q_HTE.shape[1]
    tile, rows = (_TILE_TOKENS, _ROWS) if on_cpu else (last, 1)
    pad, group = -(-last // tile) * tile - k_GLE.shape[1], len(q_HTE) // len(k_GLE)
    k_GLE, v_GLE = (F.pad(x, (0, 0, 0, pad)) for x in (k_GLE, v_GLE))
    # Query heads that share keys attend to a repeated copy, with the sums of any other head.
    k_HLE, v_HLE = (x.repeat_interleave(group, 0) if group > 1 else x for x in (k_GLE, v_GLE))
    causal, outs = not on_cpu and first == 0 and last <= part.policy.window, []
    for start in range(first // tile * tile, last, tile):
        begin, end = max(first, start), min(last, start + tile)
        q = F.pad(q_HTE[:, begin - first : end - first], (0, 0, 0, (begin - end) % rows))[None]
        k, v = k_HLE[None, :, : start + tile], v_HLE[None, :, : start + tile]
        mask = None if causal else q.new_full((q.shape[2], start + tile), -math.inf)
        mask = None if mask is None else mask.triu(begin + 1)
        if mask is not None and start + tile > part.policy.window:
            own = torch.arange(begin, begin + len(mask), device=q.device)[:, None]
            places = torch.arange(start + tile, device=q.device)
            passed = (places <= own - part.policy.window) & (places >= part.policy.sinks)
            mask.masked_fill_(passed, -math.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        outs.append(out[0, :, : end - begin])
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def gathered(
    q_BHE: Tensor, keys: Tensor, values: Tensor, tables_BC: Tensor, seen_BL: Tensor
) -> Tensor:
    """Compute attention [B, H, E] of one token per sequence to the places that it sees."""
    k_BGLE = keys[tables_BC].permute(0, 2, 1, 4, 3).flatten(2, 3)
    v_BGLE = values[tables_BC].transpose(1, 2).flatten(2, 3)
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


def seen(places: Tensor, spans_3B: Tensor) -> Tensor:
    """Return whether decoding tokens see `places`, which broadcast with each row of `spans_3B`."""
    lengths_B, sinks_B, windows_B = spans_3B
    return (places < lengths_B) & ((places < sinks_B) | (places >= lengths_B - windows_B))


def streamed(
    q_BHE: Tensor, keys: Tensor, values: Tensor, tables_BC: Tensor, spans_3B: Tensor
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
    places_L = torch.arange(tables_BC.shape[1] * BLOCK_TOKENS, device=q_BHE.device)
    seen_BCS = seen(places_L.view(-1, BLOCK_TOKENS), spans_3B[..., None, None])
    scores_BCGJS = torch.where(seen_BCS[:, :, None, None], scores_BCGJS, -math.inf)
    weights_BCGJS = (scores_BCGJS - scores_BCGJS.amax((1, 4), keepdim=True)).exp()
    mixed_BCGJE = (weights_BCGJS[..., None] * v_BCG1SE.float()).sum(4)
    out_BGJE = mixed_BCGJE.sum(1) / weights_BCGJS.sum((1, 4))[..., None]
    return out_BGJE.flatten(1, 2).to(q_BHE.dtype)
