"""Attention over a paged KV cache equals attention over contiguous keys and values."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolhouse.engine.attention import (
    AttentionMetadata,
    PagedKVCache,
    blocks_of,
    gathered,
    seen,
    streamed,
    write,
)
from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.scheduler import ScheduledChunk as Chunk
from tolhouse.engine.sequence import Sequence
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.config import ModelConfig, preset
from tolhouse.sampling import SamplingParams

CPU = torch.device("cpu")
HEADS, SIZE = 6, 16
SHAPES = [
    preset("tiny", "base", num_attention_heads=HEADS, head_dim=SIZE, num_key_value_heads=count)
    for count in (6, 2, 1)
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.num_key_value_heads)


def random(*shape: int, heads: int = HEADS) -> torch.Tensor:
    return torch.randn(*shape, heads, SIZE, generator=torch.Generator().manual_seed(sum(shape)))


def sequences(pages: PagedKVCache, lengths: list[int]) -> tuple[list[Sequence], list[torch.Tensor]]:
    """Sequences of these lengths with interleaved blocks, and their keys and values [2, T, G, E] in
    the cache."""
    cache = BlockManager(pages.keys.shape[1])
    found = [Sequence(n, list(range(n)), SamplingParams(1), lambda _: None) for n in lengths]
    for tokens in range(1, max(lengths) + 1):
        for sequence in found:
            assert cache.grow(sequence, min(tokens, len(sequence.ids)))
    heads = pages.keys.shape[2]
    kept = [torch.stack([random(n, heads=heads), random(n, 1, heads=heads)[:, 0]]) for n in lengths]
    for sequence, (k, v) in zip(found, kept, strict=True):
        for layer in range(len(pages.keys)):
            view = AttentionMetadata.of(pages, [Chunk(sequence, 0, len(sequence.ids))])
            view.attend(layer, random(len(k)), k, v)
    return found, kept


def expected(q_THE: torch.Tensor, k_LGE: torch.Tensor, v_LGE: torch.Tensor) -> torch.Tensor:
    """Attention of the last tokens, from the equations."""
    mask = torch.ones(len(q_THE), len(k_LGE)).tril(len(k_LGE) - len(q_THE)).bool()
    head_of = [head * k_LGE.shape[1] // HEADS for head in range(HEADS)]
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THE, k_LGE[:, head_of], v_LGE[:, head_of]))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


@every_shape
@pytest.mark.parametrize("attend", [gathered, streamed])
def test_decoding_attends_to_its_own_sequence(
    attend: Callable[..., torch.Tensor], shape: ModelConfig
) -> None:
    """Decoding attends to exactly the sequence's own tokens, for several sequences of any length
    and for one alone."""
    pages = PagedKVCache(shape, 64, CPU, torch.float32)
    found, kept = sequences(pages, [1, 15, 16, 17, 40, 100])
    for part in (slice(None), slice(3, 4), slice(0, 1), slice(1, 3)):
        step = [Chunk(s, len(s.ids) - 1, len(s.ids)) for s in found[part]]
        view = AttentionMetadata.of(pages, step)
        # the first token of a sequence counts as a prompt, but can be decoded here
        tables_BC = torch.tensor([[*s.blocks, *[0] * 7][:7] for s in found[part]])
        spans_3B = torch.tensor([[len(s.ids), 0, len(s.ids)] for s in found[part]]).T
        q_BHE = random(len(step), 2)[:, 0]
        k_BGE, v_BGE = (torch.stack([kv[number, -1] for kv in kept[part]]) for number in (0, 1))
        keys, values = pages.keys[1], pages.values[1]
        write(k_BGE, v_BGE, keys, values, view.blocks_T, view.offsets_T)
        places_L = torch.arange(7 * BLOCK_TOKENS)
        which = spans_3B if attend is streamed else seen(places_L, spans_3B[..., None])
        got = attend(q_BHE, keys, values, tables_BC, which)
        for q, (k, v), out in zip(q_BHE, kept[part], got, strict=True):
            torch.testing.assert_close(expected(q[None], k, v)[0], out, rtol=1e-4, atol=1e-5)


@every_shape
def test_prompt_chunks_attend_to_earlier_tokens(shape: ModelConfig) -> None:
    """In one step, a decoding token, the first chunk of one prompt and the last chunk of another
    attend to their own sequences."""
    pages = PagedKVCache(shape, 64, CPU, torch.float32)
    found, kept = sequences(pages, [30, 20, 2 * BLOCK_TOKENS + 9])
    step = [Chunk(found[0], 29, 30), Chunk(found[1], 0, 7), Chunk(found[2], 13, 41)]
    q_THE = random(36, 3)[:, 0]
    parts = [kv[:, c.first : c.last] for kv, c in zip(kept, step, strict=True)]
    k_TGE, v_TGE = torch.cat(parts, dim=1)
    got = AttentionMetadata.of(pages, step).attend(0, q_THE, k_TGE, v_TGE).split([1, 7, 28])
    for q, (k, v), chunk, out in zip(q_THE.split([1, 7, 28]), kept, step, got, strict=True):
        whole = expected(q, k[: chunk.last], v[: chunk.last])
        torch.testing.assert_close(whole, out, rtol=1e-4, atol=1e-5)


@every_shape
@pytest.mark.parametrize("size", [1, 7, 16, 33, 64, 100])
def test_prompt_chunks_have_the_same_bits_as_the_whole_prompt(
    size: int, shape: ModelConfig
) -> None:
    """A prompt's outputs have the same bits for any division into chunks and any sequences in the
    same step."""
    pages = PagedKVCache(shape, 128, CPU, torch.float32)
    found, kept = sequences(pages, [600, 40])
    prompt, (k_TGE, v_TGE) = found[0], kept[0]
    q_THE = random(600, 3)[:, 0]
    whole = AttentionMetadata.of(pages, [Chunk(prompt, 0, 600)]).attend(0, q_THE, k_TGE, v_TGE)
    beside = Chunk(found[1], 39, 40)
    for first in range(0, 600, size):
        part = slice(first, min(first + size, 600))
        k, v = (torch.cat([x[-1:], y[part]]) for x, y in zip(kept[1], kept[0], strict=True))
        step = [beside, Chunk(prompt, part.start, part.stop)]
        assert not step[1].decodes  # not even a single last token
        got = AttentionMetadata.of(pages, step).attend(0, torch.cat([q_THE[:1], q_THE[part]]), k, v)
        assert torch.equal(whole[part], got[1:])


@every_shape
def test_decoding_has_the_same_bits_in_every_batch(shape: ModelConfig) -> None:
    """A decoding token's output has the same bits alone and beside longer and shorter sequences."""
    pages = PagedKVCache(shape, 256, CPU, torch.float32)
    found, kept = sequences(pages, [5, 33, 200, 517, 1030])
    q_BHE = random(len(found), 2)[:, 0]

    def decoded(places: list[int]) -> torch.Tensor:
        step = [Chunk(found[p], len(found[p].ids) - 1, len(found[p].ids)) for p in places]
        for chunk in step:
            chunk.sequence.prompt_tokens = len(chunk.sequence.ids) - 1
        k_BGE, v_BGE = (torch.stack([kept[p][part, -1] for p in places]) for part in (0, 1))
        return AttentionMetadata.of(pages, step).attend(0, q_BHE[places], k_BGE, v_BGE)

    whole = decoded([0, 1, 2, 3, 4])
    for places in ([0], [4], [0, 1], [3, 1, 2], [2]):
        assert torch.equal(whole[places], decoded(places))


@every_shape
def test_the_cache_holds_key_value_heads(shape: ModelConfig) -> None:
    """A block takes the memory of the key-value heads, whatever the number of query heads."""
    token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * SIZE * 4
    assert 3 == blocks_of(shape, 4 * BLOCK_TOKENS * token - 1, torch.float32)
    pages = PagedKVCache(shape, 3, CPU, torch.float32)
    assert 3 * BLOCK_TOKENS * token == 4 * (pages.keys.numel() + pages.values.numel())
    with pytest.raises(InvalidArgumentError, match=f"take {BLOCK_TOKENS * token} bytes"):
        blocks_of(shape, BLOCK_TOKENS * token - 1, torch.float32)
