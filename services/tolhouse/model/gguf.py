"""Converts a GGUF file of a LLaMA-family model to a checkpoint in Hugging Face's form.

The tensors are read from the mapped file, dequantised and written in parts, so that the memory of
an import does not depend on the size of the model. The tokenizer is built from the file's
vocabulary (see `gguf_tokenizer.py`).

llama.cpp stores the query and key rows of the architecture llama for interleaved rotary embeddings:
of each head, rows j and j + head_dim / 2 are neighbours. The import puts them back.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from tqdm import tqdm

from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.files import new_folder
from tolhouse.model.gguf_tokenizer import build_tokenizer, tokenizer_config
from tolhouse.model.weights import WEIGHTS

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PART = 1 << 22  # values that are dequantised at once
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}  # of all published LLaMA-3 models
_ROPE = "rope_freqs.weight"
_REQUIRED = object()


@dataclass(frozen=True)
class Source:
    """A tensor of the GGUF file, and its name and its shape in the checkpoint."""

    name: str
    shape: tuple[int, ...]
    tensor: gguf.ReaderTensor
    order: np.ndarray | None = None  # the rows of the file in the checkpoint's order

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def parts(self) -> Iterator[np.ndarray]:
        """Yield the values in float32, some rows at a time."""
        data, kind = self.tensor.data, self.tensor.tensor_type
        step = max(1, _PART // math.prod(self.shape[1:]))
        for first in range(0, self.shape[0], step) if len(self.shape) > 1 else [0]:
            rows = slice(first, first + step) if len(self.shape) > 1 else slice(None)
            part = data[rows] if self.order is None else data[self.order[rows]]
            with np.errstate(all="ignore"):  # values that are not finite are refused later
                values = np.asarray(gguf.dequantize(part, kind), np.float32)
            yield values


class _Reader(gguf.GGUFReader):
    """The package's reader, which otherwise reads arrays beyond the end of a file as empty."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **named: Any) -> Any:
        if (end := int(offset) + np.dtype(dtype).itemsize * int(count)) > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes, and its content ends at {end}")
        return super()._get(offset, dtype, count, *more, **named)


