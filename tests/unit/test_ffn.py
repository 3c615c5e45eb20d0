"""The forms of FFN-C and FFN-M: the module and the worker's module against their formulas."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tolhouse.analysis.explain import explain_text
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.row_providers import CachedRows
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint, save_checkpoint, tensor_shapes
from tolhouse.model.config import preset
from tolhouse.model.ffn import make, silu, top
from tolhouse.model.generate import greedy
from tolhouse.model.losses import evaluate
from tolhouse.model.transformer import Transformer
from tolhouse.testing import build_table, tiny_model
from tolhouse.train.recipes import recipe
from tolhouse.train.trainer import Trainer, initialise
from torch import Tensor, nn

from loadtest.related_ffn import PeakBytes
from tests.engines import CPU, Request, engine_of, serve

SHARES = (0.25, 1.0)
FORMS = [
    *({"ffn_c": "moc", "ffn_share": share} for share in SHARES),
    {"ffn_c": "moc", "ffn_by": "activation"},
    *({"ffn_c": "avgk", "ffn_blocks": 12, "ffn_share": share} for share in SHARES),
    {"ffn_c": "flashmhf", "ffn_heads": 8, "ffn_experts": 2},
    {"ffn_c": "lookup"},
]
X = torch.randn(7, 96, generator=torch.Generator().manual_seed(2))


def name(form: dict) -> str:
    return "-".join(map(str, form.values()))


def formula(ffn: nn.Module, form: dict, x_D: Tensor) -> Tensor:
    """The output for one token, in float64, as a sum over channels."""
    weights = {key: value.double() for key, value in ffn.state_dict().items()}
    formulas = {"moc": moc, "avgk": avgk, "flashmhf": flashmhf, "lookup": lookup}
    return formulas[form["ffn_c"]](weights, form, x_D.double())


def moc(weights: dict[str, Tensor], form: dict, x_D: Tensor) -> Tensor:
    gate, up = (weights[f"{name}_proj.weight"] @ x_D for name in ("gate", "up"))
    active = round(form.get("ffn_share", 0.25) * len(gate))
    activation = gate * gate.sigmoid()
    score = activation.abs() if form.get("ffn_by") == "activation" else gate
    chosen = sorted(range(len(gate)), key=lambda channel: -score[channel])[:active]
    columns = weights["down_proj.weight"].T
    return sum(activation[j] * up[j] * columns[j] for j in chosen)


def avgk(weights: dict[str, Tensor], form: dict, x_D: Tensor) -> Tensor:
    gate, up = weights["gate_proj.weight"], weights["up_proj.weight"]
    blocks = [*zip(*(m.chunk(form["ffn_blocks"]) for m in (gate, up)), strict=True)]
    order = sorted(range(len(blocks)), key=lambda b: -(blocks[b][0].mean(0) @ x_D))
    size, out = len(gate) // len(blocks), torch.zeros_like(x_D)
    for b in order[: round(form["ffn_share"] * len(blocks))]:
        columns = weights["down_proj.weight"][:, b * size : (b + 1) * size]
        key = blocks[b][0] @ x_D
        out += columns @ (key * key.sigmoid() * (blocks[b][1] @ x_D))
    return out


def flashmhf(weights: dict[str, Tensor], form: dict, x_D: Tensor) -> Tensor:
    outs = []
    for h, q in enumerate((weights["in_proj.weight"] @ x_D).chunk(form["ffn_heads"])):
        router = (weights[f"routers.{h}.weight"] @ q).sigmoid()
        out = torch.zeros_like(q)
        for e, r in enumerate(router / router.sum()):
            gate, up, down = (
                weights[f"heads.{h}.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
            out += r * (down @ ((gate @ q) * (gate @ q).sigmoid() * (up @ q)))
        outs.append(out)
    return weights["o_proj.weight"] @ torch.cat(outs)


def lookup(weights: dict[str, Tensor], form: dict, x_D: Tensor) -> Tensor:
    """The sum over all codes of each table, of which the softmax relaxation keeps the largest."""
    bits = form.get("ffn_bits", 4)
    first, second = weights["blocks"].chunk(2)
    size, hadamard = len(first), torch.ones(1, 1).double()
    while len(hadamard) < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    z = torch.cat((x_D, x_D.new_zeros(size - len(x_D))))
    for blocks in (first, second):
        z = hadamard @ (torch.block_diag(*blocks.split(8)) @ z) / size**0.5
    out = torch.zeros_like(x_D)
    codes = torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1
    for number, table in enumerate(weights["tables"].split(2**bits)):
        products = (2.0 * codes - 1).double() @ z[number * bits : (number + 1) * bits]
        best = products.argmax()
        out += products[best] * products.softmax(0)[best] * table[best]
    return out


def permuted(path: Path, folder: Path, blocks: int) -> Checkpoint:
    """A copy of a checkpoint with permuted blocks of FFN-C, and permuted channels in them."""
    model = open_checkpoint(path).model()
    for block in model.layers:
        size = len(block.mlp.gate_proj.weight) // blocks
        within = torch.stack([torch.randperm(size) for _ in range(blocks)])
        order = (torch.randperm(blocks)[:, None] * size + within).flatten()
        for part, dim in (
            (block.mlp.gate_proj, 0),
            (block.mlp.up_proj, 0),
            (block.mlp.down_proj, 1),
        ):
            part.weight.data = part.weight.index_select(dim, order)
    save_checkpoint(folder, model, path / "tokenizer.json")
    return open_checkpoint(folder)


@pytest.fixture(scope="module", params=FORMS, ids=name)
def form(request) -> dict:
    return request.param


@pytest.fixture(scope="module")
def path(form: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which FFN-C and FFN-M have the form."""
    folder = tmp_path_factory.mktemp("models") / name(form)
    return tiny_model(folder, "flex", 3, ffn_m=form["ffn_c"], **form)


