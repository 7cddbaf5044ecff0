"""What a regular expression cannot say of a number: check digits, ranges that are issued, numbers that mean nobody.

Each takes the digits or the literal text of a candidate and is linear in it. Where a rule could err it errs towards
"personal", except where plain text would be full of false alarms: those rules say so.
"""

from bisect import bisect_right
from ipaddress import AddressValueError, IPv6Address
from typing import Final

#: Cards by their first four digits: first and last of a scheme's range, and how many digits its cards have
#: (ISO/IEC 7812; the schemes' published ranges).
_SCHEMES: Final = (
    (2200, 2204, (16,)),  # Mir
    (2221, 2720, (16,)),  # Mastercard
    (3000, 3059, (14, 16)),  # Diners Club
    (3400, 3499, (15,)),  # American Express
    (3528, 3589, (16,)),  # JCB
    (3600, 3699, (14, 16)),  # Diners Club
    (3700, 3799, (15,)),  # American Express
    (3800, 3999, (14, 16)),  # Diners Club
    (4000, 4999, (13, 16, 19)),  # Visa
    (5000, 5099, (16, 18, 19)),  # Maestro, Elo
    (5100, 5599, (16,)),  # Mastercard
    (5600, 5899, (16, 18, 19)),  # Maestro
    (6000, 6099, (16, 19)),  # Discover, RuPay
    (6200, 6299, (16, 17, 18, 19)),  # UnionPay
    (6300, 6399, (16, 18, 19)),  # Maestro
    (6440, 6599, (16, 19)),  # Discover, RuPay
    (6700, 6999, (16, 18, 19)),  # Maestro
)
_STARTS: Final = tuple(first for first, _, _ in _SCHEMES)
_ZERO: Final = ord("0")
#: Twice a digit, its own digits summed; as a character again.
_DOUBLE: Final = bytes.maketrans(b"0123456789", b"0246813579")
_UNASSIGNED: Final = frozenset(["28", "83", "89"])  # first two digits of no country code (ITU-T E.164)
_E164_MOST: Final = 15
_NATIONAL: Final = 10  # digits of a North American number without its 1


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    text = digits.encode()
    return (sum(text[-1::-2]) + sum(text[-2::-2].translate(_DOUBLE)) - _ZERO * len(text)) % 10 == 0


def is_card(digits: str) -> bool:
    """A card number: a scheme's leading digits and length, and Luhn. A tenth of random 16-digit ids of a scheme's
    range pass; ids that begin with 0, 1, 7, 8 or 9 (all timestamps, most snowflakes) never do."""
    leading = int(digits[:4])
    place = bisect_right(_STARTS, leading) - 1
    if place < 0:
        return False
    _, last, lengths = _SCHEMES[place]
    return leading <= last and len(digits) in lengths and luhn(digits)


def is_ssn(digits: str) -> bool:
    """A number that may have been issued: no area 000, 666 or 9xx, no group 00, no serial 0000 (SSA, since 2011)."""
    return digits[0] != "9" and digits[:3] not in {"000", "666"} and digits[3:5] != "00" and digits[5:] != "0000"


def is_north_american(digits: str, *, marked: bool) -> bool:
    """A number of ten digits, or eleven with a 1. `marked`: a dash or a bracket says that it is a telephone number, so
    that 555-123-4567, which no exchange has, passes too; else area and exchange begin with 2 to 9 as the plan says."""
    number = digits[-_NATIONAL:]
    return number[:3] != "000" if marked else number[0] > "1" and number[3] > "1"


def is_international(digits: str, *, grouped: bool) -> bool:
    """After a plus: a country code that exists and 8 to 15 digits (E.164); 10 and more when nothing groups them, since
    `+25000000` is as likely a sum."""
    if digits[0] in "17":
        return len(digits) == _NATIONAL + 1
    return digits[0] != "0" and digits[:2] not in _UNASSIGNED and (8 if grouped else 10) <= len(digits) <= _E164_MOST


def is_ipv4(text: str) -> bool:
    """Four octets that may be somebody's host. Not: leading zeros, this host (0, 127), multicast and masks (224 and
    up), networks (last octet 0, which also spares most four-part versions)."""
    octets = text.split(".")
    if any(len(octet) > 1 and octet[0] == "0" for octet in octets) or max(map(int, octets)) > 255:
        return False
    first = int(octets[0])
    return 0 < first < 224 and first != 127 and octets[3] != "0"


def is_ipv6(text: str) -> bool:
    """Well formed, and global unicast (2000::/3), unique local (fc00::/7) or link-local (fe80::/10): all of them are
    written with four digits first, which is what tells them from clock times, MAC addresses and `a::b` of programs."""
    try:
        address = IPv6Address(text)
    except AddressValueError:
        return False
    first = int(address) >> 112
    return 0x2000 <= first < 0x4000 or 0xFC00 <= first < 0xFE00 or 0xFE80 <= first < 0xFEC0
