"""The forms of an FFN: FFN-C, which reads the residual stream, and FFN-M, which reads X0.

A form is chosen by `ffn_c` and `ffn_m` of the config. docs/related.md names the papers and has
figures. Each form gets the intermediate size M of a SwiGLU, and has about as many parameters as
that SwiGLU, 3 * M * D.

Shapes: T tokens, D hidden size, M channels, K chosen channels, E size of a head.
"""

from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolhouse.errors import InvalidArgumentError
from tolhouse.model.config import ModelConfig


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self.coefficients(x_TD))

    def coefficients(self, x_TD: Tensor) -> Tensor:
        """Return the factors [T, M] of the channels' values, the columns of `down_proj`."""
        return silu(self.gate_proj(x_TD)) * self.up_proj(x_TD)


def silu(x: Tensor) -> Tensor:
    """Return SiLU. In float32 on a CPU, an element has the same bits in tensors of all shapes.

    There F.silu rounds the last elements of a tensor otherwise. With gradients, in other dtypes and
    on a GPU, F.silu is used: it is faster, and needs less memory in training.
    """
    if x.requires_grad or x.dtype != torch.float32 or x.device.type != "cpu":
        return F.silu(x)
    divisor = x.neg().exp_().add_(1)
    return torch.div(x, divisor, out=divisor)


class LinearStack(nn.Module):
    """FFN-C as beta maps h x h with SiLU between them. This form is ours, as the paper has none."""

    def __init__(self, hidden_size: int, depth: int, bias: bool = False) -> None:
        super().__init__()
        maps = (nn.Linear(hidden_size, hidden_size, bias=bias) for _ in range(depth))
        self.maps = nn.ModuleList(maps)

    def forward(self, x_TD: Tensor) -> Tensor:
        for linear in self.maps[:-1]:
            x_TD = silu(linear(x_TD))
        return self.maps[-1](x_TD)


