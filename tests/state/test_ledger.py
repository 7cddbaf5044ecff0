"""Every outcome of every verb of the ledger, on the real Lua in a real server (DESIGN 3 "Stale work never runs", 4)."""

import asyncio
from typing import Any

import pytest

from shared.state import keys
from shared.state.base import Dispatched, Reserved, StateUnavailable
from shared.state.ledger import MAX_AMOUNT
from tests.state.rig import DAY, HOUR, MINUTE, Money, new_rid

# ---- reserve ---------------------------------------------------------------------------------------------------------


async def test_a_request_that_goes_well(money: Money) -> None:
    """S0-15..17: reserved before, the actual cost posted after, the rest given back; in all three periods at once."""
    rid = new_rid()
    assert await money.reserve(rid, amount=100) == Reserved(status="ok", amount=100)
    assert await money.held() == (0, 100, 0)
    assert await money.dispatch(rid) == Dispatched(status="won", call=1)
    assert await money.held() == (0, 100, 0)
    assert await money.settle(rid, cost=60, estimated=True) == "settled"
    for level in (await money.levels()).values():
        assert (level.settled, level.pending, level.unconfirmed) == (60, 0, 0)
    (entry,) = await money.entries()
    assert (entry.call, entry.state, entry.amount, entry.cost, entry.estimated) == (1, "settled", 100, 60, True)


async def test_reserve_again_holds_once(money: Money) -> None:
    """Idempotent: the same or a later delivery gets the held amount back."""
    rid = new_rid()
    for delivery, amount in ((1, 100), (1, 100), (3, 250), (2, 100)):
        assert await money.reserve(rid, delivery, amount) == Reserved(status="ok", amount=100)
    await money.dispatch(rid)
    assert await money.reserve(rid, 4, 100) == Reserved(status="ok", amount=100)
    assert await money.held() == (0, 100, 0)


async def test_reserve_is_denied_at_the_limit_and_says_what_is_left(money: Money) -> None:
    """I2, D1: strictly greater than the limit is denied, equal is not."""
    await money.limit("day", 1000)
    assert (await money.reserve(new_rid(), amount=700)).status == "ok"
    assert await money.reserve(new_rid(), amount=301) == Reserved(status="denied", left=300)
    assert (await money.reserve(new_rid(), amount=300)).status == "ok"
    assert await money.reserve(new_rid(), amount=1) == Reserved(status="denied", left=0)
    assert await money.reserve(new_rid(), amount=0) == Reserved(status="ok", amount=0)  # a free model passes no limit
    assert await money.held() == (0, 1000, 0)


@pytest.mark.parametrize("period", keys.PERIODS)
async def test_each_period_limits_by_itself(money: Money, period: keys.Period) -> None:
    """The tightest of day, month and lifetime decides; a cleared limit no longer does."""
    for each in keys.PERIODS:
        await money.limit(each, 100 if each == period else 500)
    assert await money.reserve(new_rid(), amount=101) == Reserved(status="denied", left=100)
    await money.limit(period, None)
    assert (await money.reserve(new_rid(), amount=101)).status == "ok"


async def test_settled_and_unconfirmed_count_against_the_limit(money: Money) -> None:
    await money.limit("lifetime", 1000)
    first, second = new_rid(), new_rid()
    await money.reserve(first, amount=300)
    await money.dispatch(first)
    await money.settle(first, cost=250)
    await money.reserve(second, amount=400)
    await money.dispatch(second, instance="A")
    assert (await money.dispatch(second, 2, "B", lost="A", amount=10, max_calls=1)).status == "exhausted"
    assert await money.held() == (250, 0, 400)
    assert await money.reserve(new_rid(), amount=351) == Reserved(status="denied", left=350)


async def test_reserve_late_and_stale_write_nothing(money: Money) -> None:
    assert (await money.reserve(new_rid(), ttl=-1000)).status == "late"
    assert (await money.reserve(new_rid(), stale=True)).status == "stale"
    assert await money.entries() == []
    assert await money.raw("EXISTS", *keys.ledger(money.tenant)) == 0


