"""The two-phase ledger over the Lua scripts (DESIGN 4): each verb one call, each answer one Struct.

Amounts are nano-USD, times milliseconds of the shared clock. The scripts decide; this file packs and reads.
"""

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Literal, cast, get_args

import msgspec
from msgspec import Struct

from shared.state import keys
from shared.state.base import Dispatched, Level, Reserved, StateUnavailable
from shared.state.keys import Period
from shared.state.pipeline import Pipeline
from shared.state.scripts import LEDGER, Scripts, load

#: Lua's exact integers end here: limits and amounts above are refused ($9,007,199).
MAX_AMOUNT: Final = 2**53 - 1
#: No Plan is that long; keeps entries small whatever a caller sends.
MAX_CALL: Final = 64

#: Client-side times in seconds (DESIGN 4).
ADMIT_TIMEOUT: Final = 0.100  # reserve, dispatch, topup
POST_TIMEOUT: Final = 0.150  # settle, void, and what nobody waits for

#: How long balances of past days and months are kept: two months of `budget show` by day, two years by month.
KEEP_DAYS: Final = 62
KEEP_MONTHS: Final = 24

#: Entries swept by one script call (lua/_entries.lua), and calls of one sweep per tenant: 512 entries a second each.
SWEPT_AT_ONCE: Final = 16
SWEEPS_A_TURN: Final = 32
#: Tenants whose next due time is asked in one pipelined write.
TENANTS_AT_ONCE: Final = 256
#: A tenant with nothing due is asked again after this at the latest: below the 5 s of I3, above one look per second.
LOOK_AGAIN_MS: Final = 3000

#: Keys of so many tenants stay composed.
_KEYS_KEPT: Final = 4096

SCRIPTS: Final = {name: load(name, *LEDGER) for name in ("reserve", "dispatch", "topup", "settle", "void", "expire")}
_RESERVE, _DISPATCH, _TOPUP, _SETTLE, _VOID, _EXPIRE = SCRIPTS.values()

State = Literal["reserved", "voided", "dispatched", "settled", "unconfirmed", "posted"]
_CALL_STATES: Final[dict[str, State]] = {"D": "dispatched", "S": "settled", "U": "unconfirmed", "B": "posted"}


class Entry(Struct, frozen=True, kw_only=True):
    """One call of a request as the ledger holds it (or the request itself, call 0, while it has none).

    `posted` is an unconfirmed call that was posted at its upper bound. `amount` was held, `cost` was posted.
    """

    rid: str
    call: int
    state: State
    amount: int
    cost: int
    estimated: bool
    instance: str
    delivery: int
    deadline: int
    day: int  # of the reserve, days since 1970-01-01: the period that is charged


def _rid(rid: str) -> bytes:
    """The 16 bytes of a request id (half the memory of its hex). Raises ValueError for what is not 32 hex digits."""
    raw = bytes.fromhex(rid)
    if len(raw) != 16:
        raise ValueError("a request id is 32 hex digits")
    return raw


def _amount(amount: int) -> int:
    if not 0 <= amount <= MAX_AMOUNT:
        raise ValueError(f"not an amount in nano-USD: {amount}")
    return amount


def _dispatched(reply: list[Any]) -> Dispatched:
    status = reply[0]
    if status == b"won":
        return Dispatched(status="won", call=reply[1])
    if status in {b"refused", b"closed"}:
        return Dispatched(status=status.decode(), holder=reply[1].decode(), delivery=reply[2])
    if status == b"denied":
        return Dispatched(status="denied", left=reply[1])
    return Dispatched(status=status.decode())


