"""What a tenant's books say of every call they know, for `hotpath reconcile`: entries, else the journal."""

from collections.abc import AsyncIterator
from typing import Final

from msgspec import Struct

from shared.core.journal import Replay
from shared.core.reconcile import Known
from shared.core.transitions import HOLDING, Call, milliseconds
from shared.state.books import Books, Entry

_DAY_MS: Final = 86_400_000


class Standing(Struct, frozen=True):
    """One call: what is known, and the span of time within which it surely was under way (server ms; `ended` 0: nobody
    knows)."""

    known: Known
    began: int
    ended: int


async def accounts(
    books: Books, replay: Replay, tenant: str, now: int, lease_grace_ms: int
) -> AsyncIterator[tuple[str, dict[int, Standing]]]:
    """Every request of the tenant, with its calls by number; call 0 stands for a request without any.

    The journal is held in memory, in an empty `replay`, while this goes on. Raises StateUnavailable.
    """
    while lines := await books.journal(tenant=tenant, after=replay.last):
        for line in lines:
            replay.feed(line)
    seen: set[str] = set()
    async for rid, entries in books.scan(tenant=tenant):
        if rid in seen:  # a scan may come by twice
            continue
        seen.add(rid)
        whole, told = replay.take(rid)
        found = {entry.call: _of_entry(entry, told.get(entry.call), whole, now - lease_grace_ms) for entry in entries}
        for number, call in told.items():
            if number and number not in found:
                found[number] = _of_line(call, whole, fresh=True)
        yield rid, found
    for rid, whole, calls in replay.requests():
        yield rid, {number: _of_line(call, whole, fresh=False) for number, call in calls.items()}


def _of_entry(entry: Entry, told: Call | None, whole: bool, lapsed: int) -> Standing:
    holding = entry.state in {"reserved", "dispatched"}
    known = Known(
        state=entry.state, posted=entry.cost, held=entry.amount, estimated=entry.estimated,
        fresh=told is not None and told.again > 0,  # what was posted before is put right once the entry is forgotten
        running=holding and entry.deadline >= lapsed, key=entry.key, user=entry.user, day=entry.day,
    )  # fmt: skip
    ended = entry.deadline or (milliseconds(told.line) if told else 0)
    return Standing(known, _began(told, whole, entry.day), ended)


def _of_line(call: Call, whole: bool, *, fresh: bool) -> Standing:
    """Of a call that the journal alone knows. One that held money has an entry: it is not there yet, or was lost."""
    known = Known(
        state=call.state, posted=call.posted, held=call.held, estimated=call.estimated, entry=fresh, fresh=fresh,
        running=call.state in HOLDING, key=call.key, user=call.user, day=call.day,
    )  # fmt: skip
    return Standing(known, _began(call, whole, call.day), milliseconds(call.line))


def _began(call: Call | None, whole: bool, day: int) -> int:
    """Where the beginning is not kept, that of its day: earlier than it was, never later."""
    return milliseconds(call.began) if call and whole else day * _DAY_MS
