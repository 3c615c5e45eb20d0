"""Parts of `loadtest.related`: the forms of FFN-C against their formulas and against SwiGLU.

A difference is the largest one, relative to the largest output. Channels and blocks are permuted.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from tolhouse.engine.cpu.gathered import gathered
from tolhouse.engine.cpu.packed import linear, load
from tolhouse.model import ffn
from tolhouse.model.checkpoint import open_checkpoint, save_checkpoint
from tolhouse.model.config import preset
from tolhouse.testing import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
WIDTHS = 512, 1024, 2048
TOKENS = 64


def pairs(folder: Path, **form: Any) -> Iterator[tuple[ffn.SwiGLU, nn.Module]]:
    """Yield the FFN-C of each layer of a random model, and the module that a worker runs."""
    path = tiny_model(folder / "model", "flex", 3, **form)
    model = open_checkpoint(path).model()
    for block in model.layers:
        permute(cast("ffn.SwiGLU", block.mlp), form.get("ffn_blocks", 1))
    save_checkpoint(folder / "permuted", model, path / "tokenizer.json")
    checkpoint = open_checkpoint(folder / "permuted")
    packed = load(checkpoint, CPU, torch.float32)
    for own, theirs in zip(checkpoint.model().layers, packed.layers, strict=True):
        yield cast("ffn.SwiGLU", own.mlp), cast("nn.Module", theirs.mlp)


def permute(mlp: ffn.SwiGLU, blocks: int) -> None:
    """Permute the blocks of channels, and the channels of each block."""
    size = len(mlp.gate_proj.weight) // blocks
    order = torch.randperm(blocks)[:, None] * size + torch.stack(
        [torch.randperm(size) for _ in range(blocks)]
    )
    for matrix, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        matrix.weight.data = matrix.weight.index_select(dim, order.flatten())


def masked(mlp: ffn.SwiGLU, x_TD: Tensor, mask_TM: Tensor) -> Tensor:
    """A dense SwiGLU in float64, of which a mask keeps some channels."""
    gate, up, down = (m.weight.double() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return (F.silu(x_TD @ gate.T) * (x_TD @ up.T) * mask_TM) @ down.T


def top(score_TM: Tensor, active: int) -> Tensor:
    """A mask of the `active` largest scores."""
    return score_TM >= score_TM.sort(descending=True).values[:, active - 1 : active]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def moc() -> dict[str, Any]:
    """Differences, the weights that are read, and the speed against SwiGLU by width."""
    figures: dict[str, Any] = {}
    x_TD, read = torch.randn(TOKENS, 96), {}
    for name, share in (("full", 1.0), ("quarter", 0.25)):
        worst = 0.0
        with tempfile.TemporaryDirectory(prefix="tolhouse-related-") as folder:
            for own, packed in pairs(Path(folder), ffn_c="moc", ffn_share=share):
                gate_TM = x_TD.double() @ own.gate_proj.weight.double().T
                mask_TM = top(gate_TM, round(share * gate_TM.shape[1]))
                expected = masked(own, x_TD.double(), mask_TM)
                with GatheredBytes() as read[name]:
                    worst = max(worst, difference(packed(x_TD), expected))
        figures[f"moc_{name}_diff"] = worst
    figures["moc_bytes_ratio"] = read["quarter"].bytes / read["full"].bytes
    for width in WIDTHS:
        config = preset("tiny", "flex", 3, hidden_size=width, ffn_c="moc")
        dense = ffn.make("swiglu", config, width)
        sparse = ffn.make("moc", config, width)
        figures[f"moc_speed_{width}"] = round(speed(dense, sparse, width), 2)
    return figures


class GatheredBytes(TorchDispatchMode):
    """Counts the bytes of weights that kernels read by index."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "sparse_sampled_addmm":  # a row of weights for each wanted value
            self.bytes += args[0].values().numel() * args[2].shape[0] * args[2].element_size()
        elif "embedding_bag" in name:
            self.bytes += args[1].numel() * args[0].shape[1] * args[0].element_size()
        return func(*args, **(kwargs or {}))


def speed(dense: nn.Module, sparse: nn.Module, width: int) -> float:
    """Return the time of one token with `dense` over that with `sparse`, as in a worker.

    Weights are in bfloat16, and cycle through several copies, so that they come from memory.
    """
    copies = max(2, (64 << 20) // (6 * width * width))
    sets = [[in_worker(one, width) for one in (dense, sparse)] for _ in range(copies)]
    x_TD, times = torch.randn(1, width), ([], [])
    for _ in range(max(3, 200 // copies)):
        for pair in sets:
            for one, seconds in zip(pair, times, strict=True):
                start = time.perf_counter()
                one(x_TD)
                seconds.append(time.perf_counter() - start)
    dense_seconds, sparse_seconds = (sorted(one)[len(one) // 2] for one in times)
    return dense_seconds / sparse_seconds


def in_worker(module: nn.Module, width: int) -> nn.Module:
    """Return a copy of an FFN with random weights, packed as a worker does it."""
    holder = nn.Module()
    for p in module.parameters():
        p.data = torch.randn(p.shape).bfloat16() / width**0.5
    holder.mlp = gathered(module)
    for name, child in list(holder.named_modules()):
        if isinstance(child, nn.Linear):
            packed = linear(child.weight, child.bias, CPU, torch.float32)
            holder.set_submodule(name, packed)
    return holder.mlp
