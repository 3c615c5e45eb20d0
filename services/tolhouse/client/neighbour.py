"""A lookup service on the same machine: its hot rows in memory, and its bell to ring for others (table/shared.py)."""

import socket
import threading

import numpy as np

from tolhouse.table.manifest import Manifest
from tolhouse.table.shared import MOST_RUNG, RUNG, Segment, bell
from tolhouse.v1 import lookup_pb2

_CALL_SECONDS = 0.5  # to be heard; a service that hangs does not listen


class Neighbour:
    """Safe to use from several threads: each that rings has a connection of its own for as long."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self.take, self.hot = segment.take, segment.hot  # what is hot, without a word

    @classmethod
    def at(cls, manifest: Manifest, told: lookup_pb2.Segment) -> "Neighbour | None":
        """The service that offers a segment, or None where it can't be mapped."""
        segment = Segment.attach(manifest, told.capacity, told.id, told.pid, told.fd)
        return cls(segment) if segment else None

    @property
    def gone(self) -> bool:
        """Whether the service has let go of the segment, whose memory stays taken while somebody maps it."""
        return self._segment.closed

    def ring(self, ids: np.ndarray) -> socket.socket | None:
        """Ask that `ids` be made hot; None if the service can't be asked so: too many of them, or it is gone."""
        if len(ids) > min(MOST_RUNG, self._segment.capacity // 2):
            return None
        with self._lock:
            line = self._idle.pop() if self._idle else None
        try:
            if line is None:
                line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                line.settimeout(_CALL_SECONDS)
                line.connect(bell(self._segment.id))
                line.send(self._segment.word)
            line.settimeout(_CALL_SECONDS)
            line.send(ids.astype("<u4", copy=False).tobytes())
        except OSError:
            if line:
                line.close()
            return None
        return line

    def answered(self, line: socket.socket, seconds: float) -> bool:
        """Whether the rows that were rung for are there now."""
        try:
            line.settimeout(seconds)
            answer = line.recv(1)
        except OSError:
            answer = b""
        if not answer:  # it did not come in time, or never will
            line.close()
            return False
        with self._lock:
            self._idle.append(line)
        return answer == RUNG

    def close(self) -> None:
        with self._lock:
            for line in self._idle:
                line.close()
            self._idle.clear()
