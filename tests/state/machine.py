"""The machine of test_ledger_machine.py without its rules: a verb on both sides, and what holds after every step."""

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from shared.core.journal import Replay
from shared.state import keys
from shared.state.base import Dispatched, NotApplied
from shared.state.redis import State
from tests.state import virtual
from tests.state.look import Books, told
from tests.state.model import GRACE, PERIODS, TOMBSTONE, UNCONFIRMED, Account, Answer, Entry, Model
from tests.state.rig import Money, new_rid

#: Who asks: of each request its key and its user.
ASKERS = (("k1", "u1"), ("k1", "u2"), ("k2", "u1"), ("k2", ""))
LEVELS = ("t", "k:k1", "k:k2", "u:u1", "u:u2")
#: An hour and a half before: the end of a day, of a month, of a leap February, of a year.
EVENINGS = [
    int(datetime(*date, 22, 30, tzinfo=UTC).timestamp() * 1000)
    for date in ((2027, 6, 14), (2026, 11, 30), (2028, 2, 28), (2027, 12, 31))
]
#: nano-USD of one unit of the amounts below: nano-dollars; $1,000 to the nano-dollar; $22,517, so that a few
#: settlements pass 2^53 nano-USD.
UNITS = (1, 1_000_000_000_001, 22_517_998_136_852)
#: Small, so that snapshots are written and the journal is trimmed.
JOURNAL_LINES = 3

#: So many requests of a tenant at most: what was begun last is met most.
MOST = 12

#: Of core/journal.py: a settlement that comes after its tombstone is posted again (DESIGN 4; late.py asks the journal).
EXPECTED = ("twice",)

done = Counter[str]()  # what the run came to, for its report


