"""`tolhouse import gguf`: GGUF files of tiny random models, and transformers as the reference."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind
from tolhouse.cli import main
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.transformer import frequencies
from tolhouse.testing import process, wait_until_healthy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.commands import HTTP, start

D, HEAD, HEADS, KV_HEADS, K = 64, 32, 2, 1, 96
ENDS = ["<|im_start|>", "<|im_end|>", "<think>"]
UINT32 = gguf.GGUFValueType.UINT32
TEXTS = [
    "Hello world",
    "  two  spaces",
    "I'll don't 'S",
    "\t\tx = y;\r\n",
    "日本語 🙂🙂",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<think>b",
    "",
    "    ",
    "\x00\ud7ff\uffff",
]


def byte_letters() -> list[str]:
    """Return the letters of a byte-level vocabulary, in the order of bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def byte_level(writer: gguf.GGUFWriter, pre: str = "llama-bpe") -> int:
    """Write a byte-level vocabulary, and return its size."""
    tokens, merges = byte_letters(), []
    for merge in ("l l", "h e", "ll o", "Ġ Ġ", "Ġ t", "\u00c3 \u00a9"):
        merges.append(merge)
        tokens.append(merge.replace(" ", ""))
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types += [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED]
    tokens += ENDS
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_chat_template("{{ messages[0].content }}")
    return len(tokens)


def sentencepiece(writer: gguf.GGUFWriter) -> int:
    """Write a vocabulary with scores and byte tokens, and return its size."""
    words = ["▁", "e", "t", "h", "l", "o", "w", "r", "d", "▁t", "he", "▁the", "ll", "llo", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2]
    types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([0.0] * 259 + [-float(n) for n in range(len(words))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return len(tokens)


def write(
    path: Path,
    architecture: str = "llama",
    kind: Kind = Kind.F32,
    tokenizer: Callable[[gguf.GGUFWriter], int] = byte_level,
    change: Callable[[gguf.GGUFWriter, dict[str, Any]], Any] = lambda *_: None,
    tied: bool = False,
) -> Path:
    """Write the GGUF file of a random model with one layer."""
    writer = gguf.GGUFWriter(path, architecture)
    vocab = tokenizer(writer)
    # transformers reads no other head size from the GGUF file of a qwen3 model
    head = 128 if architecture == "qwen3" else HEAD
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_block_count(1)
    writer.add_feed_forward_length(K)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    rng = np.random.default_rng(0)
    shapes = {
        "attn_q": (HEADS * head, D),
        "attn_k": (KV_HEADS * head, D),
        "attn_v": (KV_HEADS * head, D),
        "attn_output": (D, HEADS * head),
        "ffn_gate": (K, D),
        "ffn_up": (K, D),
        "ffn_down": (D, K),
    }
    named: dict[str, tuple[int, ...]] = {f"blk.0.{n}.weight": s for n, s in shapes.items()}
    named |= {f"blk.0.{n}.weight": (D,) for n in ("attn_norm", "ffn_norm")}
    if architecture == "qwen2":
        named |= {f"blk.0.attn_{n}.bias": (shapes[f"attn_{n}"][0],) for n in "qkv"}
    if architecture == "qwen3":
        named |= {f"blk.0.attn_{n}_norm.weight": (head,) for n in "qk"}
    named |= {"token_embd.weight": (vocab, D), "output_norm.weight": (D,)}
    named |= {} if tied else {"output.weight": (vocab, D)}
    tensors: dict[str, Any] = {}
    for name, shape in named.items():
        values = rng.normal(size=shape).astype(np.float32) / np.sqrt(D)
        own = kind if len(shape) > 1 else Kind.F32
        tensors[name] = gguf.quantize(values, own), own
    change(writer, tensors)
    for name, (values, own) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(line: str, *more: str | Path, code: int = 0) -> str:
    """Run a command in this process, and return what it prints."""
    ended = CliRunner().invoke(main, [*line.split(), *map(str, more)])
    assert code == ended.exit_code, ended.output
    return ended.stderr if code else ended.stdout


def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(0, 60, 3)[None]).logits


CASES = [
    ("llama", Kind.F32, byte_level, True),
    ("llama", Kind.Q4_1, sentencepiece, False),
    ("llama", Kind.Q8_0, lambda writer: byte_level(writer, "gpt-2"), False),
    ("qwen2", Kind.F16, lambda writer: byte_level(writer, "deepseek-r1-qwen"), False),
    ("qwen3", Kind.BF16, lambda writer: byte_level(writer, "tekken"), True),
]


@pytest.mark.parametrize(("architecture", "kind", "tokenizer", "tied"), CASES)
def test_an_imported_model_is_that_of_transformers(
    tmp_path: Path, architecture: str, kind: Kind, tokenizer: Any, tied: bool
) -> None:
    """transformers gets the same logits and ids from the import as from the GGUF file itself."""
    write(tmp_path / "m.gguf", architecture, kind, tokenizer, tied=tied)
    out = tmp_path / "m"
    printed = run("import gguf --dtype float32", tmp_path / "m.gguf", "--out", out)
    assert f"{out}\n" == printed
    own = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    assert tied == own.config.tie_word_embeddings
    torch.testing.assert_close(logits(own), logits(reference), rtol=1e-5, atol=1e-5)
    ours = AutoTokenizer.from_pretrained(out)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert [theirs(text)["input_ids"] for text in TEXTS] == [
        ours(text)["input_ids"] for text in TEXTS
    ]
    assert theirs.eos_token == ours.eos_token
    assert [ours.eos_token_id] == [GenerationConfig.from_pretrained(out).eos_token_id]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "  1", ["ĠĠ", "1"]),  # digits are split off before spaces are
        ("gpt-2", "  1", ["Ġ", "Ġ", "1"]),
        ("qwen2", "e\u0301", ["Ã©"]),  # composed, as in Qwen's published tokenizer
        ("llama-bpe", "e\u0301", ["e", "Ì", "\u0123"]),
    ],
)
def test_the_pre_tokenizer_is_that_of_the_family(
    tmp_path: Path, pre: str, text: str, expected: list[str]
) -> None:
    """Texts are split and normalised as by the published tokenizer of the model family."""
    path = write(tmp_path / "m.gguf", tokenizer=lambda writer: byte_level(writer, pre))
    run("import gguf", path, "--out", tmp_path / "m")
    assert expected == AutoTokenizer.from_pretrained(tmp_path / "m").tokenize(text)


