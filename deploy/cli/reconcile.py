"""What `hotpath reconcile` does: a provider's bill against every tenant's books (DESIGN 4, I1).

The bill is read to its end first; then each tenant's books are read, entries and journal, and what they say of a call
is put right by what the bill says (core/reconcile.py decides). One run at a time, and a run that was cut may be run
again: what it did is found right.
"""

import asyncio
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct, field

from deploy.cli.admin import Failed, with_state
from deploy.cli.bill import Bill, Loaded
from deploy.cli.copy import CopyUnavailable, opened
from deploy.cli.verify import wanted
from deploy.cli.where import Where
from shared.core import money
from shared.core.journal import Replay
from shared.core.reconcile import KINDS, RIGHT, Action, Decision, Kind, Known, decide
from shared.core.transitions import position
from shared.settings import Settings
from shared.state.accounts import Standing, accounts
from shared.state.base import StateUnavailable
from shared.state.redis import State
from shared.wire.records import UsageRecord

#: Calls that are listed one by one; further ones are counted.
TOLD: Final = 100
#: Calls put right at once, on one pipelined connection.
AT_ONCE: Final = 64
#: A run that stops without a word leaves the way free after this; it says that it lives after each batch.
CLAIM_MS: Final = 60_000


class Options(Struct, frozen=True, kw_only=True):
    """`complete`: the span of time (server ms) of which the bill has every call of every provider; None: it may not."""

    tenant: str = ""
    dry_run: bool = False
    skip_bad: bool = False
    post_unknown: str = ""
    complete: tuple[int, int] | None = None


class Sum(Struct):
    """Calls of one kind, and by how much their books change, nano-USD."""

    calls: int = 0
    difference: int = 0


class Listed(Struct):
    """Calls that are named, at most TOLD of `calls`; amounts in nano-USD."""

    calls: int = 0
    amount: int = 0
    told: list[dict[str, Any]] = field(default_factory=list)

    def add(self, amount: int, **what: Any) -> None:
        """One more."""
        self.calls += 1
        self.amount += amount
        if len(self.told) < TOLD:
            self.told.append({**what, "amount": amount})


class Report(Struct):
    """`difference`: what the books were off by, in all (0 when right). `unknown` was posted only with --post-unknown;
    `unbilled`: calls the bill does not mention whose cost is not certain, as `waiting` ones are left alone."""

    lines: int
    billed: int
    bad: int
    bad_lines: list[tuple[int, str]]
    dry_run: bool
    difference: int = 0
    kinds: dict[Kind, Sum] = field(default_factory=lambda: {kind: Sum() for kind in KINDS})
    unknown: Listed = field(default_factory=Listed)
    waiting: Listed = field(default_factory=Listed)
    unbilled: Listed = field(default_factory=Listed)
    closed: Listed = field(default_factory=Listed)  # of them, by --complete


class _Step(Struct, frozen=True):
    """One call to put right."""

    tenant: str
    rid: str
    call: int
    cost: int
    action: Action
    known: Known


def reconcile(where: Where, file: Path, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """A Report as JSON. `say` gets a word now and then. Raises Failed, OSError (the file)."""
    found: dict[str, Any] = msgspec.to_builtins(
        with_state(where, lambda state: run(state, where.settings(), file, options, say))
    )
    return found


async def run(state: State, settings: Settings, file: Path, options: Options, say: Callable[[str], None]) -> Report:
    """Reconcile. Raises Failed, OSError, StateUnavailable."""
    bill = Bill()
    try:
        with file.open("rb") as lines:
            loaded = bill.load(lines, say)
        if loaded.bad and not options.skip_bad:
            told = "\n".join(f"  line {number}: {why}" for number, why in loaded.told)
            raise Failed(f"{loaded.bad} bad lines in {file}, nothing was done (--skip-bad leaves them out):\n{told}")
        names = await wanted(state, options.tenant)
        unknown_to = (await wanted(state, options.post_unknown)) if options.post_unknown else {}
        return await _Run(state, settings, bill, loaded, options, say).go(names, next(iter(unknown_to), ""))
    finally:
        bill.close()


def span(text: str, now: int) -> tuple[int, int]:
    """The word all, or FROM/UNTIL in ISO 8601 (UTC where no zone is named): server ms. Raises ValueError."""
    if text == "all":
        return 0, now
    try:
        first, last = (datetime.fromisoformat(part) for part in text.split("/"))
    except ValueError as error:
        raise ValueError(f"--complete {text}: expected all, or FROM/UNTIL such as 2026-11-25/2026-11-26") from error
    began, ended = (int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000) for at in (first, last))
    if not began < ended <= now:
        raise ValueError(f"--complete {text}: the bill can cover no such time")
    return began, ended