class GGUFFile:
    """The metadata and the tensors of a GGUF file.

    Raises InvalidArgumentError if the file is malformed, or if its model is not supported.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise NotFoundError(f"there is no file {path}")
        self.path = path
        self.metadata, self.tensors = self._read()
        if (parts := self.get("split.count", int, 1)) > 1:
            merge = "merge them with `llama-gguf-split --merge`"
            raise self.refused(f"is one of {parts} files of a model: {merge}")
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            allowed = ", ".join(ARCHITECTURES)
            raise self.refused(f"has architecture {self.architecture!r}; allowed are {allowed}")
        for tensor in self.tensors.values():
            self._check_type(tensor)

    def _read(self) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise self.refused("is not a GGUF file: it does not begin with GGUF")
        try:
            with np.errstate(all="ignore"):
                reader = _Reader(self.path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as error:
            if "GGMLQuantizationType" in str(error):
                raise self.refused(f"has a quantisation that is not supported: {error}") from None
            raise self.refused(f"is truncated or malformed: {error}") from None
        if reader.byte_order != "I":
            raise self.refused("is big-endian: only little-endian files are supported")
        return metadata, {tensor.name: tensor for tensor in reader.tensors}

    def _check_type(self, tensor: gguf.ReaderTensor) -> None:
        size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
        floats = {"F16": np.float16, "F32": np.float32}
        kind = tensor.tensor_type.name
        block = np.zeros(1, floats[kind]) if kind in floats else np.zeros(size, np.uint8)
        try:
            gguf.dequantize(block, tensor.tensor_type)
        except (NotImplementedError, ValueError, LookupError):
            hint = "make a file with another one, such as Q8_0, with `llama-quantize`"
            what = f"has tensor {tensor.name} in {kind}, a quantisation that is not supported"
            raise self.refused(f"{what}: {hint}") from None

    def refused(self, why: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{self.path} {why}")

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return the value of a key, or `default`.

        Raises InvalidArgumentError if it is missing or not of this kind.
        """
        value = self.metadata.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.refused(f"lacks the metadata {key}")
            return default
        if type(value) is not kind:
            raise self.refused(
                f"has {key} {value!r:.60}; allowed is a value of type {kind.__name__}"
            )
        return value

    def items(self, key: str, *kinds: type, default: Any = _REQUIRED) -> list[Any]:
        """Return the value of a key that has a list of values of one of these kinds."""
        values = self.get(key, list, default)
        if wrong := [value for value in values if type(value) not in kinds]:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise self.refused(
                f"has {key} with {wrong[0]!r:.60}; allowed are values of type {names}"
            )
        return values

    def number(self, key: str, default: Any = _REQUIRED, kind: type = int) -> Any:
        """Return a positive number of the architecture, such as `block_count`."""
        name = f"{self.architecture}.{key}"
        value = self.get(name, kind, default)
        if not 0 < value < math.inf:
            raise self.refused(f"has {name} {value}; allowed are positive numbers")
        # An eps of 1e-5 is stored as 9.9999997e-06 in 32 bit.
        return float(str(np.float32(value))) if kind is float else value

    def config(self) -> dict[str, Any]:
        """Return the content of config.json, without `torch_dtype`."""
        heads, size = self.number("attention.head_count"), self.number("embedding_length")
        head_dim = self.number("attention.key_length", max(1, size // heads))
        if head_dim % 2:
            raise self.refused(f"has an odd head size, {head_dim}")
        if (layers := self.number("block_count")) > len(self.tensors):
            raise self.refused(f"has {len(self.tensors)} tensors, too few for {layers} layers")
        same = ("attention.value_length", "rope.dimension_count")
        for key in same:
            if (value := self.number(key, head_dim)) != head_dim:
                name = f"{self.architecture}.{key}"
                raise self.refused(f"has {name} {value}; allowed is the head size, {head_dim}")
        context = self.number("context_length")
        for key in ("expert_count", "attention.sliding_window"):
            value = self.get(f"{self.architecture}.{key}", int, 0)
            if value and not (key.endswith("window") and value >= context):
                raise self.refused(f"has {self.architecture}.{key} {value}, which is not supported")
        biased = "blk.0.attn_q.bias" in self.tensors
        own: dict[str, dict[str, Any]] = {
            "llama": {
                "attention_bias": biased,
                "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
                "pretraining_tp": 1,
            },
            "qwen2": {"use_sliding_window": False},
            "qwen3": {"attention_bias": biased, "use_sliding_window": False},
        }
        ends = self.end_tokens()
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self._embedding_rows(),
            "hidden_size": size,
            "intermediate_size": self.number("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon", kind=float),
            "rope_theta": self.number("rope.freq_base", 10000.0, float),
            "rope_scaling": self._rope_scaling(head_dim),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id", int, None),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id", int, None),
            **own[self.architecture],
        }

    def end_tokens(self) -> list[int]:
        """Return the ids of the tokens that end an answer."""
        names = ("eos", "eot", "eom")
        ids = [self.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in names]
        ids = list(dict.fromkeys(i for i in ids if i is not None))
        if outside := [i for i in ids if not 0 <= i < self._embedding_rows()]:
            rows = f"its embedding has {self._embedding_rows()} rows"
            raise self.refused(f"has end token {outside[0]}, but {rows}")
        return ids

    def _embedding_rows(self) -> int:
        if "token_embd.weight" not in self.tensors:
            raise self.refused("lacks tensor token_embd.weight")
        return int(self.tensors["token_embd.weight"].shape[-1])

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        """Return the scaling of positions: linear, or that of LLaMA-3.

        A GGUF file stores the latter as one divisor per frequency. As in llama.cpp, a factor
        without a type is linear, and the type none has no factor.
        """
        name = f"{self.architecture}.rope.scaling"
        kind = self.get(f"{name}.type", str, "linear")
        if kind not in ("none", "linear"):
            allowed = f"allowed are none, linear, and LLaMA-3's, as tensor {_ROPE}"
            raise self.refused(f"has {name}.type {kind!r}: {allowed}")
        if (attention := self.get(f"{name}.attn_factor", float, 1.0)) != 1:
            raise self.refused(f"has {name}.attn_factor {attention}, which is not supported")
        old = self.get(f"{self.architecture}.rope.scale_linear", float, 0.0)
        factor = float(str(np.float32(self.get(f"{name}.factor", float, old) or 1.0)))
        linear = kind == "linear" and factor != 1
        if linear and not 0 < factor < math.inf:
            raise self.refused(f"has {name}.factor {factor}; allowed are positive numbers")
        if _ROPE not in self.tensors:
            return {"rope_type": "linear", "factor": factor} if linear else None
        if linear:
            raise self.refused(f"has {name}.factor {factor} and tensor {_ROPE}: allowed is one")
        return self._llama3_scaling(head_dim)

    def _llama3_scaling(self, head_dim: int) -> dict[str, Any]:
        tensor = self.tensors[_ROPE]
        with np.errstate(all="ignore"):
            divisors = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        factor = round(float(divisors.max(initial=1.0)), 4)
        scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
        theta = self.number("rope.freq_base", 10000.0, float)
        if divisors.shape == (head_dim // 2,):
            expected = _llama3_divisors(scaling, theta, head_dim)
            if np.allclose(divisors, expected, rtol=1e-3):
                return scaling
        raise self.refused(f"has tensor {_ROPE}, which is not the scaling of LLaMA-3")

    def sources(self, config: dict[str, Any]) -> list[Source]:
        """Return all tensors of the checkpoint.

        Raises InvalidArgumentError if a tensor is missing, unknown or of another shape.
        """
        left, found = dict(self.tensors), []
        left.pop(_ROPE, None)
        for stored, (name, shape) in _names(config).items():
            if (tensor := left.pop(stored, None)) is None:
                raise self.refused(f"lacks tensor {stored}")
            own = tuple(int(n) for n in reversed(tensor.shape))
            if own != shape:
                expected = f"its metadata asks for {list(shape)}"
                raise self.refused(f"has tensor {stored} of shape {list(own)}; {expected}")
            permuted = self.architecture == "llama" and re.search(r"\.attn_[qk]\.", stored)
            order = _permutation(shape[0], config["head_dim"]) if permuted else None
            found.append(Source(name, shape, tensor, order))
        if left:
            what = f"has tensor {min(left)}, which a {self.architecture} model does not have"
            raise self.refused(what)
        return found

    def default_dtype(self) -> str:
        """Return the dtype of the matrices if they are not quantised, and float16 otherwise."""
        kinds = {t.tensor_type.name for t in self.tensors.values() if len(t.shape) > 1}
        if kinds == {"F32"}:
            return "float32"
        return "bfloat16" if "BF16" in kinds and kinds <= {"BF16", "F32"} else "float16"


def import_gguf(path: Path, out: Path, dtype: str = "auto", progress: bool = False) -> None:
    """Write the checkpoint of GGUF file `path` to `out`, a new or an empty folder.

    `dtype` is one of DTYPE_NAMES, or auto: the file's own, float16 for quantised files. The folder
    appears when it is complete. Raises InvalidArgumentError if the file is not supported.
    """
    file = GGUFFile(path)
    dtype = file.default_dtype() if dtype == "auto" else dtype
    if dtype not in DTYPE_NAMES:
        raise InvalidArgumentError(f"`dtype` is auto or one of {', '.join(DTYPE_NAMES)}")
    config = {**file.config(), "torch_dtype": dtype}
    sources = file.sources(config)
    tokenizer = build_tokenizer(file)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        have = f"{tokenizer.get_vocab_size()} tokens"
        raise file.refused(f"has {have}, but its embedding has {config['vocab_size']} rows")
    ends = config["eos_token_id"]
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": ends}
    generation["pad_token_id"] = config["pad_token_id"]
    texts = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": _json(tokenizer_config(file, config["max_position_embeddings"])),
        "generation_config.json": _json({k: v for k, v in generation.items() if v is not None}),
        "config.json": _json(config),
    }
    with new_folder(out) as folder:
        look: Any = {"disable": None if progress else True, "dynamic_ncols": True}
        bar = tqdm(sources, desc="import", unit="tensor", **look)
        with (folder / WEIGHTS).open("wb") as written:
            _write_header(written, sources, dtype)
            for source in bar:
                _write_tensor(written, source, dtype, file)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _write_header(written: BinaryIO, sources: list[Source], dtype: str) -> None:
    """Write the header of a safetensors file, whose tensors follow in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start, item = 0, getattr(torch, dtype).itemsize
    for source in sources:
        end = start + source.size * item
        entry = {"dtype": DTYPE_NAMES[dtype], "shape": source.shape, "data_offsets": [start, end]}
        header[source.name], start = entry, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    written.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(written: BinaryIO, source: Source, dtype: str, file: GGUFFile) -> None:
    for values in source.parts():
        if not np.isfinite(values).all():
            raise file.refused(f"has values in tensor {source.tensor.name} that are not finite")
        converted = torch.tensor(values).to(getattr(torch, dtype))
        if not converted.isfinite().all():
            others = "choose --dtype bfloat16 or float32"
            what = f"has values in tensor {source.tensor.name} beyond the range of {dtype}"
            raise file.refused(f"{what}: {others}")
        written.write(converted.reshape(-1).view(torch.uint8).numpy().data)


def _permutation(rows: int, head_dim: int) -> np.ndarray:
    """Return the rows of the file in the checkpoint's order."""
    return np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _llama3_divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Return by how much LLaMA-3's scaling divides each of the head_dim / 2 frequencies."""
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    ratio = scaling["original_max_position_embeddings"] / waves
    smooth = np.clip((ratio - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def _names(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the checkpoint's name and shape of each tensor, by its name in the GGUF file."""
    kind, D, K = config["model_type"], config["hidden_size"], config["intermediate_size"]
    head, V = config["head_dim"], config["vocab_size"]
    q, kv = (config[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
    matrices = {
        "attn_q": ("self_attn.q_proj", q, D),
        "attn_k": ("self_attn.k_proj", kv, D),
        "attn_v": ("self_attn.v_proj", kv, D),
        "attn_output": ("self_attn.o_proj", D, q),
        "ffn_gate": ("mlp.gate_proj", K, D),
        "ffn_up": ("mlp.up_proj", K, D),
        "ffn_down": ("mlp.down_proj", D, K),
    }
    vectors = {"attn_norm": ("input_layernorm", D), "ffn_norm": ("post_attention_layernorm", D)}
    if kind == "qwen3":
        vectors |= {f"attn_{n}_norm": (f"self_attn.{n}_norm", head) for n in "qk"}
    biased = {"attn_q", "attn_k", "attn_v"} if kind == "qwen2" else set()
    biased |= {n for n in matrices if config.get("attention_bias") and n.startswith("attn")}
    biased |= {n for n in matrices if config.get("mlp_bias") and n.startswith("ffn")}
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (V, D))
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for own, (name, *shape) in (matrices | vectors).items():
            names[f"blk.{i}.{own}.weight"] = f"{layer}.{name}.weight", tuple(shape)
        for own in sorted(biased):
            name, rows, _ = matrices[own]
            names[f"blk.{i}.{own}.bias"] = f"{layer}.{name}.bias", (rows,)
    names["output_norm.weight"] = "model.norm.weight", (D,)
    if not config["tie_word_embeddings"]:
        names["output.weight"] = "lm_head.weight", (V, D)
    return names