class MoC(SwiGLU):
    """Mixture-of-Channels (arXiv 2511.09323): the gate chooses the channels of each token."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__(config.hidden_size, intermediate_size)
        self.active, self.by = count(config.ffn_share, intermediate_size), config.ffn_by

    def coefficients(self, x_TD: Tensor) -> Tensor:
        gate_TM = self.gate_proj(x_TD)
        c_TM = silu(gate_TM) * self.up_proj(x_TD)
        return torch.where(top_channels(gate_TM, self.active, self.by), c_TM, 0.0)


class AvgK(SwiGLU):
    """Avg-K (arXiv 2305.13999): the mean keys of blocks of channels choose blocks for each token.

    A key is a row of `gate_proj`. The number of channels is rounded down to whole blocks.
    """

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        self.blocks = config.ffn_blocks
        if self.blocks > intermediate_size:
            rule = f"must be at most the number of channels, {intermediate_size}"
            raise InvalidArgumentError(f"ffn_blocks {self.blocks} {rule}")
        super().__init__(config.hidden_size, intermediate_size // self.blocks * self.blocks)
        self.active = count(config.ffn_share, self.blocks)

    def coefficients(self, x_TD: Tensor) -> Tensor:
        gate_TM = self.gate_proj(x_TD)
        blocks_TB = gate_TM.unflatten(-1, (self.blocks, -1)).mean(-1)  # products with the mean keys
        size = gate_TM.shape[-1] // self.blocks
        chosen_TM = top(blocks_TB, self.active).repeat_interleave(size, -1)
        return torch.where(chosen_TM, silu(gate_TM) * self.up_proj(x_TD), 0.0)


class FlashMHF(nn.Module):
    """Multi-head FFN (arXiv 2512.06989): heads of small SwiGLUs, which a router mixes.

    The SwiGLUs run one after the other, so that only the channels of one are in memory.
    """

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        size, heads, experts = config.hidden_size, config.ffn_heads, config.ffn_experts
        if size % heads:
            raise InvalidArgumentError(f"ffn_heads {heads} must divide hidden_size {size}")
        self.head_dim = size // heads
        # Both projections and the routers have parameters too.
        width = (3 * intermediate_size - 2 * size - experts) // (3 * experts)
        if width < 1:
            if (most := (3 * intermediate_size - 2 * size) // 4) > 0:
                rule = f"must be at most {most} with the parameters of {intermediate_size} channels"
                raise InvalidArgumentError(f"ffn_experts {experts} {rule}")
            least = -(-(2 * size + 4 * experts) // 3)
            rule = f"needs at least the parameters of a SwiGLU with {least} channels"
            raise InvalidArgumentError(f"flashmhf {rule}, not {intermediate_size}: raise beta")
        self.in_proj = nn.Linear(size, size, bias=False)
        self.routers = nn.ModuleList(
            nn.Linear(self.head_dim, experts, bias=False) for _ in range(heads)
        )
        self.heads = nn.ModuleList(
            nn.ModuleList(SwiGLU(self.head_dim, width) for _ in range(experts))
            for _ in range(heads)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):  # read by `initialise`; o_proj is like others
                module.init_std = module.in_features**-0.5
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        queries = self.in_proj(x_TD).split(self.head_dim, -1)
        outs = [self._head(h, q_TE) for h, q_TE in enumerate(queries)]
        del queries  # before the parts are joined, so that less memory is in use
        out_TD = torch.cat(outs, -1)
        del outs
        return self.o_proj(out_TD)

    def _head(self, head: int, q_TE: Tensor) -> Tensor:
        # The sigmoids divided by their sum, which is not zero even if all of them are.
        shares_TN = F.logsigmoid(self.routers[head](q_TE)).softmax(-1)
        out_TE = torch.zeros_like(q_TE, dtype=shares_TN.dtype)
        networks = cast("nn.ModuleList", self.heads[head])
        for share_T, network in zip(shares_TN.unbind(-1), networks, strict=True):
            out_TE.addcmul_(share_T[:, None], network(q_TE))  # in place, to use less memory
        return out_TE


class LookupFFN(nn.Module):
    """LookupFFN (arXiv 2403.07221): the signs of projections choose a row of each hash table."""

    STAGES, BLOCK = 2, 8  # block-diagonal matrices, and the size of a block; our choice

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        size, self.bits = config.hidden_size, config.ffn_bits
        self.padded, self.num_tables = self.sizes(size, intermediate_size, self.bits)
        if self.num_tables < 1:
            most = self.bits - 1
            while most and self.sizes(size, intermediate_size, most)[1] < 1:
                most -= 1
            rule = f"must be at most {most}, for a table within"
            if not most:
                rule = "has no table within"
            parameters = f"the parameters of {intermediate_size} channels"
            raise InvalidArgumentError(f"ffn_bits {self.bits} {rule} {parameters}")
        self.blocks = nn.Parameter(torch.empty(self.STAGES * self.padded, self.BLOCK))
        self.tables = nn.Parameter(torch.empty(self.num_tables << self.bits, size))

    def forward(self, x_TD: Tensor) -> Tensor:
        z_TNB = self.project(x_TD)
        powers = torch.arange(self.bits, device=x_TD.device)
        first_N = torch.arange(self.num_tables, device=x_TD.device) << self.bits
        rows_TN = ((z_TNB > 0).long() << powers).sum(-1) + first_N
        # <z, c> of the signs c, times its softmax over all codes, which is a product over bits.
        score_TN = z_TNB.abs().sum(-1) / (1 + (-2 * z_TNB.abs()).exp()).prod(-1)
        score_TN = score_TN.to(self.tables.dtype)
        return F.embedding_bag(rows_TN, self.tables, mode="sum", per_sample_weights=score_TN)

    @classmethod
    def sizes(cls, size: int, intermediate_size: int, bits: int) -> tuple[int, int]:
        """Return the size of the projection, and the number of tables within the parameters."""
        most_tables = 3 * intermediate_size >> bits  # without a projection
        padded = 1 << (max(size, most_tables * bits, cls.BLOCK) - 1).bit_length()
        weights = 3 * intermediate_size * size - cls.STAGES * padded * cls.BLOCK
        return padded, weights // (size << bits)

    def project(self, x_TD: Tensor) -> Tensor:
        """Return the projections [T, tables, bits], by block-diagonal and Hadamard matrices."""
        # In float32, because rounding changes signs and so rows. Fewer than 8 tokens would be added
        # in another order, and a token must have the same bits alone and in a batch.
        tokens, size = x_TD.shape
        x_TP = F.pad(x_TD.float(), (0, self.padded - size, 0, max(0, 8 - tokens)))
        for blocks in self.blocks.float().view(self.STAGES, -1, self.BLOCK, self.BLOCK):
            x_NTB = x_TP.unflatten(-1, (-1, self.BLOCK)).transpose(0, 1)
            x_TP = hadamard((x_NTB @ blocks.mT).transpose(0, 1).flatten(-2))
        return x_TP[:tokens, : self.num_tables * self.bits].unflatten(-1, (-1, self.bits))


def initialise(module: nn.Module, normal: Callable[..., Any] = nn.init.normal_) -> None:
    """Initialise a module whose weights keep the scale of its input, and the rows of `lookup`."""
    if isinstance(module, LookupFFN):
        normal(module.blocks, std=module.BLOCK**-0.5)
        normal(module.tables, std=0.02)
    elif std := getattr(module, "init_std", None):
        normal(module.weight, std=std)


def hadamard(x: Tensor) -> Tensor:
    """Multiply x [..., P] with the orthogonal Hadamard matrix. P is a power of two.

    The matrix is the Kronecker product of two smaller ones, and multiplies with each of them.
    """
    bits = x.shape[-1].bit_length() - 1
    rows, columns = (_hadamard_matrix(n, x.device) for n in (bits // 2, bits - bits // 2))
    return (rows @ (x.unflatten(-1, (len(rows), -1)) @ columns)).flatten(-2)


@lru_cache
@torch.inference_mode(mode=False)
def _hadamard_matrix(bits: int, device: torch.device) -> Tensor:
    """Return the orthogonal Hadamard matrix of size 2^bits, in float32."""
    factor = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device)
    return reduce(torch.kron, [factor] * bits, torch.ones(1, 1, device=device)) / 2 ** (bits / 2)


def count(share: float, size: int) -> int:
    """Return how many of `size` channels or blocks each token reads, at least one."""
    return max(1, round(share * size))


def top_channels(gate_TM: Tensor, active: int, by: str) -> Tensor:
    """Return the mask [T, M] of the `active` channels with the largest gate, or |SiLU(gate)|."""
    return top(gate_TM if by == "gate" else silu(gate_TM).abs(), active)


def top(score_TN: Tensor, active: int) -> Tensor:
    """Return the mask [T, N] of the `active` largest scores. Of equal scores, the first are taken.

    `topk` takes any of them, and 16-bit scores are often equal.
    """
    least_T1 = score_TN.topk(active, sorted=False).values.amin(-1, keepdim=True)
    above_TN = score_TN > least_T1
    equal_TN = ~(above_TN | (score_TN < least_T1))  # all of them if a score is not a number
    room_T1 = active - above_TN.sum(-1, keepdim=True)
    return above_TN | (equal_TN & (equal_TN.cumsum(-1) <= room_T1))


_FORMS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    "moc": MoC,
    "avgk": AvgK,
    "flashmhf": FlashMHF,
    "lookup": LookupFFN,
}


def make(form: str, config: ModelConfig, intermediate_size: int) -> nn.Module:
    """Return an FFN of a form other than linear."""
    if form == "swiglu":
        return SwiGLU(config.hidden_size, intermediate_size)
    return _FORMS[form](config, intermediate_size)