_WORDS: Final[dict[Kind, str]] = {
    "right": "posted at what the bill says",
    "estimated": "were cut, and estimated",
    "wrong": "were posted at something else",
    "unconfirmed": "were unconfirmed: their worker died",
    "bound": "were posted at their upper bound, unconfirmed for too long",
    "unbooked": "were not posted at all: voided, or lost",
    "running": "are under way, and left alone",
    "later": "are left alone: run this again in some minutes",
    "trimmed": "are off, and left alone: the journal does not go back so far (LEDGER_JOURNAL_LINES)",
    "unknown": "are of requests that no tenant's books know",
}


def text(found: dict[str, Any]) -> str:
    """A line per kind, the total, and what is named one by one."""
    lines = [f"{found['lines']} calls on the bill, {money.show_usd(found['billed'])}"]
    lines += [f"  line {number} left out: {why}" for number, why in found["bad_lines"]]
    for kind, total in found["kinds"].items():
        if total["calls"]:
            difference = money.show_usd(total["difference"])
            lines.append(f"{total['calls']:>9}  {difference:>16}  {_WORDS[kind]}")
    for name, what in (
        ("unknown", "unknown (--post-unknown TENANT charges them)"),
        ("waiting", "left alone"),
        ("unbilled", "not certain, and not on the bill (--complete closes them at 0: see --help)"),
        ("closed", "closed at 0"),
    ):
        if found[name]["calls"]:
            lines.append(f"{found[name]['calls']} {what}:")
            lines += [
                f"  {each['request']}  {each.get('tenant', '')}  {each.get('why', '')}" for each in found[name]["told"]
            ]
    done = "would be put right" if found["dry_run"] else "put right"
    lines.append(f"difference: {found['difference']} nano-USD ({money.show_usd(found['difference'])}), {done}")
    return "\n".join(lines)


