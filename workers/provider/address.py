"""Where an endpoint's name may lead: resolved here, checked here, and the very address is then dialled.

A catalogue names hosts; DNS says where they are, and may be made to say 169.254.169.254 (faults 74). So the check is
on the resolved address at connect, not on the name.
"""

import asyncio
import errno
import os
import socket
from typing import Final

from shared.core.addresses import allowed
from shared.wire.errors import HotpathError, Overloaded, UpstreamError


class AddressRefused(UpstreamError):
    """The name leads to an address that the endpoint may not use."""

    message = "The provider's address is not allowed."


class OutOfDescriptors(Overloaded):
    """We can open no further connection (faults 87): not the endpoint's fault, and no other one would do."""

    message = "The gateway has no descriptor left for a further connection."


#: What a failed connect says when it is ours.
_OURS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))


def unreachable(failure: Exception | None, message: str) -> HotpathError:
    """Whose fault it is that no connection came about. A resolver hides why it failed, so that is tried."""
    if isinstance(failure, OSError):
        if failure.errno in _OURS:
            return OutOfDescriptors()
        if isinstance(failure, socket.gaierror):
            try:
                os.close(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                return OutOfDescriptors()
    return UpstreamError(message)


async def resolve(loop: asyncio.AbstractEventLoop, host: str, port: int, *, private: bool) -> list[str]:
    """The allowed addresses of a host, in the resolver's order.

    Raises UpstreamError (no such host), AddressRefused, OutOfDescriptors.
    """
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as exc:
        raise unreachable(exc, "The provider's name could not be resolved.") from exc
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    usable = [address for address in addresses if allowed(address, private=private)]
    if not usable:
        raise AddressRefused
    return usable
