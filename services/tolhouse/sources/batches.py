"""Computes rows in batches of one size, with one thread.

The last bits of a matrix product depend on its shape and on the number of threads. With equal
batches, of which the last is padded, builders, resumed builds and workers compute equal bytes.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

BATCH_TOKENS = 128


def in_batches(
    ids: np.ndarray, compute: Callable[[np.ndarray], Tensor]
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the float32 rows of `ids`, each batch with its slice of `ids`.

    `compute` returns the rows of BATCH_TOKENS ids, int64.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start in range(0, len(ids), BATCH_TOKENS):
            part = ids[start : start + BATCH_TOKENS].astype(np.int64)
            with torch.inference_mode():
                rows = compute(np.pad(part, (0, BATCH_TOKENS - len(part))))[: len(part)].float()
            yield slice(start, start + len(part)), rows.numpy()
    finally:
        torch.set_num_threads(threads)
