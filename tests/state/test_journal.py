"""The journal of the real Lua, replayed, is the balances (I2): random histories over three levels, snapshots."""

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.core.journal import Replay, Violation
from shared.state import keys
from shared.state.redis import State
from tests.state.rig import DAY, HOUR, KEY, MINUTE, Money, new_rid, settings_for

RIDS = st.integers(0, 3)
CALLS = st.integers(1, 3)
AMOUNTS = st.sampled_from([0, 1, 99, 100, 250])
USERS = st.sampled_from(["", "u1"])
INSTANCES = st.sampled_from("AB")

#: Steps of a history: a verb and its arguments after the request.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), RIDS, CALLS, AMOUNTS, USERS, st.sampled_from([0, 1])),
        st.tuples(st.just("dispatch"), RIDS, CALLS, INSTANCES, st.sampled_from(["", "A", "B"]), AMOUNTS),
        st.tuples(st.just("topup"), RIDS, CALLS, CALLS, INSTANCES, AMOUNTS),
        st.tuples(st.just("extend"), RIDS, CALLS, CALLS, INSTANCES, AMOUNTS),
        st.tuples(st.just("settle"), RIDS, CALLS, AMOUNTS),
        st.tuples(st.just("correct"), RIDS, CALLS, AMOUNTS),
        st.tuples(st.just("void"), RIDS, CALLS, st.sampled_from(["", "A", "B"]), CALLS),
        st.tuples(st.just("limit"), st.sampled_from(["t", "u:u1", f"k:{KEY}"]), st.sampled_from(keys.PERIODS), AMOUNTS),
        st.tuples(st.just("age"), st.sampled_from([11 * MINUTE, 2 * HOUR, DAY + HOUR])),
        st.tuples(st.just("expire")),
    ),
    min_size=5,
    max_size=60,
)


async def step(money: Money, rids: list[str], verb: str, *args: Any) -> None:
    """One call of the ledger."""
    rid = rids[args[0]] if verb not in {"limit", "age", "expire"} else ""
    match verb:
        case "reserve":
            _, delivery, amount, user, least = args
            await money.reserve(rid, delivery, amount, user=user, least=least)
        case "dispatch":
            _, delivery, instance, lost, amount = args
            await money.dispatch(rid, delivery, instance, lost, amount)
        case "topup":
            _, call, delivery, instance, amount = args
            await money.topup(rid, call, delivery, instance, amount)
        case "extend":
            _, call, delivery, instance, total = args
            await money.extend(rid, call, total, delivery, instance)
        case "settle":
            await money.settle(rid, args[1], args[2])
        case "correct":
            await money.correct(rid, args[1], args[2])
        case "void":
            _, delivery, instance, call = args
            await money.void(rid, delivery, instance, call)
        case "limit":
            level, period, amount = args
            await money.limit(period, 3 * amount if amount else None, level)
        case "age":
            await money.age(args[0])
        case "expire":
            await money.expire()


async def replay(money: Money) -> tuple[Replay, list[Violation]]:
    """The tenant's journal, and what is wrong with its lines."""
    found = Replay()
    return found, [wrong for line in await money.journal() for wrong in found.feed(line)]


async def fields(money: Money) -> dict[str, str]:
    return await money.state.ledger.levels(tenant=money.tenant)


def test_replayed_it_is_the_balances(valkey_url: str) -> None:
    """Whatever is asked, in whatever order, with time passing, snapshots and trimming. A call that was forgotten and
    settled anew is named (`twice`), as is nothing else."""
    with asyncio.Runner() as runner:
        state = runner.run(State.connect(settings_for(valkey_url, LEDGER_JOURNAL_LINES="100")))

        async def history(steps: list[Any]) -> None:
            money, rids = Money(state, f"j{new_rid()}"), [new_rid() for _ in range(4)]
            for each in steps:
                await step(money, rids, *each)
            found, wrong = await replay(money)
            assert found.differences(await fields(money)) == []
            assert {each.rule for each in wrong} <= {"twice"}
            held = {(e.rid, e.call, e.state, e.amount, e.cost, e.estimated) for e in await money.entries() if e.call}
            told = {(r, n, c.state, c.held, c.cost, c.estimated) for r, n, c in found.calls() if n}
            assert {each[:3] + each[4:] for each in held} <= {each[:3] + each[4:] for each in told}
            assert {each for each in held if each[2] != "settled"} <= told

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(STEPS)
        def check(steps: list[Any]) -> None:
            runner.run(history(steps))

        try:
            check()
        finally:
            runner.run(state.close())


