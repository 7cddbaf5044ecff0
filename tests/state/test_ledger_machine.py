"""The real Lua against a model of plain integers, step by step (I2, I3, I7): duplicated, reordered, late, stale calls,
several deliveries and calls, lost holders, voids before reserves, limits on several periods, time passing.
"""

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shared.state import keys
from shared.state.base import Dispatched, Reserved
from shared.state.redis import State
from tests.state.model import GRACE, Answer, Entry, Model
from tests.state.rig import DAY, HOUR, MINUTE, Money, new_rid, settings_for

requests = st.integers(0, 2)
deliveries = st.integers(1, 3)
instances = st.sampled_from("ABC")
amounts = st.sampled_from([0, 1, 99, 100, 250])
calls = st.integers(1, 4)
plans = st.integers(1, 4)

#: Real time passes too while the test runs; the model ignores it, so no due time may be this near.
BLUR = 30_000


def told(answer: Reserved | Dispatched) -> Answer:
    """An answer with only the fields that its status has."""
    if isinstance(answer, Reserved):
        return {"ok": ("ok", answer.amount), "denied": ("denied", answer.left)}.get(answer.status, (answer.status,))
    if answer.status == "won":
        return ("won", answer.call)
    if answer.status in {"refused", "closed"}:
        return (answer.status, answer.holder, answer.delivery)
    return (answer.status, answer.left) if answer.status == "denied" else (answer.status,)


def has_holder(entry: Entry | None) -> bool:
    """Whether some instance won the newest call."""
    return entry is not None and entry.last is not None and bool(entry.last.instance)