class BothSides(RuleBasedStateMachine):
    """One tenant, a few requests."""

    runner: ClassVar[asyncio.Runner]
    state: ClassVar[State]

    @initialize(evening=st.sampled_from(EVENINGS), unit=st.sampled_from(UNITS), limit=st.sampled_from([None, 349, 600]))
    def begin(self, evening: int, unit: int, limit: int | None) -> None:
        tenant = f"m{new_rid()}"
        self.clock = virtual.VirtualClock(self.state, tenant, evening)
        ledger = virtual.ledger(
            self.state, self.clock, lease_grace_ms=GRACE, tombstone_ms=TOMBSTONE, unconfirmed_ms=UNCONFIRMED,
            journal_lines=JOURNAL_LINES,
        )  # fmt: skip
        self.money = Money(self.state, tenant, ledger)
        self.books = Books(self.money)
        self.model = Model(evening)
        self.unit = unit
        self.rids: list[str] = [new_rid()]
        self.winners: dict[tuple[str, int, int], tuple[str, int]] = {}
        self.admitted: Account | None = None
        self.runner.run(self.clock.set(evening))
        self.set_limit("u:u1", "day", limit)
        done["sequences"] += 1

    def teardown(self) -> None:
        """From its oldest line: the beginning, or a snapshot, behind which alone lines are dropped."""
        if hasattr(self, "books"):
            lines = self.runner.run(self.money.journal())
            replay = Replay()
            wrong = [wrong for line in lines for wrong in replay.feed(line) if wrong.rule not in EXPECTED]
            assert wrong == [], wrong
            assert replay.differences(self.books.fields) == []
            done["lines"] += len(lines)
            done["trimmed"] += bool(lines) and lines[0].op == "snap"

    def ask(self, coroutine: Any) -> Any:
        """A verb's answer, and then all that Redis holds."""

        async def both() -> Any:
            try:
                answer = await coroutine
            except NotApplied as error:  # an error of a script fails the step as what it is
                raise AssertionError(str(error)) from error
            await self.books.look()
            return answer

        done["steps"] += 1
        self.admitted = None
        return self.runner.run(both())

    def which(self, wanted: Callable[[Entry | None], bool]) -> list[str]:
        return [rid for rid in getattr(self, "rids", []) if wanted(self.model.entries.get(rid))]

    def request(self, back: int) -> str:
        """One of the last that were begun."""
        return self.rids[-min(back, len(self.rids))]

    def account(self, rid: str, day: int = 0) -> Account:
        """Whom a settlement names: what the admission told."""
        key, user = ASKERS[self.rids.index(rid) % len(ASKERS)]
        return Account(day, key, user if self.model.has_limit(f"u:{user}") else "")

    def check(self, answer: Any, expected: Answer, rid: str, more: int) -> None:
        """`more` is what the verb had held if it was granted: then no limit of its levels may be passed (I2)."""
        assert told(answer) == expected
        done[f"{type(answer).__name__} {answer.status}"] += 1
        if more > 0 and answer.status in {"ok", "won"}:
            self.admitted = self.model.entries[rid].account

    def held_by(self, rid: str) -> int:
        """What the request holds in all, dispatched or reserved."""
        entry = self.model.entries.get(rid)
        if entry is None:
            return 0
        return (entry.amount if entry.state == "reserved" else 0) + sum(
            call.amount for call in entry.calls if call.state in {"dispatched", "unconfirmed"}
        )

    # ---- a verb on both sides ----------------------------------------------------------------------------------------

    def reserves(
        self, rid: str, delivery: int, amount: int, ttl: int, least: int, *, exactly: bool = False
    ) -> None:  # fmt: skip
        key, user = ASKERS[self.rids.index(rid) % len(ASKERS)]
        amount, least = (amount, least) if exactly else (amount * self.unit, least * self.unit)
        before = self.held_by(rid)
        expected = self.model.reserve(rid, delivery, amount, ttl, key, user, least)
        answer = self.ask(self.money.reserve_whole(rid, delivery, amount, ttl, key=key, user=user, least=least))
        self.check(answer, expected, rid, self.held_by(rid) - before)
        done["clamped"] += answer.status == "ok" and before == 0 and 0 < answer.amount < amount

    def dispatches(self, rid: str, delivery: int, instance: str, lost: str, amount: int, max_calls: int) -> None:
        amount *= self.unit
        before, holds = self.calls_of(rid), self.held_by(rid)
        expected = self.model.dispatch(rid, delivery, instance, lost, amount, max_calls)
        answer = self.ask(self.money.dispatch(rid, delivery, instance, lost, amount, max_calls))
        self.check(answer, expected, rid, self.held_by(rid) - holds)
        self.won(rid, answer, (instance, delivery), max_calls, fresh=self.calls_of(rid) > before > 0)

    def tops_up(self, rid: str, call: int, delivery: int, instance: str, amount: int, max_calls: int) -> None:
        amount *= self.unit
        before, holds = self.calls_of(rid), self.held_by(rid)
        expected = self.model.topup(rid, call, delivery, instance, amount, max_calls)
        answer = self.ask(self.money.topup(rid, call, delivery, instance, amount, max_calls))
        self.check(answer, expected, rid, self.held_by(rid) - holds)
        self.won(rid, answer, (instance, delivery), max_calls, fresh=self.calls_of(rid) > before)

    def calls_of(self, rid: str) -> int:
        return len(self.model.entries[rid].calls) if rid in self.model.entries else 0

    def won(self, rid: str, answer: Dispatched, holder: tuple[str, int], max_calls: int, *, fresh: bool) -> None:
        """I7: a call number is only ever won by one holder, and the Plan is not exceeded."""
        if answer.status == "won":
            assert self.winners.setdefault((rid, self.model.forgotten[rid], answer.call), holder) == holder
            assert answer.call <= max_calls or not fresh

    def extends(
        self, rid: str, call: int, total: int, delivery: int, instance: str, *, exactly: bool = False
    ) -> None:  # fmt: skip
        total *= 1 if exactly else self.unit
        holds = self.held_by(rid)
        expected = self.model.extend(rid, call, total, delivery, instance)
        answer = self.ask(self.money.extend(rid, call, total, delivery, instance))
        self.check(answer, expected, rid, self.held_by(rid) - holds)

    def corrects(self, rid: str, call: int, cost: int) -> None:
        account = self.account(rid)
        expected = self.model.correct(rid, call, cost * self.unit, account)
        answer = self.ask(self.money.correct(rid, call, cost * self.unit, key=account.key, user=account.user))
        assert answer == expected
        done[f"Corrected {answer}"] += 1

    def settles(self, rid: str, call: int, cost: int, *, estimated: bool, day: int = 0) -> None:
        account, cost = self.account(rid, day), cost * self.unit
        expected = self.model.settle(rid, call, cost, account, estimated=estimated)
        answer = self.ask(
            self.money.settle(rid, call, cost, estimated=estimated, key=account.key, user=account.user, day=day)
        )
        assert answer == expected
        done[f"Settled {answer}"] += 1

    def set_limit(self, level: str, period: keys.Period, limit: int | None) -> None:
        number = None if limit is None else min(limit * self.unit, 2**53 - 1)
        self.model.limits.pop((level, period), None)
        if number is not None:
            self.model.limits[level, period] = number
        self.ask(self.money.limit(period, number, level))

    # ---- after every step --------------------------------------------------------------------------------------------

    @invariant()
    def balances_are_the_bill_and_what_the_entries_hold(self) -> None:
        """I1: settled is the sum of the costs, the rest is what entries hold, in every bucket of every level."""
        if not hasattr(self, "books"):
            return
        found = self.books.balances
        for level, bucket in self.model.fields():
            expected = self.model.balance((level, bucket))
            assert found.get(f"{level}:{bucket}", (0, 0, 0)) == expected, (level, bucket)
            done["above 2^53"] += bucket == "lifetime" and level == "t" and expected[0] > 2**53
        asked = {f"{level}:{bucket}" for level, bucket in self.model.fields() | self.model.pruned}
        assert {name for name, balance in found.items() if any(balance)} <= asked
        assert self.books.limits == self.model.limits

    @invariant()
    def the_journal_replays_to_the_balances(self) -> None:
        if hasattr(self, "books"):
            assert self.books.replay.differences(self.books.fields) == []
            wrong = [each for each in self.books.wrong if each.rule not in EXPECTED]
            assert wrong == [], wrong

    @invariant()
    def nothing_admitted_passes_a_limit(self) -> None:
        """I2, on what Redis has, of every level and period of what was just admitted."""
        account = getattr(self, "admitted", None)
        if account is None:
            return
        for level in account.levels:
            for period, bucket in zip(PERIODS, account.buckets, strict=True):
                limit = self.books.limits.get((level, period))
                if limit is not None:
                    assert sum(self.books.balances[f"{level}:{bucket}"]) <= limit, (level, period)

    @invariant()
    def entries_and_leases_are_the_model_s(self) -> None:
        if not hasattr(self, "books"):
            return
        states = {"reserved": "R", "voided": "V", "called": "D"}
        of_calls = {"dispatched": "D", "settled": "S", "unconfirmed": "U", "posted": "B"}
        expected, found = {}, {}
        for rid, entry in self.model.entries.items():
            ours = sorted(
                (call.number, of_calls[call.state], call.amount, call.cost, int(call.estimated)) for call in entry.calls
            )
            expected[rid] = (states[entry.state], entry.account, ours)
        for rid, (state, _, _, _, day, _, key, user, _, *calls) in self.books.entries.items():
            found[rid] = (state, Account(day, key, user), sorted(tuple(call[:5]) for call in calls))
        assert found == expected
        assert self.books.leases == {rid: entry.due() for rid, entry in self.model.entries.items()}
