"""The speed of llama.cpp with a dense model of a given shape, measured by `llama-batched-bench`."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import torch
from tolhouse.model.config import ModelConfig

BENCH = "llama-batched-bench"  # a program of llama.cpp
_ALIGNMENT = 32  # of tensors in a GGUF file
_F32, _F16 = 0, 1  # types of tensors
_U32, _FLOAT, _STRING = 4, 6, 8  # types of values


def available() -> bool:
    return bool(shutil.which(BENCH))


def run(model: Path, prompt: int, answer: int, texts: list[list[int]]) -> tuple[float, float]:
    """The tokens per second of one user after the prompt, and of as many users as `texts`."""
    users = len(texts)
    sizes = {"-npp": prompt, "-ntg": answer, "-npl": users, "-c": (prompt + answer) * users}
    sizes["-t"] = torch.get_num_threads()
    words = [str(word) for pair in sizes.items() for word in pair]
    command = [BENCH, "-m", str(model), *words, "--output-format", "jsonl"]
    done = subprocess.run(command, capture_output=True, check=True, encoding="utf-8")
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    times = json.loads(line)
    return answer / times["t_tg"], users * answer / (times["t_pp"] + times["t_tg"])


def write_random(path: Path, shape: ModelConfig) -> Path:
    """Write a GGUF file of random float16 weights, without a tokenizer. `shape` is of kind base."""
    size, ffn, vocabulary = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, size),
        "output_norm.weight": (size,),
    }
    if not shape.tie_word_embeddings:
        tensors["output.weight"] = vocabulary, size
    for layer in range(shape.num_hidden_layers):
        block: dict[str, tuple[int, ...]] = {
            f"attn_{name}": (size, size) for name in ("q", "k", "v", "output")
        }
        block |= {"ffn_gate": (ffn, size), "ffn_up": (ffn, size), "ffn_down": (size, ffn)}
        block |= {"attn_norm": (size,), "ffn_norm": (size,)}
        tensors |= {f"blk.{layer}.{name}.weight": dims for name, dims in block.items()}
    fields: dict[str, str | int | float] = {
        "general.architecture": "llama",
        "llama.vocab_size": vocabulary,
        "llama.context_length": shape.max_position_embeddings,
        "llama.embedding_length": size,
        "llama.block_count": shape.num_hidden_layers,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": shape.num_attention_heads,
        "llama.attention.head_count_kv": shape.num_attention_heads,
        "llama.attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "llama.rope.freq_base": shape.rope_theta,
        "tokenizer.ggml.model": "no_vocab",
    }
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))
    head += b"".join(_text(key) + _value(value) for key, value in fields.items())
    end, places = 0, []
    for name, dims in tensors.items():
        kind, width = (_F32, 4) if len(dims) == 1 else (_F16, 2)
        head += _text(name) + struct.pack("<I", len(dims))
        head += struct.pack(f"<{len(dims)}QIQ", *reversed(dims), kind, end)
        places.append((end, kind, int(np.prod(dims))))
        end += -(-places[-1][2] * width // _ALIGNMENT) * _ALIGNMENT
    start = -(-len(head) // _ALIGNMENT) * _ALIGNMENT
    noise = (np.random.default_rng(0).standard_normal(2**20) * 0.02).astype(np.float16)
    with path.open("wb") as file:
        file.write(head)
        for place, kind, count in places:
            file.seek(start + place)
            values = np.ones(count, np.float32) if kind == _F32 else np.resize(noise, count)
            file.write(values.data)
        file.truncate(start + end)
    return path


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value: str | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    kind, code = (_U32, "I") if isinstance(value, int) else (_FLOAT, "f")
    return struct.pack(f"<I{code}", kind, value)
