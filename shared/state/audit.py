"""`hotpath ledger verify`: whether a tenant's balances, entries, leases and journal say the same (DESIGN 4, I2, I3).

Everything moves while it is read, so: the journal is replayed page by page first, then the entries are scanned, and at
last one script reads the rest of the journal, the balances, and the entries of every request that moved since the scan
began, all at one moment (lua/look.lua). What is compared is of that moment.
"""

from collections.abc import Iterable
from typing import Final

from msgspec import Struct, field

from shared.core.journal import Replay, Violation, fields_of
from shared.core.transitions import HOLDING, POSTING, Line, milliseconds, position
from shared.state.books import Books, Entry, Look

#: I3: how long after its end a lease may still stand.
OVERDUE_MS: Final = 5000
#: A record is published within 100 ms of its settlement, and a slow NATS may take longer.
COPIED_WITHIN_MS: Final = 5000
#: Of each kind so many are told; the rest is counted.
TOLD: Final = 100
_AT_ONCE: Final = 1000

#: Sums of what is held, by bucket of a level: pending, unconfirmed.
Held = tuple[int, int]


class Copied(Struct):
    """A settlement as the second copy has it: what it cost, and the journal's line that posted it ("" = none yet)."""

    cost: int
    line: str
    found: bool = False


class Difference(Struct, frozen=True):
    """One thing that is not as it should be, and what to do. `kind`: a rule of journal.Violation, or balance, held,
    lease, unknown, copy."""

    kind: str
    text: str
    do: str


class Audit(Struct):
    """What was found of one tenant. `at`: the moment, server ms; `unconfirmed`: what reconcile has yet to close."""

    tenant: str
    at: int = 0
    lines: int = 0
    first: str = ""
    last: str = ""
    settled: int = 0
    pending: int = 0
    unconfirmed: int = 0
    calls: int = 0  # posted by the lines that are kept
    estimated: int = 0
    copied: int = 0  # of these calls, so many are in the second copy with the same cost
    missing: int = 0  # and so many are not, though it goes back that far: lost with NATS, which is no fault
    differences: list[Difference] = field(default_factory=list)
    untold: int = 0  # further ones


_DO: Final = {
    "limit": "a fault in Hotpath: please report it with this line",
    "order": "a fault in Hotpath, or someone wrote to Redis: please report it with this line",
    "twice": "reconcile with the provider's bill: hotpath reconcile --bill FILE",
    "amount": "a fault in Hotpath, or someone wrote to Redis: please report it with this line",
    "clamp": "balances were lost or changed by hand: hotpath ledger rebuild",
    "snap": "balances were lost or changed by hand before that snapshot: hotpath reconcile --bill FILE",
    "line": "written by a newer Hotpath? verify with that one",
}
_REBUILD: Final = "hotpath ledger rebuild"
_SWEEP: Final = "is a guardian running? it sweeps each second"
_FAULT: Final = "a fault in Hotpath: please report it with what `hotpath ledger show` says of this request"


async def audit(
    books: Books, tenant: str, copy: dict[tuple[str, int], Copied] | None = None, whole: tuple[int, int] = (0, 0)
) -> Audit:
    """Compare everything. `copy`: the second copy's settlements of the tenant, `whole` for lines from, to (server ms).
    Raises StateUnavailable."""
    found, replay = Audit(tenant), Replay()
    reader = _Reader(found, replay, copy or {})
    while lines := await books.journal(tenant=tenant, after=replay.last):
        reader.feed(lines)
    held = {rid: calls async for rid, calls in books.scan(tenant=tenant) if _holds(calls)}
    look = await _rest(books, tenant, reader)
    for rid, calls in look.entries.items():
        held.pop(rid, None)
        if _holds(calls):
            held[rid] = calls
    _compare(found, replay, look, held)
    holding = list(held)
    for first in range(0, len(holding), _AT_ONCE):
        for rid in await books.unleased(tenant=tenant, rids=holding[first : first + _AT_ONCE]):
            tell(found, "lease", f"request {rid} holds money and has no lease", _FAULT)
    if copy is not None:
        reader.compare_copy(*whole)
    return found


async def _rest(books: Books, tenant: str, reader: "_Reader") -> Look:
    """Feeds the lines since; the moment at which there were no more, with every entry that moved since."""
    moved: set[str] = set()
    while True:
        look = await books.look(tenant=tenant, after=reader.replay.last, rids=moved, overdue_ms=OVERDUE_MS)
        reader.feed(look.lines)
        moved.update(line.rid for line in look.lines if line.rid)
        if look.whole:
            return look


