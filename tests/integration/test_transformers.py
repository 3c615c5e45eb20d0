import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tolhouse.analysis.evaluate import probed, table_rows
from tolhouse.client.client import Client
from tolhouse.errors import InvalidArgumentError, MismatchError, TolhouseError, UnsupportedError
from tolhouse.integrations.attach import attach
from tolhouse.integrations.train import ModelOptions, Options
from tolhouse.integrations.train import train as run_training
from tolhouse.integrations.transformers import MemoryLLMConfig, MemoryLLMForCausalLM
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.config import RopeScaling, preset
from tolhouse.model.generate import greedy
from tolhouse.model.transformer import NoCache, Transformer
from tolhouse.testing import build_table, tiny_model
from tolhouse.train.trainer import initialise
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from tests.commands import tolhouse

PROMPTS = ["def add(a, b):", "class"]
LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# kind, beta, fields
KINDS = [
    ("memory", 0, {}),
    ("memory", 0, {"tie_word_embeddings": False, "rope_theta": 50_000.0}),
    ("flex", 2, {}),
    ("flex", 1, {"ffn_c": "swiglu"}),
    ("flex", 3, {"ffn_c": "moc", "ffn_m": "moc", "ffn_share": 0.5}),
    ("flex", 2, {"ffn_c": "avgk", "ffn_m": "avgk", "ffn_blocks": 8}),
    ("flex", 3, {"ffn_c": "flashmhf", "ffn_m": "flashmhf"}),
    ("flex", 3, {"ffn_c": "lookup", "ffn_m": "lookup"}),
    ("wide", 0, {}),
    ("base", 0, {"eos_token_id": (0, 1)}),
    ("memory", 0, {"num_key_value_heads": 2, "head_dim": 32, "qk_norm": True, "qkv_bias": True}),
    ("flex", 3, {"num_key_value_heads": 1, "rope_scaling": LLAMA3}),
    ("wide", 0, {"head_dim": 32, "qk_norm": True, "qkv_bias": True, "o_bias": True}),
    ("base", 0, {"num_key_value_heads": 2, "rope_scaling": RopeScaling("linear", 4.0)}),
]
IDS = torch.arange(60).view(2, 30) * 7 % 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "memory", tie_word_embeddings=False)


def load(path: Path, **options) -> MemoryLLMForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def own_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    model, (batch, length) = open_checkpoint(path).model(), ids.shape
    positions, flat = torch.arange(length).repeat(batch), ids.flatten()
    with torch.inference_mode():
        logits = model(flat, positions, NoCache(length), model.rows(flat))
    return logits.view(batch, length, -1)


@pytest.mark.parametrize(("kind", "beta", "fields"), KINDS)
def test_equal_to_own_model(tmp_path, kind, beta, fields):
    """Logits, greedy texts of padded batches, and a saved copy equal those of our own model."""
    path, saved = tiny_model(tmp_path / "model", kind, beta, **fields), tmp_path / "saved"
    model, own = load(path), open_checkpoint(path)
    with torch.inference_mode():
        assert (model(IDS).logits - own_logits(path, IDS)).abs().max() <= 1e-5

    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    texts = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for prompt, ids in zip(PROMPTS, texts[:, batch.input_ids.shape[1] :].tolist(), strict=True):
        expected = []
        for token in greedy(own.model(), tokenizer(prompt).input_ids, 8, ignore_eos=True):
            if token in own.config.end_token_ids:
                break
            expected.append(token)
        assert expected == ids[: len(expected)]

    model.save_pretrained(saved, max_shard_size="200KB")
    tokenizer.save_pretrained(saved)
    copy = open_checkpoint(saved)
    assert own.config == copy.config
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    assert torch.equal(own_logits(path, IDS), own_logits(saved, IDS))