def llama3(factor: float) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    def change(writer: gguf.GGUFWriter, tensors: dict[str, Any]) -> None:
        waves = 2 * np.pi * 50000.0 ** (np.arange(0, HEAD, 2) / HEAD)
        smooth = np.clip((8192 / waves - 1) / 3, 0, 1)
        divisors = 1 / ((1 - smooth) / factor + smooth)
        tensors["rope_freqs.weight"] = divisors.astype(np.float32), Kind.F32

    return change


def test_the_scaling_of_llama_3_is_recognised(tmp_path: Path) -> None:
    """LLaMA-3's divisors become `rope_scaling`, from which transformers computes the same ones."""
    path = write(tmp_path / "m.gguf", change=llama3(32.0))
    run("import gguf", path, "--out", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_bytes())
    assert ("llama3", 32.0) == (
        config["rope_scaling"]["rope_type"],
        config["rope_scaling"]["factor"],
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").model
    plain = 50000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    stored = {t.name: t.data for t in gguf.GGUFReader(path).tensors}["rope_freqs.weight"]
    torch.testing.assert_close(
        plain / model.rotary_emb.inv_freq, torch.tensor(stored), rtol=1e-4, atol=0
    )


def linear(
    key: str, value: float, kind: str = ""
) -> Callable[[gguf.GGUFWriter, dict[str, Any]], None]:
    def change(writer: gguf.GGUFWriter, _: dict[str, Any]) -> None:
        writer.add_key_value(f"llama.{key}", value, gguf.GGUFValueType.FLOAT32)
        if kind:
            writer.add_key_value("llama.rope.scaling.type", kind, gguf.GGUFValueType.STRING)

    return change


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        (linear("rope.scaling.factor", 4.0, "linear"), 4.0),
        (linear("rope.scaling.factor", 4.0), 4.0),
        (linear("rope.scale_linear", 4.0), 4.0),
        (linear("rope.scaling.factor", 4.0, "none"), 1.0),
        (linear("rope.scaling.factor", 0.0, "linear"), 1.0),
    ],
)
def test_positions_are_scaled_as_in_llama_cpp(tmp_path: Path, change: Any, factor: float) -> None:
    """A linear factor divides all frequencies, also without a type or under its old name."""
    path = write(tmp_path / "m.gguf", change=change)
    run("import gguf", path, "--out", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").model
    plain = 50000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
    torch.testing.assert_close(plain / factor, model.rotary_emb.inv_freq)
    own = frequencies(open_checkpoint(tmp_path / "m").config, torch.device("cpu"))
    torch.testing.assert_close(plain / factor, own)


@pytest.mark.parametrize(
    ("kind", "asked", "expected"),
    [
        (Kind.Q8_0, "auto", torch.float16),
        (Kind.BF16, "auto", torch.bfloat16),
        (Kind.F32, "auto", torch.float32),
        (Kind.F32, "bfloat16", torch.bfloat16),
    ],
)
def test_weights_have_the_dtype(
    tmp_path: Path, kind: Kind, asked: str, expected: torch.dtype
) -> None:
    """The weights have the dtype that was asked for, or that suits the file."""
    path = write(tmp_path / "m.gguf", kind=kind)
    run("import gguf", path, "--out", tmp_path / "m", "--dtype", asked)
    assert expected == AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").dtype


def drop(name: str) -> Callable[[gguf.GGUFWriter, dict[str, Any]], Any]:
    return lambda _, tensors: tensors.pop(name)


def add(name: str, value: Any, kind: Any) -> Callable[[gguf.GGUFWriter, dict[str, Any]], Any]:
    return lambda writer, _: writer.add_key_value(name, value, kind)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def overlong(path: Path) -> None:
    """Give a list a length far beyond the end of the file."""
    field = gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"]
    at = field.offset + sum(part.nbytes for part in field.parts[:4])
    data = bytearray(path.read_bytes())
    data[at : at + 8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(data)


def replace(old: bytes, new: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new, 1))


REFUSED: list[tuple[dict[str, Any], Callable[[Path], Any], str]] = [
    ({}, truncate, "is truncated or malformed"),
    ({}, lambda path: path.write_bytes(b"GGUF"), "is truncated or malformed"),
    ({}, lambda path: path.write_bytes(b""), "is not a GGUF file"),
    ({}, Path.unlink, "there is no file"),
    ({"architecture": "falcon"}, lambda _: None, "'falcon'; allowed are llama, qwen2, qwen3"),
    ({}, overlong, "is truncated or malformed"),
    ({"change": drop("token_embd.weight")}, lambda _: None, "lacks tensor token_embd.weight"),
    (
        {"change": add("llama.block_count", 1 << 31, UINT32)},
        lambda _: None,
        "too few for 2147483648",
    ),
    ({"change": add("tokenizer.ggml.eot_token_id", 999, UINT32)}, lambda _: None, "end token 999"),
    (
        {"change": add("llama.embedding_length", "x", gguf.GGUFValueType.STRING)},
        lambda _: None,
        "llama.embedding_length 'x'; allowed is a value of type int",
    ),
    ({}, replace(b"embedding_length", b"embedding_lengtx"), "lacks the metadata llama.embedding_"),
    ({"change": drop("blk.0.ffn_up.weight")}, lambda _: None, "lacks tensor blk.0.ffn_up.weight"),
    (
        {"change": lambda _, tensors: tensors.update(x=tensors["output_norm.weight"])},
        lambda _: None,
        "has tensor x, which a llama model does not have",
    ),
    (
        {
            "change": lambda _, t: t.update(
                {"rope_freqs.weight": (np.arange(16.0, dtype="f4"), Kind.F32)}
            )
        },
        lambda _: None,
        "rope_freqs.weight, which is not the scaling of LLaMA-3",
    ),
    (
        {
            "change": lambda _, t: t.update(
                {"output_norm.weight": (np.full(D, np.nan, "f4"), Kind.F32)}
            )
        },
        lambda _: None,
        "output_norm.weight that are not finite",
    ),
    (
        {"change": add("llama.expert_count", 8, UINT32)},
        lambda _: None,
        "expert_c",
    ),
    (
        {"change": add("split.count", 3, gguf.GGUFValueType.UINT16)},
        lambda _: None,
        "one of 3 files",
    ),
    (
        {"change": add("llama.rope.scaling.type", "yarn", gguf.GGUFValueType.STRING)},
        lambda _: None,
        "rope.scaling.type 'yarn': allowed are none, linear, and LLaMA-3's",
    ),
    (
        {"change": linear("rope.scaling.factor", -2.0)},
        lambda _: None,
        "rope.scaling.factor -2.0; allowed are positive numbers",
    ),
    (
        {"change": linear("rope.scaling.attn_factor", 1.5)},
        lambda _: None,
        "rope.scaling.attn_factor 1.5, which is not supported",
    ),
    (
        {"change": lambda *w: (linear("rope.scaling.factor", 2.0)(*w), llama3(8.0)(*w))},
        lambda _: None,
        "rope.scaling.factor 2.0 and tensor rope_freqs.weight: allowed is one",
    ),
    (
        {},
        replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.prx"),
        "name the one of the model with `gguf-new-metadata --pre-tokenizer`: gpt-2, smollm",
    ),
    (
        {"tokenizer": lambda writer: byte_level(writer, "unknown")},
        lambda _: None,
        "tokenizer.ggml.pre 'unknown'; allowed are gpt-2, smollm",
    ),
]


@pytest.mark.parametrize(("options", "damage", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_an_unsupported_file_is_refused(
    tmp_path: Path, options: dict[str, Any], damage: Callable[[Path], Any], message: str
) -> None:
    """The error names what is not supported, and no folder is left."""
    path = write(tmp_path / "m.gguf", **options)
    damage(path)
    refused = run("import gguf", path, "--out", tmp_path / "m", code=1)
    assert message in refused
    assert refused.startswith("error: ")
    assert {"m.gguf"} >= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("number", [9, 99])
def test_an_unsupported_quantisation_is_refused(tmp_path: Path, number: int) -> None:
    """A known quantisation without a dequantiser (Q8_1), and an unknown one, are refused."""
    path = write(tmp_path / "m.gguf", kind=Kind.Q8_0)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.tensor_type == Kind.Q8_0)
    data = bytearray(path.read_bytes())
    at = tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:4])
    data[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)
    refused = run("import gguf", path, "--out", tmp_path / "m", code=1)
    assert "a quantisation that is not supported" in refused


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    """A folder that is not empty is refused and stays as it is. An empty one is used."""
    path, out = write(tmp_path / "m.gguf"), tmp_path / "m"
    out.mkdir()
    run("import gguf", path, "--out", out)
    files = {p: p.read_bytes() for p in out.iterdir()}
    refused = run("import gguf", path, "--out", out, code=1)
    assert "name a new or an empty folder" in refused
    assert files == {p: p.read_bytes() for p in out.iterdir()}


