"""The model: its shapes, the function of rows that it is, and its checkpoints."""

import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolhouse.errors import InvalidArgument, NotFound, PromptTooLong
from tolhouse.model.checkpoint import WEIGHTS, open_checkpoint, save_checkpoint
from tolhouse.model.config import PRESETS, ModelConfig, preset
from tolhouse.model.generate import greedy
from tolhouse.model.kv import GrowingCache, NoCache
from tolhouse.model.transformer import Transformer, active_parameters, total_parameters
from tolhouse.testing import tiny_model

# PAPER table 1, corrected: active parameters in millions
PAPER = {
    "250m": {"base": 265, "memory": 88, 1: 110, 2: 132, 3: 154},
    "750m": {"base": 737, "memory": 245, 1: 307, 2: 368, 3: 430},
    "1b": {"base": 1208, "memory": 402, 1: 503, 2: 604, 3: 704},
}
KINDS = [
    ("base", 0, "linear"),
    ("memory", 0, "linear"),
    ("wide", 0, "linear"),
    *(("flex", beta, form) for beta in (1, 2, 3) for form in ("linear", "swiglu")),
]


def model_of(kind: str, beta: int = 0, ffn_c: str = "linear", **overrides) -> Transformer:
    torch.manual_seed(0)
    return (
        Transformer(preset("tiny", kind, beta, ffn_c=ffn_c, vocab_size=64, **overrides))
        .eval()
        .requires_grad_(False)
    )


# shapes


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("kind", ["base", "memory", 1, 2, 3])
@pytest.mark.parametrize("ffn_c", ["linear", "swiglu"])
def test_the_presets_have_the_paper_s_parameters(size: str, kind: str | int, ffn_c: str) -> None:
    """Active parameters are those of the paper's table to the million, norms aside; totals are equal across kinds to 0.1%."""
    name, beta = ("flex", kind) if isinstance(kind, int) else (kind, 0)
    with torch.device("meta"):
        model = Transformer(preset(size, name, beta, ffn_c=ffn_c))
        base = Transformer(preset(size, "base"))
    config = model.config
    norms = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 1 and "ffn_m" not in n)
    assert abs(PAPER[size][kind] - (active_parameters(model) - norms) / 1e6) <= 1.0
    exact = config.num_hidden_layers * (12 if name == "base" else 4 + beta) * config.hidden_size**2
    assert abs(active_parameters(model) - norms - exact) / exact < 0.002
    assert abs(total_parameters(model) - total_parameters(base)) / total_parameters(base) < 0.001


@pytest.mark.parametrize("size", ["tiny", "demo"])
def test_our_presets_have_equal_totals(size: str) -> None:
    """Matrices of all kinds add up to the same number, exactly."""
    totals = set()
    for kind, beta, ffn_c in KINDS:
        with torch.device("meta"):
            model = Transformer(preset(size, kind, beta, ffn_c=ffn_c))
        named = model.named_parameters()
        totals.add(
            sum(
                p.numel()
                for n, p in named
                if p.dim() == 2 and not n.startswith(("embed_tokens", "lm_head"))
            )
        )
    assert 1 == len(totals)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name: str) -> None:
    """Every preset of every kind is read as it was written."""
    for kind, beta, ffn_c in KINDS:
        config = preset(name, kind, beta, ffn_c=ffn_c)
        assert config == ModelConfig.from_json(json.loads(json.dumps(config.to_json())))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "moe"}, "one of base, memory, flex"),
        ({"model_type": "llama"}, "model_type"),
        ({"surplus": 1}, "unknown fields"),
        ({"vocab_size": None}, "vocab_size must be int"),
        ({"vocab_size": True}, "vocab_size must be int"),
        ({"vocab_size": 0}, "from 1 to"),
        ({"hidden_size": 97}, "multiple of num_attention_heads"),
        ({"num_hidden_layers": "4"}, "must be int"),
        ({"rope_theta": "x"}, "must be float"),
        ({"beta": 1}, "beta is 1, 2 or 3 for flex"),
        ({"kind": "flex", "beta": 4}, "beta is 1, 2 or 3 for flex"),
        ({"kind": "flex", "beta": 1, "ffn_c": "conv"}, "one of linear, swiglu"),
        ({"tie_word_embeddings": 1}, "must be bool"),
        ({"eos_token_id": 10**6}, "eos_token_id"),
    ],
)
def test_a_config_that_can_not_be_is_refused(changes: dict, message: str) -> None:
    """Unknown, missing and impossible values are told by name."""
    with pytest.raises(InvalidArgument, match=message):
        ModelConfig.from_json({**preset("tiny", "memory").to_json(), **changes})
    with pytest.raises(InvalidArgument, match="missing fields"):
        ModelConfig.from_json({"model_type": "memoryllm"})
    with pytest.raises(InvalidArgument, match="not a JSON object"):
        ModelConfig.from_json([])


