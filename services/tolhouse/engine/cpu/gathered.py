"""FFNs that choose channels, with the weights laid out so that only chosen channels are read.

Each token's channels are computed by themselves, also in prompts. A token therefore has the same
bits alone and in a batch. Weights keep their stored dtype, and sums are in float32. Compiled code
reads the chosen rows in place. Uncompiled code first widens the rows that any token has chosen,
because torch has no gathering kernels that multiply 16-bit weights in float32.

Shapes: T tokens, D hidden size, M channels, K chosen channels, U channels that any token chose.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolhouse.model.ffn import AvgK, MoC, silu, top, top_channels


class GatheredMoC(nn.Module):
    """`MoC` that multiplies all channels with the gate, and reads `up` and `down` of the chosen."""

    def __init__(self, ffn: MoC, dtype: torch.dtype) -> None:
        super().__init__()
        self.active, self.by, self.gate_proj = ffn.active, ffn.by, ffn.gate_proj
        self.up_MD = _rows(ffn.up_proj.weight, dtype)
        self.down_MD = _rows(ffn.down_proj.weight.T, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TM = self.gate_proj(x_TD)
        channels_TK = chosen(top_channels(gate_TM, self.active, self.by), self.active)
        gate_TK = gate_TM.gather(1, channels_TK)
        c_TK = silu(gate_TK) * products(x_TD, self.up_MD, channels_TK)
        return weighted_sums(c_TK, self.down_MD, channels_TK)


class GatheredAvgK(nn.Module):
    """`AvgK` that multiplies the mean keys, and then reads the weights of the chosen blocks."""

    def __init__(self, ffn: AvgK, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_MD = _rows(ffn.gate_proj.weight, dtype)
        self.up_MD = _rows(ffn.up_proj.weight, dtype)
        self.down_MD = _rows(ffn.down_proj.weight.T, dtype)
        keys_BD = ffn.gate_proj.weight.detach().float().unflatten(0, (ffn.blocks, -1)).mean(1)
        self.active, self.size = ffn.active, len(self.gate_MD) // ffn.blocks
        self.mean_keys = nn.Linear(keys_BD.shape[1], ffn.blocks, bias=False, device="meta")
        self.mean_keys.weight = nn.Parameter(keys_BD, requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        blocks_TB = chosen(top(self.mean_keys(x_TD), self.active), self.active)
        channels_TK = (blocks_TB[..., None] * self.size + torch.arange(self.size)).flatten(1)
        gate_TK = products(x_TD, self.gate_MD, channels_TK)
        c_TK = silu(gate_TK) * products(x_TD, self.up_MD, channels_TK)
        return weighted_sums(c_TK, self.down_MD, channels_TK)


def gathered(ffn: nn.Module | None, dtype: torch.dtype) -> nn.Module | None:
    """Return an FFN that reads only the chosen channels, or the FFN itself if it chooses none.

    `dtype` is that of the weights that are gathered.
    """
    if isinstance(ffn, MoC):
        return GatheredMoC(ffn, dtype)
    return GatheredAvgK(ffn, dtype) if isinstance(ffn, AvgK) else ffn


def _rows(weight_MD: Tensor, dtype: torch.dtype) -> nn.Buffer:
    return nn.Buffer(weight_MD.detach().to(dtype).contiguous())


def chosen(mask_TM: Tensor, active: int) -> Tensor:
    """Return the indices [T, K] of the true values, in ascending order: `active` of each token."""
    count = mask_TM.shape[0] * active  # `len` would compile the code for one number of tokens
    return torch.nonzero_static(mask_TM, size=count)[:, 1].view(-1, active)


def products(x_TD: Tensor, weight_MD: Tensor, channels_TK: Tensor) -> Tensor:
    """Return the products [T, K] of each token with its rows of the weights."""
    (tokens, active), parts = channels_TK.shape, _parts(channels_TK)
    if torch.compiler.is_exporting():
        x_T1D = x_TD[:, None].float()
        found = [(weight_MD[part].float() * x_T1D).sum(2) for part in _unrolled(channels_TK)]
        return torch.stack(found, 2).flatten(1)[:, :active].to(x_TD.dtype)
    weight_UD, places_TK = _widened(weight_MD, channels_TK)
    starts = torch.arange(0, tokens * active + 1, active // parts)
    values = weight_UD.new_zeros(tokens * active)
    shape = tokens * parts, len(weight_UD)
    wanted = torch.sparse_csr_tensor(starts, places_TK.flatten(), values, shape)
    x = x_TD.float().repeat_interleave(parts, 0)
    found = torch.sparse.sampled_addmm(wanted, x, weight_UD.T, beta=0)
    return found.values().view_as(channels_TK).to(x_TD.dtype)


def weighted_sums(c_TK: Tensor, weight_MD: Tensor, channels_TK: Tensor) -> Tensor:
    """Return the sums [T, D] of each token's rows of the weights, times `c_TK`."""
    if torch.compiler.is_exporting():
        pairs = zip(_unrolled(c_TK.float()), _unrolled(channels_TK), strict=True)
        rows = [c[..., None] * weight_MD[channels].float() for c, channels in pairs]
        return sum(rows[1:], rows[0]).sum(1).to(c_TK.dtype)
    weight_UD, places_TK = _widened(weight_MD, channels_TK)
    shape = len(c_TK), _parts(channels_TK), -1
    places = places_TK.reshape(shape).flatten(0, 1)
    weights = c_TK.float().reshape(shape).flatten(0, 1)
    found = F.embedding_bag(places, weight_UD, mode="sum", per_sample_weights=weights)
    return found.view(*shape).sum(1).to(c_TK.dtype)


def _widened(weight_MD: Tensor, channels_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen rows [U, D] in float32, and the places [T, K] of channels in them."""
    used_M = torch.zeros(len(weight_MD), dtype=torch.bool)
    used_M[channels_TK.flatten()] = True
    places_M = used_M.cumsum(0) - 1
    return weight_MD.index_select(0, used_M.nonzero()[:, 0]).float(), places_M[channels_TK]


def _unrolled(x_TK: Tensor) -> tuple[Tensor, ...]:
    """Return eight tensors [T, K / 8] of every eighth element, with zeros after the last one.

    The compiler then reads eight rows at a time, and its vectors are parts of rows. It otherwise
    makes vectors of the chosen channels, with one element of each row.
    """
    return F.pad(x_TK, (0, -x_TK.shape[1] % 8)).unflatten(1, (-1, 8)).unbind(2)


def _parts(channels_TK: Tensor) -> int:
    """Return the number of parts of a token's channels, so that threads can share one token."""
    return math.gcd(4, channels_TK.shape[1])


with warnings.catch_warnings():  # torch warns once that sparse tensors are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))