def test_save_takes_build(folder, tmp_path):
    """A saved model can be built, and the model takes its rows from the table."""
    model, store = load(folder), f"file://{tmp_path}/tables"
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    table = build_table(tmp_path / "saved", store, name="saved")
    with torch.inference_mode():
        expected, rows = model(IDS).logits, model.rows_of(IDS)
        with Client(store) as client:

            def fetched(ids: torch.Tensor) -> torch.Tensor:
                blocks = client.fetch(table, ids.flatten().numpy()).astype(np.float32)
                return torch.from_numpy(blocks).view(*ids.shape, *blocks.shape[1:]).movedim(2, 0)

            x0_and_rows = fetched(IDS)
            assert torch.allclose(rows, x0_and_rows[1:], atol=1e-5)
            for layer in model.model.layers:
                layer.ffn_m = None
            model.model.row_source = fetched
            assert torch.allclose(expected, model(IDS).logits, atol=1e-4)
            assert torch.equal(x0_and_rows, model.rows_of(IDS))
    embeddings = torch.zeros(1, 3, model.config.hidden_size)
    with pytest.raises(InvalidArgumentError, match="give input_ids"):
        model(inputs_embeds=embeddings)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("memory", {"tie_word_embeddings": False}), ("flex", {"beta": 1}), ("wide", {})],
)
def test_attach(tmp_path, kind, fields):
    """An attached model has the logits and texts of its FFN-M, which it frees until `detach`."""
    path, store = tiny_model(tmp_path / "model", kind, **fields), f"file://{tmp_path}/tables"
    model = load(path)
    build_table(path, store, name="model")
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.inference_mode():
        expected, text = model(IDS).logits, model.generate(IDS, **options)
        sizes = [p.nbytes for name, p in model.named_parameters() if ".ffn_m." in name]
        attachment = attach(model, store, "model")
        assert sum(sizes) == attachment.freed_bytes > 0
        assert not [name for name, _ in model.named_parameters() if ".ffn_m." in name]
        assert torch.allclose(expected, model(IDS).logits, atol=1e-4)
        assert len(IDS.unique()) == attachment.fetched_rows
        assert torch.equal(text, model.generate(IDS, **options))
        with pytest.raises(InvalidArgumentError, match="detach it first"):
            attach(model, store, "model")
        attachment.detach()
        assert torch.equal(expected, model(IDS).logits)


