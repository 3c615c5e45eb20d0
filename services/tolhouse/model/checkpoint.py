"""A checkpoint: a folder with config.json, model.safetensors and tokenizer.json; no pickles.

Tensor names are LLaMA's; FFN-M adds its own. `{i}` counts layers:

    model.embed_tokens.weight                                  [V, D]
    model.layers.{i}.input_layernorm.weight                    [D]
    model.layers.{i}.self_attn.q_proj.weight                   [H * E, D]
    model.layers.{i}.self_attn.{k,v}_proj.weight               [G * E, D]
    model.layers.{i}.self_attn.o_proj.weight                   [D, H * E]
    model.layers.{i}.self_attn.{q,k,v,o}_proj.bias             [out]          with biases
    model.layers.{i}.self_attn.{q,k}_norm.weight               [E]            with qk_norm
    model.layers.{i}.post_attention_layernorm.weight           [D]            base, flex
    model.layers.{i}.mlp.{gate,up,down}_proj.weight            [K, D] [D, K]  base, flex (1)
    model.layers.{i}.mlp.maps.{j}.weight                       [D, D]         flex, linear, j < beta
    model.layers.{i}.mlp.maps.0.bias                           [D]            i in flex_layers
    model.layers.{i}.ffn_m.norm.weight                         [D]            memory, flex, wide
    model.layers.{i}.ffn_m.mlp.{gate,up,down}_proj.weight      [K, D] [D, K]  wide: i = 0 only
    model.layers.{i}.ffn_scale                                 [D]            wide; was row_scale
    model.norm.weight                                          [D]
    lm_head.weight                                             [V, D]         unless tied

(1) These are the names of swiglu and of other forms with its matrices. `mlp` has other names if
`ffn_c` or `ffn_m` choose another form of model/ffn.py.

With `flex_layers`, other layers have the FFN of base, and there is no FFN-M.

Weights may be in several files that model.safetensors.index.json names. `eos_token_id` of
generation_config.json adds end tokens, unless `eos_token_id` of a memoryllm config.json is null.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.files import read_json
from tolhouse.model.config import FORM_FIELDS, ModelConfig
from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer, tokenizer_id
from tolhouse.model.transformer import Transformer
from tolhouse.model.weights import DTYPES, WEIGHTS, Weights

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_FFN_C = re.compile(r"model\.layers\.\d+\.mlp\.")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a valid config, a valid tokenizer, and weights of the right shapes."""

    path: Path
    config: ModelConfig
    name: str  # the name of the folder or of the Hugging Face repository

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.path)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / TOKENIZER)

    @property
    def tokenizer_id(self) -> str:
        return tokenizer_id(self.path / TOKENIZER)

    @property
    def ffn_dtype(self) -> torch.dtype:
        """The dtype of all stored weights of FFN-C, or float32 if there are several or none."""
        stored = self.weights.tensors.items()
        found = {tensor.dtype for name, tensor in stored if _FFN_C.match(name)}
        return DTYPES[found.pop()] if len(found) == 1 else torch.float32

    def skeleton(self, ffn_m: bool = True, embedding: bool = True) -> Transformer:
        """Return the model without weights, and optionally without FFN-M or the input embedding."""
        with torch.device("meta"):
            model = Transformer(self.config)
        if not ffn_m:
            del model.ffn_m[:]
        if not embedding:
            model.embed_tokens = None
        return model

    def load(self, module: nn.Module, prefix: str, dtype: torch.dtype | None = None) -> nn.Module:
        """Read the weights of `module`, the part `prefix` of the model, in `dtype` or as stored.

        Raises MismatchError if the file was overwritten since the checkpoint was opened.
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
        """Load the model in `dtype`, optionally without FFN-M or the input embedding."""
        model = self.skeleton(ffn_m, embedding)
        self.load(model, "", dtype)
        if self.config.tie_word_embeddings and model.embed_tokens:
            model.lm_head.weight = model.embed_tokens.weight
        return model

    def tensor(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype.

        Raises MismatchError if the file was overwritten since it was opened.
        """
        tied = name == HEAD and self.config.tie_word_embeddings
        return self.weights.read(EMBEDDING if tied else name)

    def model_id(self) -> str:
        """Return a hash of the config and all weights, as 64 hex digits.

        A table records the hash of its model.
        """
        config = _canonical(self.config.to_json())
        return hashlib.sha256(config + f"\n{self.weights.digest()}".encode()).hexdigest()

    def rows_id(self) -> str:
        """Return a hash of the values that define the rows, as 64 hex digits.

        They are the embedding, the norms and FFN-M.
        """
        fields: dict[str, Any] = {"rms_norm_eps": self.config.rms_norm_eps}
        if self.config.ffn_m != "swiglu":
            own = {name for name, forms in FORM_FIELDS.items() if self.config.ffn_m in forms}
            stored = self.config.to_json()
            fields |= {n: v for n, v in stored.items() if n in own | {"ffn_m"}}
        digest = hashlib.sha256(_canonical(fields))
        for name in sorted(self.weights.tensors):
            if name == EMBEDDING or ".ffn_m." in name:
                tensor = self.tensor(name)
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def weight_bytes(self, dense: bool, embedding: bool = True) -> int:
        """Return the stored bytes of all weights if `dense`, else of the weights in a worker."""
        tied = self.config.tie_word_embeddings
        return sum(
            tensor.bytes
            for name, tensor in self.weights.tensors.items()
            if not (tied and name == HEAD)
            and (dense or (".ffn_m." not in name and (embedding or tied or name != EMBEDDING)))
        )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the checkpoint at `path`, and check it as far as possible without reading weights.

    Raises NotFoundError if a file is missing, and InvalidArgumentError if files are malformed or
    contradict each other.
    """
    given, path = Path(path), Path(path).resolve()
    if not path.is_dir():
        files = f"{CONFIG}, {WEIGHTS} and {TOKENIZER}"
        raise NotFoundError(f"no checkpoint at {path}: a checkpoint is a folder with {files}")
    if not (path / CONFIG).is_file():
        raise NotFoundError(f"checkpoint {path} has no {CONFIG}")
    config = ModelConfig.from_json(_with_end_tokens(path, read_json(path / CONFIG)))
    checkpoint = Checkpoint(path, config, checkpoint_name(given))
    if defect := next(_defects(checkpoint.weights, config), None):
        raise InvalidArgumentError(f"{checkpoint.weights.path}{defect}")
    load_tokenizer(path / TOKENIZER, config.text_vocab_size)
    return checkpoint


def is_converted(path: Path) -> bool:
    """Return whether the folder has a model of `tolhouse convert`, without opening its weights."""
    data = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    return isinstance(data, dict) and bool(data.get("flex_layers"))


def _with_end_tokens(folder: Path, config: Any) -> Any:
    """Return the JSON `config` with the end tokens of generation_config.json."""
    file, key = folder / GENERATION_CONFIG, "eos_token_id"
    more = read_json(file) if file.is_file() else {}
    if not isinstance(more, dict):
        raise InvalidArgumentError(f"{file} must hold a JSON object")
    if not isinstance(config, dict) or more.get(key) is None:
        return config
    if config.get(key, 0) is None and config.get("model_type") == "memoryllm":
        return config
    own = config.get(key)
    both = ([] if own is None else own, more[key])
    return {**config, key: [i for ids in both for i in (ids if isinstance(ids, list) else [ids])]}


def checkpoint_name(path: Path) -> str:
    """Return the name of a model: the name of its folder, link or Hugging Face repository.

    A snapshot in Hugging Face's cache, models--OWNER--NAME/snapshots/COMMIT, is called NAME.
    """
    path = path.resolve() if path.name in ("", "..") else path.absolute()
    cache, parent = path.parent.parent.name, path.parent.name
    if parent == "snapshots" and cache.startswith("models--"):
        return cache.rpartition("--")[2]
    return path.name


def save_checkpoint(path: Path, model: Transformer, tokenizer_file: Path) -> None:
    """Write config, weights in bfloat16 and tokenizer to the folder `path`.

    Hugging Face's AutoTokenizer and GenerationConfig can also read the folder.
    """
    weights = {name: p.detach().bfloat16().contiguous() for name, p in model.named_parameters()}
    state = {_tensor_name(name): tensor for name, tensor in weights.items()}
    write_checkpoint(path, model.config, state, tokenizer_file)


def write_checkpoint(
    path: Path, config: ModelConfig, state: dict[str, Tensor], tokenizer_file: Path
) -> None:
    """Write a checkpoint with the tensors `state`, and the files beside the tokenizer's."""
    path.mkdir(parents=True, exist_ok=True)
    partial = path / f"{WEIGHTS}.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes private files, but a service may run as another user
    partial.replace(path / WEIGHTS)
    for name in (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE):
        source = tokenizer_file.with_name(name)
        if source.is_file() and source.resolve() != (path / name).resolve():
            (path / name).write_bytes(source.read_bytes())
    fields = config.to_json()
    _write_json(path / CONFIG, fields)
    _write_json(path / GENERATION_CONFIG, {"eos_token_id": fields["eos_token_id"]})
    if not (path / TOKENIZER_CONFIG).exists():
        _write_json(path / TOKENIZER_CONFIG, _tokenizer_config(path / TOKENIZER, config))


