"""A model's rows for many ids, the same bytes each time: batches of one fixed size, the last one padded, by one thread.

A matrix product's last bits depend on its shape and on the number of threads. With both fixed they depend neither on the
machine's cores, nor on how often a build was interrupted, nor on who computes: the builder, or a worker that has lost
its lookup service.
"""

from collections.abc import Iterator

import numpy as np
import torch

from tolhouse.model.transformer import Transformer

BATCH_TOKENS = 128


def batches(
    model: Transformer, ids: np.ndarray, x0: bool = False, layers: tuple[int, ...] | None = None
) -> Iterator[tuple[slice, np.ndarray]]:
    """float32 rows [T, N, D] of `ids`, a batch at a time, and which they are; of all layers or of `layers`, X0 in front if `x0`."""
    blocks = None if layers is None else [*range(x0), *(x0 + layer for layer in layers)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for start in range(0, len(ids), BATCH_TOKENS):
            part = slice(start, min(start + BATCH_TOKENS, len(ids)))
            padded = np.zeros(BATCH_TOKENS, np.int64)
            padded[: part.stop - start] = ids[part]
            with torch.inference_mode():
                rows_NTD = model.rows(torch.from_numpy(padded), x0)
            kept = rows_NTD if blocks is None or len(blocks) == len(rows_NTD) else rows_NTD[blocks]
            yield part, kept[:, : part.stop - start].transpose(0, 1).numpy()
    finally:
        torch.set_num_threads(threads)
