"""The two-phase ledger over the Lua scripts (DESIGN 4): each verb one call, each answer one Struct.

Amounts are nano-USD, times milliseconds of the shared clock. The scripts decide; this file packs and reads.
"""

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, cast

from msgspec import Struct

from shared.state import keys
from shared.state.base import (
    Bucket,
    Counted,
    Dispatched,
    Extended,
    NotApplied,
    Rates,
    Reserved,
    Settled,
    StateUnavailable,
)
from shared.state.books import MAX_AMOUNT, POST_TIMEOUT, READ_TIMEOUT, Books, Entry, check_amount
from shared.state.pipeline import Pipeline
from shared.state.scripts import Scripts, ledger_script

__all__ = ["MAX_AMOUNT", "Entry", "RedisLedger"]

#: No Plan is that long; keeps entries small whatever a caller sends.
MAX_CALL: Final = 64

#: Client-side times in seconds (DESIGN 4).
ADMIT_TIMEOUT: Final = 0.100  # reserve, dispatch, topup, extend

#: How long balances of past days and months are kept: two months of `budget show` by day, two years by month.
KEEP_DAYS: Final = 62
KEEP_MONTHS: Final = 24
#: Of users, of whom there may be thousands, only what limits still look at, and yesterday for calls that end late.
KEEP_USER_DAYS: Final = 3

#: Entries swept by one script call (lua/_sweep.lua), and calls of one sweep per tenant: 512 entries a second each.
SWEPT_AT_ONCE: Final = 16
SWEEPS_A_TURN: Final = 32
#: Tenants whose next due time is asked in one pipelined write.
TENANTS_AT_ONCE: Final = 256
#: A tenant with nothing due is asked again after this at the latest: below the 5 s of I3, above one look per second.
LOOK_AGAIN_MS: Final = 3000

#: Keys of so many tenants stay composed.
_KEYS_KEPT: Final = 4096

_NAMES: Final = ("reserve", "dispatch", "topup", "extend", "settle", "void", "expire", "correct", "restore", "merge")
SCRIPTS: Final = {name: ledger_script(name) for name in _NAMES}
_RESERVE, _DISPATCH, _TOPUP, _EXTEND, _SETTLE, _VOID, _EXPIRE, _CORRECT, _RESTORE, _MERGE = SCRIPTS.values()
_UNRATED: Final = (b"", 0, 0, 0, 0)


def _rid(rid: str) -> bytes:
    """The 16 bytes of a request id (half the memory of its hex). Raises ValueError for what is not 32 hex digits."""
    raw = bytes.fromhex(rid)
    if len(raw) != 16:
        raise ValueError("a request id is 32 hex digits")
    return raw


def _call(call: int) -> int:
    if not 1 <= call <= MAX_CALL:
        raise ValueError(f"not the number of a call: {call}")
    return call


def _settled(reply: list[Any]) -> Settled:
    return Settled(status=reply[0].decode(), line=reply[1].decode())


def _reserved(reply: list[Any]) -> Reserved:
    status = reply[0]
    if status == b"ok":
        _, held, day, ratio, user, *counts = reply
        return Reserved(
            status="ok",
            amount=held,
            day=day,
            ratio=ratio,
            user=bool(user),
            counted=_counted(counts) if counts else None,
        )
    if status == b"denied":
        return Reserved(status="denied", left=reply[1], level=reply[2].decode(), period=reply[3].decode())
    if status == b"limited":
        _, wait_ms, level, period, *counts = reply
        return Reserved(
            status="limited", wait_ms=wait_ms, level=level.decode(), period=period.decode(), counted=_counted(counts)
        )
    return Reserved(status=status.decode())


def _counted(counts: list[int]) -> Counted:
    requests, tokens = (Bucket(*counts[i : i + 3]) if counts[i] else None for i in (0, 3))
    minute, hour = counts[6:] or (0, 0)
    return Counted(requests=requests, tokens=tokens, minute=minute, hour=hour)


def _dispatched(reply: list[Any]) -> Dispatched:
    status = reply[0]
    if status == b"won":
        return Dispatched(status="won", call=reply[1])
    if status in {b"refused", b"closed"}:
        return Dispatched(status=status.decode(), holder=reply[1].decode(), delivery=reply[2])
    if status == b"denied":
        return Dispatched(status="denied", left=reply[1])
    return Dispatched(status=status.decode())


class Swept(Struct, frozen=True):
    """What a sweep did: entries that were due, and the snapshots written to journals: (tenant, line id)."""

    entries: int
    snapshots: list[tuple[str, str]]


