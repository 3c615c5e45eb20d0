"""FFNs that choose channels, with the weights laid out so that only chosen channels are read.

Each token's channels are read by themselves, also in prompts. A token therefore has the same bits
alone and in a batch. Weights are in float32, because torch has no gathering kernels that multiply
16-bit weights in float32.

Shapes: T tokens, D hidden size, M channels, K chosen channels.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolhouse.model.ffn import AvgK, MoC, silu, top, top_channels


class GatheredMoC(nn.Module):
    """`MoC` that multiplies all channels with the gate, and reads `up` and `down` of the chosen."""

    def __init__(self, ffn: MoC) -> None:
        super().__init__()
        self.active, self.by, self.gate_proj = ffn.active, ffn.by, ffn.gate_proj
        self.up_MD, self.down_MD = rows(ffn.up_proj.weight), rows(ffn.down_proj.weight.T)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TM = self.gate_proj(x_TD)
        channels_TK = chosen(top_channels(gate_TM, self.active, self.by))
        gate_TK = gate_TM.gather(1, channels_TK)
        c_TK = silu(gate_TK) * products(x_TD, self.up_MD, channels_TK)
        return weighted_sums(c_TK, self.down_MD, channels_TK)


class GatheredAvgK(nn.Module):
    """`AvgK` that multiplies the mean keys, and then reads the weights of the chosen blocks."""

    def __init__(self, ffn: AvgK) -> None:
        super().__init__()
        matrices = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight.T
        self.gate_MD, self.up_MD, self.down_MD = map(rows, matrices)
        keys_BD = self.gate_MD.unflatten(0, (ffn.blocks, -1)).mean(1)
        self.active, self.size = ffn.active, len(self.gate_MD) // ffn.blocks
        self.mean_keys = nn.Linear(keys_BD.shape[1], ffn.blocks, bias=False, device="meta")
        self.mean_keys.weight = nn.Parameter(keys_BD, requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        blocks_TB = chosen(top(self.mean_keys(x_TD), self.active))
        channels_TK = (blocks_TB[..., None] * self.size + torch.arange(self.size)).flatten(1)
        gate_TK = products(x_TD, self.gate_MD, channels_TK)
        c_TK = silu(gate_TK) * products(x_TD, self.up_MD, channels_TK)
        return weighted_sums(c_TK, self.down_MD, channels_TK)


def gathered(ffn: nn.Module | None) -> nn.Module | None:
    """Return an FFN that reads only the chosen channels, or the FFN itself if it chooses none."""
    if isinstance(ffn, MoC):
        return GatheredMoC(ffn)
    return GatheredAvgK(ffn) if isinstance(ffn, AvgK) else ffn


def rows(weight_MD: Tensor) -> Tensor:
    return weight_MD.detach().float().contiguous()


def chosen(mask_TM: Tensor) -> Tensor:
    """Return the indices [T, K] of the true values, in ascending order: K of each token."""
    return mask_TM.nonzero()[:, 1].view(len(mask_TM), -1)


def products(x_TD: Tensor, weight_MD: Tensor, channels_TK: Tensor) -> Tensor:
    """Return the products [T, K] of each token with its rows of the weights."""
    (tokens, active), parts = channels_TK.shape, _parts(channels_TK)
    starts = torch.arange(0, tokens * active + 1, active // parts)
    values = weight_MD.new_zeros(tokens * active)
    shape = tokens * parts, len(weight_MD)
    wanted = torch.sparse_csr_tensor(starts, channels_TK.flatten(), values, shape)
    x = x_TD.to(weight_MD.dtype).repeat_interleave(parts, 0)
    found = torch.sparse.sampled_addmm(wanted, x, weight_MD.T, beta=0)
    return found.values().view_as(channels_TK).to(x_TD.dtype)


def weighted_sums(c_TK: Tensor, weight_MD: Tensor, channels_TK: Tensor) -> Tensor:
    """Return the sums [T, D] of each token's rows of the weights, times `c_TK`."""
    shape = len(c_TK), _parts(channels_TK), -1
    channels = channels_TK.reshape(shape).flatten(0, 1)
    weights = c_TK.to(weight_MD.dtype).reshape(shape).flatten(0, 1)
    found = F.embedding_bag(channels, weight_MD, mode="sum", per_sample_weights=weights)
    return found.view(*shape).sum(1).to(c_TK.dtype)


def _parts(channels_TK: Tensor) -> int:
    """Return the number of parts of a token's channels, so that threads can share one token."""
    return math.gcd(4, channels_TK.shape[1])


with warnings.catch_warnings():  # torch warns once that sparse tensors are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))
