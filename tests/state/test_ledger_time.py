"""What time does to the ledger: leases, unconfirmed calls, tombstones, periods, sweeps (I3, I8, DESIGN 4)."""

from datetime import date, timedelta
from pathlib import Path

import msgspec
import pytest

from shared.state import keys
from shared.state.redis import State
from tests.state.conftest import Connect
from tests.state.rig import DAY, HOUR, MINUTE, Money, new_rid


async def test_a_reservation_is_leased(money: Money) -> None:
    """I3: voided after deadline + 10 s, forgotten a tombstone later, nothing left in Redis but balances (I8)."""
    rid = new_rid()
    await money.reserve(rid, ttl=MINUTE)
    assert (await money.leases())[rid] == pytest.approx(MINUTE + 10_000, abs=1000)
    await money.age(MINUTE + 8000)
    assert await money.expire() == 0
    await money.age(4000)
    assert await money.expire() == 1
    assert await money.held() == (0, 0, 0)
    assert await money.calls(rid) == [(0, "voided")]
    assert (await money.leases())[rid] == pytest.approx(600_000, abs=1000)
    await money.age(601_000)
    assert await money.expire() == 1
    assert await money.raw("EXISTS", keys.entries(money.tenant), keys.leases(money.tenant)) == 0


async def test_a_dispatched_call_lapses_to_unconfirmed_and_is_posted_at_its_bound(money: Money) -> None:
    """DESIGN 4: against the limit for 24 h, then posted; a settle that comes even later corrects the posting."""
    rid = new_rid()
    await money.reserve(rid, ttl=MINUTE)
    await money.dispatch(rid)
    await money.age(2 * MINUTE)
    assert await money.expire() == 1
    assert await money.held() == (0, 0, 100)
    await money.age(DAY - MINUTE)
    assert await money.expire() == 0
    await money.age(2 * MINUTE)
    assert await money.expire() == 1
    assert await money.held() == (100, 0, 0)
    (entry,) = await money.entries()
    assert (entry.state, entry.cost, entry.estimated) == ("posted", 100, True)
    assert await money.settle(rid, 1, 40) == "late"
    assert await money.settle(rid, 1, 40) == "duplicate"
    assert await money.held() == (40, 0, 0)


async def test_an_unconfirmed_call_outlives_its_successor(money: Money) -> None:
    rid = new_rid()
    await money.reserve(rid, ttl=MINUTE)
    await money.dispatch(rid, 1, "A")
    await money.dispatch(rid, 2, "B", lost="A", amount=70)
    assert (await money.leases())[rid] == pytest.approx(MINUTE + 10_000, abs=1000)
    await money.settle(rid, 2, 50)
    assert (await money.leases())[rid] == pytest.approx(DAY, abs=1000)
    await money.age(HOUR)
    assert await money.expire() == 0
    assert await money.held() == (50, 0, 100)


async def test_reserve_sweeps_what_is_due_and_uses_its_room(money: Money) -> None:
    """DESIGN 4: at most 16 expired leases per call; without any sweeper a request still finds the room (faults 20)."""
    await money.limit("day", 2000)
    for _ in range(20):
        await money.reserve(new_rid(), ttl=MINUTE)
    assert (await money.reserve(new_rid())).status == "denied"
    await money.age(2 * MINUTE)
    assert (await money.reserve(new_rid())).status == "ok"
    assert await money.held() == (0, 500, 0)
    assert await money.expire() == 4
    assert await money.held() == (0, 100, 0)