def test_module_and_worker_compute_the_formula(form: dict, path: Path, tmp_path: Path) -> None:
    """The module, and the module that a worker runs, equal the formula for each token, also with
    permuted channels, and a token has the same bits alone and in a batch."""
    plain, checkpoints = open_checkpoint(path), [open_checkpoint(path)]
    if form["ffn_c"] in ("moc", "avgk"):
        checkpoints.append(permuted(path, tmp_path, form.get("ffn_blocks", 1)))
    pairs = [(c.model().layers, load(c, CPU, torch.float32).layers) for c in checkpoints]
    for layer, block in enumerate(plain.model().layers):
        expected = torch.stack([formula(block.mlp, form, x_D) for x_D in X]).float()
        assert (scale := expected.abs().max()) > 0.01
        for both in pairs:
            own, worker = (layers[layer].mlp for layers in both)
            with torch.inference_mode():
                for ffn in (own, worker):
                    assert ((ffn(X) - expected) / scale).abs().max() <= 1e-5
                assert torch.equal(torch.cat([worker(x_D[None]) for x_D in X]), worker(X))


def test_a_worker_generates_what_the_model_does(path: Path) -> None:
    """The rows of a table equal the module's, and requests that run together get the model's own
    greedy tokens."""
    model, prompts = open_checkpoint(path).model(), [[5, 9, 5, 60], list(range(40)), [1]]
    with closing(open_row_source(f"file://{path}-tables")) as source:
        manifest = source.describe(build_table(path, source.url, codec="fp32"))
        records = source.fetch_records(manifest, np.arange(60, dtype=np.uint32))
        built = torch.from_numpy(manifest.decode(records)).transpose(0, 1)
        torch.testing.assert_close(model.rows(torch.arange(60)), built, rtol=1e-5, atol=1e-5)
        with closing(CachedRows(source, manifest, 1 << 20, CPU)) as rows:
            requests = [Request(prompt, 12) for prompt in prompts]
            serve(engine_of(path, rows), *requests)
    expected = [list(greedy(model, prompt, 12, ignore_eos=True)) for prompt in prompts]
    assert expected == [request.tokens for request in requests]


