"""What the ledger's last answers said of tenants and users, so that the next request knows it without a round trip."""

from typing import Any, Final

from shared.state.base import RATIO_ONE, Reserved

TENANTS_KEPT: Final = 4096
USERS_KEPT: Final = 16_384


class Seen:
    """Bounded: of more tenants or users the oldest are forgotten, which is what a fresh process knows of everybody."""

    def __init__(self) -> None:
        self._ratios: dict[str, int] = {}
        self._users: dict[tuple[str, str], None] = {}

    def ratio(self, tenant: str) -> int:
        """The tenant's output/input ratio as last told, in millionths; 1.0 until then (S2-10)."""
        return self._ratios.get(tenant, RATIO_ONE)

    def limited(self, tenant: str, user: str) -> bool:
        """Whether this user was seen to have a limit: its money fails closed then, too (D4)."""
        return user != "" and (tenant, user) in self._users

    def note(self, tenant: str, user: str, answer: Reserved) -> None:
        """Learn from a reservation. One for an earlier delivery tells no ratio: it counted nothing."""
        if answer.counted is not None and self._ratios.get(tenant) != answer.ratio:
            _put(self._ratios, tenant, answer.ratio, TENANTS_KEPT)
        if user:
            if answer.user:
                _put(self._users, (tenant, user), None, USERS_KEPT)
            else:
                self._users.pop((tenant, user), None)


def _put(table: dict[Any, Any], key: object, value: object, most: int) -> None:
    if key not in table and len(table) >= most:
        del table[next(iter(table))]
    table[key] = value