# the function


@pytest.mark.parametrize(("kind", "beta", "ffn_c"), KINDS)
def test_rows_are_a_function_of_the_token_alone(kind: str, beta: int, ffn_c: str) -> None:
    """[N, T, D]; the row of a token is the same wherever it stands and whoever stands beside it."""
    model = model_of(kind, beta, ffn_c)
    ids = torch.tensor([3, 60, 3, 0, 7])
    rows = model.rows(ids)
    assert ({"base": 0, "wide": 1}.get(kind, 4), 5, 96) == tuple(rows.shape)
    assert torch.equal(rows, model.rows(ids))
    torch.testing.assert_close(rows, torch.stack([model.rows(i[None])[:, 0] for i in ids], dim=1))


@pytest.mark.parametrize(("kind", "beta", "ffn_c"), KINDS)
def test_a_sequence_in_pieces_is_the_sequence_at_once(kind: str, beta: int, ffn_c: str) -> None:
    """Logits do not depend on how a sequence is fed, and never on what comes later."""
    model = model_of(kind, beta, ffn_c)
    ids, positions = torch.arange(5, 29), torch.arange(24)
    whole = model(ids, positions, NoCache(24), model.rows(ids))
    cache, pieces = GrowingCache(), []
    for start, end in pairwise((0, 7, 8, 9, 24)):
        pieces.append(
            model(ids[start:end], positions[start:end], cache, model.rows(ids[start:end]))
        )
    torch.testing.assert_close(whole, torch.cat(pieces), atol=1e-5, rtol=1e-4)
    other = torch.cat((ids[:12], ids[12:].flip(0)))
    torch.testing.assert_close(
        whole[:12], model(other, positions, NoCache(24), model.rows(other))[:12]
    )


def test_forward_never_computes_the_token_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With FFN-M's weights gone forward works on given rows; rows() then says what is missing."""
    model, ids, positions = model_of("memory"), torch.arange(6), torch.arange(6)
    rows = model.rows(ids)
    expected = model(ids, positions, NoCache(6), rows)
    del model.ffn_m[:]
    assert torch.equal(expected, model(ids, positions, NoCache(6), rows))
    assert not torch.allclose(expected, model(ids, positions, NoCache(6), torch.zeros_like(rows)))
    with pytest.raises(InvalidArgument, match="rows come from a table"):
        model.rows(ids)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_may_carry_x0(tied: bool, tmp_path: Path) -> None:
    """With X0 in front of its rows, a model loaded without its embedding gives the same logits; without it, it says what is missing."""
    opened = open_checkpoint(tiny_model(tmp_path / "m", tie_word_embeddings=tied))
    whole, bare, ids, positions = (
        opened.model(),
        opened.model(ffn_m=False, embedding=False),
        torch.arange(6),
        torch.arange(6),
    )
    rows = whole.rows(ids, x0=True)
    assert torch.equal(rows, torch.cat((whole.embed_tokens(ids)[None], whole.rows(ids))))
    expected = whole(ids, positions, NoCache(6), whole.rows(ids))
    assert torch.equal(expected, bare(ids, positions, NoCache(6), rows))
    assert torch.equal(expected, whole(ids, positions, NoCache(6), rows))
    assert not torch.allclose(
        expected, bare(ids, positions, NoCache(6), torch.cat((rows[:1] * 2, rows[1:])))
    )
    assert [] == [
        name for name, _ in bare.named_parameters() if name.startswith(("embed_tokens", "ffn_m"))
    ]
    with pytest.raises(InvalidArgument, match="X0 comes from a table"):
        bare(ids, positions, NoCache(6), rows[1:])


