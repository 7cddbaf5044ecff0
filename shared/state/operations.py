"""What an operator may ask and do, by the names an operator uses: `hotpath keys|tenant|budget|spend` and the admin API
are two ways to call this, so that they cannot differ. Amounts are integers of nano-USD, times ms since 1970.

Raises: Missing (no such tenant, key or request), Contrary (not as things stand), ValueError (what was asked for cannot
be; the message says why),
StateUnavailable (Redis).
"""

import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Literal, Protocol, get_args

from msgspec import UNSET, Meta, Struct, UnsetType

from shared.core.users import user_id
from shared.state import keys
from shared.state.admin import Admin, Contrary, KeyInfo, NewKey, TenantInfo
from shared.state.base import Level, StateUnavailable
from shared.state.books import MAX_AMOUNT, Entry, read_balance
from shared.state.costs import Costs, Spent
from shared.state.keys import Period
from shared.state.policies import KeyChange, Mode, Pii, TenantChange

By = Literal["model", "key", "day"]
#: Days shown of `--by day` unless told otherwise.
DAYS: Final = 30
#: The ledger keeps a day's balance for so long (state/ledger.py KEEP_DAYS).
MAX_DAYS: Final = 62
#: Longest `user` field that can have a limit.
MAX_USER: Final = 256

_RID: Final = re.compile(r"[0-9a-f]{32}")
_BUCKET: Final = re.compile(r"(t|k:[A-Za-z0-9_-]{1,64}):(\d{4}-\d\d-\d\d|lifetime)")

Amount = Annotated[int, Meta(ge=0, le=MAX_AMOUNT, description="nano-USD")]
Limit = Annotated[int, Meta(ge=0, le=MAX_AMOUNT)] | None


class Missing(LookupError):
    """There is no such tenant, key or request: `kind` says which, the message names it."""

    def __init__(self, kind: Literal["tenant", "key", "request"], name: str) -> None:
        self.kind = kind
        self.name = name[:80]
        super().__init__(f"there is no {kind} {name[:80]}")


class Limits(Struct, kw_only=True, forbid_unknown_fields=True):
    """Limits to set; null clears one, and a period that is not named stays as it is."""

    day: Limit | UnsetType = UNSET
    month: Limit | UnsetType = UNSET
    lifetime: Limit | UnsetType = UNSET

    def named(self) -> dict[Period, int | None]:
        """Those that are named."""
        found = {period: getattr(self, period) for period in keys.PERIODS}
        return {period: amount for period, amount in found.items() if amount is not UNSET}


class BudgetLevel(Struct, kw_only=True):
    """One period of a level: what was spent, is reserved, and is held for calls whose worker died (nano-USD)."""

    level: str  # tenant, key or user
    period: Period
    settled: int
    pending: int
    unconfirmed: int
    limit: int | None


class Budget(Struct, kw_only=True):
    """The current day, month and lifetime of a tenant, or of a key or user of it (`user` is the opaque id)."""

    tenant: str
    key: str | UnsetType = UNSET
    user: str | UnsetType = UNSET
    levels: list[BudgetLevel]


class Key(Struct, kw_only=True):
    """A key without its secret. `revoked` and `expires` are 0 when it is not; rates 0 and models [] mean no bound."""

    key_id: str
    tenant_id: str
    tenant: str
    synthetic: bool
    created: int
    revoked: int
    expires: int
    models: list[str]
    rpm: int
    tpm: int


class Tenant(Struct, kw_only=True):
    """A tenant and its policy."""

    tenant: str
    tenant_id: str
    synthetic: bool
    created: int
    mode: Mode
    pii: Pii
    keywords: list[str]
    clamp: bool
    rpm: int
    tpm: int


class Row(Struct, kw_only=True, omit_defaults=True):
    """What one model, key or day cost. By key and day it is the ledger's: `pending` and `unconfirmed` too; by model the
    cost tracker's: requests and tokens."""

    name: str
    settled: int
    pending: int | UnsetType = UNSET
    unconfirmed: int | UnsetType = UNSET
    requests: int | UnsetType = UNSET
    input_tokens: int | UnsetType = UNSET
    output_tokens: int | UnsetType = UNSET


class Spend(Struct, kw_only=True):
    """`days` 0: since ever."""

    tenant: str
    by: By
    days: int
    settled: int
    rows: list[Row]


class Counts(Struct, kw_only=True):
    """Upstream calls that used something, and what they cost."""

    requests: int
    cost: int
    input_tokens: int
    output_tokens: int


class CostReport(Struct, kw_only=True):
    """The cost tracker's picture: by model since ever, by day (the last 30), by model of each day. `alerts`:
    "lifetime:50", "2026-11-21:20" (USD) -> when each was crossed; `since`: its first batch, 0 for none."""

    tenant: str
    since: int
    total: Counts
    models: dict[str, Counts]
    days: dict[str, Counts]
    models_by_day: dict[str, dict[str, Counts]]
    alerts: dict[str, int]


