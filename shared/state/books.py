"""Reading a tenant's books, and setting its limits: balances, entries, the journal (DESIGN 4). Nothing here is hot."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final, Literal, cast, get_args

import msgspec
from msgspec import Struct

from shared.core.transitions import Line
from shared.state import keys
from shared.state.base import Level, StateUnavailable
from shared.state.keys import Period
from shared.state.pipeline import Pipeline
from shared.state.scripts import Scripts, ledger_script, load

#: Lua's exact integers end here: limits and amounts above are refused ($9,007,199).
MAX_AMOUNT: Final = 2**53 - 1
#: Users of one tenant that may have a limit: their balances are read whole by a snapshot.
MAX_USERS: Final = 10_000
#: Client-side time in seconds of what nobody waits for (DESIGN 4).
POST_TIMEOUT: Final = 0.150
#: A page of the journal: some 100 KiB.
PAGE: Final = 1000
#: A snapshot line of 10,000 users is a megabyte.
READ_TIMEOUT: Final = 5.0

State = Literal["reserved", "voided", "dispatched", "settled", "unconfirmed", "posted"]
CALL_STATES: Final[dict[str, State]] = {"D": "dispatched", "S": "settled", "U": "unconfirmed", "B": "posted"}

_LIMIT: Final = ledger_script("limit")
_LOOK: Final = load("look")
_LEVEL: Final = re.compile(r"t|[ku]:[A-Za-z0-9_-]{1,64}")
_NAMES: Final = {"t": "tenant", "k": "key", "u": "user"}


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
    key: str = ""
    user: str = ""


class Look(Struct, frozen=True):
    """The books at one moment. `whole`: `lines` are all there were behind the id, and `fields` all of the balances."""

    now: int  # server ms
    lines: list[Line]
    whole: bool
    fields: dict[str, str]
    entries: dict[str, list[Entry]]  # rid -> its calls, [] = forgotten
    overdue: dict[str, int]  # rid -> when it was due, server ms


def check_amount(amount: int) -> int:
    """The amount. Raises ValueError for what is none in nano-USD."""
    if not 0 <= amount <= MAX_AMOUNT:
        raise ValueError(f"not an amount in nano-USD: {amount}")
    return amount


def check_level(level: str) -> str:
    """The level: "t", "k:<key id>" or "u:<user id>". Raises ValueError for anything else (D6)."""
    if not _LEVEL.fullmatch(level):
        raise ValueError(f"not a level: {level[:80]!r}")
    return level


class Books:
    """What `RedisLedger` can tell of a tenant."""

    def __init__(
        self,
        pipeline: Pipeline,
        scripts: Scripts,
        *,
        now: Callable[[], int],
        spans: tuple[bytes, bytes, bytes],
        announce: Callable[[str], Awaitable[None]] | None,
    ) -> None:
        """`announce(tenant)` tells every process that the tenant's limits changed (the registry's version)."""
        self._pipeline = pipeline
        self._run = scripts.run
        self._now = now
        self._spans = spans
        self._announce = announce

    async def balances(self, *, tenant: str, level: str = "t") -> list[Level]:
        """The current day, month and lifetime of the tenant, or of a key or user of it.

        Raises ValueError (not a level), StateUnavailable, for damaged numbers too.
        """
        now = self._now()
        buckets = [keys.bucket(period, now) for period in keys.PERIODS]
        fields = [keys.balance_field(check_level(level), bucket) for bucket in buckets]
        *values, limits = await self._pipeline.execute(
            b"HMGET", keys.balances(tenant), *fields, keys.limit_field(level), within=POST_TIMEOUT
        )
        try:
            numbers = [(0, 0, 0) if value is None else read_balance(value) for value in values]
            bounds = read_limits(limits)
        except ValueError as error:
            raise StateUnavailable(f"a balance or limit of {tenant} is damaged: {error}") from error
        return [
            Level(
                level=_NAMES[level[0]], name=level[2:], period=period, bucket=bucket,
                settled=settled, pending=pending, unconfirmed=unconfirmed, limit=limit,
            )
            for period, bucket, (settled, pending, unconfirmed), limit in zip(
                keys.PERIODS, buckets, numbers, bounds, strict=True
            )
        ]  # fmt: skip

    async def set_limit(self, *, tenant: str, period: str, limit: int | None, level: str = "t") -> None:
        """Set or clear a limit, write it to the journal and announce it.

        Raises ValueError (level, period, above 2^53 - 1, more than MAX_USERS users), StateUnavailable.
        """
        if period not in get_args(Period):
            raise ValueError(f"a period is day, month or lifetime, not {period!r}")
        number = keys.PERIODS.index(cast("Period", period)) + 1
        value = b"-" if limit is None else b"%d" % check_amount(limit)
        args = (b"", *self._spans, check_level(level).encode(), number, value, MAX_USERS)
        reply = await self._run(_LIMIT, keys.ledger(tenant), args, POST_TIMEOUT)
        if reply[0] == b"full":
            raise ValueError(f"{MAX_USERS} users of this tenant have a limit: clear one first")
        if self._announce is not None:
            await self._announce(tenant)

    async def levels(self, *, tenant: str) -> dict[str, str]:
        """Every field of the balances as it stands, for `hotpath ledger verify` and `spend`: field -> text."""
        flat = await self._pipeline.execute(b"HGETALL", keys.balances(tenant), within=READ_TIMEOUT)
        texts = [each.decode() for each in flat]
        return dict(zip(texts[::2], texts[1::2], strict=True))

    async def look(self, *, tenant: str, after: str, rids: Iterable[str] = (), overdue_ms: int = 0) -> Look:
        """The lines behind the id `after` ("" = all), at most a page, and what stood beside them at the same moment:
        the entries of their requests and of `rids`, leases due more than `overdue_ms` ago (at most 100).

        Raises StateUnavailable.
        """
        args: tuple[bytes | int, ...] = (after.encode(), PAGE, overdue_ms, *(bytes.fromhex(rid) for rid in rids))
        now, lines, flat, entries, due = await self._run(_LOOK, keys.ledger(tenant), args, READ_TIMEOUT)
        texts = [each.decode() for each in flat]
        return Look(
            now=now,
            lines=[read_line(raw_id.decode(), fields[1], fields[3]) for raw_id, fields in lines],
            whole=len(lines) < PAGE,
            fields=dict(zip(texts[::2], texts[1::2], strict=True)),
            entries={
                rid.hex(): [] if packed is None else list(read_entry(rid.hex(), msgspec.msgpack.decode(packed)))
                for rid, packed in zip(entries[::2], entries[1::2], strict=True)
            },
            overdue={rid.hex(): int(float(score)) for rid, score in zip(due[::2], due[1::2], strict=True)},
        )

    async def scan(self, *, tenant: str) -> AsyncIterator[tuple[str, list[Entry]]]:
        """Every request the ledger remembers, page by page: request id and calls. Raises StateUnavailable."""
        cursor = b"0"
        while True:
            cursor, page = await self._pipeline.execute(
                b"HSCAN", keys.entries(tenant), cursor, b"COUNT", 200, within=READ_TIMEOUT
            )
            for rid, packed in zip(page[::2], page[1::2], strict=True):
                yield rid.hex(), list(read_entry(rid.hex(), msgspec.msgpack.decode(packed)))
            if cursor == b"0":
                return

    async def unleased(self, *, tenant: str, rids: list[str]) -> list[str]:
        """Those of the requests that have no lease, so that no sweep will ever find them. Raises StateUnavailable."""
        if not rids:
            return []
        raw = [bytes.fromhex(rid) for rid in rids]
        scores = await self._pipeline.execute(b"ZMSCORE", keys.leases(tenant), *raw, within=READ_TIMEOUT)
        return [rid for rid, score in zip(rids, scores, strict=True) if score is None]

    async def claim(self, token: str, ms: int) -> bool:
        """Be the one who reconciles, for so long, or still be it. Raises StateUnavailable."""
        if await self._pipeline.execute(b"GET", keys.RECONCILE, within=READ_TIMEOUT) == token.encode():
            return bool(await self._pipeline.execute(b"PEXPIRE", keys.RECONCILE, ms, within=READ_TIMEOUT))
        done = await self._pipeline.execute(
            b"SET", keys.RECONCILE, token, b"NX", b"PX", ms, within=READ_TIMEOUT
        )  # fmt: skip
        return done is not None

    async def release(self, token: str) -> None:
        """Let another one reconcile. Raises StateUnavailable."""
        if await self._pipeline.execute(b"GET", keys.RECONCILE, within=READ_TIMEOUT) == token.encode():
            await self._pipeline.execute(b"DEL", keys.RECONCILE, within=READ_TIMEOUT)

    async def entries(self, *, tenant: str, at_most: int = 100_000) -> list[Entry]:
        """The calls the ledger remembers, at most so many: `hotpath ledger show`. Raises StateUnavailable."""
        found: dict[bytes, list[Entry]] = {}
        cursor = b"0"
        while True:
            cursor, page = await self._pipeline.execute(
                b"HSCAN", keys.entries(tenant), cursor, b"COUNT", 200, within=POST_TIMEOUT
            )
            for rid, packed in zip(page[::2], page[1::2], strict=True):
                found[rid] = list(read_entry(rid.hex(), msgspec.msgpack.decode(packed)))
            if cursor == b"0" or len(found) >= at_most:
                return [entry for entries in found.values() for entry in entries][:at_most]

    async def entry(self, *, tenant: str, rid: str) -> list[Entry]:
        """The calls of one request, none when it is forgotten. Raises StateUnavailable, ValueError (rid)."""
        packed = await self._pipeline.execute(b"HGET", keys.entries(tenant), bytes.fromhex(rid), within=POST_TIMEOUT)
        return [] if packed is None else list(read_entry(rid, msgspec.msgpack.decode(packed)))

    async def journal(self, *, tenant: str, after: str = "", count: int = PAGE) -> list[Line]:
        """The next lines behind the id `after` ("" = from the oldest kept), at most so many; [] at the end.

        `after` "1700000000000" begins at that server millisecond. Raises StateUnavailable.
        """
        start = f"({after}" if "-" in after else after or "-"
        found = await self._pipeline.execute(
            b"XRANGE", keys.journal(tenant), start, b"+", b"COUNT", count, within=READ_TIMEOUT
        )
        return [read_line(raw_id.decode(), fields[1], fields[3]) for raw_id, fields in found]


def read_balance(text: bytes) -> tuple[int, int, int]:
    """Settled, pending, unconfirmed. Raises ValueError for what is not three integers."""
    settled, pending, unconfirmed = text.split(b" ")
    return int(settled), int(pending), int(unconfirmed)


def read_limits(text: bytes | None) -> list[int | None]:
    """Of day, month, lifetime. Raises ValueError for what is not three integers or dashes."""
    if text is None:
        return [None, None, None]
    parts = text.split(b" ")
    if len(parts) != len(keys.PERIODS):
        raise ValueError(f"not three limits: {text!r}")
    return [None if part == b"-" else int(part) for part in parts]


def read_line(line_id: str, rid: bytes, packed: bytes) -> Line:
    """A line of the journal as lua/_balances.lua writes it."""
    op, call, day, key, user, settled, pending, unconfirmed, *more = msgspec.msgpack.decode(packed)
    return Line(
        id=line_id, op=op, rid=rid.hex(), call=call, day=day, key=key, user=user,
        settled=settled, pending=pending, unconfirmed=unconfirmed, more=tuple(more),
    )  # fmt: skip


def read_entry(rid: str, entry: list[Any]) -> Iterable[Entry]:
    """An entry as lua/_balances.lua describes it."""
    state, delivery, _voided, deadline, day, amount, key, user, _rated, *calls = entry
    if not calls:
        yield Entry(
            rid=rid, call=0, state="reserved" if state == "R" else "voided", amount=amount, cost=0, estimated=False,
            instance="", delivery=delivery, deadline=deadline, day=day, key=key, user=user,
        )  # fmt: skip
    for number, call_state, held, cost, estimated, instance, holder_delivery, _due in calls:
        yield Entry(
            rid=rid, call=number, state=CALL_STATES[call_state], amount=held, cost=cost, estimated=bool(estimated),
            instance=instance, delivery=holder_delivery, deadline=deadline, day=day, key=key, user=user,
        )  # fmt: skip
