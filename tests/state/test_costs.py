"""The cost tracker over the real Lua: models, days, the output ratio, alerts; each batch once (S1-H2, S1-M1, S2-10)."""

import secrets
from typing import Any

import pytest

from shared.state import costs, keys
from shared.state.base import RATIO_ONE
from shared.state.costs import USD, Alert, Spent
from shared.state.redis import State
from shared.wire.records import UsageBatch, UsageRecord
from tests.state.conftest import Connect
from tests.state.rig import Money, new_rid

TODAY = 20_000  # 2024-10-04


class Tracker:
    """One tenant's."""

    def __init__(self, state: State, tenant: str) -> None:
        self.state = state
        self.tenant = tenant
        self.instance = "p" + secrets.token_hex(4)
        self.number = 0

    def record(self, **fields: Any) -> UsageRecord:
        given: dict[str, Any] = {
            "tenant": self.tenant, "rid": new_rid(), "call": 1, "key": "k", "user": "", "day": TODAY, "model": "m",
            "endpoint": "e", "cost": 1000, "estimated": False, "line": "1-1", "at": 0, "input_tokens": 10,
            "output_tokens": 5,
        }  # fmt: skip
        return UsageRecord(**{**given, **fields})

    async def learn(
        self, *records: UsageRecord, number: int = 0, instance: str = "", late: bool = False
    ) -> list[Alert]:
        self.number += 1
        batch = UsageBatch(
            instance=instance or self.instance, number=number or self.number, at=0, records=records, late=late
        )  # fmt: skip
        return await self.state.tracker.learn(self.tenant, batch, records)

    async def costs(self) -> costs.Costs:
        return await self.state.costs(self.tenant)


@pytest.fixture
def tracker(state: State, money: Money) -> Tracker:
    return Tracker(state, money.tenant)


async def test_by_model_and_day(tracker: Tracker) -> None:
    assert await tracker.costs() == costs.Costs()
    await tracker.learn(
        tracker.record(model="a/b:c"), tracker.record(model="a/b:c", cost=500), tracker.record(day=TODAY - 1, cost=7)
    )
    await tracker.learn(tracker.record(model="*", cost=1), tracker.record(cost=0, input_tokens=0, output_tokens=0))
    found = await tracker.costs()
    assert found.total == Spent(4, 1508, 40, 20)
    assert found.models == {"a/b:c": Spent(2, 1500, 20, 10), "m": Spent(1, 7, 10, 5), "*": Spent(1, 1, 10, 5)}
    assert found.days == {"2024-10-03": Spent(1, 7, 10, 5), "2024-10-04": Spent(3, 1501, 30, 15)}
    assert found.by_day["2024-10-03"] == {"m": Spent(1, 7, 10, 5)}
    assert found.since > 0


async def test_a_batch_that_comes_again_counts_once(tracker: Tracker) -> None:
    """Redelivered by JetStream, in any order, to any guardian; another process's batch of that number is another."""
    record = tracker.record()
    for number in (5, 3, 5, 4097, 3, 1, 4097, costs.PAGE * 3, 5):
        await tracker.learn(record, number=number)
    assert (await tracker.costs()).total.requests == 5
    await tracker.learn(record, number=5, instance="another")
    assert (await tracker.costs()).total.requests == 6


async def test_a_late_record_counts_once_in_whatever_batch_it_comes(state: State, tracker: Tracker) -> None:
    """Several guardians may publish the same: copies of it lay in JetStream and in a spool."""
    one, two = tracker.record(model="one"), tracker.record(model="two", input_tokens=10, output_tokens=40)
    await state.ledger.settle(tenant=tracker.tenant, rid=one.rid, call=1, cost=1, key="k")
    for records in ((one,), (one, two), (two, one, two), (tracker.record(rid=one.rid, call=2, model="one"),)):
        await tracker.learn(*records, late=True)
    found = await tracker.costs()
    assert {name: spent.requests for name, spent in found.models.items()} == {"one": 2, "two": 1}
    ratio = ((1 * 0.9 + 0.05) * 0.9 + 0.4) * 0.9 + 0.05
    assert abs(int((await state.ledger.levels(tenant=tracker.tenant))["ratio"]) - ratio * 1_000_000) <= 1
    left = await state.ledger._pipeline.execute(b"PTTL", keys.late(tracker.tenant), within=1)
    assert 0 < left <= 7_200_000


async def test_1000_models_leave_exactly_100(tracker: Tracker) -> None:
    """S1-H2a, b: never 101; whoever has the fewest requests goes before a new one comes."""
    await tracker.learn(*(tracker.record(model="much used") for _ in range(3)))
    for first in range(0, 1000, 250):
        await tracker.learn(*(tracker.record(model=f"model-{n}") for n in range(first, first + 250)))
        found = await tracker.costs()
        assert len(found.models) == costs.MAX_MODELS
        assert found.models["much used"].requests == 3
    assert found.total.requests == 1003
    day = found.by_day["2024-10-04"]
    assert len(day) == costs.MAX_MODELS + 1
    assert day[costs.OTHERS].requests == 1003 - sum(spent.requests for name, spent in day.items() if name != "*")
    assert sum(spent.cost for spent in day.values()) == found.days["2024-10-04"].cost == 1_003_000


