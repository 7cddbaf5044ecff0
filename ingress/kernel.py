"""What the kernel knows of a connection and asyncio does not tell."""

import asyncio
import fcntl
import select
import sys
import termios


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