def test_a_form_learns_and_is_stored(form: dict, path: Path, tmp_path: Path) -> None:
    """Training changes every weight and lowers the loss, and the checkpoint has the form."""
    tiny = recipe("tiny", "flex", 3)
    config = replace(tiny.config, vocab_size=512, num_hidden_layers=2, **form)
    sizes = {"steps": 20, "batch_sequences": 2, "sequence_tokens": 16, "warmup_steps": 1}
    text = np.tile(np.random.default_rng(0).integers(0, 300, 16).astype(np.int32), 20)
    (tmp_path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes())
    trainer = Trainer(replace(tiny, config=config, **sizes), text, text, tmp_path)
    after = trainer.run()
    assert config == open_checkpoint(tmp_path).config
    torch.manual_seed(0)
    fresh = Transformer(config)
    initialise(fresh)
    assert after.loss < 0.8 * evaluate(fresh, text).loss
    first, last = fresh.state_dict(), trainer.model.state_dict()
    assert [] == [name for name in first if ".mlp." in name and (first[name] == last[name]).all()]


def test_a_form_has_the_parameters_of_a_swiglu(form: dict) -> None:
    """Presets have about as many parameters as with SwiGLU, and never more than half a percent
    more."""
    for size in ("tiny", "small", "1b"):
        plain, own = (
            sum(torch.Size(s).numel() for s in tensor_shapes(preset(size, "flex", 3, **f)).values())
            for f in ({"ffn_c": "swiglu"}, form)
        )
        assert 0.95 < own / plain <= 1.005


@pytest.mark.parametrize("form", ["flashmhf", "lookup"])
def test_a_form_without_channels_is_not_explained(form: str, tmp_path: Path) -> None:
    """`tolhouse explain` refuses a form whose FFN-M has no keys."""
    path = tiny_model(tmp_path, "memory", ffn_m=form)
    with pytest.raises(InvalidArgumentError, match=f"form {form} has no keys; .* are swiglu, moc"):
        explain_text(open_checkpoint(path), "def", 2, 2)


def test_rows_have_the_hash_of_their_form(tmp_path: Path) -> None:
    """The hash changes with FFN-M's form and its fields, but not with the fields of FFN-C."""

    def rows_id(form: str, **changes: str | float) -> str:
        path = tiny_model(tmp_path / form, "flex", 3, ffn_c="moc", ffn_m=form)
        config = json.loads((path / "config.json").read_bytes()) | changes
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return open_checkpoint(path).rows_id()

    assert rows_id("lookup") == rows_id("lookup", ffn_share=0.5)
    changes = {}, {"ffn_share": 0.5}, {"ffn_m": "swiglu"}, {"ffn_m": "avgk"}
    assert len({rows_id("moc", **change) for change in changes}) == len(changes)


@pytest.mark.parametrize("channels", [144, 683])
def test_swiglu_has_the_same_bits_alone_and_in_a_batch(channels: int) -> None:
    """A token's bits do not depend on the number of tokens, for any number of channels."""
    x_TM = torch.randn(9, channels)
    assert torch.equal(torch.cat([silu(x_M[None]) for x_M in x_TM]), silu(x_TM))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_silu_is_as_exact_as_its_dtype(dtype: torch.dtype) -> None:
    """SiLU equals its formula in float64 within the rounding of the dtype, also far from zero."""
    x = torch.linspace(-40, 40, 999).to(dtype)
    expected = x.double() / (1 + (-x.double()).exp())
    finfo = torch.finfo(dtype)
    tolerance = {"rtol": 4 * finfo.eps, "atol": finfo.smallest_normal}
    torch.testing.assert_close(silu(x).double(), expected, **tolerance)


