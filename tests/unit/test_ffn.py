"""The forms of FFN-C and FFN-M: the module and the worker's module against their formulas."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.row_providers import CachedRows
from tolhouse.errors import InvalidArgumentError
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint, save_checkpoint, tensor_shapes
from tolhouse.model.config import preset
from tolhouse.model.generate import greedy
from tolhouse.model.losses import evaluate
from tolhouse.model.transformer import Transformer
from tolhouse.testing import build_table, tiny_model
from tolhouse.train.recipes import recipe
from tolhouse.train.trainer import Trainer, initialise
from torch import Tensor, nn

from tests.engines import CPU, Request, engine_of, serve

SHARES = (0.25, 1.0)
FORMS = [
    *({"ffn_c": "moc", "ffn_share": share} for share in SHARES),
    {"ffn_c": "moc", "ffn_by": "activation"},
]
X = torch.randn(7, 96, generator=torch.Generator().manual_seed(2))


def name(form: dict) -> str:
    return "-".join(map(str, form.values()))


def formula(ffn: nn.Module, form: dict, x_D: Tensor) -> Tensor:
    """The output for one token, in float64, as a sum over channels."""
    weights = {key: value.double() for key, value in ffn.state_dict().items()}
    return {"moc": moc}[form["ffn_c"]](weights, form, x_D.double())


def moc(weights: dict[str, Tensor], form: dict, x_D: Tensor) -> Tensor:
    gate, up = (weights[f"{name}_proj.weight"] @ x_D for name in ("gate", "up"))
    active = round(form.get("ffn_share", 0.25) * len(gate))
    activation = gate * gate.sigmoid()
    score = activation.abs() if form.get("ffn_by") == "activation" else gate
    chosen = sorted(range(len(gate)), key=lambda channel: -score[channel])[:active]
    columns = weights["down_proj.weight"].T
    return sum(activation[j] * up[j] * columns[j] for j in chosen)


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
    return tiny_model(tmp_path_factory.mktemp("models") / name(form), "flex", 3, **form)


def test_module_and_worker_compute_the_formula(form: dict, path: Path, tmp_path: Path) -> None:
    """The module, and the module that a worker runs, equal the formula for each token, also with
    permuted channels, and a token has the same bits alone and in a batch."""
    plain, checkpoints = open_checkpoint(path), [open_checkpoint(path)]
    if form["ffn_c"] in ("moc", "avgk"):
        checkpoints.append(permuted(path, tmp_path, form.get("ffn_blocks", 1)))
    for layer, block in enumerate(plain.model().layers):
        expected = torch.stack([formula(block.mlp, form, x_D) for x_D in X]).float()
        assert (scale := expected.abs().max()) > 0.01
        for checkpoint in checkpoints:
            own, worker = (
                model.layers[layer].mlp
                for model in (checkpoint.model(), load(checkpoint, CPU, torch.float32))
            )
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
    expected = [list(greedy(model, prompt, 12)) for prompt in prompts]
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


def test_a_worker_says_that_a_form_decodes_uncompiled(form: dict, tmp_path: Path) -> None:
    """Compiling the decode step is refused, and the error names the form."""
    from tolhouse.engine.cpu.compiled import compile_decode

    config = preset("tiny", "flex", 3, **form)
    with pytest.raises(InvalidArgumentError, match=f"FFN-C {form['ffn_c']} decodes uncompiled"):
        compile_decode(config, torch.float32, tmp_path)
