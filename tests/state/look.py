"""What the machine of the ledger looks at: answers as tuples, states of entries, all that Redis holds of a tenant."""

from typing import Any

import msgspec

from shared.core.journal import Replay, Violation
from shared.state import keys
from shared.state.base import Dispatched, Extended, Reserved
from shared.state.books import PAGE, read_balance, read_limits, read_line
from tests.state.model import Answer, Entry
from tests.state.rig import Money


def told(answer: Reserved | Dispatched | Extended) -> Answer:
    """An answer with only the fields that its status has."""
    status = answer.status
    if isinstance(answer, Reserved):
        if status == "ok":
            return ("ok", answer.amount, answer.day, int(answer.user))
        return ("denied", answer.left, answer.level, answer.period) if status == "denied" else (status,)
    if status == "denied":
        return ("denied", answer.left)
    if isinstance(answer, Extended):
        return ("ok", answer.amount) if status == "ok" else (status,)
    if status == "won":
        return ("won", answer.call)
    return (status, answer.holder, answer.delivery) if status in {"refused", "closed"} else (status,)


def has_holder(entry: Entry | None) -> bool:
    """Whether some instance won the newest call."""
    return entry is not None and entry.last is not None and bool(entry.last.instance)


def is_voided(entry: Entry | None) -> bool:
    return entry is not None and entry.state == "voided"


def is_reserved(entry: Entry | None) -> bool:
    return entry is not None and entry.state == "reserved"


def is_in_doubt(entry: Entry | None) -> bool:
    return entry is not None and any(call.state in {"unconfirmed", "posted"} for call in entry.calls)


def is_open(entry: Entry | None) -> bool:
    return has_holder(entry) and entry is not None and entry.last is not None and entry.last.state == "dispatched"


def balances_of(fields: dict[str, str]) -> dict[str, tuple[int, int, int]]:
    """<level>:<bucket> -> settled, pending, unconfirmed, of a balances hash."""
    found = {}
    for name, text in fields.items():
        level, _, bucket = name.rpartition(":")
        if level and bucket != "limit":
            found[name] = read_balance(text.encode())
    return found


def limits_of(fields: dict[str, str]) -> dict[tuple[str, str], int]:
    """(level, period) -> limit, of a balances hash."""
    found: dict[tuple[str, str], int] = {}
    for name, text in fields.items():
        level, _, what = name.rpartition(":")
        if level and what == "limit":
            pairs = zip(keys.PERIODS, read_limits(text.encode()), strict=True)
            found |= {(level, period): limit for period, limit in pairs if limit is not None}
    return found


class Books:
    """All that Redis holds of the tenant, read in one go, and its journal replayed as far as it goes."""

    def __init__(self, money: Money) -> None:
        self.money = money
        self.replay = Replay()
        self.seen = "0-0"
        self.lines = 0  # of the last step
        self.wrong: list[Violation] = []  # with them
        self.fields: dict[str, str] = {}
        self.balances: dict[str, tuple[int, int, int]] = {}
        self.limits: dict[tuple[str, str], int] = {}
        self.entries: dict[str, list[Any]] = {}
        self.leases: dict[str, int] = {}

    async def look(self) -> None:
        tenant = self.money.tenant
        balances, entries, leases, lines = await self.money.state._side.many(
            [
                (b"HGETALL", keys.balances(tenant)),
                (b"HGETALL", keys.entries(tenant)),
                (b"ZRANGE", keys.leases(tenant), 0, -1, b"WITHSCORES"),
                (b"XRANGE", keys.journal(tenant), f"({self.seen}", b"+", b"COUNT", PAGE),
            ],
            10.0,
        )
        texts = [each.decode() for each in balances]
        self.fields = dict(zip(texts[::2], texts[1::2], strict=True))
        self.balances, self.limits = balances_of(self.fields), limits_of(self.fields)
        self.entries = {
            rid.hex(): msgspec.msgpack.decode(packed) for rid, packed in zip(entries[::2], entries[1::2], strict=True)
        }
        self.leases = {rid.hex(): int(score) for rid, score in zip(leases[::2], leases[1::2], strict=True)}
        fresh = [read_line(line_id.decode(), fields[1], fields[3]) for line_id, fields in lines]
        self.wrong = [wrong for line in fresh for wrong in self.replay.feed(line)]
        self.lines = len(fresh)
        if fresh:
            self.seen = fresh[-1].id