def _holds(calls: list[Entry]) -> bool:
    return any(call.state in HOLDING for call in calls)


def tell(found: Audit, kind: str, text: str, do: str) -> None:
    """Note a difference, or count it."""
    if sum(each.kind == kind for each in found.differences) < TOLD:
        found.differences.append(Difference(kind, text, do))
    else:
        found.untold += 1


class _Reader:
    """Feeds the replay, and holds each posting against the second copy."""

    def __init__(self, found: Audit, replay: Replay, copy: dict[tuple[str, int], Copied]) -> None:
        self._found = found
        self.replay = replay
        self._copy = copy
        self._posted: list[int] = []  # server ms of postings that the copy does not have

    def feed(self, lines: Iterable[Line]) -> None:
        for line in lines:
            for wrong in self.replay.feed(line):
                self._tell(wrong)
            if line.op in POSTING and line.op != "correct":
                self._found.calls += 1
                self._found.estimated += bool(line.more[1])
                self._hold_against_copy(line)

    def _tell(self, wrong: Violation) -> None:
        tell(self._found, wrong.rule, f"line {wrong.line}: {wrong.text}", _DO[wrong.rule])

    def _hold_against_copy(self, line: Line) -> None:
        copied = self._copy.get((line.rid, line.call))
        if copied is None:
            self._posted.append(milliseconds(line.id))
            return
        copied.found = True
        # of another line: it was posted later, or reconcile was there before
        if copied.cost == line.more[0] or copied.line != line.id:
            self._found.copied += 1
        else:
            tell(
                self._found, "copy",
                f"line {line.id}: call {line.rid}.{line.call} was posted at {line.more[0]}, the second copy says "
                f"{copied.cost} (nano-USD)",
                "reconcile with the provider's bill: hotpath reconcile --bill FILE",
            )  # fmt: skip

    def compare_copy(self, since: int, until: int) -> None:
        """Postings that the copy lacks are counted; settlements that the journal lacks were lost by Redis."""
        self._found.missing = sum(since <= at < until - COPIED_WITHIN_MS for at in self._posted)
        for (rid, call), copied in self._copy.items():
            if not copied.found and copied.line and self._lost(copied.line):
                text = f"call {rid}.{call}: its settlement at {copied.cost} nano-USD is in the second copy alone"
                tell(self._found, "copy", text, _REBUILD)

    def _lost(self, line: str) -> bool:
        """Whether a line should be in the journal, and is not: it is no older than what is kept."""
        return position(line) > self.replay.since


def _compare(found: Audit, replay: Replay, look: Look, held: dict[str, list[Entry]]) -> None:
    found.at, found.lines, found.first, found.last = look.now, replay.lines, replay.first, replay.last
    found.settled, found.pending, found.unconfirmed = replay.balances.get("t:lifetime", (0, 0, 0))
    if "about" not in look.fields and replay.lines:
        tell(found, "balance", "the balances are gone; nobody is admitted", _REBUILD)
    else:
        for text in replay.differences(look.fields):
            tell(found, "balance", text, _REBUILD)
    sums = _sums(held)
    for name in sorted(sums.keys() | {name for name, sums in replay.balances.items() if sums[1] or sums[2]}):
        told, entries = tuple(replay.balances.get(name, (0, 0, 0))[1:]), sums.get(name, (0, 0))
        if told != entries:
            tell(
                found, "held", f"{name}: the journal holds {told} (pending, unconfirmed), the entries {entries}", _FAULT
            )
    for rid, due in look.overdue.items():
        if rid in held:
            tell(found, "lease", f"request {rid} holds money {look.now - due} ms after its lease ended", _SWEEP)


def _sums(held: dict[str, list[Entry]]) -> dict[str, Held]:
    """What the entries hold, by the fields of the balances."""
    found: dict[str, Held] = {}
    for calls in held.values():
        for call in calls:
            pending = call.amount if call.state in {"reserved", "dispatched"} else 0
            unconfirmed = call.amount if call.state == "unconfirmed" else 0
            for _, names in fields_of(call.day, call.key, call.user) if pending or unconfirmed else ():
                for name in names:
                    before = found.get(name, (0, 0))
                    found[name] = before[0] + pending, before[1] + unconfirmed
    return found