async def test_reserve_closed(money: Money) -> None:
    """No call is open any more, and the delivery is not new."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    await money.settle(rid)
    assert (await money.reserve(rid, 1)).status == "closed"
    assert await money.reserve(rid, 2) == Reserved(status="ok", amount=0)  # the holder may have died between two calls
    assert await money.held() == (60, 0, 0)


async def test_void_and_reserve_in_any_order(money: Money) -> None:
    """DESIGN 3: a later delivery's reserve reopens a VOIDED entry, an equal or earlier one is refused."""
    rid = new_rid()
    await money.reserve(rid, 2)
    assert await money.void(rid, 2) == "voided"
    assert await money.held() == (0, 0, 0)
    assert (await money.reserve(rid, 1)).status == "refused"
    assert (await money.reserve(rid, 2)).status == "refused"
    assert (await money.dispatch(rid, 2)).status == "voided"
    assert (await money.reserve(rid, 3, amount=70)) == Reserved(status="ok", amount=70)
    assert await money.held() == (0, 70, 0)
    assert (await money.dispatch(rid, 2)).status == "voided"  # the voided delivery stays dead
    assert (await money.dispatch(rid, 3)).status == "won"


async def test_a_void_before_its_reserve_leaves_a_tombstone(money: Money) -> None:
    rid = new_rid()
    assert await money.void(rid, 1) == "voided"
    assert (await money.reserve(rid, 1)).status == "refused"
    assert (await money.reserve(rid, 2)).status == "ok"
    assert await money.calls(rid) == [(0, "reserved")]


async def test_void_keeps_what_a_later_delivery_reserved_or_any_dispatched(money: Money) -> None:
    rid = new_rid()
    await money.reserve(rid, 1)
    await money.reserve(rid, 2)
    assert await money.void(rid, 1) == "kept"
    await money.dispatch(rid, 2)
    assert await money.void(rid, 2) == "kept"
    assert await money.void(rid, 5) == "kept"
    assert await money.held() == (0, 100, 0)
    await money.settle(rid)
    assert await money.void(rid, 2) == "kept"


async def test_void_of_a_dispatch_in_doubt_settles_it_at_nothing(money: Money) -> None:
    """DESIGN 3: asked again once and still in doubt, a provider makes no call and settles 0, number unknown."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid, 1, "A")
    assert await money.void(rid, 1, "B") == "kept"
    assert await money.void(rid, 2, "A") == "kept"
    assert await money.void(rid, 1, "A") == "voided"
    assert await money.held() == (0, 0, 0)
    assert (await money.dispatch(rid, 1, "A")).status == "closed"
    undispatched = new_rid()
    await money.reserve(undispatched)
    assert await money.void(undispatched, 1, "A") == "voided"
    assert (await money.dispatch(undispatched, 1, "A")).status == "voided"


async def test_void_of_a_topup_in_doubt_leaves_the_call_before_it_alone(money: Money) -> None:
    """Call 1 was made and its settle got no answer either; the topup for call 2 never arrived."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    assert await money.void(rid, 1, "A", call=2) == "kept"
    assert await money.settle(rid, 1, 70) == "settled"
    await money.topup(rid, 2)
    assert await money.void(rid, 1, "A", call=2) == "voided"
    assert await money.held() == (70, 0, 0)


# ---- dispatch --------------------------------------------------------------------------------------------------------


async def test_one_delivery_wins_and_asking_again_gives_the_same_call(money: Money) -> None:
    """I7, faults 33: a duplicate makes no second call."""
    rid = new_rid()
    await money.reserve(rid)
    for _ in range(2):
        assert await money.dispatch(rid, 1, "A") == Dispatched(status="won", call=1)
    assert await money.dispatch(rid, 2, "B") == Dispatched(status="refused", holder="A", delivery=1)
    assert await money.dispatch(rid, 2, "A") == Dispatched(status="refused", holder="A", delivery=1)
    assert await money.dispatch(rid, 2, "B", lost="C") == Dispatched(status="refused", holder="A", delivery=1)
    await money.settle(rid)
    assert await money.dispatch(rid, 1, "A") == Dispatched(status="closed", holder="A", delivery=1)
    assert await money.dispatch(rid, 2, "B") == Dispatched(status="closed", holder="A", delivery=1)