def test_each_layer_adds_its_own_row() -> None:
    """The rows of two layers exchanged give other logits: which layer a row belongs to matters."""
    model, ids, positions = model_of("memory"), torch.arange(6), torch.arange(6)
    rows = model.rows(ids) * 5
    assert not torch.allclose(
        model(ids, positions, NoCache(6), rows),
        model(ids, positions, NoCache(6), rows[[1, 0, 2, 3]]),
        atol=1e-3,
    )


def test_greedy_completion_keeps_to_its_limits(checkpoint: Path) -> None:
    """Prompts that are empty, foreign or too long are refused; the end of text ends it unless ignored."""
    model = open_checkpoint(checkpoint).model()
    assert 5 == len(list(greedy(model, [1, 2], 5, ignore_eos=True)))
    for prompt, count, error in (
        ([], 1, InvalidArgument),
        ([999_999], 1, InvalidArgument),
        ([1], 0, InvalidArgument),
        ([1], 256, PromptTooLong),
    ):
        with pytest.raises(error):
            list(greedy(model, prompt, count))


# checkpoints


@pytest.mark.parametrize(("kind", "beta", "ffn_c"), KINDS)
def test_a_checkpoint_comes_back(kind: str, beta: int, ffn_c: str, tmp_path: Path) -> None:
    """Config, weights and tokenizer are what was saved; without FFN-M the other weights are the same."""
    path = tiny_model(tmp_path / "m", kind, beta, ffn_c=ffn_c)
    opened = open_checkpoint(path)
    whole, worker = opened.model().state_dict(), opened.model(ffn_m=False).state_dict()
    assert set(worker) == {name for name in whole if not name.startswith("ffn_m.")}
    assert all(torch.equal(whole[name], worker[name]) for name in worker)
    again = tmp_path / "again"
    save_checkpoint(again, opened.model(), path / "tokenizer.json")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }
    assert opened.model_id() == open_checkpoint(again).model_id()
    stored = (path / WEIGHTS).stat().st_size
    assert 0 < stored - opened.weight_bytes(dense=True) < 8192  # the header
    assert (kind == "base") == (opened.weight_bytes(dense=False) == opened.weight_bytes(dense=True))
    assert opened.weight_bytes(dense=False) == opened.weight_bytes(
        dense=False, embedding=False
    )  # it is the head


def test_tensors_have_the_names_of_the_docstring(tmp_path: Path) -> None:
    """LLaMA's names, and FFN-M's own."""
    names = set(load_file(tiny_model(tmp_path / "m", "flex", 2, num_hidden_layers=1) / WEIGHTS))
    layer = "model.layers.0."
    expected = {
        "model.embed_tokens.weight",
        "model.norm.weight",
        f"{layer}input_layernorm.weight",
        f"{layer}post_attention_layernorm.weight",
    }
    expected |= {f"{layer}self_attn.{x}_proj.weight" for x in "qkvo"} | {
        f"{layer}mlp.maps.{j}.weight" for j in range(2)
    }
    expected |= {f"{layer}ffn_m.norm.weight"} | {
        f"{layer}ffn_m.mlp.{x}_proj.weight" for x in ("gate", "up", "down")
    }
    assert expected == names


def test_the_id_of_rows_follows_what_defines_them(tmp_path: Path) -> None:
    """Embedding and FFN-M change it, attention does not; any weight changes the model's id."""
    path = tiny_model(tmp_path / "m")
    opened = open_checkpoint(path)
    rows_id, model_id = opened.rows_id(), opened.model_id()
    before = (path / WEIGHTS).read_bytes()
    weights = load_file(path / WEIGHTS)
    for name, changes in (
        ("model.embed_tokens.weight", True),
        ("model.layers.2.ffn_m.norm.weight", True),
        ("model.layers.3.ffn_m.mlp.down_proj.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", False),
        ("model.norm.weight", False),
    ):
        save_file({**weights, name: weights[name] + 1}, path / WEIGHTS)
        assert changes == (rows_id != opened.rows_id())
        assert model_id != opened.model_id()
    (path / WEIGHTS).write_bytes(before)
    assert (rows_id, model_id) == (opened.rows_id(), opened.model_id())