class Ledger(Protocol):
    """What is asked of the ledger (state/ledger.py)."""

    async def balances(self, *, tenant: str, level: str = "t") -> list[Level]:
        """A level."""

    async def set_limit(self, *, tenant: str, period: str, limit: int | None, level: str = "t") -> None:
        """Journalled and announced."""

    async def levels(self, *, tenant: str) -> dict[str, str]:
        """All fields."""

    async def entry(self, *, tenant: str, rid: str) -> list[Entry]:
        """The calls of a request."""

    async def entries(self, *, tenant: str, at_most: int = 100_000) -> list[Entry]:
        """The calls of all requests."""


class Operations:
    """See the module."""

    def __init__(
        self, *, admin: Admin, ledger: Ledger, costs: Callable[[str], Awaitable[Costs]], pepper: str,
        now: Callable[[], int],
    ) -> None:  # fmt: skip
        """`pepper`: KEY_PEPPER, under which users have their ids; `now`: the shared clock."""
        self._admin = admin
        self._ledger = ledger
        self._costs = costs
        self._pepper = pepper.encode()
        self.now = now

    # ---- tenants and keys --------------------------------------------------------------------------------------------

    async def tenant_id(self, name: str) -> str:
        """The id of a tenant."""
        found = await self._admin.tenant_by_name(name)
        if found is None:
            raise Missing("tenant", name)
        return found

    async def tenants(self) -> list[Tenant]:
        """All of them."""
        return [_tenant(each) for each in await self._admin.list_tenants()]

    async def tenant(self, name: str) -> Tenant:
        """One."""
        (found,) = await self._admin.list_tenants(await self.tenant_id(name))
        return _tenant(found)

    async def set_tenant(self, name: str, change: TenantChange) -> Tenant:
        """Change a tenant's policy; the policy afterwards."""
        await self._admin.set_policy(await self.tenant_id(name), change)
        return await self.tenant(name)

    async def keys(self, tenant: str | None = None) -> list[Key]:
        """Every key ever made (for the tenant of this name), revoked ones too."""
        wanted = None if tenant is None else await self.tenant_id(tenant)
        return [_key(each) for each in await self._admin.list_keys(wanted)]

    async def key(self, key_id: str) -> Key:
        """One key."""
        found = await self._admin.key(key_id)
        if found is None:
            raise Missing("key", key_id)
        return _key(found)

    async def create_key(
        self, tenant: str, *, synthetic: bool, tenant_limits: Limits, limits: Limits, change: KeyChange
    ) -> NewKey:
        """Make a key, and the tenant with it when the name is new. Both with their limits, the key with its policy."""
        return await self._admin.create_key(
            tenant, synthetic=synthetic, tenant_limits=_set(tenant_limits), key_limits=_set(limits), change=change
        )

    async def set_key(self, key_id: str, change: KeyChange) -> Key:
        """Change what a key may do; the key afterwards."""
        if not await self._admin.set_key(key_id, change):
            raise Missing("key", key_id)
        return await self.key(key_id)

    async def revoke_key(self, key_id: str) -> None:
        """Everywhere within a second."""
        if not await self._admin.revoke_key(key_id):
            raise Missing("key", key_id)

    # ---- money -------------------------------------------------------------------------------------------------------

    async def budget(self, tenant: str, *, key: str = "", user: str = "") -> Budget:
        """A tenant's, or that of one of its keys (an id) or users (as requests name them)."""
        found = await self.tenant_id(tenant)
        return await self._budget(tenant, found, await self._level(found, key, user))

    async def set_limits(self, tenant: str, limits: Limits, *, key: str = "", user: str = "") -> Budget:
        """Set and clear limits; the budget afterwards."""
        found = await self.tenant_id(tenant)
        level = await self._level(found, key, user)
        for period, amount in limits.named().items():
            await self._ledger.set_limit(tenant=found, period=period, limit=amount, level=level)
        return await self._budget(tenant, found, level)

    async def _level(self, tenant: str, key: str, user: str) -> str:
        if key and user:
            raise Contrary("a key or a user, not both")
        if user:
            if len(user) > MAX_USER:
                raise ValueError(f"a user's name has at most {MAX_USER} characters")
            return f"u:{user_id(self._pepper, tenant, user)}"
        if key and await self._admin.tenant_of(key) != tenant:
            raise Missing("key", key)
        return f"k:{key}" if key else keys.TENANT_LEVEL

    async def _budget(self, name: str, tenant: str, level: str) -> Budget:
        rows = [
            BudgetLevel(
                level=each.level, period=each.period, settled=each.settled, pending=each.pending,
                unconfirmed=each.unconfirmed, limit=each.limit,
            )
            for each in await self._ledger.balances(tenant=tenant, level=level)
        ]  # fmt: skip
        kind, _, of = level.partition(":")
        return Budget(tenant=name, key=of if kind == "k" else UNSET, user=of if kind == "u" else UNSET, levels=rows)

    async def spend(self, tenant: str, by: By, days: int = 0) -> Spend:
        """What models, keys or days cost; `days`: only the last so many, 0: all (of days: the last 30)."""
        if by not in get_args(By) or not 0 <= days <= MAX_DAYS:
            raise ValueError(f"by model, key or day, of at most {MAX_DAYS} days")
        found = await self.tenant_id(tenant)
        if by == "day" and days == 0:
            days = DAYS
        today = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=self.now())
        wanted = {(today - timedelta(days=ago)).date().isoformat() for ago in range(days)} or {"lifetime"}
        if by == "model":
            costs = await self._costs(found)
            rows = _models(costs, wanted if days else None)
            settled = sum(row.settled for row in rows) if days else costs.total.cost  # of forgotten models too
            return Spend(tenant=tenant, by=by, days=days, settled=settled, rows=rows)
        fields = await self._ledger.levels(tenant=found)
        try:
            rows = _rows(fields, by, wanted)
        except ValueError as error:
            raise StateUnavailable(f"a balance of {tenant} is damaged: {error}") from error
        return Spend(tenant=tenant, by=by, days=days, settled=sum(row.settled for row in rows), rows=rows)

    async def costs(self, tenant: str) -> CostReport:
        """What the cost tracker has seen of a tenant."""
        costs = await self._costs(await self.tenant_id(tenant))
        return CostReport(
            tenant=tenant, since=costs.since, total=_counts(costs.total),
            models={name: _counts(each) for name, each in costs.models.items()},
            days={date: _counts(each) for date, each in costs.days.items()},
            models_by_day={
                date: {name: _counts(each) for name, each in models.items()} for date, models in costs.by_day.items()
            },
            alerts=costs.alerts,
        )  # fmt: skip

    async def entries(self, tenant: str, rid: str = "") -> list[Entry]:
        """What the ledger remembers of a request's calls, or of all (at most 100,000)."""
        if rid and not _RID.fullmatch(rid):
            raise ValueError(f"{rid[:80]}: a request id is 32 hex digits")
        found = await self.tenant_id(tenant)
        if rid:
            return await self._ledger.entry(tenant=found, rid=rid)
        return await self._ledger.entries(tenant=found)