async def test_a_lost_holder_is_replaced(money: Money) -> None:
    """DESIGN 3 "Ownership": the lost call becomes UNCONFIRMED at once, call n+1 opens with its own amount."""
    rid = new_rid()
    await money.reserve(rid, amount=100)
    await money.dispatch(rid, 1, "A")
    assert await money.dispatch(rid, 2, "B", lost="A", amount=130) == Dispatched(status="won", call=2)
    assert await money.dispatch(rid, 2, "B", lost="A", amount=130) == Dispatched(status="won", call=2)
    assert await money.calls(rid) == [(1, "unconfirmed"), (2, "dispatched")]
    assert await money.held() == (0, 130, 100)
    assert await money.dispatch(rid, 1, "A") == Dispatched(status="refused", holder="B", delivery=2)
    assert await money.settle(rid, 1, 90) == "late"
    assert await money.settle(rid, 2, 120) == "settled"
    assert await money.held() == (210, 0, 0)


async def test_a_holder_lost_between_two_calls_is_replaced(money: Money) -> None:
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid, 1, "A")
    await money.settle(rid, 1, 0)
    assert await money.dispatch(rid, 2, "B", lost="A", amount=80) == Dispatched(status="won", call=2)
    assert await money.held() == (0, 80, 0)


async def test_a_lost_call_is_unconfirmed_even_when_no_further_one_opens(money: Money) -> None:
    await money.limit("day", 150)
    rid = new_rid()
    await money.reserve(rid, amount=100)
    await money.dispatch(rid, 1, "A")
    assert await money.dispatch(rid, 2, "B", lost="A", amount=60) == Dispatched(status="denied", left=50)
    assert await money.held() == (0, 0, 100)
    assert (await money.dispatch(rid, 2, "B", lost="A", amount=50, max_calls=1)).status == "exhausted"
    assert await money.dispatch(rid, 2, "B", lost="A", amount=50) == Dispatched(status="won", call=2)


async def test_dispatch_missing_late_stale(money: Money) -> None:
    rid = new_rid()
    assert (await money.dispatch(rid)).status == "missing"
    await money.reserve(rid, ttl=HOUR)
    assert (await money.dispatch(rid, stale=True)).status == "stale"
    assert (await money.dispatch(rid, max_calls=0)).status == "exhausted"
    await money.age(HOUR + MINUTE)
    assert (await money.dispatch(rid)).status == "late"
    assert await money.calls(rid) == [(0, "reserved")]


# ---- topup -----------------------------------------------------------------------------------------------------------


async def test_the_holder_tops_up_for_a_further_call(money: Money) -> None:
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    await money.settle(rid, 1, 0)
    for _ in range(2):
        assert await money.topup(rid, 2, amount=40) == Dispatched(status="won", call=2)
    assert await money.held() == (0, 40, 0)
    await money.settle(rid, 2, 40)
    assert await money.topup(rid, 2) == Dispatched(status="closed", holder="A", delivery=1)
    assert await money.topup(rid, 4) == Dispatched(status="closed", holder="A", delivery=1)
    assert (await money.topup(rid, 3)).status == "won"
    await money.settle(rid, 3, 1)
    assert (await money.topup(rid, 4)).status == "exhausted"


