"""Hot rows in memory that other processes of the machine may map: a lookup service's slab, and a client's view of it.

The segment is an anonymous file (memfd), found by the owner's process id and file descriptor, so that nothing outlives
the owner:

    head        uint64 rows that readers took, then 16 bytes to say at the doorbell: who can map the segment knows them; then a byte
                that is 1 once the owner has let go of it, so that readers do too
    uses        uint8 [capacity]   readers count uses here, for the owner's policy
    slot_of     int32 [V]          slot of a token's record, -1 where it is not hot
    slab        uint8 [capacity, record_bytes]

Readers may write to the first two, each of which begins on a page; the others they can only read. Nobody locks. A reader
copies a record and then verifies its checksum, which is seeded by version and token: a row that was replaced meanwhile,
or is only half there, does not pass, and is asked for in the ordinary way.

A reader may also ring for rows that are not hot: after a packet with the head's word, a packet of token ids (little-endian uint32, at most MOST_RUNG) to the
owner's Unix socket is answered with RUNG when they are in the slab, as far as there was room, or with another byte when
they can't be had; the ordinary way says why. Other hosts, other users and other containers can't open the segment, and
need not. Processes of the owner's user can, without the token that calls need: they could read the owner's memory anyway.
The socket's name can be seen by all who share the network namespace, which is why they have to know the word too.
"""

import mmap
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from tolhouse.table.manifest import Manifest
from tolhouse.table.row_cache import MOST_USES

MOST_RUNG = 16_384
RUNG = b"1"
_WORD, _CLOSED = slice(8, 24), 24


class Segment:
    """The memory of one table's hot rows, as its owner (`create`) or as a reader (`attach`) sees it."""

    def __init__(
        self,
        counts: mmap.mmap,
        rows: mmap.mmap,
        manifest: Manifest,
        capacity: int,
        number: int,
        fd: int,
    ) -> None:
        """`counts` holds the part that readers may write, `rows` the whole; both begin with the head."""
        self.manifest, self.capacity, self.id, self.fd = manifest, capacity, number, fd
        uses, slots, slab, end = _layout(manifest, capacity)
        self.taken = np.frombuffer(counts, np.uint64, 1)
        self.word = bytes(rows[_WORD])
        self._memory = rows
        self.uses = np.frombuffer(counts, np.uint8, capacity, uses)
        self.slot_of = np.frombuffer(rows, np.int32, manifest.vocab_size, slots)
        self.slab = np.frombuffer(rows, np.uint8, end - slab, slab).reshape(
            capacity, manifest.record_bytes
        )
        self.bytes = memoryview(rows)[slab:end]  # the slab, flat

    @classmethod
    def create(cls, manifest: Manifest, capacity: int) -> "Segment":
        """An empty segment; pages of the slab are taken when written. Without memfd, memory that nobody else can map."""
        size, number = _layout(manifest, capacity)[-1], secrets.randbits(63) + 1
        fd = -1
        with suppress(AttributeError, OSError):
            fd = os.memfd_create(_name(number))
        if fd >= 0:
            os.ftruncate(fd, size)
        memory = mmap.mmap(fd, size)
        memory[_WORD] = secrets.token_bytes(16)
        segment = cls(memory, memory, manifest, capacity, number, fd)
        segment.slot_of[:] = -1
        return segment

    @classmethod
    def attach(
        cls, manifest: Manifest, capacity: int, number: int, pid: int, fd: int
    ) -> "Segment | None":
        """The segment of another process, or None if it can't be mapped from here."""
        path = Path(f"/proc/{pid}/fd/{fd}")
        with suppress(OSError, ValueError):
            # in another namespace the same numbers mean something else: look before opening
            if not str(path.readlink()).startswith(f"/memfd:{_name(number)}"):
                return None
            opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                _, slots, _, end = _layout(manifest, capacity)
                counts, rows = mmap.mmap(opened, slots), mmap.mmap(opened, end, prot=mmap.PROT_READ)
            finally:
                os.close(opened)
            return cls(counts, rows, manifest, capacity, number, -1)
        return None

    def close(self) -> None:
        """The owner's end of it: nobody can attach any more; those who did are told to let go of what they have mapped."""
        self._memory[_CLOSED] = 1
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def closed(self) -> bool:
        return self._memory[_CLOSED] == 1

    def hot(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` [T] are in the slab now; bool [T]."""
        return self.slot_of[ids] >= 0

    def take(self, ids: np.ndarray, out: memoryview, places: Iterable[int]) -> list[int]:
        """Copy the hot ones of `ids` into records `places` of `out` (flat bytes), verified; indices of those not taken."""
        slots = self.slot_of[ids]
        if (slots < 0).all():
            return list(range(len(ids)))
        left = self.manifest.take(ids, self.bytes, slots.tolist(), out, places)
        taken = np.delete(slots, left) if left else slots
        self.uses[taken] = np.minimum(self.uses[taken] + 1, MOST_USES)
        self.taken += np.uint64(len(taken))
        return left


def _layout(manifest: Manifest, capacity: int) -> tuple[int, int, int, int]:
    """Offsets of uses, slot_of, slab and the end, the first three at the beginning of a page."""
    at, offsets = mmap.PAGESIZE, []
    for size in (capacity, 4 * manifest.vocab_size):
        offsets.append(at)
        at += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    return offsets[0], offsets[1], at, at + capacity * manifest.record_bytes


def bell(segment: int) -> bytes:
    """The address, in Linux's abstract namespace, of the socket where readers of a segment ring."""
    return b"\0" + _name(segment).encode()


def _name(number: int) -> str:
    return f"tolhouse-{number:016x}"
