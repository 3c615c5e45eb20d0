"""Copies small arrays to a GPU in one transfer."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy int64 arrays to the device together. The copy does not wait for work on the device."""
    flat = pinned(sum(array.size for array in arrays), device)
    np.concatenate([array.ravel() for array in arrays], out=flat.numpy())
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def pinned(size: int, device: torch.device) -> Tensor:
    """Return int64 memory of the host from which the device can copy asynchronously."""
    return torch.empty(size, dtype=torch.int64, pin_memory=device.type != "cpu")