async def test_a_topup_while_its_last_settle_is_in_doubt(money: Money) -> None:
    """A settle that Redis did not answer leaves the call unconfirmed; it may still come."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    assert (await money.topup(rid, 2, amount=40)).status == "won"
    assert await money.held() == (0, 40, 100)
    assert await money.settle(rid, 1, 70) == "late"
    assert await money.held() == (70, 40, 0)


async def test_topup_refusals(money: Money) -> None:
    rid = new_rid()
    assert (await money.topup(rid, 2)).status == "missing"
    await money.reserve(rid)
    assert (await money.topup(rid, 2)).status == "missing"  # never dispatched
    await money.dispatch(rid, 1, "A")
    assert await money.topup(rid, 2, 2, "B") == Dispatched(status="refused", holder="A", delivery=1)
    await money.settle(rid, 1, 10)
    assert await money.topup(rid, 2, 2, "B") == Dispatched(status="closed", holder="A", delivery=1)
    assert (await money.topup(rid, 2, stale=True)).status == "stale"
    await money.limit("month", 20)
    assert await money.topup(rid, 2, amount=11) == Dispatched(status="denied", left=10)
    assert await money.held() == (10, 0, 0)
    await money.age(2 * HOUR)
    assert (await money.topup(rid, 2)).status == "late"
    voided = new_rid()
    await money.void(voided)
    assert (await money.topup(voided, 2)).status == "voided"


async def test_a_holder_declared_lost_may_not_top_up(money: Money) -> None:
    """It was frozen and thawed: the request has moved on (faults 17)."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid, 1, "A")
    assert (await money.dispatch(rid, 2, "B", lost="A", max_calls=1)).status == "exhausted"
    assert await money.topup(rid, 2, 1, "A") == Dispatched(status="closed", holder="A", delivery=1)


# ---- settle ----------------------------------------------------------------------------------------------------------


async def test_settle_posts_in_full_once(money: Money) -> None:
    """DESIGN 4: what was really used is always posted, past the reservation and past the limit."""
    await money.limit("day", 100)
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    assert await money.settle(rid, 1, 5000) == "settled"
    assert await money.settle(rid, 1, 5000) == "duplicate"
    assert await money.settle(rid, 1, 1) == "duplicate"
    assert await money.held() == (5000, 0, 0)
    assert await money.reserve(new_rid(), amount=1) == Reserved(status="denied", left=0)


async def test_settle_of_what_was_not_known(money: Money) -> None:
    rid = new_rid()
    assert await money.settle(rid, 2, 70) == "opened"
    assert await money.settle(rid, 2, 70) == "duplicate"
    assert (await money.reserve(rid, 1)).status == "closed"
    assert await money.void(rid, 1) == "kept"
    assert await money.settle(rid, 1, 5) == "opened"  # nor was this call
    assert await money.held() == (75, 0, 0)


async def test_settle_without_a_known_dispatch_releases_the_reservation(money: Money) -> None:
    rid = new_rid()
    await money.reserve(rid)
    assert await money.settle(rid, 1, 30) == "settled"
    assert await money.held() == (30, 0, 0)


async def test_a_voided_entry_accepts_a_late_settle(money: Money) -> None:
    rid = new_rid()
    await money.reserve(rid)
    await money.void(rid)
    assert await money.settle(rid, 1, 30) == "late"
    assert await money.held() == (30, 0, 0)
    assert (await money.reserve(rid, 2)).status == "closed"


# ---- what time does --------------------------------------------------------------------------------------------------


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
    await money.raw("HSET", keys.balances(money.tenant), keys.balance_field(yesterday, "p"), 100)
    await money.settle(rid, 1, 60)
    assert await money.raw("HGET", keys.balances(money.tenant), keys.balance_field(yesterday, "s")) == b"60"
    assert await money.raw("HGET", keys.balances(money.tenant), keys.balance_field(yesterday, "p")) == b"0"
    assert (await money.levels())["day"].settled == 0


def _on_the_day_before(packed: bytes) -> bytes:
    import msgspec  # noqa: PLC0415 - only here

    entry: list[Any] = msgspec.msgpack.decode(packed)
    entry[4] -= 1
    return msgspec.msgpack.encode(entry)


async def test_old_days_and_months_are_dropped_once_a_day(money: Money) -> None:
    """I8: balances do not grow for ever."""
    now, bal = money.now, keys.balances(money.tenant)
    kept = [keys.bucket("day", now - days * DAY) for days in (0, 1, 62)] + [keys.bucket("month", now - 200 * DAY)]
    gone = [keys.bucket("day", now - days * DAY) for days in (63, 64, 400)] + [keys.bucket("month", now - 800 * DAY)]
    for bucket in (*kept, *gone, "lifetime"):
        await money.raw("HSET", bal, keys.balance_field(bucket, "s"), 5)
    await money.limit("lifetime", 1000)
    await money.expire()
    left = {name.decode() for name in await money.raw("HKEYS", bal)}
    assert left == {f"t:{bucket}:s" for bucket in (*kept, "lifetime")} | {"t:limit:lifetime", "pruned"}
    await money.raw("HSET", bal, keys.balance_field(gone[0], "s"), 5)
    await money.expire()  # already done today
    assert await money.raw("HEXISTS", bal, keys.balance_field(gone[0], "s")) == 1