def damage(path: Path, how: str) -> None:
    weights = path / WEIGHTS
    tensors = load_file(weights)
    match how:
        case "garbage":
            weights.write_bytes(b"x" * 1000)
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "empty":
            weights.write_bytes(b"")
        case "pickle":
            weights.write_bytes(pickle.dumps({"a": 1}))
        case "missing tensor":
            del tensors["model.norm.weight"]
            save_file(tensors, weights)
        case "extra tensor":
            save_file({**tensors, "model.surplus": torch.zeros(1)}, weights)
        case "wrong shape":
            save_file({**tensors, "model.norm.weight": torch.zeros(3)}, weights)
        case "wrong type":
            save_file({**tensors, "model.norm.weight": torch.zeros(96, dtype=torch.int32)}, weights)
        case "only a pickle":
            weights.rename(path / "pytorch_model.bin")
        case "no config":
            (path / "config.json").unlink()
        case "bad config":
            (path / "config.json").write_text("{")
        case "bad tokenizer":
            (path / "tokenizer.json").write_text("{}")
        case "no tokenizer":
            (path / "tokenizer.json").unlink()
        case "large tokenizer":
            (path / "tokenizer.json").write_bytes(
                Path("models/demo-memory/tokenizer.json").read_bytes()
            )
        case "folder":
            weights.unlink()
            weights.mkdir()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("garbage", "not a safetensors file"),
        ("truncated", "not a safetensors file"),
        ("empty", "not a safetensors file"),
        ("pickle", "not a safetensors file"),
        ("missing tensor", "lacks 1 tensors of a memory model, such as model.norm.weight"),
        ("extra tensor", "that a memory model lacks, such as model.surplus"),
        ("wrong shape", r"model.norm.weight has shape \[3\]"),
        ("wrong type", "model.norm.weight is I32"),
        ("only a pickle", "convert it to safetensors"),
        ("no config", "no config.json"),
        ("bad config", "not JSON"),
        ("bad tokenizer", "not a tokenizer.json"),
        ("no tokenizer", "no tokenizer"),
        ("large tokenizer", "8192 tokens, but the model's vocabulary is"),
        ("folder", "has no model.safetensors"),
    ],
)
def test_a_malformed_checkpoint_is_refused(how: str, message: str, tmp_path: Path) -> None:
    """Each defect is told, and nothing is ever unpickled."""
    path = tiny_model(tmp_path / "m")
    damage(path, how)
    with pytest.raises((InvalidArgument, NotFound), match=message):
        open_checkpoint(path)


def test_what_is_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    """A path that is not there, or is a file, is told what a checkpoint is."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(NotFound, match="a checkpoint is a folder"):
            open_checkpoint(path)


def test_the_demo_models_are_twins() -> None:
    """memory and flex beta 3, equal in total parameters and tokenizer, bfloat16, at most 20 MB each, with a card and a curve."""
    memory, flex = (open_checkpoint(Path("models") / name) for name in ("demo-memory", "demo-flex"))
    assert ("memory", 0, "flex", 3) == (
        memory.config.kind,
        memory.config.beta,
        flex.config.kind,
        flex.config.beta,
    )
    assert memory.tokenizer_id == flex.tokenizer_id
    totals = [
        sum(p.numel() for p in c.model().parameters() if p.dim() == 2) for c in (memory, flex)
    ]
    assert totals[0] == totals[1]
    for checkpoint in (memory, flex):
        assert (checkpoint.path / WEIGHTS).stat().st_size <= 20_000_000
        with safe_open(checkpoint.path / WEIGHTS, "pt") as weights:
            assert {"BF16"} == {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        card = (checkpoint.path / "README.md").read_text()
        assert all(word in card for word in ("held-out loss", "tolhouse train demo", "tokens"))
        assert (checkpoint.path / "loss.csv").exists()
