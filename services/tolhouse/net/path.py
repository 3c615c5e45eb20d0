"""The bytes in flight that a TCP connection's path needs."""

import socket
import struct

_MIN_RTT_AT = 148  # of tcpi_min_rtt in struct tcp_info (linux/tcp.h), in microseconds
_BYTES_PER_SECOND = 2.5e9  # 20 Gbit/s
_LEAST_BYTES = 128 << 10


def bytes_in_flight(sock: socket.socket) -> float:
    """Return the bytes in flight that keep a path of 20 Gbit/s busy, at least 128 KiB.

    More of them do not help. Between processes on one machine they cost time: each byte is copied
    into and out of the kernel, and bytes that wait for long leave the processor's cache. The result
    is infinite if the round-trip time is unknown, as for Unix sockets.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        (microseconds,) = struct.unpack_from("=I", info, _MIN_RTT_AT)
    except (OSError, AttributeError, struct.error):
        return float("inf")
    return max(_LEAST_BYTES, _BYTES_PER_SECOND * microseconds / 1e6)
