"""Where a name may lead: which resolved addresses may be dialled (faults 74). Pure."""

import ipaddress
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


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