class RedisLedger(Books):
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
        journal_lines: int,
        snapshot_ms: int,
        renew_ms: int,
        announce: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """`journal_lines`: a snapshot is written when so many lines came; `renew_ms`: and after this when none did; see
        `Books` for the rest."""
        spans = (b"%d" % lease_grace_ms, b"%d" % tombstone_ms, b"%d" % unconfirmed_ms)
        super().__init__(pipeline, scripts, now=now, spans=spans, announce=announce)
        self._expiring = (b"", *spans, KEEP_DAYS, KEEP_MONTHS, KEEP_USER_DAYS, journal_lines, snapshot_ms, renew_ms)
        self._keys: dict[str, tuple[bytes, ...]] = {}
        self._look_at: dict[str, int] = {}
        self._renew_ms = renew_ms
        self._renew_at: dict[str, int] = {}

    def _ledger_keys(self, tenant: str) -> tuple[bytes, ...]:
        known = self._keys.get(tenant)
        if known is None:
            if len(self._keys) >= _KEYS_KEPT:
                self._keys.clear()
            known = self._keys[tenant] = keys.ledger(tenant)
        return known

    async def reserve(
        self, *, tenant: str, rid: str, delivery: int, amount: int, deadline: int, not_after: int,
        key: str, user: str = "", least: int = 0, rates: Rates | None = None,
    ) -> Reserved:  # fmt: skip
        """Hold `amount` for the request's first call. See `base.Ledger`. Raises StateUnavailable, ValueError."""
        counts: tuple[bytes | int, ...] = _UNRATED
        if rates is not None:
            counts = (
                rates.tokens, rates.tenant_requests, rates.tenant_tokens, rates.key_requests, rates.key_tokens
            )  # fmt: skip
        args = (
            _rid(rid), *self._spans, delivery, check_amount(amount), deadline, not_after,
            key.encode(), user.encode(), check_amount(least), *counts,
        )  # fmt: skip
        try:
            return _reserved(await self._run(_RESERVE, self._ledger_keys(tenant), args, ADMIT_TIMEOUT))
        except NotApplied as error:
            if "LOST " not in str(error):
                raise
            return Reserved(status="lost")

    async def dispatch(
        self, *, tenant: str, rid: str, delivery: int, instance: str, lost: str, amount: int, max_calls: int,
        not_after: int,
    ) -> Dispatched:  # fmt: skip
        """Win the right to make the next upstream call. Raises StateUnavailable, ValueError.

        `closed` names the last holder: it settled its call and may be between two calls, or done.
        """
        args = (
            _rid(rid), *self._spans, delivery, instance.encode(), lost.encode(), check_amount(amount), max_calls,
            not_after,
        )  # fmt: skip
        return _dispatched(await self._run(_DISPATCH, self._ledger_keys(tenant), args, ADMIT_TIMEOUT))

    async def topup(
        self, *, tenant: str, rid: str, call: int, delivery: int, instance: str, amount: int, max_calls: int,
        not_after: int,
    ) -> Dispatched:  # fmt: skip
        """Open call `call` (= n+1) of the holder of call n. Raises StateUnavailable, ValueError.

        Call n should be settled; when its settle got no answer, n becomes unconfirmed and its settle may come late.
        """
        args = (_rid(rid), *self._spans, call, delivery, instance.encode(), check_amount(amount), max_calls, not_after)
        return _dispatched(await self._run(_TOPUP, self._ledger_keys(tenant), args, ADMIT_TIMEOUT))

    async def extend(
        self, *, tenant: str, rid: str, call: int, delivery: int, instance: str, total: int, not_after: int
    ) -> Extended:
        """Hold `total` in all for an open call. See `base.Ledger`. Raises StateUnavailable, ValueError."""
        args = (_rid(rid), *self._spans, _call(call), delivery, instance.encode(), check_amount(total), not_after)
        reply = await self._run(_EXTEND, self._ledger_keys(tenant), args, ADMIT_TIMEOUT)
        if reply[0] == b"ok":
            return Extended(status="ok", amount=reply[1])
        if reply[0] == b"denied":
            return Extended(status="denied", left=reply[1])
        return Extended(status=reply[0].decode())

    async def settle(
        self, *, tenant: str, rid: str, call: int, cost: int, estimated: bool = False,
        key: str = "", user: str = "", day: int = 0, tokens: int = 0,
    ) -> Settled:  # fmt: skip
        """Post what was really used, in full. See `base.Ledger`. Raises StateUnavailable, ValueError."""
        args = (
            _rid(rid), *self._spans, _call(call), check_amount(cost), int(estimated), key.encode(), user.encode(), day,
            tokens,
        )  # fmt: skip
        return _settled(await self._run(_SETTLE, self._ledger_keys(tenant), args, POST_TIMEOUT))

    async def correct(
        self, *, tenant: str, rid: str, call: int, cost: int, key: str = "", user: str = "", day: int = 0, was: int = -1
    ) -> Settled:
        """Put a call right by the provider's bill. See `base.Ledger`. Raises StateUnavailable, ValueError."""
        args = (
            _rid(rid), *self._spans, _call(call), check_amount(cost), key.encode(), user.encode(), day, was
        )  # fmt: skip
        return _settled(await self._run(_CORRECT, self._ledger_keys(tenant), args, POST_TIMEOUT))

    async def void(
        self, *, tenant: str, rid: str, delivery: int, instance: str = "", call: int = 1, key: str = "", user: str = ""
    ) -> str:
        """Nothing was used by this delivery: give an undispatched reservation back. "voided" or "kept".

        With `instance`, the open call this instance may have won under this delivery is settled at 0 as well: what a
        provider sends whose dispatch stayed in doubt (DESIGN 3), since it cannot know the call's number. After a topup
        in doubt `call` is the number it asked for: call n, which was made, must keep its place for its own settle.
        `key` and `user` are charged should the request be settled after all, though it was never reserved.
        Raises StateUnavailable, ValueError.
        """
        args = (_rid(rid), *self._spans, delivery, instance.encode(), call, key.encode(), user.encode())
        reply = await self._run(_VOID, self._ledger_keys(tenant), args, POST_TIMEOUT)
        return cast("str", reply[0].decode())

    async def expire(self, *, tenant: str) -> tuple[int, str]:
        """Sweep up to 16 due entries, and look after balances and journal; how many were due, and the journal id of the
        snapshot that was written ("" = none). Raises StateUnavailable."""
        swept, snapshot = await self._run(_EXPIRE, self._ledger_keys(tenant), self._expiring, POST_TIMEOUT)
        return swept, snapshot.decode()

    async def restore(self, *, tenant: str, fields: dict[str, str], last: str = "") -> str:
        """Put lost balances back: "restored", "kept" (they are not lost), "moved" (the journal's newest line is not
        `last`: replay again). Raises StateUnavailable."""
        flat = [part.encode() for pair in fields.items() for part in pair]
        args = (b"", *self._spans, last.encode(), *flat)
        reply = await self._run(_RESTORE, self._ledger_keys(tenant), args, READ_TIMEOUT)
        return cast("str", reply[0].decode())

    async def merge(self, *, tenant: str, fields: dict[str, str], snapshot: str, last: str) -> str:
        """Add a snapshot of before everything was lost: "merged", "moved" (the journal's newest line is not `last`),
        "lost" (the balances alone are gone: `restore` them first). Raises StateUnavailable."""
        flat = [part.encode() for pair in fields.items() for part in pair]
        args = (b"", *self._spans, last.encode(), snapshot.encode(), *flat)
        reply = await self._run(_MERGE, self._ledger_keys(tenant), args, READ_TIMEOUT)
        return cast("str", reply[0].decode())

    async def sweep(self, tenants: Iterable[str], dice: Callable[[], float] = random.random) -> Swept:
        """The idle sweep: expires what is due for tenants to which no request comes (I3), and looks after the journals.

        Each guardian calls `await ledger.sweep(registry.tenants())` once a second from a task of its own and swallows
        StateUnavailable (the next second asks again). Cost: one pipelined ZRANGE for each tenant whose next due time
        is not known to be further off, at most every 3 s, and one `expire` for each that has entries, or is due for a
        snapshot; several guardians begin at different places, so they seldom ask for the same work. Raises
        StateUnavailable.
        """
        now = self._now()
        waiting = [tenant for tenant in tenants if self._look_at.get(tenant, 0) <= now]
        if len(self._look_at) > 2 * len(waiting) + _KEYS_KEPT:
            self._look_at.clear()  # tenants come and go; all are asked anew
            self._renew_at.clear()
        start = int(dice() * len(waiting))
        waiting = waiting[start:] + waiting[:start]
        swept, snapshots = 0, []
        for first in range(0, len(waiting), TENANTS_AT_ONCE):
            for tenant in await self._with_work(waiting[first : first + TENANTS_AT_ONCE], dice):
                for _ in range(SWEEPS_A_TURN):
                    count, snapshot = await self.expire(tenant=tenant)
                    swept += count
                    if snapshot:
                        snapshots.append((tenant, snapshot))
                    if count < SWEPT_AT_ONCE:
                        break
        return Swept(swept, snapshots)

    async def _with_work(self, tenants: list[str], dice: Callable[[], float]) -> list[str]:
        """Those of the tenants that have entries, or are due for a snapshot; notes when to look at them again."""
        first = [(b"ZRANGE", self._ledger_keys(tenant)[2], 0, 0, b"WITHSCORES") for tenant in tenants]
        replies = await self._pipeline.many(first, POST_TIMEOUT)
        now = self._now()
        found = []
        for tenant, reply in zip(tenants, replies, strict=True):
            if isinstance(reply, Exception):
                raise StateUnavailable(f"redis: {reply}")
            renew_at = self._renew_at.setdefault(tenant, now + int(dice() * self._renew_ms))  # spread over the time
            if renew_at <= now:
                self._renew_at[tenant] = now + self._renew_ms
            if reply or renew_at <= now:
                found.append(tenant)
            due = int(float(reply[1])) if reply else now + LOOK_AGAIN_MS
            self._look_at[tenant] = min(due, now + LOOK_AGAIN_MS) if due > now else 0
        return found
