"""A checkpoint: a folder of config.json, model.safetensors and tokenizer.json. Nothing is ever unpickled.

Tensor names are LLaMA's; FFN-M adds its own. `{i}` counts layers:

    model.embed_tokens.weight                                  [V, D]
    model.layers.{i}.input_layernorm.weight                    [D]
    model.layers.{i}.self_attn.{q,k,v,o}_proj.weight           [D, D]
    model.layers.{i}.post_attention_layernorm.weight           [D]            base, flex
    model.layers.{i}.mlp.{gate,up,down}_proj.weight            [K, D] [D, K]  base; flex with ffn_c = swiglu
    model.layers.{i}.mlp.maps.{j}.weight                       [D, D]         flex with ffn_c = linear, j < beta
    model.layers.{i}.ffn_m.norm.weight                         [D]            memory, flex; wide: layer 0's alone
    model.layers.{i}.ffn_m.mlp.{gate,up,down}_proj.weight      [K, D] [D, K]  memory, flex; wide: layer 0's alone
    model.layers.{i}.row_scale                                 [D]            wide
    model.norm.weight                                          [D]
    lm_head.weight                                             [V, D]         unless tied to the embedding
"""

import hashlib
import json
import math
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
    """A checkpoint on disk whose config and tokenizer have been read and whose weights have been listed, not loaded."""

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

        Without its FFN-M weights if `ffn_m` is false, without its input embedding if `embedding` is: those are not read then.
        """
        with torch.device("meta"):
            model = Transformer(self.config)
        if not ffn_m:
            del model.ffn_m[:]
        if not embedding:
            model.embed_tokens = None
        names = {name: _tensor_name(name) for name, _ in model.named_parameters()}
        if self.config.tie_word_embeddings and not embedding:
            names["lm_head.weight"] = EMBEDDING
        with _open(self.path / WEIGHTS) as weights:
            state = {
                name: weights.get_tensor(tensor_name).to(dtype=dtype)
                for name, tensor_name in names.items()
            }
        if self.config.tie_word_embeddings and embedding:
            state["lm_head.weight"] = state["embed_tokens.weight"]
        model.load_state_dict(state, assign=True)
        if self.config.tie_word_embeddings and model.embed_tokens:
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
        return hashlib.sha256(
            f"{_canonical(self.config.to_json())}\n{weights}".encode()
        ).hexdigest()

    def rows_id(self) -> str:
        """64 hex digits over what defines the rows: embedding, per-layer norms, FFN-M weights (DESIGN section 3)."""
        digest = hashlib.sha256(_canonical({"rms_norm_eps": self.config.rms_norm_eps}).encode())
        with _open(self.path / WEIGHTS) as weights:
            for name in sorted(weights.keys()):
                if name == EMBEDDING or ".ffn_m." in name:
                    tensor = weights.get_tensor(name)
                    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                    digest.update(tensor.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def weight_bytes(self, dense: bool, embedding: bool = True) -> int:
        """Bytes of the weights as stored: all of them, or those that a worker loads, with or without an input embedding."""

        def loaded(name: str) -> bool:
            return ".ffn_m." not in name and (
                name != EMBEDDING or embedding or self.config.tie_word_embeddings
            )

        with _open(self.path / WEIGHTS) as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - not a dict
        return sum(
            math.prod(t.get_shape()) * _DTYPES[t.get_dtype()]
            for name, t in slices.items()
            if dense or loaded(name)
        )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, checked as far as possible without reading weights.

    NotFound if there is none; InvalidArgument if it is malformed, of an unknown kind, or not safetensors.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        raise NotFound(
            f"no checkpoint at {path}: a checkpoint is a folder with {CONFIG}, {WEIGHTS} and {TOKENIZER}"
        )
    if not (path / WEIGHTS).is_file():
        others = sorted(
            p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        )
        hint = (
            f"; {', '.join(others)} can run code when loaded and is refused: convert it to safetensors"
            if others
            else ""
        )
        raise NotFound(f"checkpoint {path} has no {WEIGHTS}{hint}")
    try:
        data = json.loads((path / CONFIG).read_text())
    except FileNotFoundError:
        raise NotFound(f"checkpoint {path} has no {CONFIG}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path / CONFIG} is not JSON: {error}") from None
    config = ModelConfig.from_json(data)
    _check_tensors(path / WEIGHTS, config)
    load_tokenizer(path / TOKENIZER, config.vocab_size)
    return Checkpoint(path, config)


def save_checkpoint(
    path: Path, model: Transformer, tokenizer_file: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write config, weights (rounded to `dtype`) and tokenizer into the folder `path`; weights are replaced at once."""
    path.mkdir(parents=True, exist_ok=True)
    tied = model.config.tie_word_embeddings
    state = {
        _tensor_name(name): tensor.detach().to(dtype).contiguous()
        for name, tensor in model.named_parameters()
        if not (tied and name == "lm_head.weight")
    }
    partial = path / f"{WEIGHTS}.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(
        0o644
    )  # safetensors keeps its files to their owner; a service may run as another user
    partial.replace(path / WEIGHTS)
    config = {**model.config.to_json(), "torch_dtype": str(dtype).removeprefix("torch.")}
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer_file.resolve() != (path / TOKENIZER).resolve():
        (path / TOKENIZER).write_bytes(tokenizer_file.read_bytes())


def _tensor_name(parameter: str) -> str:
    if parameter.startswith("lm_head."):
        return parameter
    if parameter.startswith("ffn_m."):
        _, layer, rest = parameter.split(".", 2)
        return f"model.layers.{layer}.ffn_m.{rest}"
    return f"model.{parameter}"


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of each tensor in a checkpoint of this config."""
    with torch.device("meta"):
        model = Transformer(config)
    for name, tensor in model.named_parameters():  # a tied head is listed once, as the embedding
        yield _tensor_name(name), list(tensor.shape)


def _check_tensors(path: Path, config: ModelConfig) -> None:
    expected = dict(tensor_shapes(config))
    with _open(path) as weights:
        found = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        if missing := sorted(set(expected) - set(found)):
            raise InvalidArgument(
                f"{path} lacks {len(missing)} tensors of a {config.kind} model, such as {missing[0]}"
            )
        if extra := sorted(set(found) - set(expected)):
            raise InvalidArgument(
                f"{path} has {len(extra)} tensors that a {config.kind} model lacks, such as {extra[0]}"
            )
        for name, shape in expected.items():
            if found[name].get_shape() != shape:
                raise InvalidArgument(
                    f"{path}: {name} has shape {found[name].get_shape()}, config.json asks for {shape}"
                )
            if found[name].get_dtype() not in _DTYPES:
                raise InvalidArgument(
                    f"{path}: {name} is {found[name].get_dtype()}; allowed are {', '.join(_DTYPES)}"
                )


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InvalidArgument(f"{path} is not a safetensors file: {error}") from None


def _canonical(data: dict) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))