def _tokenizer_config(tokenizer_file: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the config that AutoTokenizer of transformers needs beside tokenizer.json."""
    tokenizer = load_tokenizer(tokenizer_file)
    end = next((tokenizer.id_to_token(i) for i in config.end_token_ids), None)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **({"eos_token": end} if end else {}),
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def torch_device(name: str) -> torch.device:
    """Return the device of `--device NAME`. auto is cuda if there is a GPU, else cpu.

    Raises InvalidArgumentError if this machine does not have the device.
    """
    on_gpu = torch.cuda.is_available()
    name = ("cuda" if on_gpu else "cpu") if name == "auto" else name
    if re.fullmatch(r"cpu|cuda(:\d+)?" if on_gpu else "cpu", name):
        return torch.device(name)
    allowed = "cpu, cuda or auto" if on_gpu else "cpu or auto, as there is no GPU"
    raise InvalidArgumentError(f"--device {name!r} is not on this machine; {allowed}")


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of `--dtype NAME`. auto is bfloat16 on a GPU that supports it, else float32.

    On a CPU, float32 gives the same tokens at every batch size. Raises InvalidArgumentError if the
    device cannot compute in bfloat16.
    """
    if device.type == "cpu":
        onednn = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
        # oneDNN multiplies packed matrices and needs certain instructions.
        supported = not onednn or onednn._is_mkldnn_bf16_supported()  # noqa: SLF001 - no public name
        name = "float32" if name == "auto" else name
    else:
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        name = ("bfloat16" if supported else "float32") if name == "auto" else name
    if name == "bfloat16" and not supported:
        where = "CPU" if device.type == "cpu" else "GPU"
        raise InvalidArgumentError(f"this {where} has no bfloat16: choose --dtype float32")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def tensor_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Return the shape of each tensor in a checkpoint of this config, by name."""
    with torch.device("meta"):
        model = Transformer(config)
    # A tied head is listed once, as the embedding.
    return {_tensor_name(name): list(p.shape) for name, p in model.named_parameters()}


def _tensor_name(parameter: str) -> str:
    name = re.sub(r"^ffn_m\.(\d+)", r"layers.\1.ffn_m", parameter)
    return name if name.startswith("lm_head.") else f"model.{name}"


_BIAS_FIELDS = "attention_bias (memoryllm: qkv_bias and o_bias)"


def _defects(weights: Weights, config: ModelConfig) -> Iterator[str]:
    """Yield the ways in which the weights contradict `config`."""
    expected, stored, kind = tensor_shapes(config), set(weights.tensors), config.kind
    if config.tie_word_embeddings and {HEAD, EMBEDDING} <= stored:
        if not weights.equal(HEAD, EMBEDDING):
            hint = f"set tie_word_embeddings to false in {CONFIG}, or remove {HEAD}"
            yield f": {HEAD} differs from {EMBEDDING}, and {CONFIG} ties the two: {hint}"
        stored.remove(HEAD)
    if missing := sorted(expected.keys() - stored):
        hint = f": set tie_word_embeddings to true in {CONFIG} if the embedding is the head"
        surplus = sorted(stored - expected.keys())
        if missing[0].endswith("_proj.bias"):
            hint = f": set {_BIAS_FIELDS} to false in {CONFIG} if attention has no biases"
        elif missing != [HEAD]:
            hint = f"; it has {surplus[0]}" if surplus else ""
        yield f" lacks {len(missing)} tensors of a {kind} model, such as {missing[0]}{hint}"
    if extra := sorted(stored - expected.keys()):
        message = f" has {len(extra)} tensors that a {kind} model lacks, such as {extra[0]}"
        biased = extra[0].endswith(".self_attn.k_proj.bias")
        where = f"set {_BIAS_FIELDS} to true in" if biased else "correct"
        yield f"{message}: {where} {CONFIG}, or remove them"
    for name, shape in expected.items():
        tensor = weights.tensors[name]
        if list(tensor.shape) != shape:
            fields = "num_attention_heads, num_key_value_heads and head_dim"
            by = f" with its {fields}" if ".self_attn." in name else ""
            yield f": {name} has shape {list(tensor.shape)}, {CONFIG} asks for {shape}{by}"
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(DTYPES)
            yield f": {name} is {tensor.dtype}; allowed are {allowed}: convert the weights"


def _canonical(data: dict) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
