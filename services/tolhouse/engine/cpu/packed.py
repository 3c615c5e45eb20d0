"""Puts the matrices of the model into the fastest layout for the device.

q, k and v become one matrix, and all matrices are packed.

On a CPU, linear layers with plain weights reach a third of the memory bandwidth, and packed layers
reach four fifths (loadtest/LOG.md). `float32` computes in float32 and keeps 16-bit weights in 16
bits.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import ClassVar, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolhouse.engine.cpu.gathered import gathered
from tolhouse.model.checkpoint import EMBEDDING, HEAD, Checkpoint
from tolhouse.model.transformer import Attention, Block, Cache, Transformer, rotate

_LARGEST_FLOAT16 = 65504.0


class FusedAttention(nn.Module):
    """`Attention` with one matrix for q, k and v."""

    def __init__(self, attention: Attention, qkv_proj: nn.Module, o_proj: nn.Module) -> None:
        super().__init__()
        self.layer, self.head_dim = attention.layer, attention.head_dim
        self.heads = [attention.heads, attention.kv_heads, attention.kv_heads]
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        every = self.qkv_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        qk, v_TGE = every.split([sum(self.heads[:2]), self.heads[2]], 1)
        if self.q_norm and self.k_norm:
            q_THE, k_TGE = qk.split(self.heads[:2], 1)
            qk = torch.cat((self.q_norm(q_THE), self.k_norm(k_TGE)), 1)
        q_THE, k_TGE = rotate(qk, rope).split(self.heads[:2], 1)
        out_THE = cache.attend(self.layer, q_THE, k_TGE, v_TGE)
        return self.o_proj(out_THE.flatten(1))


class PackedLinear(nn.Module):
    """A linear layer in the format of its kernel. Compiled code calls it through its handle."""

    layers: ClassVar[WeakValueDictionary[int, "PackedLinear"]] = WeakValueDictionary()
    _handles = itertools.count()

    def __init__(self, outputs: int, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.outputs, self.run = outputs, run
        number = next(self._handles)
        self.register_buffer("handle", torch.tensor(number))
        self.layers[number] = self

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.run(x_TD)


def by_handle(weight: Tensor, _bias: Tensor | None) -> PackedLinear:
    """Return a layer without weights for the compiler.

    It calls the layer that its handle identifies.
    """
    op = torch.ops.tolhouse.packed_linear
    layer = PackedLinear(len(weight), lambda x_TD: op(x_TD, layer.handle, layer.outputs))
    return layer


_ops = torch.library.Library("tolhouse", "DEF")
_ops.define("packed_linear(Tensor x, Tensor handle, SymInt outputs) -> Tensor")


@torch.library.impl(_ops, "packed_linear", "CPU")
def _packed_linear(x_TD: Tensor, handle: Tensor, _outputs: int) -> Tensor:
    return PackedLinear.layers[int(handle)].run(x_TD)


@torch.library.register_fake("tolhouse::packed_linear", lib=_ops)
def _shape_of_packed_linear(x_TD: Tensor, _handle: Tensor, outputs: int) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], outputs)


def linear(
    weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Return a linear layer for `weight` [out, in]. The caller may drop `weight` afterwards."""
    bias = None if bias is None else bias.to(device, dtype, copy=True)
    if device.type == "cpu":
        sixteen_bit = weight.dtype in (torch.bfloat16, torch.float16)
        fits = sixteen_bit and float(weight.abs().max()) < _LARGEST_FLOAT16
        has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines  # on x86
        if fits and dtype == torch.float32 and has_fbgemm:
            # float32 arithmetic with float16 weights, exact for bfloat16 values to within 2^-25
            float16 = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
            run = torch.ops.quantized.linear_dynamic_fp16.default
            return PackedLinear(len(weight), lambda x_TD: run(x_TD, float16))
        if torch.backends.mkldnn.is_available():
            # The compiler of torch calls these operators, which have no public names.
            weights = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)  # noqa: SLF001
            run = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001
            return PackedLinear(len(weight), lambda x: run(x, weights, bias, "none", [], ""))
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


class Embedding(nn.Module):
    """The input embedding X0 in `dtype`, whose weights keep the stored dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.weight).to(self.dtype)


def load(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, embedding: bool = True
) -> Transformer:
    """Load the model without FFN-M. It has no input embedding if rows contain X0.

    Weights are read one by one, so that none is in memory twice. The exception is a tied embedding:
    it is packed as the head, and also kept as stored for the few rows that a step reads.
    """
    model = checkpoint.skeleton(ffn_m=False, embedding=False)
    ffn_dtype = checkpoint.ffn_dtype
    for number, block in enumerate(cast("Iterable[Block]", model.layers)):
        checkpoint.load(block, f"layers.{number}.")
        if device.type == "cpu":
            block.mlp = gathered(block.mlp, ffn_dtype)
        pack(block, lambda weight, bias: linear(weight, bias, device, dtype))
    model.set_submodule("lm_head", linear(checkpoint.tensor(HEAD), None, device, dtype))
    if embedding:
        add_embedding(model, checkpoint, device, dtype)
    checkpoint.load(model.norm, "norm.")
    for parameter in model.parameters():  # the norms and scales
        parameter.requires_grad_(False)
        parameter.data = parameter.to(device, dtype)
    return model


def add_embedding(
    model: Transformer, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> None:
    """Load the input embedding of a model that was loaded without it."""
    if checkpoint.config.tie_word_embeddings and isinstance(model.lm_head, nn.Linear):
        weight = model.lm_head.weight
    else:
        weight = checkpoint.tensor(EMBEDDING).to(device)
    model.embed_tokens = cast("nn.Embedding", Embedding(weight, dtype))


def pack(block: Block, make: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Replace a block's linear layers by the layers that `make` returns for weight and bias.

    A weight is [out, in], and a bias is [out] or None.
    """
    attention = block.self_attn
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    qkv = torch.cat([part.weight for part in parts])
    biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
    o_proj = make(attention.o_proj.weight, attention.o_proj.bias)
    fused = FusedAttention(attention, make(qkv, torch.cat(biases) if biases else None), o_proj)
    block.set_submodule("self_attn", fused)
    for name, child in list(block.named_modules()):
        if isinstance(child, nn.Linear) and name.startswith("mlp."):
            block.set_submodule(name, make(child.weight, child.bias))
