"""A checkpoint: a folder of config.json, model.safetensors and tokenizer.json; no pickles.

Tensor names are LLaMA's; FFN-M adds its own. `{i}` counts layers:

    model.embed_tokens.weight                                  [V, D]
    model.layers.{i}.input_layernorm.weight                    [D]
    model.layers.{i}.self_attn.{q,k,v,o}_proj.weight           [D, D]
    model.layers.{i}.post_attention_layernorm.weight           [D]            base, flex
    model.layers.{i}.mlp.{gate,up,down}_proj.weight            [K, D] [D, K]  base, flex with swiglu
    model.layers.{i}.mlp.maps.{j}.weight                       [D, D]         flex, linear, j < beta
    model.layers.{i}.ffn_m.norm.weight                         [D]            memory, flex, wide
    model.layers.{i}.ffn_m.mlp.{gate,up,down}_proj.weight      [K, D] [D, K]  (wide: i = 0 alone)
    model.layers.{i}.ffn_scale                                 [D]            wide; was row_scale
    model.norm.weight                                          [D]
    lm_head.weight                                             [V, D]         unless tied
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from tolhouse.errors import InvalidArgument, NotFound
from tolhouse.model.config import ModelConfig
from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer, tokenizer_id
from tolhouse.model.transformer import Transformer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
_DTYPES = {"BF16": 2, "F16": 2, "F32": 4}  # bytes per value


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and tokenizer were read, and whose weights were listed."""

    path: Path
    config: ModelConfig

    @property
    def name(self) -> str:
        return self.path.name

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / TOKENIZER)

    @property
    def tokenizer_id(self) -> str:
        return tokenizer_id(self.path / TOKENIZER)

    def model(
        self, ffn_m: bool = True, embedding: bool = True, dtype: torch.dtype | None = torch.float32
    ) -> Transformer:
        """The model in `dtype`, or with None as stored, in the mapped file.

        Without `ffn_m` or `embedding`, the weights of FFN-M or the input embedding are not read.
        """
        with torch.device("meta"):
            model = Transformer(self.config)
        if not ffn_m:
            del model.ffn_m[:]
        if not embedding:
            model.embed_tokens = None
        names = {name: _tensor_name(name) for name, _ in model.named_parameters()}
        if tied := self.config.tie_word_embeddings:
            names["lm_head.weight"] = EMBEDDING
        with _open(self.path / WEIGHTS) as weights:
            stored = _stored_names(weights)
            read = {t: weights.get_tensor(stored[t]).to(dtype=dtype) for t in {*names.values()}}
        model.load_state_dict({n: read[t] for n, t in names.items()}, assign=True)
        if tied and model.embed_tokens:
            model.lm_head.weight = model.embed_tokens.weight
        return model.eval().requires_grad_(False)

    def embedding(self) -> Tensor:
        """The embedding [V, D] as stored, in a mapping of its own."""
        with _open(self.path / WEIGHTS) as weights:
            return weights.get_tensor(EMBEDDING)

    def model_id(self) -> str:
        """64 hex digits over config and all weights: what a table says it was built from."""
        with (self.path / WEIGHTS).open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        config = _canonical(self.config.to_json())
        return hashlib.sha256(config + f"\n{weights}".encode()).hexdigest()

    def rows_id(self) -> str:
        """64 hex digits over what defines the rows: embedding, per-layer norms, FFN-M weights."""
        digest = hashlib.sha256(_canonical({"rms_norm_eps": self.config.rms_norm_eps}))
        with _open(self.path / WEIGHTS) as weights:
            for name in sorted(_stored_names(weights)):
                if name == EMBEDDING or ".ffn_m." in name:
                    tensor = weights.get_tensor(name)
                    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                    digest.update(tensor.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def weight_bytes(self, dense: bool, embedding: bool = True) -> int:
        """Bytes of all weights as stored; or not `dense`, of those that a worker loads."""
        head = embedding or self.config.tie_word_embeddings
        with _open(self.path / WEIGHTS) as weights:
            slices = [
                weights.get_slice(stored)
                for name, stored in _stored_names(weights).items()
                if dense or (".ffn_m." not in name and (head or name != EMBEDDING))
            ]
            return sum(math.prod(t.get_shape()) * _DTYPES[t.get_dtype()] for t in slices)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, checked as far as possible without reading weights."""
    path = Path(path).resolve()
    if not path.is_dir():
        files = f"{CONFIG}, {WEIGHTS} and {TOKENIZER}"
        raise NotFound(f"no checkpoint at {path}: a checkpoint is a folder with {files}")
    if not (path / WEIGHTS).is_file():
        unsafe = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        others = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in unsafe))
        hint = "can run code when loaded and is refused: convert it to safetensors"
        raise NotFound(f"checkpoint {path} has no {WEIGHTS}" + (others and f"; {others} {hint}"))
    try:
        config = ModelConfig.from_json(json.loads((path / CONFIG).read_text()))
    except FileNotFoundError:
        raise NotFound(f"checkpoint {path} has no {CONFIG}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path / CONFIG} is not JSON: {error}") from None
    with _open(path / WEIGHTS) as weights:
        if defect := next(_defects(weights, config), None):
            raise InvalidArgument(f"{path / WEIGHTS}{defect}")
    load_tokenizer(path / TOKENIZER, config.vocab_size)
    return Checkpoint(path, config)


def save_checkpoint(path: Path, model: Transformer, tokenizer_file: Path) -> None:
    """Write config, weights in bfloat16 and tokenizer to the folder `path`."""
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    state = {_tensor_name(name): tensor for name, tensor in weights.items()}
    partial = path / f"{WEIGHTS}.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes its files private; a service may run as another user
    partial.replace(path / WEIGHTS)
    (path / CONFIG).write_text(json.dumps(model.config.to_json(), indent=2) + "\n")
    if tokenizer_file.resolve() != (path / TOKENIZER).resolve():
        (path / TOKENIZER).write_bytes(tokenizer_file.read_bytes())


def tensor_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """The shape of each tensor in a checkpoint of this config, by name."""
    with torch.device("meta"):
        model = Transformer(config)
    # a tied head is listed once, as the embedding
    return {_tensor_name(name): list(p.shape) for name, p in model.named_parameters()}


def _tensor_name(parameter: str) -> str:
    name = re.sub(r"^ffn_m\.(\d+)", r"layers.\1.ffn_m", parameter)
    return name if name.startswith("lm_head.") else f"model.{name}"


def _stored_names(weights: safe_open) -> dict[str, str]:
    """By the name of a tensor, its name in the file, which may be a former one."""
    return {name.replace(".row_scale", ".ffn_scale"): name for name in weights.keys()}  # noqa: SIM118


def _defects(weights: safe_open, config: ModelConfig) -> Iterator[str]:
    """What in the weights does not agree with `config`."""
    expected, stored, kind = tensor_shapes(config), _stored_names(weights), config.kind
    if missing := sorted(expected.keys() - stored.keys()):
        yield f" lacks {len(missing)} tensors of a {kind} model, such as {missing[0]}"
    if extra := sorted(stored.keys() - expected.keys()):
        yield f" has {len(extra)} tensors that a {kind} model lacks, such as {extra[0]}"
    for name, shape in expected.items():
        tensor = weights.get_slice(stored[name])
        if tensor.get_shape() != shape:
            yield f": {name} has shape {tensor.get_shape()}, {CONFIG} asks for {shape}"
        if tensor.get_dtype() not in _DTYPES:
            yield f": {name} is {tensor.get_dtype()}; allowed are {', '.join(_DTYPES)}"


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InvalidArgument(f"{path} is not a safetensors file: {error}") from None


def _canonical(data: dict) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
