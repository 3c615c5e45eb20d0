"""Attention over the paged KV cache on a GPU, with one kernel for prompts and decoding sequences.

A tile has up to `tile_tokens` consecutive tokens of one sequence. A program of the kernel computes
the query heads of one key-value head for the tokens of one tile. It reads the pages of the sequence
in place, once for all of these heads and tokens, and keeps a running softmax
(FlashAttention, arXiv 2205.14135). A long sequence that decodes is divided into parts, which run in
parallel and are then combined (Flash-Decoding).

Shapes are those of `engine/attention.py`. In addition, X is the number of tiles, and P is the
number of parts.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tolhouse.engine.attention import AttentionMetadata, PagedKVCache, Places, span_of, write
from tolhouse.engine.block_manager import BLOCK_TOKENS
from tolhouse.engine.gpu.transfer import upload
from tolhouse.engine.scheduler import ScheduledChunk
from tolhouse.logs import event

_PROMPT_ROWS = 64  # rows of a tile of a prompt; a row is a token and a query head
_DECODE_ROWS = 16  # the fewest that matrix units multiply
_KEYS = 64  # keys that a program reads at a time
_LEAST_KEYS = 256  # the fewest keys in a part
_PROGRAMS = 264  # two for each multiprocessor of a large GPU


@dataclass
class TiledMetadata(AttentionMetadata):
    """The attention metadata of one step on a GPU.

    `tables_BC` and `spans_3B` have all sequences of the step, also those with prompt chunks.
    """

    # Rows: the first token of a tile, its number of tokens, the place after its last token, and
    # the row of its sequence in `tables_BC`. None: every tile is one token of a decoding sequence.
    tiles_4X: Tensor | None = None

    @classmethod
    def of(cls, pages: PagedKVCache, step: list[ScheduledChunk]) -> "TiledMetadata":
        places = Places.of(step)
        arrays = [places.blocks_T, places.offsets_T, places.tables_BC, places.spans_3B]
        if not places.chunks:
            return cls(pages, places.decoding, *upload(arrays, pages.device))
        tables = [*places.tables_BC, *(table for _, table in places.chunks)]
        arrays[2] = np.zeros((len(tables), max(map(len, tables))), np.int64)
        for row, table in zip(arrays[2], tables, strict=True):
            row[: len(table)] = table
        arrays[3] = np.array([span_of(chunk) for chunk in step], np.int64).T
        tiles_4X = _tiles(places, max(1, _PROMPT_ROWS // pages.group))
        slots = upload([*arrays, tiles_4X], pages.device)
        prompts = zip(places.chunks, slots[2][places.decoding :], strict=True)
        chunks = [(part, row[: len(table)]) for (part, table), row in prompts]
        view = cls(pages, places.decoding, *slots[:4], chunks=chunks)
        view.tiles_4X = slots[4]
        return view

    def attend(self, layer: int, q_THE: Tensor, k_TGE: Tensor, v_TGE: Tensor) -> Tensor:
        keys, values = self.pages.layers[layer]
        write(k_TGE, v_TGE, keys, values, self.blocks_T, self.offsets_T)
        tables = self.tables_BC, self.spans_3B
        self.copy_kept(layer, q_THE)
        return tiled_attention(q_THE, keys, values, *tables, self.tiles_4X)


def fits(pages: PagedKVCache) -> bool:
    """Compile the kernels, and return whether the GPU has enough shared memory for them.

    The log has the reason if it has not. This writes to the last block of the pages.
    """
    try:
        warm_up(pages)
    except triton.runtime.errors.OutOfResources as error:
        event("the attention kernel does not fit the GPU", reason=str(error))
        return False
    return True


def warm_up(pages: PagedKVCache) -> None:
    """Compile the kernels for prompts, and for short and long sequences that decode.

    This writes to the last block of the pages.
    """
    layers, groups, size = len(pages.keys), pages.keys.shape[2], pages.keys.shape[3]
    q_THE = pages.keys.new_zeros(1, groups * pages.group, size)
    k_TGE, one = q_THE[:, :groups], torch.ones(1, dtype=torch.int64, device=pages.device)
    last, tile_4X = one * (pages.keys.shape[1] - 1), one.new_tensor([[0], [1], [1], [0]])
    for tiles, blocks in ((tile_4X, 1), (None, 1), (None, 2 * _LEAST_KEYS // BLOCK_TOKENS)):
        tables_BC = last.expand(1, blocks).contiguous()
        spans_3B = one.expand(3, 1).contiguous()
        view = TiledMetadata(pages, 1, last, one - 1, tables_BC, spans_3B, tiles_4X=tiles)
        view.attend(layers - 1, q_THE, k_TGE, k_TGE)


def _tiles(places: Places, tile_tokens: int) -> np.ndarray:
    """Divide the tokens of a step into `tiles_4X`."""
    tiles = [(n, 1, int(length), n) for n, length in enumerate(places.spans_3B[0])]
    start = places.decoding
    for number, (part, _) in enumerate(places.chunks, places.decoding):
        for at in range(0, part.count, tile_tokens):
            length = min(tile_tokens, part.count - at)
            tiles.append((start + at, length, part.first + at + length, number))
        start += part.count
    return np.array(tiles, np.int64).T


def tiled_attention(
    q_THE: Tensor,
    keys: Tensor,
    values: Tensor,
    tables_BC: Tensor,
    spans_3B: Tensor,
    tiles_4X: Tensor | None,
) -> Tensor:
    """Compute causal attention [T, H, E] of the tiles' tokens to the pages of their sequences.

    Without `tiles_4X` (TiledMetadata), each sequence has one token. The keys and values of all
    tokens must be in the pages.
    """
    tiles = spans_3B if tiles_4X is None else tiles_4X
    q_THE = q_THE.contiguous()
    count, heads, size = q_THE.shape
    groups, num_tiles, decodes = keys.shape[1], tiles.shape[1], tiles_4X is None
    most_keys, rows, parts = tables_BC.shape[1] * BLOCK_TOKENS, _PROMPT_ROWS, 1
    if decodes:
        rows = _DECODE_ROWS
        parts = max(1, min(_PROGRAMS // (num_tiles * groups), most_keys // _LEAST_KEYS))
    rows = max(rows, triton.next_power_of_2(heads // groups))
    part_keys = triton.cdiv(triton.cdiv(most_keys, parts), _KEYS) * _KEYS
    dtype = q_THE.dtype if parts == 1 else torch.float32
    out_PTHE = torch.empty(parts, count, heads, size, dtype=dtype, device=q_THE.device)
    mass_PTH = torch.empty(parts, count, heads, device=q_THE.device)
    padded = max(16, triton.next_power_of_2(size))
    _attend[num_tiles, groups, parts](
        *(q_THE, keys, values, tables_BC, spans_3B, tiles, out_PTHE, mass_PTH),
        *(size**-0.5, count, num_tiles, tables_BC.shape[1], part_keys, spans_3B.stride(0)),
        *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        DECODES=decodes,
        HEADS=heads,
        GROUP=heads // groups,
        SIZE=size,
        PADDED=padded,
        ROWS=rows,
        KEYS=_KEYS,
        PAGE=BLOCK_TOKENS,
        num_warps=4 if rows * padded <= 64 * 64 else 8,
        num_stages=2 if q_THE.element_size() < 4 else 1,  # for the shared memory of most GPUs
    )
    if parts == 1:
        return out_PTHE[0]
    out_THE = torch.empty_like(q_THE)
    places = count * heads
    _combine[(places,)](out_PTHE, mass_PTH, out_THE, parts, places, SIZE=size, PADDED=padded)
    return out_THE


# Triton would compile the kernel again for values that are 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=["tokens", "num_tiles", "table_size", "span_row"],
    do_not_specialize_on_alignment=["tables", "spans", "tiles"],  # parts of one array
)
def _attend(
    q,
    keys,
    values,
    tables,
    spans,
    tiles,
    out,
    mass,
    scale,
    tokens,
    num_tiles,
    table_size,
    part_keys,
    span_row,
    key_page,
    key_group,
    value_page,
    value_group,
    DECODES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE: tl.constexpr,
):
    tile, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, count, end, sequence = tile, 1, tl.load(tiles + tile), tile
    if not DECODES:
        start = end
        count = tl.load(tiles + num_tiles + tile)
        end = tl.load(tiles + 2 * num_tiles + tile)
        sequence = tl.load(tiles + 3 * num_tiles + tile)
    sinks = tl.load(spans + span_row + sequence)
    window = tl.load(spans + 2 * span_row + sequence)
    row, key, e = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, PADDED)
    token, head = row // GROUP, group * GROUP + row % GROUP
    place_of_row = end - count + token  # in the cache of the sequence
    place = (start + token) * HEADS + head
    exists = token < count
    inside = exists[:, None] & (e < SIZE)[None, :]
    q_rows = tl.load(q + place[:, None] * SIZE + e[None, :], mask=inside, other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED], tl.float32)
    first = part * part_keys
    for at in range(first, tl.minimum(first + part_keys, end), KEYS):
        at_key = at + key
        known = at_key < end
        page = tl.load(tables + sequence * table_size + at_key // PAGE, mask=known, other=0)
        offset = at_key % PAGE
        k_at = keys + page[None, :] * key_page + group * key_group
        k_at += e[:, None] * PAGE + offset[None, :]
        k = tl.load(k_at, mask=(e < SIZE)[:, None] & known[None, :], other=0.0)
        scores = tl.dot(q_rows, k, input_precision="ieee") * scale
        before = place_of_row[:, None] - at_key[None, :]
        seen = (before >= 0) & ((before < window) | (at_key[None, :] < sinks))
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A row may have no key in this part yet; exp(-inf - -inf) would not be a number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, kept = tl.exp(scores - base[:, None]), tl.exp(highest - base)
        v_at = values + page[:, None] * value_page + group * value_group
        v_at += offset[:, None] * SIZE + e[None, :]
        v = tl.load(v_at, mask=known[:, None] & (e < SIZE)[None, :], other=0.0)
        mixed = mixed * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * kept + tl.sum(weights, 1)
        highest = higher
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    place += part * tokens * HEADS
    result = mixed.to(out.dtype.element_ty)
    tl.store(out + place[:, None] * SIZE + e[None, :], result, mask=inside)
    log_mass = tl.where(total > 0, highest + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(mass + place, log_mass, mask=exists)


@triton.jit(do_not_specialize=["parts", "places"])
def _combine(
    parts_out,
    mass,
    out,
    parts,
    places,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
):
    place, e = tl.program_id(0), tl.arange(0, PADDED)
    highest, total = float("-inf"), 0.0
    mixed = tl.zeros([PADDED], tl.float32)
    for part in range(parts):
        at = part * places + place
        log_mass = tl.load(mass + at)
        higher = tl.maximum(highest, log_mass)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no part had a key yet
        weight, kept = tl.exp(log_mass - base), tl.exp(highest - base)
        values = tl.load(parts_out + at * SIZE + e, mask=e < SIZE, other=0.0)
        mixed, total = mixed * kept + values * weight, total * kept + weight
        highest = higher
    tl.store(out + place * SIZE + e, (mixed / total).to(out.dtype.element_ty), mask=e < SIZE)