async def test_the_period_of_the_reserve_is_charged(money: Money) -> None:
    """Faults 80: midnight during a request."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    yesterday = keys.bucket("day", money.now - DAY)
    packed = await money.raw("HGET", keys.entries(money.tenant), bytes.fromhex(rid))
    await money.raw("HSET", keys.entries(money.tenant), bytes.fromhex(rid), _on_the_day_before(packed))
    await money.raw("HSET", keys.balances(money.tenant), keys.balance_field("t", yesterday), "0 100 0")
    await money.settle(rid, 1, 60)
    assert await money.raw("HGET", keys.balances(money.tenant), keys.balance_field("t", yesterday)) == b"60 0 0"
    assert (await money.levels())["day"].settled == 0


def _on_the_day_before(packed: bytes) -> bytes:
    entry = msgspec.msgpack.decode(packed, type=list)
    entry[4] -= 1
    return msgspec.msgpack.encode(entry)


async def test_old_days_and_months_are_dropped_once_a_day(money: Money) -> None:
    """I8: balances do not grow for ever."""
    now, bal = money.now, keys.balances(money.tenant)
    kept = [keys.bucket("day", now - days * DAY) for days in (0, 1, 62)] + [keys.bucket("month", now - 200 * DAY)]
    gone = [keys.bucket("day", now - days * DAY) for days in (63, 64, 400)] + [keys.bucket("month", now - 800 * DAY)]
    for bucket in (*kept, *gone, "lifetime"):
        await money.raw("HSET", bal, keys.balance_field("t", bucket), "5 0 0")
    await money.limit("lifetime", 1000)
    await money.expire()
    left = {name.decode() for name in await money.raw("HKEYS", bal)}
    assert left == {f"t:{bucket}" for bucket in (*kept, "lifetime")} | {"about", "t:limit", "pruned", "snap"}
    await money.raw("HSET", bal, keys.balance_field("t", gone[0]), "5 0 0")
    await money.expire()  # already done today
    assert await money.raw("HEXISTS", bal, keys.balance_field("t", gone[0])) == 1


async def test_the_dates_of_lua_are_those_of_python(state: State) -> None:
    """Civil-from-days against the standard library: leap years, centuries, ends of months."""
    prelude = (Path(keys.__file__).parent / "lua" / "_balances.lua").read_text("utf-8")
    text = f"#!lua\n{prelude}\nlocal y, m, d = civil(tonumber(ARGV[5]))\nreturn {{y, m, d}}"
    first = date(1970, 1, 1)
    days = [*range(0, 200_000, 97), *((date(year, 3, 1) - first).days - 1 for year in range(1970, 2410))]
    replies = await state._side.many(
        [(b"EVAL", text, 5, b"x", b"y", b"z", b"j", b"r", b"", 0, 0, 0, day) for day in days], 30.0
    )
    for day, reply in zip(days, replies, strict=True):
        expected = first + timedelta(days=day)
        assert reply == [expected.year, expected.month, expected.day]


async def test_a_tombstone_outlives_the_deadline(connect: Connect, valkey_url: str) -> None:
    """I7 whatever LEDGER_TOMBSTONE_MS says: a duplicate before the deadline never begins it anew."""
    money = Money(await connect(valkey_url, LEDGER_TOMBSTONE_MS="60000"), f"t{new_rid()}")
    rid = new_rid()
    await money.reserve(rid, ttl=HOUR)
    await money.dispatch(rid)
    await money.settle(rid)
    await money.age(50 * MINUTE)
    assert await money.expire() == 0
    assert (await money.reserve(rid)).status == "closed"


async def test_the_idle_sweep_finds_what_nobody_asks_for(money: Money) -> None:
    """I3: tenants to which no request comes, among others with nothing due; 40 entries are three calls."""
    others = [Money(money.state, f"{money.tenant}-{n}") for n in range(300)]
    for _ in range(40):
        await others[7].reserve(new_rid(), ttl=MINUTE)
    await others[8].reserve(new_rid())
    await others[7].age(2 * MINUTE)
    tenants = [each.tenant for each in others]
    assert (await money.state.ledger.sweep(tenants, dice=lambda: 0.5)).entries == 40
    assert await others[7].held() == (0, 0, 0)
    assert await others[8].held() == (0, 100, 0)
    assert (await money.state.ledger.sweep(tenants)).entries == 0


async def test_the_sweep_looks_again_in_time(money: Money, monkeypatch: pytest.MonkeyPatch) -> None:
    """I3: a tenant that had nothing due is looked at again within 3 s, and not each second for nothing."""
    rid = new_rid()
    assert (await money.state.ledger.sweep([money.tenant])).entries == 0
    await money.reserve(rid, ttl=MINUTE)
    await money.age(2 * MINUTE)
    now = money.now
    monkeypatch.setattr(money.state.ledger, "_now", lambda: now + 1000)
    assert (await money.state.ledger.sweep([money.tenant])).entries == 0
    monkeypatch.setattr(money.state.ledger, "_now", lambda: now + 3100)
    assert (await money.state.ledger.sweep([money.tenant])).entries == 1
