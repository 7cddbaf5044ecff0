"""What the rest of the code may ask of the shared state: the ledger, the clock, the registry, the circuits.

Errors: `StateUnavailable` when Redis did not answer in time or refused (OOM, read-only, loading ...): the caller then
follows D4. Amounts are nano-USD integers, times are milliseconds of the shared clock.
"""

from collections.abc import Iterable
from typing import Literal, Protocol

from msgspec import Struct

from shared.core.circuit import Circuit, Event, State


class StateUnavailable(Exception):
    """Redis did not answer in time, or answered that it cannot serve. The call may or may not have been applied."""


class NotApplied(StateUnavailable):
    """Certainly not applied: nothing was sent, or Redis refused it before its first write."""


class Reserved(Struct, frozen=True, kw_only=True):
    """Answer of `reserve`.

    ok: reserved (or was already, for an earlier delivery); `amount` is what is held. denied: would pass a limit, `left`
    is what is left. late: past its deadline. stale: ran after its not-after. refused: an equal or later delivery was
    voided. closed: the request is over.
    """

    status: Literal["ok", "denied", "late", "stale", "refused", "closed"]
    amount: int = 0
    left: int = 0


class Dispatched(Struct, frozen=True, kw_only=True):
    """Answer of `dispatch` and `topup`.

    won: make upstream call number `call`. refused: `holder` (with `delivery`) has the stream. denied: a further call
    does not fit (`left`). exhausted: the Plan has no calls left. late, stale, voided, closed, missing: make no call.
    """

    status: Literal["won", "refused", "denied", "exhausted", "late", "stale", "voided", "closed", "missing"]
    call: int = 0
    holder: str = ""
    delivery: int = 0
    left: int = 0


class Level(Struct, frozen=True, kw_only=True):
    """One row of `hotpath budget show`: nano-USD; `limit` None = none. `bucket` names the period, e.g. 2026-11-21."""

    level: str
    period: Literal["day", "month", "lifetime"]
    settled: int
    pending: int
    unconfirmed: int
    limit: int | None
    bucket: str = ""


class Ledger(Protocol):
    """The two-phase ledger (DESIGN 4). Every method is one Lua call, idempotent per its arguments."""

    async def reserve(
        self, *, tenant: str, rid: str, delivery: int, amount: int, deadline: int, not_after: int
    ) -> Reserved:
        """Hold `amount` for the request's first call. Leased to deadline + 10 s."""

    async def dispatch(
        self, *, tenant: str, rid: str, delivery: int, instance: str, lost: str, amount: int, max_calls: int,
        not_after: int,
    ) -> Dispatched:  # fmt: skip
        """Win the right to make the next upstream call (compare-and-set). `lost` names a holder known dead: its call
        becomes UNCONFIRMED and call n+1 opens with its own `amount`, if it fits and calls are left."""

    async def topup(
        self, *, tenant: str, rid: str, call: int, delivery: int, instance: str, amount: int, max_calls: int,
        not_after: int,
    ) -> Dispatched:  # fmt: skip
        """Open call number `call` (= n+1) after call n of the same holder was settled."""

    async def settle(self, *, tenant: str, rid: str, call: int, cost: int, estimated: bool = False) -> str:
        """Post what was really used, in full. "settled", "late" (was unconfirmed or voided), "duplicate", "opened"
        (no entry was known: posted as its own)."""

    async def void(self, *, tenant: str, rid: str, delivery: int, instance: str = "", call: int = 1) -> str:
        """Give an undispatched reservation back. "voided", or "kept" (a later delivery reserved, or one dispatched).

        With `instance` also what a dispatch (or, with its number as `call`, a topup) of that instance may have opened
        whose answer never came: it is settled at 0."""

    async def expire(self, *, tenant: str) -> int:
        """Sweep up to 16 expired leases; how many were."""

    async def balances(self, *, tenant: str) -> list[Level]:
        """The current day, month and lifetime of the tenant."""

    async def set_limit(self, *, tenant: str, period: str, limit: int | None) -> None:
        """Set or clear a limit. Raises ValueError above 2^53 - 1 nano-USD (Lua's exact integers)."""


class Clock(Protocol):
    """The shared clock: this process's monotonic clock mapped to Redis TIME."""

    def now(self) -> int:
        """Milliseconds."""


class Principal(Struct, frozen=True, kw_only=True):
    """Who a key belongs to."""

    tenant: str  # opaque id
    key: str  # key id
    tenant_name: str
    synthetic: bool = False  # may be used by direct publishers on the admit subject
    limited: bool = False  # the tenant has a hard limit: money fails closed (D4)


class Registry(Protocol):
    """The process's own copy of tenants and keys."""

    @property
    def ready(self) -> bool:
        """Loaded at least once."""

    @property
    def fresh(self) -> bool:
        """Whether Redis answered the last poll: an unknown key is then really unknown (401), else 503."""

    def authenticate(self, token: bytes) -> Principal | None:
        """The principal of an API key as presented, compared in constant time (D7); None when unknown or revoked."""

    def lookup(self, tenant: str, key: str) -> Principal | None:
        """The principal by ids: what guardian and provider check an envelope against."""


class Circuits(Protocol):
    """Which endpoints may be called: shared through Redis, read locally (S2-05: one map look-up)."""

    def look(self, endpoint: str) -> Circuit | None:
        """Its circuit as this process last heard of it; None when it is closed."""

    async def record(self, endpoint: str, events: Iterable[tuple[Event, str]]) -> State | None:
        """What happened there (oldest first, each with its probe's id); the state, when the circuit moved."""

    async def claim(self, endpoint: str, probe: str) -> bool:
        """Ask to be the one probe of a half_open endpoint."""