async def test_the_dates_of_lua_are_those_of_python(state: Any) -> None:
    """Civil-from-days against the standard library: leap years, centuries, ends of months."""
    from datetime import date, timedelta  # noqa: PLC0415 - only here

    prelude = (keys_folder() / "_balances.lua").read_text("utf-8")
    text = f"#!lua\n{prelude}\nlocal y, m, d = civil(tonumber(ARGV[5]))\nreturn {{y, m, d}}"
    first = date(1970, 1, 1)
    days = [*range(0, 200_000, 97), *((date(year, 3, 1) - first).days - 1 for year in range(1970, 2410))]
    replies = await state._side.many([(b"EVAL", text, 3, b"x", b"y", b"z", b"", 0, 0, 0, day) for day in days], 30.0)
    for day, reply in zip(days, replies, strict=True):
        expected = first + timedelta(days=day)
        assert reply == [expected.year, expected.month, expected.day]


def keys_folder() -> Any:
    from pathlib import Path  # noqa: PLC0415 - only here

    return Path(keys.__file__).parent / "lua"


# ---- numbers ---------------------------------------------------------------------------------------------------------


async def test_large_amounts_are_exact(money: Money) -> None:
    """$100,000 and more to the nano-USD (plain tostring would write 1e+14), and sums past 2^53 when nothing limits."""
    odd = 100_000_000_000_001
    for _ in range(3):
        rid = new_rid()
        await money.reserve(rid, amount=odd)
        await money.dispatch(rid)
        assert (await money.held())[1] == odd
        await money.settle(rid, 1, odd + 2)
    assert await money.held() == (3 * odd + 6, 0, 0)
    assert b"e" not in await money.raw("HGET", keys.balances(money.tenant), keys.balance_field("lifetime", "s"))
    for n in range(3):
        await money.settle(new_rid(), 1, MAX_AMOUNT - n)
    assert await money.held() == (3 * odd + 6 + 3 * MAX_AMOUNT - 3, 0, 0)
    await money.limit("lifetime", MAX_AMOUNT)
    assert await money.reserve(new_rid(), amount=1) == Reserved(status="denied", left=0)


@pytest.mark.parametrize("junk", ["nan", "inf", "1e3", "-1", "", " 5", "0x10", "5.0", "9" * 19])
async def test_a_damaged_limit_is_an_error_never_unlimited(money: Money, junk: str) -> None:
    """D2: checked by pattern before the first write."""
    rid = new_rid()
    await money.raw("HSET", keys.balances(money.tenant), keys.limit_field("month"), junk)
    with pytest.raises(StateUnavailable, match="NOTINTEGER"):
        await money.reserve(rid)
    assert await money.entries() == []
    assert await money.raw("HLEN", keys.balances(money.tenant)) == 1


async def test_a_damaged_balance_stops_the_whole_move(money: Money) -> None:
    """The last of the fields is damaged: none of the others may have been written."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    await money.raw("HSET", keys.balances(money.tenant), keys.balance_field("lifetime", "p"), "1e2")
    with pytest.raises(StateUnavailable, match="NOTINTEGER"):
        await money.settle(rid)
    assert await money.calls(rid) == [(1, "dispatched")]
    day = keys.bucket("day", money.now)
    assert await money.raw("HGET", keys.balances(money.tenant), keys.balance_field(day, "p")) == b"100"
    assert await money.raw("HGET", keys.balances(money.tenant), keys.balance_field(day, "s")) is None
    with pytest.raises(StateUnavailable, match="damaged"):
        await money.levels()


async def test_deleted_balances_do_not_turn_into_headroom(money: Money) -> None:
    """Faults 52, as far as it goes before the journal: nothing held never goes below nothing."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    await money.raw("DEL", keys.balances(money.tenant))
    await money.settle(rid, 1, 60)
    assert await money.held() == (60, 0, 0)


