"""The model against the paper's equations, written out token by token."""

import math

import pytest
import torch
from tolhouse.model.config import preset
from tolhouse.model.ffn import SwiGLU
from tolhouse.model.transformer import NoCache, Transformer
from torch import Tensor

KINDS = [
    ("base", 0, "linear"),
    ("memory", 0, "linear"),
    *(("flex", beta, form) for beta in (1, 2, 3) for form in ("linear", "swiglu")),
]
IDS = torch.tensor([5, 9, 5, 60, 0, 33, 7])
POSITIONS = torch.arange(len(IDS))


def model_of(kind: str, beta: int = 0, ffn_c: str = "linear", **overrides) -> Transformer:
    """A float64 model with random weights and norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Transformer(
            preset("tiny", kind, beta, ffn_c=ffn_c, vocab_size=64, num_hidden_layers=2, **overrides)
        ).double()
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def norm(x: Tensor, layer: torch.nn.RMSNorm) -> Tensor:
    return x / math.sqrt(x.square().mean() + layer.eps) * layer.weight


def swiglu(x: Tensor, ffn: SwiGLU) -> Tensor:
    gate = ffn.gate_proj.weight @ x
    return ffn.down_proj.weight @ ((ffn.up_proj.weight @ x) * gate * torch.sigmoid(gate))


def ffn_c(x: Tensor, module: torch.nn.Module) -> Tensor:
    if isinstance(module, SwiGLU):
        return swiglu(x, module)
    for number, linear in enumerate(module.maps):
        x = linear.weight @ (x * torch.sigmoid(x) if number else x)
    return x


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """A head's vector as E/2 complex numbers, each rotated by its own angle."""
    half = len(x) // 2
    angles = torch.tensor([position * theta ** (-k / half) for k in range(half)])
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat((z.real, z.imag))


def attention(inputs: list[Tensor], block: torch.nn.Module, model: Transformer) -> Tensor:
    """Attention of the last of `inputs` over all of them."""
    size, theta, out = model.config.head_dim, model.config.rope_theta, []
    for head in range(model.config.num_attention_heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (
            [(p.weight @ x)[part] for x in inputs]
            for p in (block.q_proj, block.k_proj, block.v_proj)
        )
        query = turned(q[-1], len(inputs) - 1, theta)
        scores = torch.stack(
            [query @ turned(key, place, theta) for place, key in enumerate(k)]
        ) / math.sqrt(size)
        out.append(scores.softmax(0) @ torch.stack(v))
    return block.o_proj.weight @ torch.cat(out)


def paper(model: Transformer, ids: Tensor) -> Tensor:
    """The equations of PAPER section 1, including the FFNs."""
    x0 = list(model.embed_tokens.weight[ids])
    x = x0
    for layer, block in enumerate(model.layers):
        inputs = [norm(t, block.input_layernorm) for t in x]
        x = [
            t + attention(inputs[: place + 1], block.self_attn, model) for place, t in enumerate(x)
        ]
        if block.mlp:
            x = [t + ffn_c(norm(t, block.post_attention_layernorm), block.mlp) for t in x]
        if model.ffn_m:
            memory = model.ffn_m[layer]
            x = [t + swiglu(norm(t0, memory.norm), memory.mlp) for t, t0 in zip(x, x0, strict=True)]
    return torch.stack([model.lm_head.weight @ norm(t, model.norm) for t in x])


@pytest.mark.parametrize("form", KINDS, ids=lambda form: "-".join(map(str, form)))
def test_the_model_follows_the_paper_s_equations(form: tuple[str, int, str]) -> None:
    """Every kind's logits equal those of the equations, up to the precision of the rotary
    angles."""
    model = model_of(*form)
    torch.testing.assert_close(
        paper(model, IDS),
        model(IDS, POSITIONS, NoCache(len(IDS)), model.rows(IDS)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("place", range(len(IDS)))
@pytest.mark.parametrize("layer", [0, 1])
def test_a_row_affects_only_its_token_and_later_ones(place: int, layer: int) -> None:
    """Changing a token's row changes the logits of that token and of later tokens that attend to
    it, and no earlier ones."""
    model = model_of("memory")
    rows = model.rows(IDS)
    other = rows.clone()
    other[layer, place] += 1
    before, after = (model(IDS, POSITIONS, NoCache(len(IDS)), r) for r in (rows, other))
    changed = ((before - after).abs().amax(-1) > 1e-9).tolist()
    # the last layer adds its row after its attention, so that no other token is affected
    expected = [t == place or (layer == 0 and t > place) for t in range(len(IDS))]
    assert expected == changed


def test_positions_are_relative() -> None:
    """A sequence at later positions has the same logits, because rotary embeddings encode only
    distances."""
    model = model_of("flex", 2)
    rows = model.rows(IDS)
    shifted = [model(IDS, POSITIONS + start, NoCache(len(IDS)), rows) for start in (0, 1, 100)]
    torch.testing.assert_close(shifted[0], shifted[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shifted[0], shifted[2], rtol=1e-3, atol=1e-3)


def test_logits_depend_on_the_order_of_tokens() -> None:
    """The last token's logits depend on the order of the tokens before it."""
    model = model_of("memory")
    other = torch.cat((IDS[:-1].flip(0), IDS[-1:]))
    last, swapped = (
        model(ids, POSITIONS, NoCache(len(ids)), model.rows(ids))[-1] for ids in (IDS, other)
    )
    assert not torch.allclose(last, swapped, atol=1e-3)


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    """Two sequences in a batch have the same logits as alone."""
    model = model_of("flex", 3)
    pair = torch.stack((IDS, IDS.flip(0)))
    alone = torch.cat([model(ids, POSITIONS, NoCache(len(ids)), model.rows(ids)) for ids in pair])
    both = pair.flatten()
    torch.testing.assert_close(
        alone, model(both, POSITIONS.repeat(2), NoCache(len(IDS)), model.rows(both))
    )


def test_rows_do_not_depend_on_attention() -> None:
    """Attention, FFN-C and the last norms do not change rows; the embedding does."""
    model = model_of("flex", 1)
    rows = model.rows(IDS)
    for name, p in model.named_parameters():
        if name.startswith(("layers.", "norm.")):
            p.data += 1
    assert torch.equal(rows, model.rows(IDS))
    model.embed_tokens.weight.data[9] += torch.arange(96)
    assert [True, False, True, True, True, True, True] == (rows == model.rows(IDS)).all(-1).all(
        0
    ).tolist()


def test_the_head_can_be_untied_from_the_embedding() -> None:
    """An untied head is a separate matrix, and a tied head is the embedding."""
    tied, untied = (model_of("memory", tie_word_embeddings=tie) for tie in (True, False))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)
