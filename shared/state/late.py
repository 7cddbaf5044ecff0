"""Posts what a usage record says was used and Redis did not take then (DESIGN 4). Once, however often it is asked.

    the entry is known, or its tombstone     `settle` says whether it was posted
    younger than its tombstone would be      the same: it cannot have been forgotten
    older                                    the journal is searched first: what was posted there is not posted twice
    older than the journal goes back         nobody can tell: left to reconcile, and the log says so

A call that was posted at its upper bound meanwhile is put right by what was really used.
"""

import asyncio
import re
from collections.abc import Iterable, Mapping
from typing import Final

from msgspec import Struct

from shared.core.transitions import milliseconds
from shared.state import keys
from shared.state.base import Settled, StateUnavailable
from shared.state.books import MAX_AMOUNT, PAGE
from shared.state.ledger import MAX_CALL, RedisLedger
from shared.wire.records import UsageRecord

#: The share of a tombstone's life within which it is surely there.
SURE: Final = 0.9
#: Two processes' ideas of the shared time differ by less.
SLACK_MS: Final = 1000
AT_ONCE: Final = 64

_RID: Final = re.compile(r"[0-9a-f]{32}")
_POSTED: Final = frozenset({"settle", "overrun", "late", "opened", "correct"})
_BOUND: Final = "post"

Call = tuple[str, int]  # rid, number


class Untold(Exception):
    """Whether it was posted cannot be told any more."""


class Found(Struct):
    """What the journal says of the calls that were looked for. `since`: ms from which on it is whole."""

    posted: dict[Call, str]  # -> id of the line
    bounds: dict[Call, int]  # posted at its upper bound, nano-USD, and not since
    since: int


Result = str | StateUnavailable | Untold


async def post(ledger: RedisLedger, records: Iterable[UsageRecord], now: int, tombstone_ms: int) -> list[Result]:
    """For each record the id of the journal's line that posts it ("" = posted, the line is no longer kept), or why it
    is not posted: StateUnavailable (try again), Untold (never)."""
    tenants: dict[str, list[tuple[int, UsageRecord]]] = {}
    results: dict[int, Result] = {}
    for index, record in enumerate(records):
        if is_ours(record):
            tenants.setdefault(record.tenant, []).append((index, record))
        else:
            results[index] = Untold("no provider of ours wrote this record")
    for tenant, wanted in tenants.items():
        for first in range(0, len(wanted), AT_ONCE):
            some = wanted[first : first + AT_ONCE]
            try:
                found = await _of_tenant(ledger, tenant, [record for _, record in some], now, tombstone_ms)
            except StateUnavailable as error:
                found = [error] * len(some)
            results.update(zip((index for index, _ in some), found, strict=True))
    return [results[index] for index in range(len(results))]


async def _of_tenant(
    ledger: RedisLedger, tenant: str, records: list[UsageRecord], now: int, tombstone_ms: int
) -> list[Result]:
    old = [record for record in records if now - record.at > SURE * tombstone_ms]
    known = dict(
        zip(map(_call, old), await asyncio.gather(*(_is_known(ledger, record) for record in old)), strict=True)
    )
    unsure = [record for record in old if not known[_call(record)]]
    found = await search(ledger, tenant, unsure) if unsure else Found({}, {}, 0)
    results = await asyncio.gather(
        *(_one(ledger, record, found if record in unsure else None) for record in records), return_exceptions=True
    )
    settled: list[Result] = []
    doubles = []
    for record, result in zip(records, results, strict=True):
        if isinstance(result, Settled):
            settled.append(result.line)
            if not result.line:
                doubles.append(record)
        elif isinstance(result, str | StateUnavailable | Untold):
            settled.append(result)
        else:
            raise result
    if doubles:
        lines = (await search(ledger, tenant, doubles)).posted
        settled = [
            lines.get(_call(record), "") if result == "" else result
            for record, result in zip(records, settled, strict=True)
        ]
    return settled


def is_ours(record: UsageRecord) -> bool:
    """Whether its ids and amounts are such as a provider of ours writes: they become part of Redis keys."""
    return (
        keys.OPAQUE.fullmatch(record.tenant) is not None
        and _RID.fullmatch(record.rid) is not None
        and 1 <= record.call <= MAX_CALL
        and 0 <= record.cost <= MAX_AMOUNT
    )


def _call(record: UsageRecord) -> Call:
    return record.rid, record.call


async def _is_known(ledger: RedisLedger, record: UsageRecord) -> bool:
    """Whether the entry knows the call, so that settling is safe at any age."""
    return any(entry.call == record.call for entry in await ledger.entry(tenant=record.tenant, rid=record.rid))


async def _one(ledger: RedisLedger, record: UsageRecord, found: Found | None) -> Settled | str:
    """Raises StateUnavailable, Untold."""
    if found is not None:
        if (line := found.posted.get(_call(record))) is not None:
            return line
        if (bound := found.bounds.get(_call(record))) is not None:
            return await ledger.correct(
                tenant=record.tenant, rid=record.rid, call=record.call, cost=record.cost, key=record.key,
                user=record.user, day=record.day, was=bound,
            )  # fmt: skip
        if found.since > record.at - SLACK_MS:
            raise Untold("its tombstone is gone, and the journal does not go back so far")
    return await ledger.settle(
        tenant=record.tenant, rid=record.rid, call=record.call, cost=record.cost, estimated=record.estimated,
        key=record.key, user=record.user, day=record.day, tokens=record.input_tokens + record.output_tokens,
    )  # fmt: skip


async def search(ledger: RedisLedger, tenant: str, records: Iterable[UsageRecord]) -> Found:
    """What the journal says of these calls, since the oldest of them. Raises StateUnavailable."""
    wanted: Mapping[Call, UsageRecord] = {_call(record): record for record in records}
    oldest = await ledger.journal(tenant=tenant, count=1)
    # it is only ever cut before a snapshot; one that begins otherwise was never cut
    found = Found({}, {}, milliseconds(oldest[0].id) if oldest and oldest[0].op in {"snap", "restore"} else 0)
    after = str(max(0, min(record.at for record in wanted.values()) - SLACK_MS))
    while lines := await ledger.journal(tenant=tenant, after=after, count=PAGE):
        after = lines[-1].id
        for line in lines:
            if line.op == "restore":  # what a lost journal held until its snapshot is in one sum
                found.since = max(found.since, milliseconds(line.more[0]))
            if (call := (line.rid, line.call)) not in wanted:
                continue
            if line.op in _POSTED:
                found.posted[call] = line.id
            elif line.op == _BOUND:
                found.bounds[call] = line.settled
    return found