@pytest.mark.parametrize("form", ["swiglu", "moc", "avgk", "flashmhf", "lookup"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attach_in_16_bits(tmp_path, form, dtype):
    """A model in 16 bits takes the table of its checkpoint, whatever the form of FFN-M."""
    path, store = tiny_model(tmp_path / "model", ffn_m=form), f"file://{tmp_path}/tables"
    build_table(path, store, name="model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    attachment = attach(model, store, "model")
    assert model(IDS).logits.isfinite().all()
    attachment.detach()
    build_table(tiny_model(tmp_path / "other", ffn_m=form, seed=1), store, name="other")
    with pytest.raises(MismatchError, match="rows of another model"):
        attach(model, store, "other")


def test_attach_refuses(folder, tmp_path):
    """A table of another model, or of another shape, and a model without rows are refused."""
    store = f"file://{tmp_path}/tables"
    other = tiny_model(tmp_path / "other", seed=1, tie_word_embeddings=False)
    build_table(other, store)
    build_table(tiny_model(tmp_path / "small", hidden_size=48), store)
    for table, message in (("other", "rows of another model"), ("small", "needs 4 blocks ffn.0")):
        with pytest.raises(MismatchError, match=message):
            attach(load(folder), store, table)
    with pytest.raises(InvalidArgumentError, match="kind base has no rows"):
        attach(load(tiny_model(tmp_path / "base", "base")), store, "other")


def test_attention_and_caches(folder):
    """Eager and SDPA attention agree, with and without a cache, and with embeddings as input."""
    sdpa, eager = load(folder), load(folder, attn_implementation="eager")
    with torch.inference_mode():
        expected = sdpa(IDS).logits
        assert torch.allclose(expected, eager(IDS).logits, atol=1e-4)
        embeddings = sdpa.get_input_embeddings()(IDS)
        assert torch.allclose(expected, sdpa(inputs_embeds=embeddings).logits, atol=1e-4)
        cache = DynamicCache(config=sdpa.config)
        parts = [sdpa(part, cache=cache).logits for part in IDS.split((20, 1, 9), dim=1)]
        assert torch.allclose(expected, torch.cat(parts, dim=1), atol=1e-4)
        last = sdpa(IDS, logits_to_keep=1, output_hidden_states=True)
        assert torch.allclose(expected[:, -1:], last.logits, atol=1e-4)
        assert [IDS.shape] * 5 == [state.shape[:2] for state in last.hidden_states]
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        dynamic = sdpa.generate(IDS, **options)
        assert torch.equal(dynamic, sdpa.generate(IDS, **options, use_cache=False))
        assert torch.equal(dynamic, sdpa.generate(IDS, **options, cache_implementation="static"))
        assert (2, 36) == sdpa.generate(IDS, **options, num_beams=3).shape
        sampled = {"max_new_tokens": 6, "do_sample": True, "top_k": 5}
        assert sdpa.generate(IDS, **sampled).shape[1] > 30


def test_gradient_checkpointing(folder):
    """Checkpointed layers give the gradients of all weights, FFN-M included."""
    model = load(folder).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5), name


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft uses it
def test_lora_with_the_trainer(folder, tmp_path):
    """The Trainer fits a LoRA adapter, which can be loaded and merged into a checkpoint."""
    targets = ["q_proj", "v_proj", "gate_proj"]
    model = get_peft_model(load(folder), LoraConfig(r=4, target_modules=targets))
    data = [{"input_ids": row, "labels": row} for row in IDS for _ in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        activation_checkpointing=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")

    tuned = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    merged = tuned.merge_and_unload()
    with torch.inference_mode():
        logits = merged(IDS).logits
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "merged")
    assert (logits - own_logits(tmp_path / "merged", IDS)).abs().max() <= 1e-4
    assert not torch.allclose(logits, own_logits(folder, IDS), atol=1e-2)


def test_dispatch_and_offload(folder, tmp_path):
    """accelerate can keep layers on disk, and the logits stay equal."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    model = load(folder, device_map=places, offload_folder=tmp_path)
    assert model.model.layers[1].ffn_m.norm.weight.is_meta
    with torch.inference_mode():
        assert torch.allclose(load(folder)(IDS).logits, model(IDS).logits, atol=1e-5)


def test_initialisation(folder):
    """A model from a config has the standard deviations of `tolhouse train`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layer = model.model.layers[0]
    assert abs(layer.ffn_m.mlp.up_proj.weight.std().item() - 0.02) < 1e-3
    assert abs(layer.ffn_m.mlp.down_proj.weight.std().item() - 0.02 / 8**0.5) < 1e-3
    assert torch.equal(layer.input_layernorm.weight, torch.ones(96))


def test_converted_model(tmp_path):
    """A converted model has the logits of our own model with the rows of its table, and no rows
    without it."""
    dense, store = tiny_model(tmp_path / "dense", "base"), f"file://{tmp_path}/tables"
    path = tmp_path / "converted"
    convert = ("convert", dense, "--text", __file__, "--layers", "3,1", "--codec", "fp32")
    done = tolhouse(*convert, "--out", path, "--publish", "--store", store)
    checkpoint, model = open_checkpoint(path), load(path)
    for use in (model, model.rows_of):
        with pytest.raises(InvalidArgumentError, match=r"only in its table: attach it"):
            use(IDS)
    rows = probed(table_rows(checkpoint, store, done.stdout.strip()))
    with torch.inference_mode():
        ids, positions = IDS.flatten(), torch.arange(30).repeat(2)
        expected = checkpoint.model()(ids, positions, NoCache(30), rows(ids))
        attachment = attach(model, store, "converted")
        assert (expected.view(2, 30, -1) - model(IDS).logits).abs().max() <= 1e-5
    attachment.detach()
    with pytest.raises(InvalidArgumentError, match=r"only in its table"):
        model(IDS)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    other = Path(shutil.copytree(path, tmp_path / "other"))
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5e4}), encoding="utf-8")
    with pytest.raises(MismatchError, match="rows of another model"):
        attach(load(other), store, "converted")


def test_attach_compares_all_rows(folder, tmp_path):
    """A table is refused if one row differs from the folder of the model, and accepted if only
    other weights differ."""
    store = f"file://{tmp_path}/tables"
    cases = (("model.embed_tokens.weight", "rows of another"), ("model.norm.weight", ""))
    for name, message in cases:
        path = Path(shutil.copytree(folder, tmp_path / name))
        tensors = load_file(path / "model.safetensors")
        tensors[name][7] += 1
        save_file(tensors, path / "model.safetensors")
        build_table(path, store, name=name)
        with pytest.raises(MismatchError, match=message) if message else nullcontext():
            attach(load(folder), store, name)


