"""Finds out whether Triton can compile kernels on this machine."""

import functools

import torch

from tolhouse.logs import event


@functools.cache
def available(device: torch.device) -> bool:
    """Return whether kernels run on the device. The log has the reason if they do not.

    Triton comes with torch for GPUs. It needs a C compiler when a kernel is first used.
    """
    if device.type == "cpu":
        return False
    try:
        from tolhouse.engine.gpu.copy_rows import copy_rows

        row = torch.zeros(1, 8, dtype=torch.uint8, device=device)
        copy_rows(row, row.clone(), torch.zeros(1, dtype=torch.int64, device=device))
        torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001 - torch's own operators do the work without kernels
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        hint = "install a C compiler, such as gcc, for a faster worker"
        event("no Triton kernels", reason=reason, hint=hint)
        return False
    return True
