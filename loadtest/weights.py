"""Write checkpoints of any shape with random or zero weights for benchmarks."""

import json
import math
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tolhouse.model.checkpoint import CONFIG, TOKENIZER, WEIGHTS, tensor_shapes
from tolhouse.model.config import ModelConfig


def random_weights(path: Path, shape: ModelConfig) -> Path:
    """Write a bfloat16 checkpoint with normal weights of standard deviation 0.02. All tensors
    repeat the same 4 million numbers, so that the disk's speed is the limit."""
    if not path.exists():
        path.mkdir(parents=True)
        noise = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
        tensors = {name: _filled(noise, size) for name, size in tensor_shapes(shape).items()}
        save_file(tensors, path / WEIGHTS)
        _write_rest(path, shape)
    return path


def zero_weights(path: Path, shape: ModelConfig) -> Path:
    """Write a checkpoint of zeros as a sparse file, which is fast at any size."""
    path.mkdir(parents=True)
    header, end = {}, 0
    for name, size in tensor_shapes(shape).items():
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with (path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)
    _write_rest(path, shape)
    return path


def _write_rest(path: Path, shape: ModelConfig) -> None:
    (path / CONFIG).write_text(json.dumps(shape.to_json()), encoding="utf-8")
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(path / TOKENIZER))


def _filled(noise: torch.Tensor, size: list[int]) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    count = size[0] * size[1]
    return noise.repeat(-(-count // len(noise)))[:count].view(size)
