"""The forms of an FFN: FFN-C, which reads the residual stream, and FFN-M, which reads X0.

A form is chosen by `ffn_c` and `ffn_m` of the config. docs/related.md names the papers and has
figures. Each form gets the intermediate size M of a SwiGLU, and has about as many parameters as
that SwiGLU, 3 * M * D.

Shapes: T tokens, D hidden size, M channels, K chosen channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        return F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD)


class LinearStack(nn.Module):
    """FFN-C as beta maps h x h with SiLU between them. This form is ours, as the paper has none."""

    def __init__(self, hidden_size: int, depth: int, bias: bool = False) -> None:
        super().__init__()
        maps = (nn.Linear(hidden_size, hidden_size, bias=bias) for _ in range(depth))
        self.maps = nn.ModuleList(maps)

    def forward(self, x_TD: Tensor) -> Tensor:
        for linear in self.maps[:-1]:
            x_TD = F.silu(linear(x_TD))
        return self.maps[-1](x_TD)


class MoC(SwiGLU):
    """Mixture-of-Channels (arXiv 2511.09323): the gate chooses the channels of each token."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__(config.hidden_size, intermediate_size)
        self.active, self.by = count(config.ffn_share, intermediate_size), config.ffn_by

    def coefficients(self, x_TD: Tensor) -> Tensor:
        gate_TM = self.gate_proj(x_TD)
        c_TM = F.silu(gate_TM) * self.up_proj(x_TD)
        return only(c_TM, top_channels(gate_TM, self.active, self.by))


def count(share: float, size: int) -> int:
    """Return how many of `size` channels or blocks each token reads, at least one."""
    return max(1, round(share * size))


def top_channels(gate_TM: Tensor, active: int, by: str) -> Tensor:
    """Return the `active` channels [T, K] with the largest gate, or magnitude of SiLU(gate)."""
    score_TM = gate_TM if by == "gate" else F.silu(gate_TM).abs()
    return score_TM.topk(active, sorted=False).indices


def only(c_TM: Tensor, channels_TK: Tensor) -> Tensor:
    """Return the coefficients, with zeros for channels that are not in `channels_TK`."""
    return c_TM * torch.zeros_like(c_TM).scatter(-1, channels_TK, 1)


_FORMS: dict[str, type[MoC]] = {"moc": MoC}


def make(form: str, config: ModelConfig, intermediate_size: int) -> nn.Module:
    """Return an FFN of a form other than linear."""
    if form == "swiglu":
        return SwiGLU(config.hidden_size, intermediate_size)
    return _FORMS[form](config, intermediate_size)