def test_unsupported_config(folder, tmp_path):
    """A config that asks for another computation is refused by the name of the field."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"hidden_act": "gelu"}), encoding="utf-8"
    )
    with pytest.raises(InvalidArgumentError, match="hidden_act is 'gelu'"):
        AutoConfig.from_pretrained(tmp_path)
    more = {"summary_tokens": 2, "summary_segment": 16}
    (tmp_path / "config.json").write_text(json.dumps(config | more), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="2 summary tokens"):
        AutoConfig.from_pretrained(tmp_path)


def train(*arguments: str) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, "-m", "tolhouse.integrations.train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, check=False
    )


def test_training_on_two_processes(tmp_path):
    """Two processes train a model from text, and a resumed run gives the same weights."""
    tokenizer, text, out = tiny_model(tmp_path / "tokenizer"), tmp_path / "text", tmp_path / "out"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text(
            f"def add(a, b):\n    return a + {number}\n" * 60, encoding="utf-8"
        )
    options = ["--preset", "tiny", "--kind", "flex", "--beta", "1", "--text", str(text)]
    options += ["--tokenizer", str(tokenizer), "--sequence_tokens", "32", "--output_dir", str(out)]
    options += ["--max_steps", "8", "--save_steps", "4", "--logging_steps", "1", "--bf16"]
    options += ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2"]
    options += ["--learning_rate", "0.01", "--disable_tqdm", "true", "--use_cpu", "true"]
    done = train(*options)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint, state_file = open_checkpoint(out), "trainer_state.json"
    state = json.loads((out / "checkpoint-8" / state_file).read_text(encoding="utf-8"))
    assert ("flex", 1) == (checkpoint.config.kind, checkpoint.config.beta)
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert 8 == len(losses)
    assert losses[-1] < losses[0]
    assert list(out.rglob("events.out.tfevents.*"))

    first = checkpoint.model()
    shutil.rmtree(out / "checkpoint-8")
    (out / "model.safetensors").unlink()
    state = json.loads((out / "checkpoint-4" / state_file).read_text(encoding="utf-8"))
    state["log_history"].append({"step": 4, "mark": 1})
    (out / "checkpoint-4" / state_file).write_text(json.dumps(state), encoding="utf-8")
    done = train(*options)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((out / "checkpoint-8" / state_file).read_text(encoding="utf-8"))
    assert {"step": 4, "mark": 1} in state["log_history"]
    second = open_checkpoint(out).model()
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name


def test_forms_are_trained(folder, tmp_path):
    """A new model has the forms of the options, is trained, and is continued."""
    (tmp_path / "text").write_text("def add(a, b): return a + b\n" * 20, encoding="utf-8")
    model = {"preset": "tiny", "kind": "flex", "beta": 3, "tokenizer": str(folder)}
    forms = {"ffn_c": "moc", "ffn_share": 0.5, "ffn_m": "lookup", "ffn_bits": 5}
    common = {"text": str(tmp_path / "text"), "sequence_tokens": 16}
    for number, more in enumerate((model | forms, {"checkpoint": str(tmp_path / "0")})):
        out = tmp_path / str(number)
        options = Options(output_dir=str(out), max_steps=1, use_cpu=True, report_to=[])
        run_training(ModelOptions(**common, **more), options)
        config = open_checkpoint(out).config
        assert forms == {field: getattr(config, field) for field in forms}


def test_training_refuses(folder, tmp_path):
    """Options that contradict each other, and a missing text, are one-line errors."""
    common = {"text": str(folder / "none"), "checkpoint": str(folder)}
    for more, steps, message in (
        ({}, 0, "give --max_steps"),
        ({}, 1, "no corpus at"),
        ({"preset": "tiny"}, 1, "give either --checkpoint or --preset"),
        ({"checkpoint": "", "preset": "tiny"}, 1, "needs a --tokenizer"),
        ({"text": str(folder / "config.json"), "sequence_tokens": 4000}, 1, "fewer than 4000"),
        (
            {"checkpoint": "", "preset": "tiny", "tokenizer": str(folder), "ffn_m": "moe"},
            1,
            "ffn_m: Input should be 'swiglu', 'moc'",
        ),
    ):
        options = Options(output_dir=str(tmp_path), max_steps=steps or -1, use_cpu=True)
        with pytest.raises(TolhouseError, match=message):
            run_training(ModelOptions(**{**common, **more}), options)


@pytest.mark.parametrize("form", ["flashmhf", "lookup"])
def test_forms_are_initialised_as_by_the_trainer(form: str) -> None:
    """Each weight of a new model has about the scale that `tolhouse train` gives it."""
    config = preset("tiny", "flex", 3, ffn_c=form, ffn_m=form, vocab_size=64)
    own = Transformer(config)
    initialise(own)
    expected = {name: float(p.detach().std()) for name, p in own.named_parameters()}
    model = MemoryLLMForCausalLM(MemoryLLMConfig(**config.to_json()))
    for full, p in model.named_parameters():
        name = re.sub(r"^layers\.(\d+)\.ffn_m", r"ffn_m.\1", full.removeprefix("model."))
        assert pytest.approx(expected[name], rel=0.7) == float(p.detach().std()), name
