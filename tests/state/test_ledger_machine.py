"""The real Lua against a model of plain integers, step by step (I1, I2, I3, I7; D1, D2).

Duplicated, reordered, late and stale calls, several deliveries and calls, lost holders, voids before reserves; a
tenant, two keys and two users with limits of each period that come and go; clamping, more in the middle of a stream,
corrections by the bill; midnights, ends of months and years; amounts above $100,000, lifetimes beyond 2^53 nano-USD.
The journal is replayed after every step, and once more from its oldest line at the end.

    LEDGER_SEQUENCES=2000 .venv/bin/python -m pytest -q -s --timeout 3000 tests/state/test_ledger_machine.py
"""

import asyncio
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from shared.state import keys
from shared.state.redis import State
from tests.state.look import has_holder, is_in_doubt, is_open, is_reserved, is_voided, told
from tests.state.machine import LEVELS, MOST, BothSides, done
from tests.state.model import GRACE, PERIODS, Account
from tests.state.rig import DAY, HOUR, MINUTE, new_rid, settings_for

requests = st.integers(1, 4)
deliveries = st.integers(1, 3)
instances = st.sampled_from("ABC")
amounts = st.sampled_from([0, 1, 99, 100, 250])
leasts = st.sampled_from([0, 0, 1, 1, 90, 251])
calls = st.integers(1, 4)
plans = st.integers(1, 4)
costs = st.sampled_from([0, 1, 60, 100, 400])