def _set(limits: Limits) -> dict[Period, int]:
    """Those that are amounts."""
    return {period: amount for period, amount in limits.named().items() if amount is not None}


def _tenant(info: TenantInfo) -> Tenant:
    policy = info.policy
    return Tenant(
        tenant=info.tenant, tenant_id=info.tenant_id, synthetic=info.synthetic, created=info.created,
        mode=policy.mode, pii=policy.pii, keywords=list(policy.keywords), clamp=policy.clamp,
        rpm=policy.rpm, tpm=policy.tpm,
    )  # fmt: skip


def _key(info: KeyInfo) -> Key:
    policy = info.policy
    return Key(
        key_id=info.key_id, tenant_id=info.tenant_id, tenant=info.tenant, synthetic=info.synthetic,
        created=info.created, revoked=info.revoked, expires=policy.expires, models=sorted(policy.models),
        rpm=policy.rpm, tpm=policy.tpm,
    )  # fmt: skip


def _counts(spent: Spent) -> Counts:
    return Counts(
        requests=spent.requests, cost=spent.cost, input_tokens=spent.input_tokens, output_tokens=spent.output_tokens
    )


def _models(costs: Costs, days: Collection[str] | None) -> list[Row]:
    """A row per model: of these days, or since ever; the dearest first."""
    kept = [costs.models] if days is None else [models for date, models in costs.by_day.items() if date in days]
    sums: dict[str, list[int]] = {}
    for models in kept:
        for name, spent in models.items():
            more = (spent.cost, spent.requests, spent.input_tokens, spent.output_tokens)
            sums[name] = [sum(pair) for pair in zip(sums.get(name, (0, 0, 0, 0)), more, strict=True)]
    rows = [
        Row(name=name, settled=cost, requests=requests, input_tokens=read, output_tokens=written)
        for name, (cost, requests, read, written) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row.settled)


def _rows(fields: Mapping[str, str], by: By, wanted: Collection[str]) -> list[Row]:
    """Of the balances: a row per key, its buckets added up, or per day. Raises ValueError for damaged ones."""
    sums: dict[str, list[int]] = {}
    for field, text in fields.items():
        match = _BUCKET.fullmatch(field)
        if match is None or match[2] not in wanted or (match[1] == "t") != (by == "day"):
            continue
        name = match[2] if by == "day" else match[1][2:]
        sums[name] = [sum(pair) for pair in zip(sums.get(name, (0, 0, 0)), read_balance(text.encode()), strict=True)]
    rows = [
        Row(name=name, settled=settled, pending=pending, unconfirmed=unconfirmed)
        for name, (settled, pending, unconfirmed) in sums.items()
    ]
    return sorted(rows, key=lambda row: row.name) if by == "day" else sorted(rows, key=lambda row: -row.settled)
