"""A token bucket for each client address: how often a page that costs something may be asked (S1-R1)."""

from collections.abc import Callable
from typing import Final

from shared.wire import errors

#: Addresses remembered; one that is forgotten has a full bucket, so the oldest go first.
MAX_CLIENTS: Final = 1024
_MINUTE_MS: Final = 60_000


class Limiter:
    """`most` at once and so many in a minute. A bucket is kept as the time at which it is full again, so that all is
    exact in whole milliseconds."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """`clock` in seconds."""
        self._most = most
        self._each = _MINUTE_MS // most
        self._clock = clock
        self._full_at: dict[str, int] = {}  # by address, the oldest first

    def take(self, client: str) -> None:
        """One request of this client. Raises RateLimited, with the exact wait."""
        now = round(self._clock() * 1000)
        full_at = max(self._full_at.pop(client, now), now)
        wait = full_at - now - (self._most - 1) * self._each
        self._full_at[client] = full_at if wait > 0 else full_at + self._each
        if len(self._full_at) > MAX_CLIENTS:
            del self._full_at[next(iter(self._full_at))]
        if wait > 0:
            raise errors.RateLimited(f"This page may be asked {self._most} times a minute.", retry_after_ms=wait)
