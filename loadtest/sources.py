"""A MoLE model with rows over TCP, and the memory of an import; parts of loadtest.models."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tolhouse import Client
from tolhouse.testing import build_table
from torch import Tensor, nn
from torch.nn import functional as F

from loadtest import tables

EXPERTS = 4
ROWS, WIDTH, SHARDS = 65_536, 4096, 8  # an import of 0.5 GiB in bfloat16
BLOCKS = 16


class TwoMatrices(nn.Module):
    """The FFN of MoLE: two matrices with a GELU between them."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class MoleFFN(nn.Module):
    """The FFN of a layer of MoLE: a dense FFN, and experts mixed by a router.

    `outputs()` returns the outputs [B, T, E, D] of the experts for the tokens at hand.
    """

    def __init__(self, hidden: int, inner: int, outputs: Callable[[], Tensor]) -> None:
        super().__init__()
        self.mlp, self.outputs = TwoMatrices(hidden, inner), outputs
        self.router = nn.Linear(hidden, EXPERTS, bias=False)

    def forward(self, normed_BTD: Tensor) -> Tensor:
        share_BTE = torch.softmax(self.router(normed_BTD), -1, dtype=torch.float32)
        return self.mlp(normed_BTD) + (share_BTE[..., None] * self.outputs()).sum(2)


def mole_diff() -> float:
    """The largest difference of a logit between a MoLE model that computes its experts and the same
    model with rows over TCP, over the standard deviation of all logits. The rest of the model is
    transformers' LLaMA."""
    import transformers as hf

    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    experts = [nn.ModuleList(TwoMatrices(hidden, inner) for _ in range(EXPERTS)) for _ in range(4)]
    norms = [nn.RMSNorm(hidden, eps=model.config.rms_norm_eps) for _ in experts]
    at: dict[str, Any] = {}  # the tokens, or the rows, of the current forward pass

    def outputs(layer: int) -> Tensor:
        if "rows" in at:
            return at["rows"][:, :, layer]
        normed = norms[layer](model.model.embed_tokens(at["ids"]))
        return torch.stack([expert(normed) for expert in experts[layer]], 2)

    for n, layer in enumerate(model.model.layers):
        layer.mlp = MoleFFN(hidden, inner, partial(outputs, n))
    weights = [*model.parameters(), *(w for m in (*experts, *norms) for w in m.parameters())]
    for weight in weights:
        nn.init.normal_(weight, std=0.3)
    state = {"model.embed_tokens.weight": model.model.embed_tokens.weight}
    for n, (norm, several) in enumerate(zip(norms, experts, strict=True)):
        state[f"model.layers.{n}.expert_layernorm.weight"] = norm.weight
        state |= {f"model.layers.{n}.experts.{k}": w for k, w in several.state_dict().items()}
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(1))
    at["ids"] = ids
    with torch.no_grad():
        wanted = model(ids).logits
        with tempfile.TemporaryDirectory() as folder:
            path, url = Path(folder) / "mole", f"file://{folder}/tables"
            path.mkdir()
            save_file(
                {k: w.detach().contiguous() for k, w in state.items()}, path / "model.safetensors"
            )
            about = {"architectures": ["MoleForCausalLM"], "num_experts": EXPERTS}
            config = model.config.to_dict() | about
            (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
            ref = build_table(path, url, codec="fp32")
            with tables.service(url, 1) as lookup, Client(lookup.address) as client:
                rows = client.fetch(ref, ids.flatten().numpy().astype(np.uint32))
        at["rows"] = torch.from_numpy(np.array(rows)).view(*ids.shape, 4, EXPERTS, hidden)
        found = model(ids).logits
        at["rows"] = torch.zeros_like(at["rows"])
        if torch.equal(model(ids).logits, wanted):
            raise RuntimeError("the rows of the experts do not change the logits")
        return float((found - wanted).abs().max() / wanted.std())


def import_peak_over_bound() -> float:
    """The anonymous memory that an import of a large tensor needs beyond that of a small tensor,
    over four shards. The large tensor is in the last of four files of an index."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = folder / "small", folder / "large"
        for path, count in ((small, SHARDS), (large, ROWS)):
            _write(path, count)
        peaks = [_peak(path, f"file://{folder}/tables") for path in (small, large)]
    return (peaks[1] - peaks[0]) / (4 * ROWS * WIDTH * 2 / SHARDS)


def _write(folder: Path, count: int) -> None:
    folder.mkdir()
    table = torch.zeros(count, WIDTH, dtype=torch.bfloat16)
    states = [{f"other.{n}.weight": torch.zeros(64, 64)} for n in range(3)] + [{"table": table}]
    files = [f"model-{n + 1:05}-of-00004.safetensors" for n in range(4)]
    for file, state in zip(files, states, strict=True):
        save_file(state, folder / file)
    places = {k: file for file, state in zip(files, states, strict=True) for k in state}
    index = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _peak(folder: Path, url: str) -> int:
    """The largest anonymous memory of the command, in bytes."""
    options = ["--blocks", BLOCKS, "--shards", SHARDS, "--store", url]
    words = ["import", "tensor", folder, "table", *options]
    command = [sys.executable, "-m", "tolhouse.cli", *map(str, words)]
    quiet = subprocess.DEVNULL
    most, status = 0, ""
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            found = [line for line in status.splitlines() if line.startswith("RssAnon")]
            most = max(most, *(1024 * int(line.split()[1]) for line in found), 0)
            time.sleep(0.005)
    if process.returncode:
        raise RuntimeError(f"the import of {folder} failed")
    return most