class _Run:
    """One run over the books."""

    def __init__(
        self,
        state: State,
        settings: Settings,
        bill: Bill,
        loaded: Loaded,
        options: Options,
        say: Callable[[str], None],
    ) -> None:
        self._state = state
        self._settings = settings
        self._bill = bill
        self._options = options
        self._say = say
        self._token = secrets.token_hex(8)
        self._steps: list[_Step] = []
        self._done = 0
        self._since: dict[str, tuple[int, int]] = {}  # of each tenant, see Replay
        self.report = Report(loaded.lines, loaded.total, loaded.bad, loaded.told, options.dry_run)

    async def go(self, names: dict[str, str], unknown_to: str) -> Report:
        """Every tenant's books, then what is left of the bill. Raises Failed, StateUnavailable."""
        await self._claim()
        try:
            for tenant, name in names.items():
                await self._tenant(tenant, name)
            await self._copied(names)
            if unknown_to:
                await self._must_be_unknown(names)
            for billed in self._bill.rest():
                self._note(decide(None, billed.cost))
                self.report.unknown.add(billed.cost, request=f"{billed.rid}.{billed.call}")
                if unknown_to:
                    step = _Step(unknown_to, billed.rid, billed.call, billed.cost, "settle", Known(state="none"))
                    await self._put(step)
            await self._flush()
        finally:
            if not self._options.dry_run:
                await self._state.ledger.release(self._token)
        known = [total.difference for kind, total in self.report.kinds.items() if kind not in {"unknown", "trimmed"}]
        self.report.difference = sum(known) + (self.report.unknown.amount if unknown_to else 0)
        return self.report

    async def _must_be_unknown(self, names: dict[str, str]) -> None:
        """No call is charged as an unknown one that the books of another tenant know, or may have forgotten."""
        for other in (await wanted(self._state, "")).keys() - names.keys():
            replay = Replay()
            grace = self._state.lease_grace_ms
            async for rid, _ in accounts(self._state.ledger, replay, other, self._state.clock.now(), grace):
                self._bill.of(rid)
            self._since[other] = replay.since
        if next(self._bill.rest(), None) is None:
            return
        (since, _), span = max(self._since.values(), default=(0, 0)), self._options.complete
        if since and (span is None or span[0] <= since):
            await self._flush()
            at = datetime.fromtimestamp(since / 1000, UTC).isoformat(timespec="seconds")
            raise Failed(
                f"calls of before {at} may be forgotten ones that were posted (LEDGER_JOURNAL_LINES), so no unknown"
                " one is: --post-unknown takes a bill of later calls, whose time --complete FROM/UNTIL names"
            )

    async def _claim(self) -> None:
        if self._options.dry_run:
            return
        if not await self._state.ledger.claim(self._token, CLAIM_MS):
            raise Failed("another `hotpath reconcile` is at work; wait for it (or for a minute, if it was killed)")

    async def _tenant(self, tenant: str, name: str) -> None:
        ledger, grace, replay = self._state.ledger, self._state.lease_grace_ms, Replay()
        async for rid, calls in accounts(ledger, replay, tenant, self._state.clock.now(), grace):
            billed = self._bill.of(rid)
            for call, cost in billed.items():
                standing = calls.get(call) or calls.get(0)
                known = standing.known if standing else _sibling(calls)
                decision = decide(known, cost)
                self._note(decision)
                if decision.kind in {"running", "later"}:
                    self.report.waiting.add(cost, request=f"{rid}.{call}", tenant=name, why=decision.kind)
                await self._put(_Step(tenant, rid, call, cost, decision.action, known))
            for call, standing in calls.items():
                if call not in billed and not (call == 0 and billed):
                    await self._unbilled(tenant, name, rid, call, standing)
        self._since[tenant] = replay.since

    async def _copied(self, names: dict[str, str]) -> None:
        """Calls that the books have forgotten: the second copy may know them for a while yet."""
        if next(self._bill.rest(), None) is None:
            return
        try:
            async with opened(self._settings) as copy:
                async for record in copy.records():
                    cost = self._bill.one(record.rid, record.call) if record.tenant in names else None
                    if cost is not None:
                        await self._of_copy(record, names[record.tenant], cost)
        except CopyUnavailable as error:
            self._say(str(error))

    async def _of_copy(self, record: UsageRecord, name: str, cost: int) -> None:
        trimmed = position(record.line) <= self._since[record.tenant]
        known = Known(state="none", entry=False, key=record.key, user=record.user, day=record.day)
        if not record.line:  # the guardians are about to post it
            decision = Decision("later")
        elif not trimmed:  # lost by Redis: as `ledger rebuild` posts it, but at what the bill says
            decision = decide(known, cost)
        else:
            off = cost - record.cost
            decision = Decision("trimmed", off) if off else RIGHT
        self._note(decision)
        if decision.kind in {"later", "trimmed"}:
            self.report.waiting.add(cost, request=f"{record.rid}.{record.call}", tenant=name, why=decision.kind)
        await self._put(_Step(record.tenant, record.rid, record.call, cost, decision.action, known))

    async def _unbilled(self, tenant: str, name: str, rid: str, call: int, standing: Standing) -> None:
        known = standing.known
        decision = decide(known, 0)
        if decision.kind not in {"unconfirmed", "bound", "estimated"}:
            return
        amount = known.held if decision.kind == "unconfirmed" else known.posted
        self.report.unbilled.add(amount, request=f"{rid}.{call}", tenant=name, why=decision.kind)
        span = self._options.complete
        if span is not None and call and span[0] <= standing.began and 0 < standing.ended <= span[1]:
            self._note(decision)
            self.report.closed.add(amount, request=f"{rid}.{call}", tenant=name, why=decision.kind)
            await self._put(_Step(tenant, rid, call, 0, decision.action, known))

    def _note(self, decision: Decision) -> None:
        found = self.report.kinds[decision.kind]
        found.calls += 1
        found.difference += decision.difference

    async def _put(self, step: _Step) -> None:
        if step.action:
            self._steps.append(step)
        if len(self._steps) >= AT_ONCE:
            await self._flush()

    async def _flush(self) -> None:
        steps, self._steps = self._steps, []
        if not steps or self._options.dry_run:
            return
        if not await self._state.ledger.claim(self._token, CLAIM_MS):
            raise Failed("this run took so long that another `hotpath reconcile` began; run it again after that one")
        results = await asyncio.gather(*map(self._apply, steps), return_exceptions=True)
        for result in results:
            if isinstance(result, StateUnavailable):
                raise Failed(f"Redis did not answer ({result}); what was done stays done: run it again")
            if isinstance(result, BaseException):
                raise result
        before, self._done = self._done, self._done + len(steps)
        if self._done // 10_000 > before // 10_000:
            self._say(f"{self._done} calls put right")

    async def _apply(self, step: _Step) -> None:
        """Raises StateUnavailable. Never tried again here: what is forgotten has no entry that would notice."""
        known = step.known
        ledger = self._state.ledger
        if step.action == "correct":
            was = known.posted if known.state in {"settled", "posted"} else -1
            await ledger.correct(
                tenant=step.tenant, rid=step.rid, call=step.call, cost=step.cost, key=known.key, user=known.user,
                day=known.day, was=was,
            )  # fmt: skip
        else:
            await ledger.settle(
                tenant=step.tenant, rid=step.rid, call=step.call, cost=step.cost, key=known.key, user=known.user,
                day=known.day,
            )  # fmt: skip


def _sibling(calls: dict[int, Standing]) -> Known:
    """A call of which nothing is known, of a request of which something is."""
    other = next(iter(calls.values())).known
    entry = any(standing.known.entry for standing in calls.values())
    return Known(state="none", entry=entry, key=other.key, user=other.user, day=other.day)