def test_a_killed_import_leaves_no_checkpoint(tmp_path: Path) -> None:
    """After a kill, there is no folder of that name, and the next import succeeds."""
    path, out = write(tmp_path / "m.gguf"), tmp_path / "m"
    running = start("import gguf", path, "--out", out)
    while running.poll() is None and not list(tmp_path.glob(".m.*.partial")):
        pass
    running.send_signal(signal.SIGKILL)
    running.communicate()
    if running.returncode:
        assert not out.exists()
        run("import gguf", path, "--out", out)
    assert (out / "config.json").is_file()


def test_an_imported_model_answers_like_transformers(tmp_path: Path) -> None:
    """A chat through the gateway, with the file's template, and the loss of `eval` are those of
    transformers."""
    path, out = write(tmp_path / "m.gguf"), tmp_path / "m"
    run("import gguf", path, "--out", out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "hello the <|im_start|>"}]
    prompt = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    made = model.generate(**prompt, do_sample=False, max_new_tokens=8, pad_token_id=0)
    expected = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    local = ("--listen", "127.0.0.1:0")
    with (
        process("worker", str(out), *local, "--compile", "never") as worker,
        process("gateway", str(out), *local, "--workers", worker.address) as gateway,
    ):
        wait_until_healthy(gateway.address)
        body = {"messages": messages, "temperature": 0, "max_tokens": 8}
        url = f"http://{gateway.address}/v1/chat/completions"
        replied = HTTP.post(url, json=body, timeout=60).raise_for_status().json()
    assert expected == replied["choices"][0]["message"]["content"]
    text = "the hello llama\n" * 8
    (tmp_path / "text").write_text(text, encoding="utf-8")
    options = ("--text", tmp_path / "text", "--context", "16", "--json")
    ids, losses = torch.tensor(tokenizer(text)["input_ids"]), []
    for first in range(0, len(ids) - 1, 16):
        window = ids[first : first + 17]
        losses.append(
            model(window[None, :-1]).logits[0].log_softmax(-1)[range(len(window) - 1), window[1:]]
        )
    measured = json.loads(run("eval", out, *options))
    assert -torch.cat(losses).mean().item() == pytest.approx(measured["loss"], abs=1e-5)