@pytest.mark.parametrize("form", [f for f in FORMS if f["ffn_c"] in ("moc", "avgk")], ids=name)
def test_the_first_of_equal_scores_are_chosen(form: dict, tmp_path: Path) -> None:
    """If channels or blocks have equal keys, the module and the worker take the first ones."""
    path = tiny_model(tmp_path / "some", "flex", 3, **form)
    model, blocks = open_checkpoint(path).model(), form.get("ffn_blocks", 96)
    for block in model.layers:
        keys_BSD = block.mlp.gate_proj.weight.unflatten(0, (blocks, -1))
        block.mlp.gate_proj.weight.data = keys_BSD[torch.arange(blocks) % 3].flatten(0, 1)
    save_checkpoint(tmp_path / "equal", model, path / "tokenizer.json")
    checkpoint = open_checkpoint(tmp_path / "equal")
    own, worker = checkpoint.model().layers, load(checkpoint, CPU, torch.float32).layers
    for layer in range(len(own)):
        expected = torch.stack([formula(own[layer].mlp, form, x_D) for x_D in X]).float()
        for layers in (own, worker):
            with torch.inference_mode():
                difference = layers[layer].mlp(X) - expected
            assert difference.abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_as_many_scores_are_chosen(dtype: torch.dtype) -> None:
    """The first of the largest scores are chosen, as many as asked for, even if some are equal,
    infinite or not a number."""
    scores = torch.randint(-3, 3, (50, 11)).to(dtype)
    for active in (1, 4, 11):
        order = scores.float().sort(dim=-1, descending=True, stable=True).indices[:, :active]
        assert torch.equal(top(scores, active), torch.zeros(50, 11).scatter(1, order, 1).bool())
        scores[:, 3], scores[:, 5] = torch.inf, torch.nan
        assert (top(scores, active).sum(1) == active).all()
        scores[:, 3], scores[:, 5] = 0, 0


@pytest.mark.parametrize("heads", [2, 8])
def test_heads_need_less_memory_than_a_swiglu(heads: int) -> None:
    """With as many parameters, the activations of all heads together are smaller than a
    SwiGLU's."""
    config, peaks = preset("tiny", "flex", 3, ffn_c="flashmhf", ffn_heads=heads), []
    for form in ("flashmhf", "swiglu"):
        ffn = make(form, config, 96)
        with torch.inference_mode(), PeakBytes() as memory:
            ffn(X)
        peaks.append(memory.peak)
    assert peaks[0] < 0.9 * peaks[1]


def test_channels_that_are_not_chosen_may_overflow() -> None:
    """A channel that is infinite and not chosen does not change the output."""
    mlp = make("moc", preset("tiny", "flex", 3, ffn_c="moc"), 96)
    with torch.no_grad():
        mlp.gate_proj.weight[0] = 0  # less than the gates of the chosen quarter
        expected = mlp(X)
        mlp.up_proj.weight[0] = torch.inf
        assert torch.equal(expected, mlp(X))


def test_a_router_of_small_sigmoids_is_normalised() -> None:
    """The shares of a head's networks sum to one if all sigmoids are zero in float32."""
    mlp = make("flashmhf", preset("tiny", "flex", 3), 96)
    for router in mlp.routers:
        router.weight.data *= 1e4
    assert mlp(X).isfinite().all()


def test_a_budget_that_a_form_cannot_have_is_refused() -> None:
    """The error names the field or the least budget."""
    for beta, form, message in (
        (2, {"ffn_c": "flashmhf"}, "needs at least the parameters of a SwiGLU with 68 channels"),
        (3, {"ffn_c": "flashmhf", "ffn_heads": 5}, "ffn_heads 5 must divide hidden_size 96"),
        (3, {"ffn_c": "flashmhf", "ffn_experts": 25}, "ffn_experts 25 must be at most 24 with"),
        (1, {"ffn_c": "lookup", "ffn_bits": 8}, "ffn_bits 8 must be at most 6, .* of 32 channels"),
        (1, {"ffn_c": "avgk", "ffn_blocks": 33}, "ffn_blocks 33 must be at most .*, 32"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            tensor_shapes(preset("tiny", "flex", beta, **form))


@pytest.mark.parametrize("form", ["flashmhf", "lookup"])
def test_a_worker_says_that_a_form_decodes_uncompiled(form: str, tmp_path: Path) -> None:
    """Compiling the decode step is refused, and the error names the form."""
    from tolhouse.engine.cpu.compiled import compile_decode

    checkpoint = open_checkpoint(tiny_model(tmp_path / "m", "flex", 3, ffn_c=form))
    with pytest.raises(InvalidArgumentError, match=f"FFN-C {form} decodes uncompiled"):
        compile_decode(checkpoint, torch.float32, tmp_path)
