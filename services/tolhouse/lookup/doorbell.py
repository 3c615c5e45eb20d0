"""Where clients of the same machine ring for rows: ids come in, the rows are made hot, a byte goes out (table/shared.py).

Next to gRPC this saves most of the hops between threads that a row from the store costs: the thread that hears the bell
reads the rows. It says nothing about errors; whoever gets none of the rows asks over gRPC.

Only the owner's user is heard, and only who has the segment mapped: it holds the word to begin with.
"""

import hmac
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from tolhouse.errors import TolhouseError
from tolhouse.logs import log
from tolhouse.table.shared import MOST_RUNG, RUNG, Segment, bell

MAX_LINES = 256  # open connections; more are closed, and ask over gRPC


class Doorbell:
    def __init__(self, segment: Segment, bring: Callable[[np.ndarray], None]) -> None:
        """Listen for readers of `segment`; `bring` makes ids (uint32 [T]) hot, or raises a TolhouseError."""
        self._word, self._bring = segment.word, bring
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(bell(segment.id))
        self._listener.listen()
        self._open = {self._listener}
        threading.Thread(target=self._accept, name="doorbell", daemon=True).start()

    def close(self) -> None:
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits there
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                _, user, _ = struct.unpack(
                    "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                )
                if user != os.getuid() or len(self._open) > MAX_LINES:
                    connection.close()
                    continue
                self._open.add(connection)
                threading.Thread(
                    target=self._serve, args=(connection,), name="doorbell", daemon=True
                ).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            known = hmac.compare_digest(connection.recv(len(self._word)), self._word)
            while known and (packet := connection.recv(4 * MOST_RUNG)):
                answer = RUNG
                try:
                    self._bring(np.frombuffer(packet, "<u4"))
                except (TolhouseError, ValueError):  # or no whole ids
                    answer = b"0"
                except Exception as error:  # noqa: BLE001 - the boundary of this thread
                    log.error("internal error", exc_info=error)
                    answer = b"0"
                connection.send(answer)
        self._open.discard(connection)
