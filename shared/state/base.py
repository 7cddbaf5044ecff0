"""What the rest of the code may ask of the shared state: the ledger, the clock, the registry, the circuits.

Errors: `StateUnavailable` when Redis did not answer in time or refused (OOM, read-only, loading ...): the caller then
follows D4. Amounts are nano-USD integers, times are milliseconds of the shared clock.
"""

from collections.abc import Iterable
from typing import Final, Literal, Protocol

from msgspec import Struct

from shared.core.circuit import Circuit, Event, State

#: The output/input ratio of a tenant that has none yet (S2-10: 1.0), in millionths.
RATIO_ONE: Final = 1_000_000


class StateUnavailable(Exception):
    """Redis did not answer in time, or answered that it cannot serve. The call may or may not have been applied."""


class NotApplied(StateUnavailable):
    """Certainly not applied: nothing was sent, or Redis refused it before its first write."""


class Rates(Struct, frozen=True, kw_only=True):
    """What `reserve` is to count besides the money: buckets of a minute (S1-G07), 0 = no limit.

    `tokens` is what the request takes of the token buckets until its settlement puts the difference right; the
    velocity of the key in this minute and hour (S2-13) is counted whenever rates are given.
    """

    tokens: int = 0
    tenant_requests: int = 0  # a minute
    tenant_tokens: int = 0
    key_requests: int = 0
    key_tokens: int = 0


class Bucket(Struct, frozen=True, array_like=True):
    """A token bucket after the request: its size, what is in it, ms until it is full."""

    limit: int
    left: int
    full_ms: int


class Counted(Struct, frozen=True, kw_only=True):
    """What `reserve` counted: the tighter bucket of each kind, None without a limit; requests of the key
    (0 when refused)."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    minute: int = 0
    hour: int = 0


class Reserved(Struct, frozen=True, kw_only=True):
    """Answer of `reserve`.

    ok: reserved (or was already, for an earlier delivery); `amount` is what is held, which is less than was asked for
    when that did not fit and `least` did. denied: would pass a limit, `left` is what is left of it; `level` and
    `period` name it. limited: a rate limit (`level`: "t" or "k:...", `period`: requests or tokens), `wait_ms` until it
    fits; -1: it never will. late: past its deadline. stale: ran after its not-after. refused: an equal or later
    delivery was voided. closed: the request is over. lost: the tenant's balances are gone, limits and all, and its
    journal is not: nobody is admitted until it is replayed (faults 52).

    `day` is charged (days since 1970-01-01), `ratio` is the tenant's output/input ratio x 1,000,000 (S2-10), `user`
    says that the user has a limit, and its level moved.
    """

    status: Literal["ok", "denied", "limited", "late", "stale", "refused", "closed", "lost"]
    amount: int = 0
    left: int = 0
    level: str = ""
    period: str = ""
    wait_ms: int = 0
    day: int = 0
    ratio: int = RATIO_ONE
    user: bool = False
    counted: Counted | None = None


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


class Extended(Struct, frozen=True, kw_only=True):
    """Answer of `extend`.

    ok: `amount` is held now. denied: it does not fit, `left` is left. closed: the call is not open, or not this
    holder's. stale: ran after its not-after. missing: no such entry.
    """

    status: Literal["ok", "denied", "closed", "stale", "missing"]
    amount: int = 0
    left: int = 0


class Settled(Struct, frozen=True, kw_only=True):
    """Answer of `settle` and `correct`.

    settled; overrun: the same, above what was held; late: was unconfirmed, voided or posted; opened: no entry was
    known, posted as its own; corrected: another cost was posted; duplicate: it was right already; missing: nobody
    knows it. `line`: id of the journal's line, "" where nothing was done.
    """

    status: Literal["settled", "overrun", "late", "opened", "corrected", "duplicate", "missing"]
    line: str = ""


class Level(Struct, frozen=True, kw_only=True):
    """One row of `hotpath budget show`: nano-USD; `limit` None = none. `bucket` names the period, e.g. 2026-11-21.

    `level`: "tenant", "key" or "user"; `name`: the key's or user's id."""

    level: str
    period: Literal["day", "month", "lifetime"]
    settled: int
    pending: int
    unconfirmed: int
    limit: int | None
    bucket: str = ""
    name: str = ""


class Ledger(Protocol):
    """The two-phase ledger (DESIGN 4). Every method is one Lua call, idempotent per its arguments.

    It moves every level that applies: the tenant, the key, and the user where that has a limit; each with a balance of
    the day, the month and the lifetime, and any of three limits.
    """

    async def reserve(
        self, *, tenant: str, rid: str, delivery: int, amount: int, deadline: int, not_after: int,
        key: str, user: str = "", least: int = 0, rates: Rates | None = None,
    ) -> Reserved:  # fmt: skip
        """Hold `amount` for the request's first call. Leased to deadline + 10 s.

        `least` > 0: when `amount` does not fit but this does, hold what is left (clamping)."""

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

    async def extend(
        self, *, tenant: str, rid: str, call: int, delivery: int, instance: str, total: int, not_after: int
    ) -> Extended:
        """Hold `total` in all for an open call of this holder (mid-stream); less than is held already is ok."""

    async def settle(
        self, *, tenant: str, rid: str, call: int, cost: int, estimated: bool = False,
        key: str = "", user: str = "", day: int = 0, tokens: int = 0,
    ) -> Settled:  # fmt: skip
        """Post what was really used, in full. `key`, `user` and `day` (0 = today) say whom and when to charge should no
        entry be known; `tokens` puts the rate limits right."""

    async def correct(
        self, *, tenant: str, rid: str, call: int, cost: int, key: str = "", user: str = "", day: int = 0, was: int = -1
    ) -> Settled:
        """Reconcile: the call's cost is this, whatever was posted. `was`: what the journal says was posted, for a call
        whose entry is forgotten; -1: unknown, then nothing is done without an entry ("missing")."""

    async def void(
        self, *, tenant: str, rid: str, delivery: int, instance: str = "", call: int = 1, key: str = "", user: str = ""
    ) -> str:
        """Give an undispatched reservation back. "voided", or "kept" (a later delivery reserved, or one dispatched).

        With `instance` also what a dispatch (or, with its number as `call`, a topup) of that instance may have opened
        whose answer never came: it is settled at 0."""

    async def expire(self, *, tenant: str) -> tuple[int, str]:
        """Sweep up to 16 expired leases; how many were, and the journal's snapshot line if one was written."""

    async def balances(self, *, tenant: str, level: str = "t") -> list[Level]:
        """The current day, month and lifetime of the tenant, of a key ("k:<id>") or of a user ("u:<id>")."""

    async def set_limit(self, *, tenant: str, period: str, limit: int | None, level: str = "t") -> None:
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
    limited: bool = False  # the tenant or the key has a hard limit: money fails closed (D4)
    mode: Literal["off", "observe", "active"] = "observe"  # of the guardian's advice (S2-15)
    pii: Literal["off", "flag", "redact", "block"] = "off"  # what is done about personal data in prompts
    keywords: tuple[str, ...] = ()  # and about these words
    clamp: bool = True  # lower the output cap to the budget's headroom instead of refusing
    tenant_rpm: int = 0  # requests and tokens a minute; 0 = no limit
    tenant_tpm: int = 0
    key_rpm: int = 0
    key_tpm: int = 0
    expires: int = 0  # shared-clock ms; 0 = never
    models: frozenset[str] = frozenset()  # the key may ask for these; empty = all


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