async def test_a_trimmed_journal_begins_with_a_snapshot(connect: Any, valkey_url: str) -> None:
    """Requests that began before it, among them one that still holds money, end after it."""
    money = Money(await connect(valkey_url, LEDGER_JOURNAL_LINES="100"), f"j{new_rid()}")
    early = new_rid()
    await money.reserve(early)
    await money.dispatch(early)
    for _ in range(2):
        for _ in range(50):
            rid = new_rid()
            await money.reserve(rid)
            await money.settle(rid, cost=7)
        await money.expire()
    for _ in range(60):
        await money.reserve(new_rid())
        await money.settle(new_rid(), cost=3)
    await money.expire()
    await money.settle(early, cost=20)
    found, wrong = await replay(money)
    assert (wrong, found.whole, found.lines < 300) == ([], False, True)
    assert found.differences(await fields(money)) == []
    call = found.call(early, 1)
    assert call is not None
    assert (call.state, call.cost) == ("settled", 20)


@pytest.mark.parametrize(
    ("command", "rule"),
    [(("HSET", "t:lifetime", "61 0 0"), "t:lifetime"), (("HDEL", "t:lifetime"), "t:lifetime"),
     (("HSET", "t:limit", "5 - -"), "t:limit"), (("HSET", f"k:{KEY}:lifetime", "60 1 0"), f"k:{KEY}:lifetime")],
)  # fmt: skip
async def test_balances_that_were_touched_differ(money: Money, command: tuple[str, ...], rule: str) -> None:
    """Faults 52: whoever changes the hash by hand is found."""
    rid = new_rid()
    await money.reserve(rid)
    await money.settle(rid, cost=60)
    found, wrong = await replay(money)
    assert (wrong, found.differences(await fields(money))) == ([], [])
    await money.raw(command[0], keys.balances(money.tenant), *command[1:])
    (difference,) = found.differences(await fields(money))
    assert difference.startswith(f"{rule}: ")


async def test_snapshots_in_between_do_not_shorten_the_journal(connect: Any, valkey_url: str) -> None:
    """A tenant that asks seldom keeps its lines for reconcile all the same: each snapshot takes the place of the one
    before, until there are enough lines for a mark; then one to two times as many stay."""
    money = Money(await connect(valkey_url, LEDGER_JOURNAL_LINES="100"), f"j{new_rid()}")
    ledger = money.state.ledger
    ledger._expiring = (*ledger._expiring[:-1], 0)  # as if each time the time had come
    for n in range(1, 301):
        await money.reserve(new_rid())
        await money.expire()
        lines = await money.journal()
        kept = [line.op for line in lines].count("reserve")
        assert kept == n if n < 150 else 98 <= kept <= 200
        assert (len(lines) - kept <= 3, lines[-1].op) == (True, "snap")
    found, wrong = await replay(money)
    assert (wrong, found.whole, found.differences(await fields(money))) == ([], False, [])


async def test_a_quiet_tenant_gets_snapshots_too(connect: Any, valkey_url: str) -> None:
    """JetStream forgets the copy of a snapshot after USAGE_RETENTION_MS: one that asks nothing must have another
    there before, or a Redis that lost everything could not get its balances back."""
    money = Money(await connect(valkey_url, USAGE_RETENTION_MS="4000000"), f"j{new_rid()}")
    ledger, tenants = money.state.ledger, [money.tenant]
    await money.settle(new_rid())
    ((tenant, first),) = (await ledger.sweep(tenants, lambda: 0.5)).snapshots
    assert (tenant, (await money.journal())[-1].id) == (money.tenant, first)
    await money.raw("DEL", keys.leases(money.tenant), keys.entries(money.tenant))
    ledger._look_at.clear()
    assert (await ledger.sweep(tenants, lambda: 0.5)).snapshots == []
    ledger._look_at.clear()
    ledger._renew_at[money.tenant] = 0
    assert (await ledger.sweep(tenants, lambda: 0.5)).snapshots == []  # another guardian was there before
    ledger._look_at.clear()
    ledger._renew_at[money.tenant] = 0
    ledger._expiring = (*ledger._expiring[:-1], 0)
    ((_, second),) = (await ledger.sweep(tenants, lambda: 0.5)).snapshots
    assert second > first
    assert [line.op for line in await money.journal()] == ["opened", "snap"]
    assert ledger._renew_at[money.tenant] > money.now + 900_000
