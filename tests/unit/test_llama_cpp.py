"""The GGUF file of a random dense model for llama.cpp."""

import struct
from pathlib import Path

from tolhouse.model.config import preset

from loadtest.llama_cpp import write_random


def test_a_gguf_file_has_the_weights_of_the_shape(tmp_path: Path) -> None:
    """The file begins with GGUF's header, and has two bytes a matrix value, four a norm's."""
    shape = preset("tiny", "base")
    data = write_random(tmp_path / "dense.gguf", shape).read_bytes()
    size, ffn, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    values = shape.vocab_size * size + layers * (4 * size**2 + 3 * size * ffn)
    magic, version, tensors, _ = struct.unpack_from("<4sIQQ", data)
    assert (b"GGUF", 3, 2 + 9 * layers) == (magic, version, tensors)
    weights = 2 * values + 4 * size * (2 * layers + 1)
    assert 0 <= len(data) - weights < 10_000  # the header
    assert b"blk.3.ffn_gate.weight" in data[:10_000]
