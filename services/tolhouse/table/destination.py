"""The places of records in an array, into which a reader receives and verifies them in order."""

import numpy as np
import xxhash

from tolhouse.table.manifest import Manifest


class Destination:
    """The rows `slots` [T] of `out` (uint8 [slots, record_bytes]) for the records of `ids` [T]."""

    def __init__(
        self, manifest: Manifest, ids: np.ndarray, out: np.ndarray, slots: np.ndarray
    ) -> None:
        self.manifest, self.ids, self._out, self._slots = manifest, ids, out, slots
        self._flat = memoryview(out.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer
        self._starts = (slots * np.int64(manifest.record_bytes)).tolist()
        self._seeds = manifest.seeds(ids)

    def __len__(self) -> int:
        return len(self._starts)

    def views(self, first: int, end: int) -> list[memoryview]:
        """Return views of the records from `first` to `end`, one view for neighbouring slots."""
        size, flat, starts = self.manifest.record_bytes, self._flat, self._starts
        views, begin = list[memoryview](), first
        for n in range(first + 1, end + 1):
            if n == end or starts[n] != starts[n - 1] + size:
                views.append(flat[starts[begin] : starts[n - 1] + size])
                begin = n
        return views

    def verify(self, first: int, end: int) -> None:
        """Check the records from `first` to `end`. Raises CorruptError with the bad tokens."""
        size, flat, slots = self.manifest.record_bytes, self._flat, self._slots[first:end]
        starts, seeds = self._starts[first:end], self._seeds[first:end]
        expected = self._out[slots, -8:].view("<u8")[:, 0].tolist()
        digest, data = xxhash.xxh3_64_intdigest, size - 8
        found = [digest(flat[at : at + data], s) for at, s in zip(starts, seeds, strict=True)]
        if found != expected:
            self.manifest.verify(self.ids[first:end], (flat[at : at + size] for at in starts))
