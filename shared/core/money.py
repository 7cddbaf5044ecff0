"""Money: integer nano-USD (1 USD = 1_000_000_000), read from and shown as decimal text; no floats (D2, D12)."""

import re
from typing import Final

NANO: Final = 1_000_000_000  # nano-USD in one USD
MAX_NANO: Final = 2**53 - 1  # Lua's exact integers: no amount or limit may be larger (DESIGN 4)

_DIGITS: Final = 9  # decimals of one nano-USD
_SHOWN: Final = 2  # decimals shown at least (D12)
_USD: Final = re.compile(r"\$?([0-9]{1,9})(?:\.([0-9]{1,9}))?\Z", re.ASCII)


def usd_to_nano(text: str) -> int:
    """Read `"5"` or `"$0.001"` as nano-USD.

    Raises ValueError for anything but plain decimal digits, at most nine after the point (no sign, exponent, NaN or
    separators), and above `MAX_NANO`.
    """
    found = _USD.match(text)
    if found is None:
        raise ValueError("expected an amount in USD such as '5' or '0.001': digits, at most nine after the point")
    nano = int(found[1]) * NANO + int((found[2] or "").ljust(_DIGITS, "0"))
    if nano > MAX_NANO:
        raise ValueError(f"amounts above {show_usd(MAX_NANO)} are not supported")
    return nano


def show_usd(nano: int) -> str:
    """D12: USD with the digits it has, at least two and at most nine: `$0.03`, `$0.0000425`, `-$1.50`."""
    whole, part = divmod(abs(nano), NANO)
    digits = f"{part:09d}".rstrip("0").ljust(_SHOWN, "0")
    return f"{'-' if nano < 0 else ''}${whole}.{digits}"
