"""When a stream has generated more than is reserved for it: the provider worker meters what it passes on (DESIGN 4).

No token is shorter than a byte. So of what came since the last count at most as many tokens can be new as bytes, and
only when those could pass what is reserved must anything be counted: `due` is that number of bytes, and until then
metering a stream is one comparison a read. An English token has four bytes, so a count mostly finds that a quarter was
used, and puts `due` further on: a stream that uses a reservation of 1,000 tokens up is counted some twenty times, each
time only what is new (translators/texts.py). Pure.
"""

from typing import Final

from shared.core.pricing import PER, dearest_input
from shared.wire.messages import Price

#: The `due` of a call that is not metered.
NEVER: Final = 2**62
#: A count takes 18 us a KiB: a large reservation is counted this often, so that no read waits for more than 0.3 ms.
LOOK_BYTES: Final = 16_384
#: A slice is the price of so many tokens, or the smallest reservation if that is more: 2.5 s of a fast model. Slices do
#: not grow: one costs a tenth of what streaming its tokens does, and what is held and not used refuses others.
SLICE_TOKENS: Final = 256


def affordable(price: Price, amount: int, input_tokens: int) -> int:
    """Output tokens that `amount` (nano-USD) pays for once the input is taken at its bound; NEVER when they are free.

    By the money, not by the cap: the floor of a reservation may be more than the cap costs."""
    if price.output <= 0:
        return NEVER
    left = amount * PER - input_tokens * dearest_input(price)
    return max(left // price.output, 0)


def spent(price: Price, input_tokens: int, output_tokens: int) -> int:
    """Nano-USD of so many output tokens behind the input at its bound: what must be held for them."""
    total = input_tokens * dearest_input(price) + output_tokens * price.output
    return -(-total // PER)


def slice_of(price: Price, floor: int) -> int:
    """Nano-USD asked for at a time; `floor`: the smallest reservation."""
    return max(-(-SLICE_TOKENS * price.output // PER), floor)


class Meter:
    """Of one call, all choices together. `due`: bytes of text up to which nothing need be counted."""

    __slots__ = ("counted", "due", "reserved", "written")

    def __init__(self, reserved: int) -> None:
        """`reserved`: output tokens that are paid for; NEVER: not metered."""
        self.reserved = reserved
        self.counted = 0  # tokens, at the last count
        self.written = 0  # bytes, at the last count
        self.due = 0
        self._arm()

    def count(self, written: int, counted: int) -> int:
        """So many tokens make up so many bytes; how many of them are not paid for."""
        self.written, self.counted = written, max(counted, self.counted)
        self._arm()
        return max(self.counted - self.reserved, 0)

    def reserve(self, reserved: int) -> int:
        """So many tokens are paid for now, in all; how many of those counted are not."""
        self.reserved = reserved
        self._arm()
        return max(self.counted - self.reserved, 0)

    def _arm(self) -> None:
        if self.reserved >= NEVER:
            self.due = NEVER
        else:
            self.due = self.written + max(min(self.reserved - self.counted, LOOK_BYTES), 0)
