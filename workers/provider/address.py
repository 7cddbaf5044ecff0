"""Where an endpoint's name may lead: resolved here, checked here, and the very address is then dialled.

A catalogue names hosts; DNS says where they are, and may be made to say 169.254.169.254 (faults 74). So the check is
on the resolved address at connect, not on the name.
"""

import asyncio
import errno
import ipaddress
import os
import socket
from typing import Final

from shared.wire.errors import HotpathError, Overloaded, UpstreamError

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


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


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, if it does (mapped, 6to4, NAT64)."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def allowed(text: str, *, private: bool) -> bool:
    """Public addresses; with `private` also loopback, private and shared ones. Never link-local (cloud metadata),
    multicast, unspecified or reserved ones."""
    try:
        address = _inner(ipaddress.ip_address(text.partition("%")[0]))
    except ValueError:
        return False
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return False
    if address.version == 4 and address.is_reserved:
        return False
    return private or address.is_global


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
