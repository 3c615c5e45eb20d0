"""The row cache's slab where the model runs: on a CPU the same memory, on a GPU a copy that each
record reaches once.

Records cross the bus as codes, from pinned memory and on a stream of their own, beside what the GPU
is doing.
"""

import numpy as np
import torch

from tolhouse.table.manifest import Manifest
from tolhouse.table.row_cache import RowCache, capacity_for


class DeviceRowCache:
    def __init__(self, manifest: Manifest, most_bytes: int, device: torch.device) -> None:
        self.device, on_gpu = device, device.type == "cuda"
        shape = capacity_for(manifest, most_bytes), manifest.record_bytes
        self.host = torch.empty(
            shape, dtype=torch.uint8, pin_memory=on_gpu
        )  # paged in when written
        self.records = torch.empty(shape, dtype=torch.uint8, device=device) if on_gpu else self.host
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.read: torch.cuda.Event | None = None  # after the last read of the launched steps
        self.cache = RowCache(self.host.numpy(), manifest.vocab_size)

    def upload(self, slots: np.ndarray) -> None:
        """Copy `slots` of the host's slab, which have changed, to the device."""
        if self.stream:
            with torch.cuda.stream(self.stream):
                if self.read:
                    self.stream.wait_event(self.read)
                for slot in slots[slots >= 0].tolist():
                    self.records[slot].copy_(self.host[slot], non_blocking=True)

    def mark_read(self) -> None:
        """Uploads wait for the work launched so far, which may read the records."""
        if self.stream:
            self.read = torch.cuda.current_stream(self.device).record_event()

    def wait_for_uploads(self) -> None:
        """Work launched from now on sees all that was uploaded."""
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def wait_until_idle(self) -> None:
        """Wait until no upload reads the host's slab."""
        if self.stream:
            self.stream.synchronize()
