"""The places of records in an array, into which a reader receives and verifies them in order."""

import numpy as np
import xxhash

from tolhouse.table.manifest import Manifest, checksum_at


class Destination:
    """The rows `slots` [T] of `out` (uint8 [slots, record_bytes]) for the records of `ids` [T]."""

    def __init__(
        self, manifest: Manifest, ids: np.ndarray, out: np.ndarray, slots: np.ndarray
    ) -> None:
        self.manifest, self._ids = manifest, ids
        self._flat = memoryview(out.reshape(-1))  # type: ignore[arg-type]  # an array is a buffer
        self._starts: list[int] = (slots * np.int64(manifest.record_bytes)).tolist()
        self._seeds = manifest.seeds(ids)

    def __len__(self) -> int:
        return len(self._starts)

    def views(self, first: int, end: int) -> list[memoryview]:
        """Return views of the records from `first` to `end`, one view for neighbouring slots."""
        size, flat, starts = self.manifest.record_bytes, self._flat, self._starts[first:end]
        if not starts:
            return []
        views: list[memoryview] = []
        begin = stop = starts[0]
        for start in starts:
            if start != stop:
                views.append(flat[begin:stop])
                begin = start
            stop = start + size
        views.append(flat[begin:stop])
        return views

    def verify(self, first: int, end: int) -> None:
        """Check the records from `first` to `end`. Raises CorruptError with the bad tokens."""
        size, flat, starts = self.manifest.record_bytes, self._flat, self._starts[first:end]
        digest, data = xxhash.xxh3_64_intdigest, size - 8
        for at, seed in zip(starts, self._seeds[first:end], strict=True):
            checksum = at + data
            if digest(flat[at:checksum], seed) != checksum_at(flat, checksum)[0]:
                break
        else:
            return
        self.manifest.verify(self._ids[first:end], (flat[at : at + size] for at in starts))
