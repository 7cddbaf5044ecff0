"""What the kernel knows of a connection and asyncio does not tell, and what it is told past asyncio."""

import asyncio
import fcntl
import select
import socket
import struct
import sys
import termios
from typing import Final

_NO_LINGER: Final = struct.pack("ii", 1, 0)  # socket(7): on, 0 seconds


def has_unread(transport: asyncio.Transport | None) -> bool:
    """Whether bytes have come that the loop has not read yet."""
    descriptor = _descriptor(transport)
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def unconfirmed(transport: asyncio.Transport | None) -> int:
    """Bytes written that the other side has not confirmed (tcp(7), SIOCOUTQ); 0 when the connection is gone."""
    descriptor = _descriptor(transport)
    if descriptor < 0:
        return 0
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def _descriptor(transport: asyncio.Transport | None) -> int:
    sock = None if transport is None else transport.get_extra_info("socket")
    return -1 if sock is None else int(sock.fileno())


def reset(transport: asyncio.Transport) -> None:
    """Cut it so that the kernel lets go of it, too: a plain close leaves what it holds for a client that takes nothing
    (256 KiB) to its own retries, which go on for a quarter of an hour (tcp(7), tcp_orphan_retries)."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()
