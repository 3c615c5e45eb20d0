"""All records of a table in memory that the device reads. No step then waits for the host.

Shapes: T tokens of a step.
"""

import time
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tolhouse.client.row_source import RowSource
from tolhouse.engine.dequant import Decoder, StagedRows
from tolhouse.engine.row_providers import Fallback, FallbackRows, SourceRows
from tolhouse.errors import DeadlineExceededError, UnavailableError
from tolhouse.table.manifest import Manifest

_FETCH_BYTES = 16 << 20


class WholeTable:
    """Reads the whole table once, and stages rows with operations of the device alone.

    A GPU reads the memory of the host over the bus (unified virtual addressing), which vLLM also
    does for its n-gram tables. On a CPU there is no difference to the memory of the device.
    A part of the table that cannot be read is fetched again for up to `wait_seconds`. After that,
    raises the error of Tolhouse if neither the source nor the fallback delivers it.
    """

    def __init__(
        self,
        source: RowSource,
        manifest: Manifest,
        memory: Literal["host", "device"],
        device: torch.device,
        dtype: torch.dtype,
        fallback: Fallback,
        wait_seconds: float,
    ) -> None:
        self.manifest, self.device = manifest, device
        self.decoder = Decoder(source.auxiliary(manifest), device, dtype)
        in_host = memory == "host" and device.type != "cpu"
        place: dict[str, Any] = {"pin_memory": True} if in_host else {"device": device}
        shape = manifest.vocab_size, manifest.record_bytes
        records = torch.empty(shape, dtype=torch.uint8, **place)
        rows = FallbackRows(SourceRows(source, manifest), fallback)
        step = max(1, _FETCH_BYTES // manifest.record_bytes)
        try:
            for start in tqdm(range(0, len(records), step), "rows", unit="part", disable=None):
                part = records[start : start + step]
                ids = np.arange(start, start + len(part), dtype=np.uint32)
                fetched = np.empty(part.shape, np.uint8)
                _fetch(rows, ids, fetched, wait_seconds)
                part.copy_(torch.from_numpy(fetched))
        finally:
            rows.close()
        self.records = _device_view(records) if in_host else records

    def stage(self, ids_T: Tensor) -> StagedRows:
        """Return the records of `ids_T`, which are on the device.

        Ids outside of the vocabulary are padding, and stand for token 0.
        """
        is_known = (ids_T >= 0) & (ids_T < self.manifest.vocab_size)
        ids_T = torch.where(is_known, ids_T, 0).long()
        return StagedRows(self.records, ids_T, ids_T)


def _fetch(rows: FallbackRows, ids: np.ndarray, out: np.ndarray, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            return rows.fetch(ids, out, np.arange(len(ids)))
        except (UnavailableError, DeadlineExceededError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def _device_view(pinned: Tensor) -> Tensor:
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    return get_accelerator_view_from_cpu_tensor(pinned)