async def test_thirty_days_are_kept(tracker: Tracker) -> None:
    """S1-M1b."""
    for day in range(TODAY, TODAY + 35):
        await tracker.learn(tracker.record(day=day, cost=6 * USD))
    found = await tracker.costs()
    assert len(found.days) == costs.DAYS_KEPT == 30
    assert min(found.days) == "2024-10-09"
    assert found.total.requests == 35
    assert {name.partition(":")[0] for name in found.alerts} == {"lifetime", *found.days}
    await tracker.learn(tracker.record(day=TODAY))  # a settlement that comes very late: its day is gone
    assert len((await tracker.costs()).days) == 30


async def test_daily_limits_and_lifetime_tiers_once_each(tracker: Tracker) -> None:
    """S1-M1a: 10, 50, 100, 500 for life; S1-M1b: 5, 20, 50, 100 a day; $45 a day is noticed."""

    async def spend(usd: float, day: int = TODAY) -> list[tuple[str, int]]:
        told = await tracker.learn(tracker.record(cost=int(usd * USD), day=day))
        return [(alert.date, alert.limit // USD) for alert in told]

    today, tomorrow = "2024-10-04", "2024-10-05"
    assert await spend(5) == []  # a limit is exceeded, not met
    assert await spend(0.000000001) == [(today, 5)]
    assert await spend(4.999999999) == [("", 10)]  # a tier is reached
    assert sorted(await spend(45)) == [("", 50), (today, 20), (today, 50)]
    assert await spend(44) == []
    assert await spend(6, TODAY + 1) == [("", 100), (tomorrow, 5)]
    assert sorted(await spend(500)) == [("", 500), (today, 100)]
    assert await spend(5000) == []
    found = await tracker.costs()
    assert found.alerts.keys() == {
        *(f"lifetime:{usd}" for usd in (10, 50, 100, 500)), *(f"{today}:{usd}" for usd in (5, 20, 50, 100)),
        f"{tomorrow}:5",
    }  # fmt: skip
    assert all(at > 0 for at in found.alerts.values())


async def test_an_alert_is_told_again_to_who_reads_its_batch_again(tracker: Tracker) -> None:
    """The guardian that was told may have died before it told anybody."""
    record = tracker.record(cost=12 * USD)
    first = await tracker.learn(record, number=1)
    await tracker.learn(tracker.record(), number=2)
    again = await tracker.learn(record, number=1)
    assert [(alert.date, alert.limit) for alert in again] == [(alert.date, alert.limit) for alert in first]
    assert len(first) == 2
    assert (await tracker.costs()).total.requests == 2


async def test_the_output_ratio(state: State, money: Money, tracker: Tracker) -> None:
    """S2-10: EWMA with alpha 0.1 from 1.0, of what was generated over what was estimated of the prompt; what reserve
    answers with."""

    async def ratio() -> int:
        return (await money.reserve_whole(new_rid())).ratio

    assert await ratio() == RATIO_ONE
    await tracker.learn(tracker.record(input_estimate=20, output_tokens=40))
    assert await ratio() == 1_100_000
    await tracker.learn(
        tracker.record(input_tokens=10, output_tokens=0), tracker.record(input_tokens=10, output_tokens=5)
    )
    expected = ((1.1 * 0.9 + 0.1 * 0) * 0.9 + 0.1 * 0.5) * 1_000_000
    assert abs(await ratio() - expected) <= 1
    for odd in ({"estimated": True}, {"input_tokens": 0, "input_estimate": 0}):
        before = await ratio()
        await tracker.learn(tracker.record(**odd, output_tokens=1000))
        assert await ratio() == before
    await tracker.learn(tracker.record(input_tokens=1, output_tokens=10**9))  # noise does not reach the sky
    assert await ratio() < 101_000_000
    for junk in ("junk", "nan", "-inf", "-5", "1e300", ""):  # D4: no request is refused for it, and it is learned anew
        await money.raw("HSET", keys.balances(money.tenant), "ratio", junk)
        assert await ratio() == RATIO_ONE, junk
        await tracker.learn(tracker.record(input_estimate=20, output_tokens=40))
        assert await ratio() == 1_100_000, junk


async def test_lost_balances_do_not_look_like_some(state: State, tracker: Tracker) -> None:
    """A ratio alone would make an empty hash."""
    await tracker.learn(tracker.record())
    assert await state.ledger.levels(tenant=tracker.tenant) == {}


async def test_what_tells_a_repetition_lives_as_long_as_one_may_come(connect: Connect, valkey_url: str) -> None:
    """I8: pages not written for that long go when another begins, the rest with the tenant's last batch."""
    state = await connect(valkey_url, USAGE_RETENTION_MS="1000")
    tracker = Tracker(state, "t" + secrets.token_hex(6))
    execute, seen = state.ledger._pipeline.execute, keys.seen(tracker.tenant)
    for number in (1, costs.PAGE):
        await tracker.learn(tracker.record(), number=number)
    assert await execute(b"HLEN", seen, within=1) == 2
    field, raw = f"{tracker.instance}:0".encode(), await execute(b"HGET", seen, f"{tracker.instance}:0", within=1)
    await execute(b"HSET", seen, field, b"%013d" % (int(raw[:13]) - 2001) + raw[13:], within=1)
    await tracker.learn(tracker.record(), number=2 * costs.PAGE)
    assert sorted(await execute(b"HKEYS", seen, within=1)) == [f"{tracker.instance}:{n}".encode() for n in (1, 2)]
    assert 0 < await execute(b"PTTL", seen, within=1) <= 2000
