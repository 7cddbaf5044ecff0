"""Whose turn it is to try an endpoint whose circuit is half_open: one request a second, of those that come here.

Not the guarantee that there is one probe, which the claim in Redis gives; it keeps all others from asking for it.
A request that had its turn and made no call (its client left) costs a second, not a circuit that stays as it is.
"""

from typing import Final

GAP_MS: Final = 1000


class Turns:
    """As many entries as the catalogue has endpoints, at most."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}  # endpoint -> shared-clock ms of the next turn

    def take(self, endpoint: str, now: int) -> bool:
        """Whether the request at hand has it; nobody else has it for a second then. A clock set back grants one."""
        due = self._next.get(endpoint, 0)
        if due - GAP_MS <= now < due:
            return False
        self._next[endpoint] = now + GAP_MS
        return True
