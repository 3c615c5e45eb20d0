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
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.model.config import ModelConfig
from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer, tokenizer_id
from tolhouse.model.transformer import Transformer
from tolhouse.model.weights import DTYPES, WeightsFile

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config and tokenizer were read, and whose weights were listed."""

    path: Path
    config: ModelConfig

    @cached_property
    def weights(self) -> WeightsFile:
        return WeightsFile(self.path / WEIGHTS)

    @property
    def name(self) -> str:
        return self.path.name

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / TOKENIZER)

    @property
    def tokenizer_id(self) -> str:
        return tokenizer_id(self.path / TOKENIZER)

    def skeleton(self, ffn_m: bool = True, embedding: bool = True) -> Transformer:
        """The model without weights, and without FFN-M or the input embedding if not wanted."""
        with torch.device("meta"):
            model = Transformer(self.config)
        if not ffn_m:
            del model.ffn_m[:]
        if not embedding:
            model.embed_tokens = None
        return model

    def load(self, module: nn.Module, prefix: str, dtype: torch.dtype | None = None) -> nn.Module:
        """Read the weights of `module`, the model's part `prefix`, in `dtype` or as stored.

        MismatchError if the file was overwritten since the checkpoint was opened.
        """
        names = dict.fromkeys(name for name, _ in module.named_parameters())
        state = {
            name: self.tensor(_tensor_name(f"{prefix}{name}")).to(dtype=dtype) for name in names
        }
        module.load_state_dict(state, assign=True, strict=False)
        return module.eval().requires_grad_(False)

    def model(
        self, ffn_m: bool = True, embedding: bool = True, dtype: torch.dtype = torch.float32
    ) -> Transformer:
        """The model in `dtype`. Weights of FFN-M or the embedding are not read if not wanted."""
        model = self.skeleton(ffn_m, embedding)
        self.load(model, "", dtype)
        if self.config.tie_word_embeddings and model.embed_tokens:
            model.lm_head.weight = model.embed_tokens.weight
        return model

    def tensor(self, name: str) -> Tensor:
        """A tensor as stored; MismatchError if the file was overwritten since it was opened."""
        if name == HEAD and self.config.tie_word_embeddings:
            name = EMBEDDING
        return self.weights.read(_stored_names(self.weights)[name])

    def model_id(self) -> str:
        """64 hex digits over config and all weights: what a table says it was built from."""
        config = _canonical(self.config.to_json())
        return hashlib.sha256(config + f"\n{self.weights.digest()}".encode()).hexdigest()

    def rows_id(self) -> str:
        """64 hex digits over what defines the rows: embedding, per-layer norms, FFN-M weights."""
        digest = hashlib.sha256(_canonical({"rms_norm_eps": self.config.rms_norm_eps}))
        for name in sorted(_stored_names(self.weights)):
            if name == EMBEDDING or ".ffn_m." in name:
                tensor = self.tensor(name)
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def weight_bytes(self, dense: bool, embedding: bool = True) -> int:
        """Bytes of all weights as stored; or not `dense`, of those that a worker loads."""
        head = embedding or self.config.tie_word_embeddings
        return sum(
            self.weights.tensors[stored].bytes
            for name, stored in _stored_names(self.weights).items()
            if dense or (".ffn_m." not in name and (head or name != EMBEDDING))
        )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, checked as far as possible without reading weights."""
    path = Path(path).resolve()
    if not path.is_dir():
        files = f"{CONFIG}, {WEIGHTS} and {TOKENIZER}"
        raise NotFoundError(f"no checkpoint at {path}: a checkpoint is a folder with {files}")
    if not (path / WEIGHTS).is_file():
        unsafe = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        others = ", ".join(sorted(p.name for p in path.iterdir() if p.suffix in unsafe))
        hint = "can run code when loaded and is refused: convert it to safetensors"
        raise NotFoundError(
            f"checkpoint {path} has no {WEIGHTS}" + (others and f"; {others} {hint}")
        )
    try:
        config = ModelConfig.from_json(json.loads((path / CONFIG).read_text()))
    except FileNotFoundError:
        raise NotFoundError(f"checkpoint {path} has no {CONFIG}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path / CONFIG} is not JSON: {error}") from None
    checkpoint = Checkpoint(path, config)
    if defect := next(_defects(checkpoint.weights, config), None):
        raise InvalidArgumentError(f"{path / WEIGHTS}{defect}")
    load_tokenizer(path / TOKENIZER, config.vocab_size)
    return checkpoint


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


def torch_device(name: str) -> torch.device:
    """The device of `--device NAME`; auto: cuda if there is one. InvalidArgumentError without
    it."""
    on_gpu = torch.cuda.is_available()
    name = ("cuda" if on_gpu else "cpu") if name == "auto" else name
    if re.fullmatch(r"cpu|cuda(:\d+)?" if on_gpu else "cpu", name):
        return torch.device(name)
    allowed = "cpu, cuda or auto" if on_gpu else "cpu or auto, as there is no GPU"
    raise InvalidArgumentError(f"--device {name!r} is not on this machine; {allowed}")


def tensor_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """The shape of each tensor in a checkpoint of this config, by name."""
    with torch.device("meta"):
        model = Transformer(config)
    # a tied head is listed once, as the embedding
    return {_tensor_name(name): list(p.shape) for name, p in model.named_parameters()}


def _tensor_name(parameter: str) -> str:
    name = re.sub(r"^ffn_m\.(\d+)", r"layers.\1.ffn_m", parameter)
    return name if name.startswith("lm_head.") else f"model.{name}"


def _stored_names(weights: WeightsFile) -> dict[str, str]:
    """By the name of a tensor, its name in the file, which may be a former one."""
    return {name.replace(".row_scale", ".ffn_scale"): name for name in weights.tensors}


def _defects(weights: WeightsFile, config: ModelConfig) -> Iterator[str]:
    """What in the weights does not agree with `config`."""
    expected, stored, kind = tensor_shapes(config), _stored_names(weights), config.kind
    if missing := sorted(expected.keys() - stored.keys()):
        yield f" lacks {len(missing)} tensors of a {kind} model, such as {missing[0]}"
    if extra := sorted(stored.keys() - expected.keys()):
        yield f" has {len(extra)} tensors that a {kind} model lacks, such as {extra[0]}"
    for name, shape in expected.items():
        tensor = weights.tensors[stored[name]]
        if list(tensor.shape) != shape:
            yield f": {name} has shape {list(tensor.shape)}, {CONFIG} asks for {shape}"
        if tensor.dtype not in DTYPES:
            yield f": {name} is {tensor.dtype}; allowed are {', '.join(DTYPES)}"


def _canonical(data: dict) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
