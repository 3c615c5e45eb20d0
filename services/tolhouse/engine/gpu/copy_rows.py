"""Copies rows between arrays in one kernel. The source may be pinned memory of the host."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 2048  # values that a program copies


def copy_rows(source: Tensor, target: Tensor, rows_R: Tensor) -> None:
    """Copy rows `rows_R` of `source` to the same rows of `target`.

    Both are uint8 [U, record_bytes] and contiguous. `target` and `rows_R` are on the GPU. The GPU
    reads pinned memory of the host over the bus, without a copy by the host.
    """
    if source.shape[1] % 8 == 0:
        source, target = source.view(torch.int64), target.view(torch.int64)
    size = source.shape[1]
    grid = len(rows_R), triton.cdiv(size, _VALUES)
    _copy[grid](source, target, rows_R, size, VALUES=_VALUES)


@triton.jit(do_not_specialize=["size"])
def _copy(source, target, rows, size, VALUES: tl.constexpr):
    row = tl.load(rows + tl.program_id(0))
    value = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    inside = value < size
    tl.store(target + row * size + value, tl.load(source + row * size + value, inside), inside)