class LedgerMachine(BothSides):
    """One tenant, a few requests."""

    # ---- anything at all: duplicated, reordered, by whomever ---------------------------------------------------------

    @rule(request=requests, delivery=deliveries, amount=amounts, least=leasts,
          ttl=st.sampled_from([HOUR, 5 * MINUTE, -MINUTE]))  # fmt: skip
    def reserve(self, request: int, delivery: int, amount: int, least: int, ttl: int) -> None:
        self.reserves(self.request(request), delivery, amount, ttl, least)

    @rule(request=requests, delivery=deliveries, instance=instances, lost=st.sampled_from(["", "", "A", "B", "C"]),
          amount=amounts, max_calls=plans)  # fmt: skip
    def dispatch(self, request: int, delivery: int, instance: str, lost: str, amount: int, max_calls: int) -> None:
        self.dispatches(self.request(request), delivery, instance, lost, amount, max_calls)

    @rule(request=requests, call=calls, delivery=deliveries, instance=instances, amount=amounts, max_calls=plans)
    def topup(self, request: int, call: int, delivery: int, instance: str, amount: int, max_calls: int) -> None:
        self.tops_up(self.request(request), call, delivery, instance, amount, max_calls)

    @rule(request=requests, call=calls, total=amounts, delivery=deliveries, instance=instances)
    def extend(self, request: int, call: int, total: int, delivery: int, instance: str) -> None:
        self.extends(self.request(request), call, total, delivery, instance)

    @rule(request=requests, call=calls, cost=costs, estimated=st.booleans(), yesterday=st.booleans())
    def settle(self, request: int, call: int, cost: int, estimated: bool, yesterday: bool) -> None:
        self.settles(
            self.request(request), call, cost, estimated=estimated, day=self.model.today - 1 if yesterday else 0
        )

    @rule(request=requests, call=calls, cost=costs)
    def correct(self, request: int, call: int, cost: int) -> None:
        """Reconcile, whatever state the call is in."""
        self.corrects(self.request(request), call, cost)

    @rule(request=requests, delivery=deliveries, instance=st.sampled_from(["", "", "A", "B"]), call=calls,
          named=st.booleans())  # fmt: skip
    def void(self, request: int, delivery: int, instance: str, call: int, named: bool) -> None:
        rid = self.request(request)
        account = self.account(rid) if named else Account(0, "", "")
        who = {"key": account.key, "user": account.user}
        expected = self.model.void(rid, delivery, instance, call, **who)
        assert self.ask(self.money.void(rid, delivery, instance, call, **who)) == expected
        done[f"Void {expected}"] += 1

    @rule(request=requests, delivery=deliveries, verb=st.sampled_from(["reserve", "dispatch", "topup", "extend"]))
    def stale(self, request: int, delivery: int, verb: str) -> None:
        """Run after its not-after (Redis or NATS frozen and thawed): nothing is written, not even a sweep."""
        rid, money = self.request(request), self.money
        answer: Any
        match verb:
            case "reserve":
                answer = self.ask(money.reserve_whole(rid, delivery, stale=True))
            case "dispatch":
                answer = self.ask(money.dispatch(rid, delivery, stale=True))
            case "topup":
                answer = self.ask(money.topup(rid, 2, delivery, stale=True))
            case _:
                answer = self.ask(money.extend(rid, 1, 10**9, delivery, stale=True))
        assert told(answer) == ("stale",)
        assert not self.books.lines

    # ---- what the roles do when all is well, so that histories get somewhere -----------------------------------------

    @rule(amount=amounts, least=leasts, ttl=st.sampled_from([HOUR, HOUR, 5 * MINUTE]))
    def begin_a_request(self, amount: int, least: int, ttl: int) -> None:
        if len(self.rids) < MOST:
            self.rids.append(new_rid())
        rid = next((each for each in reversed(self.rids) if each not in self.model.entries), self.rids[-1])
        self.reserves(rid, 1, amount, ttl, least)

    @rule(over=st.sampled_from([0, 1]), least=st.sampled_from([0, 0, 1]))
    def begin_at_the_edge(self, over: int, least: int) -> None:
        """Exactly what is left, or a nano-dollar more."""
        if len(self.rids) < MOST:
            self.rids.append(new_rid())
        rid = self.rids[-1]
        denied = self.model.denies(self.account(rid, self.model.today), 2**53 - 1)
        if denied:
            self.reserves(rid, 1, int(denied[1]) + over, HOUR, least, exactly=True)

    @precondition(lambda self: self.which(is_voided))
    @rule(data=st.data(), amount=amounts, least=leasts)
    def begin_it_anew(self, data: st.DataObject, amount: int, least: int) -> None:
        """A later delivery of what was voided."""
        rid = data.draw(st.sampled_from(self.which(is_voided)))
        self.reserves(rid, self.model.entries[rid].voided + 1, amount, HOUR, least)

    @precondition(lambda self: self.which(is_reserved))
    @rule(data=st.data(), instance=instances)
    def win_its_call(self, data: st.DataObject, instance: str) -> None:
        rid = data.draw(st.sampled_from(self.which(is_reserved)))
        self.dispatches(rid, self.model.entries[rid].delivery, instance, "", 100, 3)

    @precondition(lambda self: self.which(has_holder))
    @rule(data=st.data(), again=st.booleans(), delivery=deliveries, amount=amounts, max_calls=plans)
    def redeliver(self, data: st.DataObject, again: bool, delivery: int, amount: int, max_calls: int) -> None:
        """The same delivery asks again, or a later one names the holder as lost."""
        rid = data.draw(st.sampled_from(self.which(has_holder)))
        last = self.model.entries[rid].last
        assert last is not None
        if again:
            self.dispatches(rid, last.delivery, last.instance, "", amount, max_calls)
        else:
            successor = {"A": "B", "B": "C", "C": "A"}[last.instance]
            self.dispatches(rid, last.delivery + delivery, successor, last.instance, amount, max_calls)

    @precondition(lambda self: self.which(has_holder))
    @rule(data=st.data(), amount=amounts, max_calls=plans, ahead=st.integers(0, 1), settled=st.booleans())
    def go_on(self, data: st.DataObject, amount: int, max_calls: int, ahead: int, settled: bool) -> None:
        """The holder tops up for its next call, mostly after settling the last one."""
        rid = data.draw(st.sampled_from(self.which(has_holder)))
        last = self.model.entries[rid].last
        assert last is not None
        if settled:
            self.settles(rid, last.number, 60, estimated=False)
        self.tops_up(rid, last.number + ahead, last.delivery, last.instance, amount, max_calls)

    @precondition(lambda self: self.which(is_open))
    @rule(data=st.data(), cost=costs)
    def finish(self, data: st.DataObject, cost: int) -> None:
        rid = data.draw(st.sampled_from(self.which(is_open)))
        last = self.model.entries[rid].last
        assert last is not None
        self.settles(rid, last.number, cost, estimated=False)

    @precondition(lambda self: self.which(is_open))
    @rule(data=st.data(), more=st.sampled_from([-1, 0, 1, 50, 150]), over=st.sampled_from([None, None, 0, 1]))
    def stream_on(self, data: st.DataObject, more: int, over: int | None) -> None:
        """The holder's answer grows past what was held (DESIGN 4, mid-stream), or to the edge of what is left."""
        rid = data.draw(st.sampled_from(self.which(is_open)))
        last = self.model.entries[rid].last
        assert last is not None
        total = min(2**53 - 1, max(0, last.amount + more * self.unit))
        denied = self.model.denies(self.model.entries[rid].account, 2**53 - 1)
        if over is not None and denied:
            total = min(2**53 - 1, last.amount + int(denied[1]) + over)
        self.extends(rid, last.number, total, last.delivery, last.instance, exactly=True)

    @precondition(lambda self: self.which(is_in_doubt))
    @rule(data=st.data(), cost=costs, bill=st.booleans())
    def settle_late(self, data: st.DataObject, cost: int, bill: bool) -> None:
        """What was unconfirmed, or already posted at its bound, is settled after all, or reconciled."""
        rid = data.draw(st.sampled_from(self.which(is_in_doubt)))
        call = next(each for each in self.model.entries[rid].calls if each.state in {"unconfirmed", "posted"})
        if bill:
            self.corrects(rid, call.number, cost)
        else:
            self.settles(rid, call.number, cost, estimated=False)

    @precondition(lambda self: bool(getattr(self, "model", None) and self.model.entries))
    @rule(data=st.data(), off=st.sampled_from([-1, 0, 0, 1]))
    def until_something_is_due(self, data: st.DataObject, off: int) -> None:
        """To the millisecond: a lease, the day of an unconfirmed call, the end of a tombstone."""
        rid = data.draw(st.sampled_from([each for each in self.rids if each in self.model.entries]))
        self.age(max(0, self.model.entries[rid].due() + off - self.model.now))
        self.expire()

    @precondition(lambda self: hasattr(self, "model") and bool(self.forgotten_calls()))
    @rule(data=st.data(), cost=costs)
    def correct_what_is_forgotten(self, data: st.DataObject, cost: int) -> None:
        """The journal knows what was posted; of the call there is no entry any more."""
        rid, call = data.draw(st.sampled_from(self.forgotten_calls()))
        posting = self.model.bill[rid, self.model.forgotten[rid] - 1, call]
        was, account, amount = posting.cost, posting.account, cost * self.unit
        expected = self.model.correct(rid, call, amount, account, was)
        assert expected == self.ask(
            self.money.correct(rid, call, amount, key=account.key, user=account.user, day=account.day, was=was)
        )

    def forgotten_calls(self) -> list[tuple[str, int]]:
        lives = self.model.forgotten
        return [
            (rid, call)
            for rid, life, call in self.model.bill
            if rid not in self.model.entries and life == lives[rid] - 1
        ]

    # ---- limits and time ---------------------------------------------------------------------------------------------

    @rule(level=st.sampled_from(LEVELS), period=st.sampled_from(PERIODS),
          limit=st.sampled_from([None, None, 0, 349, 600, 1000]))  # fmt: skip
    def limit(self, level: str, period: keys.Period, limit: int | None) -> None:
        self.set_limit(level, period, limit)

    @rule(
        ms=st.sampled_from(
            [MINUTE, MINUTE, 4 * MINUTE, 4 * MINUTE, 11 * MINUTE, 11 * MINUTE, 2 * HOUR, DAY + HOUR, 5 * DAY]
        )
    )
    def age(self, ms: int) -> None:
        done["midnights"] += self.model.today != (self.model.now + ms) // DAY
        self.model.now += ms
        self.ask(self.clock.set(self.model.now))

    @rule()
    def expire(self) -> None:
        """I3: whoever comes by within 5 s of the lease finds nothing held by it any more."""
        expected = self.model.expire()
        assert self.ask(self.money.expire()) == expected
        for rid, (state, _, _, deadline, *_, calls) in (
            (rid, [*entry[:9], entry[9:]]) for rid, entry in self.books.entries.items()
        ):
            if state == "R" or any(call[1] == "D" for call in calls):
                assert deadline + GRACE > self.model.now, rid


def test_the_ledger_equals_the_model(valkey_url: str) -> None:
    """I1, I2, I3, I7 and the sums, over random histories; LEDGER_SEQUENCES says how many."""
    sequences = int(os.environ.get("LEDGER_SEQUENCES", "100"))
    done.clear()
    with asyncio.Runner() as runner:
        LedgerMachine.runner = runner
        LedgerMachine.state = runner.run(State.connect(settings_for(valkey_url)))
        try:
            run_state_machine_as_test(
                LedgerMachine,
                settings=settings(
                    max_examples=sequences, stateful_step_count=50, deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
                ),
            )  # fmt: skip
        finally:
            runner.run(LedgerMachine.state.close())
    print("\n" + "\n".join(f"{count:7d} {name}" for name, count in sorted(done.items())))