class RedisLedger:
    """`base.Ledger` on one pipelined connection."""

    def __init__(
        self,
        pipeline: Pipeline,
        scripts: Scripts,
        *,
        now: Callable[[], int],
        lease_grace_ms: int,
        tombstone_ms: int,
        unconfirmed_ms: int,
        announce: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """`announce(tenant)` tells every process that the tenant's limits changed (the registry's version)."""
        self._pipeline = pipeline
        self._run = scripts.run
        self._now = now
        self._announce = announce
        self._spans = (b"%d" % lease_grace_ms, b"%d" % tombstone_ms, b"%d" % unconfirmed_ms)
        self._keys: dict[str, tuple[bytes, bytes, bytes]] = {}
        self._look_at: dict[str, int] = {}

    def _ledger_keys(self, tenant: str) -> tuple[bytes, bytes, bytes]:
        known = self._keys.get(tenant)
        if known is None:
            if len(self._keys) >= _KEYS_KEPT:
                self._keys.clear()
            known = self._keys[tenant] = keys.ledger(tenant)
        return known

    async def reserve(
        self, *, tenant: str, rid: str, delivery: int, amount: int, deadline: int, not_after: int
    ) -> Reserved:
        """Hold `amount` for the request's first call. See `base.Ledger`. Raises StateUnavailable, ValueError."""
        args = (_rid(rid), *self._spans, delivery, _amount(amount), deadline, not_after)
        reply = await self._run(_RESERVE, self._ledger_keys(tenant), args, ADMIT_TIMEOUT)
        if reply[0] == b"ok":
            return Reserved(status="ok", amount=reply[1])
        if reply[0] == b"denied":
            return Reserved(status="denied", left=reply[1])
        return Reserved(status=reply[0].decode())

    async def dispatch(
        self, *, tenant: str, rid: str, delivery: int, instance: str, lost: str, amount: int, max_calls: int,
        not_after: int,
    ) -> Dispatched:  # fmt: skip
        """Win the right to make the next upstream call. Raises StateUnavailable, ValueError.

        `closed` names the last holder: it settled its call and may be between two calls, or done.
        """
        args = (
            _rid(rid), *self._spans, delivery, instance.encode(), lost.encode(), _amount(amount), max_calls, not_after,
        )  # fmt: skip
        return _dispatched(await self._run(_DISPATCH, self._ledger_keys(tenant), args, ADMIT_TIMEOUT))

    async def topup(
        self, *, tenant: str, rid: str, call: int, delivery: int, instance: str, amount: int, max_calls: int,
        not_after: int,
    ) -> Dispatched:  # fmt: skip
        """Open call `call` (= n+1) of the holder of call n. Raises StateUnavailable, ValueError.

        Call n should be settled; when its settle got no answer, n becomes unconfirmed and its settle may come late.
        """
        args = (_rid(rid), *self._spans, call, delivery, instance.encode(), _amount(amount), max_calls, not_after)
        return _dispatched(await self._run(_TOPUP, self._ledger_keys(tenant), args, ADMIT_TIMEOUT))

    async def settle(self, *, tenant: str, rid: str, call: int, cost: int, estimated: bool = False) -> str:
        """Post what was really used, in full. See `base.Ledger`. Raises StateUnavailable, ValueError."""
        if not 1 <= call <= MAX_CALL:
            raise ValueError(f"not the number of a call: {call}")
        args = (_rid(rid), *self._spans, call, _amount(cost), int(estimated))
        reply = await self._run(_SETTLE, self._ledger_keys(tenant), args, POST_TIMEOUT)
        return cast("str", reply[0].decode())

    async def void(self, *, tenant: str, rid: str, delivery: int, instance: str = "", call: int = 1) -> str:
        """Nothing was used by this delivery: give an undispatched reservation back. "voided" or "kept".

        With `instance`, the open call this instance may have won under this delivery is settled at 0 as well: what a
        provider sends whose dispatch stayed in doubt (DESIGN 3), since it cannot know the call's number. After a topup
        in doubt `call` is the number it asked for: call n, which was made, must keep its place for its own settle.
        Raises StateUnavailable, ValueError.
        """
        args = (_rid(rid), *self._spans, delivery, instance.encode(), call)
        reply = await self._run(_VOID, self._ledger_keys(tenant), args, POST_TIMEOUT)
        return cast("str", reply[0].decode())

    async def expire(self, *, tenant: str) -> int:
        """Sweep up to 16 due entries; how many were. Raises StateUnavailable."""
        args = (b"", *self._spans, KEEP_DAYS, KEEP_MONTHS)
        return cast("int", await self._run(_EXPIRE, self._ledger_keys(tenant), args, POST_TIMEOUT))

    async def sweep(self, tenants: Iterable[str], dice: Callable[[], float] = random.random) -> int:
        """The idle sweep: expires what is due for tenants to which no request comes (I3); returns how many entries.

        Each guardian calls `await ledger.sweep(registry.tenants())` once a second from a task of its own and swallows
        StateUnavailable (the next second asks again). Cost: one pipelined ZRANGE for each tenant whose next due time
        is not known to be further off, at most every 3 s; several guardians begin at different places, so they
        seldom ask for the same work. Raises StateUnavailable.
        """
        now = self._now()
        waiting = [tenant for tenant in tenants if self._look_at.get(tenant, 0) <= now]
        if len(self._look_at) > 2 * len(waiting) + _KEYS_KEPT:
            self._look_at.clear()  # tenants come and go; all are asked anew
        start = int(dice() * len(waiting))
        waiting = waiting[start:] + waiting[:start]
        swept = 0
        for first in range(0, len(waiting), TENANTS_AT_ONCE):
            for tenant in await self._due(waiting[first : first + TENANTS_AT_ONCE]):
                for _ in range(SWEEPS_A_TURN):
                    count = await self.expire(tenant=tenant)
                    swept += count
                    if count < SWEPT_AT_ONCE:
                        break
        return swept

    async def _due(self, tenants: list[str]) -> list[str]:
        """Those of the tenants that have a due entry now; notes when to look at the others again."""
        first = [(b"ZRANGE", self._ledger_keys(tenant)[2], 0, 0, b"WITHSCORES") for tenant in tenants]
        replies = await self._pipeline.many(first, POST_TIMEOUT)
        now = self._now()
        due = []
        for tenant, reply in zip(tenants, replies, strict=True):
            if isinstance(reply, Exception):
                raise StateUnavailable(f"redis: {reply}")
            if reply and float(reply[1]) <= now:
                due.append(tenant)
            else:
                self._look_at[tenant] = min(int(float(reply[1])), now + LOOK_AGAIN_MS) if reply else now + LOOK_AGAIN_MS
        return due

    async def balances(self, *, tenant: str) -> list[Level]:
        """The current day, month and lifetime of the tenant. Raises StateUnavailable, for damaged numbers too."""
        now = self._now()
        buckets = [keys.bucket(period, now) for period in keys.PERIODS]
        fields = [
            field
            for period, bucket in zip(keys.PERIODS, buckets, strict=True)
            for field in (*(keys.balance_field(bucket, kind) for kind in ("s", "p", "u")), keys.limit_field(period))
        ]
        values = await self._pipeline.execute(b"HMGET", keys.balances(tenant), *fields, within=POST_TIMEOUT)
        try:
            numbers = [None if value is None else int(value) for value in values]
        except ValueError as error:
            raise StateUnavailable(f"a balance or limit of {tenant} is damaged: {error}") from error
        return [
            Level(
                level="tenant",
                period=period,
                bucket=bucket,
                settled=numbers[4 * i] or 0,
                pending=numbers[4 * i + 1] or 0,
                unconfirmed=numbers[4 * i + 2] or 0,
                limit=numbers[4 * i + 3],
            )
            for i, (period, bucket) in enumerate(zip(keys.PERIODS, buckets, strict=True))
        ]

    async def set_limit(self, *, tenant: str, period: str, limit: int | None) -> None:
        """Set or clear a limit and announce it. Raises ValueError (period, or above 2^53 - 1), StateUnavailable."""
        if period not in get_args(Period):
            raise ValueError(f"a period is day, month or lifetime, not {period!r}")
        field = keys.limit_field(cast("Period", period))
        if limit is None:
            await self._pipeline.execute(b"HDEL", keys.balances(tenant), field, within=POST_TIMEOUT)
        else:
            number = _amount(limit)
            await self._pipeline.execute(b"HSET", keys.balances(tenant), field, number, within=POST_TIMEOUT)
        if self._announce is not None:
            await self._announce(tenant)

    async def entries(self, *, tenant: str, at_most: int = 100_000) -> list[Entry]:
        """The calls the ledger remembers, at most so many: `hotpath ledger show`. Raises StateUnavailable."""
        found: dict[bytes, list[Entry]] = {}
        cursor = b"0"
        while True:
            cursor, page = await self._pipeline.execute(
                b"HSCAN", keys.entries(tenant), cursor, b"COUNT", 200, within=POST_TIMEOUT
            )
            for rid, packed in zip(page[::2], page[1::2], strict=True):
                found[rid] = list(_read(rid.hex(), msgspec.msgpack.decode(packed)))
            if cursor == b"0" or len(found) >= at_most:
                return [entry for entries in found.values() for entry in entries][:at_most]


def _read(rid: str, entry: list[Any]) -> Iterable[Entry]:
    """An entry as lua/_balances.lua describes it."""
    state, delivery, _voided, deadline, day, amount, *calls = entry
    if not calls:
        yield Entry(
            rid=rid, call=0, state="reserved" if state == "R" else "voided", amount=amount, cost=0, estimated=False,
            instance="", delivery=delivery, deadline=deadline, day=day,
        )  # fmt: skip
    for number, call_state, held, cost, estimated, instance, holder_delivery, _due in calls:
        yield Entry(
            rid=rid, call=number, state=_CALL_STATES[call_state], amount=held, cost=cost, estimated=bool(estimated),
            instance=instance, delivery=holder_delivery, deadline=deadline, day=day,
        )  # fmt: skip