class LedgerMachine(RuleBasedStateMachine):
    """One tenant, three requests."""

    runner: ClassVar[asyncio.Runner]
    state: ClassVar[State]

    @initialize()
    def begin(self) -> None:
        self.money = Money(self.state, f"m{new_rid()}")
        self.model = Model()
        self.rids = [new_rid() for _ in range(3)]
        self.winners: dict[tuple[str, int, int], tuple[str, int]] = {}
        self.admitted = False

    def ask(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def admit(self, answer: Any, expected: Answer, amount: int) -> None:
        assert told(answer) == expected
        self.admitted = amount > 0 and expected[0] in {"ok", "won"}

    def won(self, rid: str, answer: Dispatched, holder: tuple[str, int], max_calls: int, *, fresh: bool) -> None:
        """I7: a call number is only ever won by one holder, and the Plan is not exceeded."""
        if answer.status == "won":
            assert self.winners.setdefault((rid, self.model.forgotten[rid], answer.call), holder) == holder
            assert answer.call <= max_calls or not fresh

    # ---- anything at all: duplicated, reordered, by whomever ---------------------------------------------------------

    @rule(request=requests, delivery=deliveries, amount=amounts, ttl=st.sampled_from([HOUR, 5 * MINUTE, -MINUTE]))
    def reserve(self, request: int, delivery: int, amount: int, ttl: int) -> None:
        self.reserves(self.rids[request], delivery, amount, ttl)

    @rule(request=requests, delivery=deliveries, instance=instances, lost=st.sampled_from(["", "", "A", "B", "C"]),
          amount=amounts, max_calls=plans)  # fmt: skip
    def dispatch(self, request: int, delivery: int, instance: str, lost: str, amount: int, max_calls: int) -> None:
        self.dispatches(self.rids[request], delivery, instance, lost, amount, max_calls)

    @rule(request=requests, call=calls, delivery=deliveries, instance=instances, amount=amounts, max_calls=plans)
    def topup(self, request: int, call: int, delivery: int, instance: str, amount: int, max_calls: int) -> None:
        self.tops_up(self.rids[request], call, delivery, instance, amount, max_calls)

    # ---- what the roles do when all is well, so that histories get somewhere -----------------------------------------

    @precondition(lambda self: self.which(lambda entry: entry is None or entry.state == "voided"))
    @rule(data=st.data(), amount=amounts, ttl=st.sampled_from([HOUR, 5 * MINUTE]))
    def begin_a_request(self, data: st.DataObject, amount: int, ttl: int) -> None:
        rid = data.draw(st.sampled_from(self.which(lambda entry: entry is None or entry.state == "voided")))
        entry = self.model.entries.get(rid)
        self.reserves(rid, entry.voided + 1 if entry else 1, amount, ttl)

    @precondition(lambda self: self.which(lambda entry: entry is not None and entry.state == "reserved"))
    @rule(data=st.data(), instance=instances)
    def win_its_call(self, data: st.DataObject, instance: str) -> None:
        rid = data.draw(st.sampled_from(self.which(lambda entry: entry is not None and entry.state == "reserved")))
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
            self.settle(self.rids.index(rid), last.number, 60, estimated=False)
        self.tops_up(rid, last.number + ahead, last.delivery, last.instance, amount, max_calls)

    # ---- a verb on both sides ----------------------------------------------------------------------------------------

    def which(self, wanted: Callable[[Entry | None], bool]) -> list[str]:
        return [rid for rid in getattr(self, "rids", []) if wanted(self.model.entries.get(rid))]

    def reserves(self, rid: str, delivery: int, amount: int, ttl: int) -> None:
        known = rid in self.model.entries and self.model.entries[rid].state != "voided"
        expected = self.model.reserve(rid, delivery, amount, ttl)
        self.admit(self.ask(self.money.reserve(rid, delivery, amount, ttl)), expected, 0 if known else amount)

    def dispatches(self, rid: str, delivery: int, instance: str, lost: str, amount: int, max_calls: int) -> None:
        before = len(self.model.entries[rid].calls) if rid in self.model.entries else 0
        expected = self.model.dispatch(rid, delivery, instance, lost, amount, max_calls)
        answer = self.ask(self.money.dispatch(rid, delivery, instance, lost, amount, max_calls))
        opened = rid in self.model.entries and len(self.model.entries[rid].calls) > before > 0
        self.admit(answer, expected, amount if opened else 0)
        self.won(rid, answer, (instance, delivery), max_calls, fresh=opened)

    def tops_up(self, rid: str, call: int, delivery: int, instance: str, amount: int, max_calls: int) -> None:
        before = len(self.model.entries[rid].calls) if rid in self.model.entries else 0
        expected = self.model.topup(rid, call, delivery, instance, amount, max_calls)
        answer = self.ask(self.money.topup(rid, call, delivery, instance, amount, max_calls))
        opened = rid in self.model.entries and len(self.model.entries[rid].calls) > before
        self.admit(answer, expected, amount if opened else 0)
        self.won(rid, answer, (instance, delivery), max_calls, fresh=opened)

    @rule(request=requests, call=calls, cost=st.sampled_from([0, 1, 60, 100, 400]), estimated=st.booleans())
    def settle(self, request: int, call: int, cost: int, estimated: bool) -> None:
        rid = self.rids[request]
        assert self.ask(self.money.settle(rid, call, cost, estimated=estimated)) == self.model.settle(rid, call, cost)

    @rule(request=requests, delivery=deliveries, instance=st.sampled_from(["", "", "A", "B"]), call=calls)
    def void(self, request: int, delivery: int, instance: str, call: int) -> None:
        rid = self.rids[request]
        expected = self.model.void(rid, delivery, instance, call)
        assert self.ask(self.money.void(rid, delivery, instance, call)) == expected

    @rule(request=requests, delivery=deliveries, verb=st.sampled_from(["reserve", "dispatch", "topup"]))
    def stale(self, request: int, delivery: int, verb: str) -> None:
        """Run after its not-after (Redis or NATS frozen and thawed): nothing is written, not even a sweep."""
        rid = self.rids[request]
        if verb == "reserve":
            assert told(self.ask(self.money.reserve(rid, delivery, stale=True))) == ("stale",)
        elif verb == "dispatch":
            assert told(self.ask(self.money.dispatch(rid, delivery, stale=True))) == ("stale",)
        else:
            assert told(self.ask(self.money.topup(rid, 2, delivery, stale=True))) == ("stale",)

    @rule(period=st.sampled_from(keys.PERIODS), limit=st.sampled_from([None, None, 0, 349, 600, 1000]))
    def limit(self, period: keys.Period, limit: int | None) -> None:
        self.model.limits.pop(period, None)
        if limit is not None:
            self.model.limits[period] = limit
        self.ask(self.money.limit(period, limit))

    @rule(ms=st.sampled_from([MINUTE, MINUTE, 4 * MINUTE, 11 * MINUTE, HOUR, DAY + HOUR]))
    def age(self, ms: int) -> None:
        while any(
            abs(moment - self.model.now - ms) < BLUR
            for entry in self.model.entries.values()
            for moment in (entry.due(), entry.deadline, entry.forget_at)
        ):
            ms += 2 * BLUR + 1
        self.model.now += ms
        self.ask(self.money.age(ms))

    @rule()
    def expire(self) -> None:
        assert self.ask(self.money.expire()) == self.model.sweep()

    @invariant()
    def balances_are_the_sums_of_the_entries(self) -> None:
        if not hasattr(self, "money"):
            return
        for level in self.ask(self.money.levels()).values():
            assert (level.settled, level.pending, level.unconfirmed) == (
                self.model.settled, self.model.pending, self.model.unconfirmed,
            )  # fmt: skip
            if self.admitted and level.limit is not None:  # I2
                assert level.settled + level.pending + level.unconfirmed <= level.limit
        self.admitted = False

    @invariant()
    def entries_and_leases_are_the_model_s(self) -> None:
        if not hasattr(self, "money"):
            return
        expected = set()
        for rid, entry in self.model.entries.items():
            expected |= {(rid, call.number, call.state, call.cost) for call in entry.calls}
            if not entry.calls:
                expected.add((rid, 0, entry.state, 0))
        assert {(each.rid, each.call, each.state, each.cost) for each in self.ask(self.money.entries())} == expected
        leases = self.ask(self.money.leases())
        assert leases.keys() == self.model.entries.keys()  # I3: whatever is held, or remembered, has its time
        for rid, due in leases.items():
            assert abs(due - (self.model.entries[rid].due() - self.model.now)) < BLUR


def test_the_ledger_equals_the_model(valkey_url: str) -> None:
    """I2, I3, I7 and the sums, over random histories."""
    with asyncio.Runner() as runner:
        seconds, _ = divmod(runner.run(_server_ms(valkey_url)), 1000)
        if seconds % 86_400 > 86_400 - 120:
            pytest.skip("midnight UTC is near: the model knows one day only")
        LedgerMachine.runner = runner
        LedgerMachine.state = runner.run(State.connect(settings_for(valkey_url, LEDGER_LEASE_GRACE_MS=str(GRACE))))
        try:
            run_state_machine_as_test(
                LedgerMachine,
                settings=settings(
                    max_examples=150, stateful_step_count=50, deadline=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
                ),
            )  # fmt: skip
        finally:
            runner.run(LedgerMachine.state.close())


async def _server_ms(url: str) -> int:
    state = await State.connect(settings_for(url))
    await state.close()
    return state.clock.now()