async def test_what_may_not_be_asked(money: Money) -> None:
    """Wrong arguments are refused here, before anything is sent."""
    with pytest.raises(ValueError, match="amount"):
        await money.limit("day", 2**53)
    with pytest.raises(ValueError, match="period"):
        await money.state.ledger.set_limit(tenant=money.tenant, period="week", limit=1)
    for rid in ("", "abc", "0" * 31, "z" * 32, "0" * 34):
        with pytest.raises(ValueError, match=r"request id|hexadecimal"):
            await money.reserve(rid)
    for amount in (-1, 2**53):
        with pytest.raises(ValueError, match="amount"):
            await money.reserve(new_rid(), amount=amount)
    for call in (0, -1, 65):
        with pytest.raises(ValueError, match="call"):
            await money.settle(new_rid(), call)
    for tenant in ("", "a{b}", "a}b", "a:b", "x" * 65, "ü", "a b", "a\n"):
        with pytest.raises(ValueError, match="tenant id"):
            await Money(money.state, tenant).reserve(new_rid())


# ---- many at once ----------------------------------------------------------------------------------------------------


async def test_a_thousand_reserves_at_the_edge(money: Money) -> None:
    """Faults 89, S0-22: exactly floor(headroom / amount) are admitted."""
    await money.limit("day", 137 * 7 + 6)
    answers = await asyncio.gather(*(money.reserve(new_rid(), amount=7) for _ in range(1000)))
    assert sum(each.status == "ok" for each in answers) == 137
    assert {each.left for each in answers if each.status == "denied"} == {6}
    assert await money.held() == (0, 137 * 7, 0)


async def test_ten_deliveries_race_for_one_call(money: Money) -> None:
    rid = new_rid()
    await money.reserve(rid)
    answers = await asyncio.gather(*(money.dispatch(rid, n, f"i{n}") for n in range(1, 11)))
    assert sorted(each.status for each in answers) == ["refused"] * 9 + ["won"]


async def test_tenants_do_not_share_anything(money: Money) -> None:
    """I10: the same rid in two tenants is two entries."""
    other, rid = Money(money.state, money.tenant + "x"), new_rid()
    await money.reserve(rid, amount=10)
    await other.reserve(rid, amount=20)
    assert (await money.held(), await other.held()) == ((0, 10, 0), (0, 20, 0))


async def test_the_idle_sweep_finds_what_nobody_asks_for(money: Money) -> None:
    """I3: tenants to which no request comes, among others with nothing due; 40 entries are three calls."""
    others = [Money(money.state, f"{money.tenant}-{n}") for n in range(300)]
    for _ in range(40):
        await others[7].reserve(new_rid(), ttl=MINUTE)
    await others[8].reserve(new_rid())
    await others[7].age(2 * MINUTE)
    tenants = [each.tenant for each in others]
    assert await money.state.ledger.sweep(tenants, dice=lambda: 0.5) == 40
    assert await others[7].held() == (0, 0, 0)
    assert await others[8].held() == (0, 100, 0)
    assert await money.state.ledger.sweep(tenants) == 0


async def test_a_tombstone_outlives_the_deadline(connect: Any, valkey_url: str) -> None:
    """I7 whatever LEDGER_TOMBSTONE_MS says: a duplicate before the deadline never begins it anew."""
    money = Money(await connect(valkey_url, LEDGER_TOMBSTONE_MS="60000"), f"t{new_rid()}")
    rid = new_rid()
    await money.reserve(rid, ttl=HOUR)
    await money.dispatch(rid)
    await money.settle(rid)
    await money.age(50 * MINUTE)
    assert await money.expire() == 0
    assert (await money.reserve(rid)).status == "closed"


async def test_nobody_takes_the_place_of_nobody(money: Money) -> None:
    """A call that was settled before its dispatch has no holder, and an empty `lost` names none."""
    rid = new_rid()
    await money.reserve(rid)
    await money.settle(rid)
    assert await money.dispatch(rid, lost="") == Dispatched(status="closed", holder="", delivery=1)
