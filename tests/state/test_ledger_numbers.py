"""The ledger's numbers: exact at any size, never unlimited by damage, and many callers at once (D2, I2, I10)."""

import asyncio

import pytest

from shared.state import keys
from shared.state.base import Reserved, StateUnavailable
from shared.state.ledger import MAX_AMOUNT
from tests.state.rig import DAY, MINUTE, Money, new_rid

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
    assert b"e" not in await money.raw("HGET", keys.balances(money.tenant), keys.balance_field("t", "lifetime"))
    for n in range(3):
        await money.settle(new_rid(), 1, MAX_AMOUNT - n)
    assert await money.held() == (3 * odd + 6 + 3 * MAX_AMOUNT - 3, 0, 0)
    await money.limit("lifetime", MAX_AMOUNT)
    assert await money.reserve(new_rid(), amount=1) == Reserved(status="denied", left=0)


async def test_what_is_below_nothing_is_exact_too(money: Money) -> None:
    """A day that was dropped, and whose postings reconcile corrects: to minus $18 million and back, to the nano-USD."""
    sums, day = 0, money.now // DAY
    for cost, was in (
        (1, MAX_AMOUNT),
        (3, MAX_AMOUNT),
        (0, 1),
        (999_999_999, 0),
        (MAX_AMOUNT, 7),
        (MAX_AMOUNT, 0),
        (5, 0),
    ):
        assert await money.correct(new_rid(), cost=cost, was=was, day=day) == "corrected"
        sums += cost - was
        assert await money.held() == (sums, 0, 0)


async def test_what_is_held_stays_an_exact_number_without_any_limit(money: Money) -> None:
    """D2: two holders of half of 2^53 each are unconfirmed in the end; a third would have made every later sweep, and
    with it every reservation of the tenant, an error."""
    half = 2**52
    for instance in "AB":
        rid = new_rid()
        await money.reserve(rid, amount=half - (instance == "B"), ttl=MINUTE)
        await money.dispatch(rid, 1, instance)
    assert await money.reserve(new_rid(), amount=1) == Reserved(status="denied", left=0)
    await money.age(3 * MINUTE)
    assert await money.expire() == 2
    assert await money.held() == (0, 0, MAX_AMOUNT)
    denied = await money.reserve_whole(new_rid(), amount=MAX_AMOUNT)
    assert (denied.status, denied.left, denied.level) == ("denied", 0, "t")
    await money.settle(rid, 1, 5)
    assert await money.reserve(new_rid(), amount=half) == Reserved(status="denied", left=half - 1)


@pytest.mark.parametrize("junk", ["nan", "inf", "1e3", "-1", "", " 5", "0x10", "5.0", "9" * 19])
async def test_a_damaged_limit_is_an_error_never_unlimited(money: Money, junk: str) -> None:
    """D2: checked by pattern before the first write."""
    rid = new_rid()
    await money.raw("HSET", keys.balances(money.tenant), keys.limit_field(), f"- {junk} -")
    with pytest.raises(StateUnavailable, match="NOTINTEGER"):
        await money.reserve(rid)
    assert await money.entries() == []
    assert await money.raw("HLEN", keys.balances(money.tenant)) == 1


async def test_a_damaged_balance_stops_the_whole_move(money: Money) -> None:
    """The last of the fields is damaged: none of the others may have been written."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    await money.raw("HSET", keys.balances(money.tenant), keys.balance_field("t", "lifetime"), "0 1e2 0")
    with pytest.raises(StateUnavailable, match="NOTINTEGER"):
        await money.settle(rid)
    assert await money.calls(rid) == [(1, "dispatched")]
    day = keys.bucket("day", money.now)
    assert await money.raw("HGET", keys.balances(money.tenant), keys.balance_field("t", day)) == b"0 100 0"
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
        await money.ledger.set_limit(tenant=money.tenant, period="week", limit=1)
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


async def test_balances_that_are_lost_admit_nobody(money: Money) -> None:
    """Faults 52: a deleted hash is no new tenant, whose limit would be none."""
    await money.limit("month", 1000)
    rid = new_rid()
    assert (await money.reserve(rid)).status == "ok"
    await money.dispatch(rid)
    await money.raw("DEL", keys.balances(money.tenant))
    assert (await money.reserve(new_rid())).status == "lost"
    assert await money.settle(rid) == "settled"  # what was used is posted all the same
    assert (await money.reserve(new_rid())).status == "lost"
    last = (await money.journal())[-1].id
    restore = money.state.ledger.restore
    fields = {"t:lifetime": "60 0 0", "t:limit": "- 1000 -"}
    assert await restore(tenant=money.tenant, fields=fields, last="1-0") == "moved"
    assert await restore(tenant=money.tenant, fields=fields, last=last) == "restored"
    assert await restore(tenant=money.tenant, fields=fields, last=last) == "kept"
    assert (await money.reserve(new_rid(), amount=1001)).status == "denied"
    assert await money.held() == (60, 0, 0)


async def test_whoever_begins_with_nothing_is_new(money: Money) -> None:
    """Not lost: a first call of 0, a settlement nobody reserved, a limit that was lifted again."""
    called, settled, limited = (Money(money.state, f"{money.tenant}{n}") for n in range(3))
    await called.reserve(new_rid(), amount=0)
    await settled.settle(new_rid(), 1, 0)
    await limited.limit("day", 5)
    await limited.limit("day", None)
    for each in (called, settled, limited):
        assert (await each.reserve(new_rid())).status == "ok"
