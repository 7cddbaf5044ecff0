"""Each verb on each level: tenant, key, user; clamping, more in mid-stream, corrections (DESIGN 4, I2, D1, D2)."""

from datetime import UTC, datetime

import pytest
from msgspec import structs

from shared.core.journal import Replay
from shared.state import keys
from shared.state.base import Extended, Rates, Reserved, StateUnavailable
from shared.state.books import MAX_USERS
from shared.state.redis import State
from tests.state import virtual
from tests.state.rig import DAY, KEY, MINUTE, Money, new_rid

USER = "0123456789abcdef"
LEVELS = ("t", f"k:{KEY}", f"u:{USER}")
NOON = int(datetime(2027, 3, 31, 12, tzinfo=UTC).timestamp() * 1000)


@pytest.fixture
async def clock(state: State) -> virtual.VirtualClock:
    clock = virtual.VirtualClock(state, f"v{new_rid()}", NOON)
    await clock.set(NOON)
    return clock


async def all_held(money: Money, *levels: str) -> list[tuple[int, int, int]]:
    """Settled, pending, unconfirmed of each level's day; month and lifetime must be the same."""
    found = []
    for level in levels:
        rows = {(row.settled, row.pending, row.unconfirmed) for row in (await money.levels(level)).values()}
        assert len(rows) == 1
        found.append(rows.pop())
    return found


@pytest.mark.parametrize("period", keys.PERIODS)
@pytest.mark.parametrize("level", LEVELS)
async def test_each_limit_of_each_level_is_one(money: Money, level: str, period: keys.Period) -> None:
    """I2: it alone decides, is named, and holds for top-ups and mid-stream as well; equal is not above."""
    for each in keys.PERIODS:
        await money.limit(each, 250 if each == period else 1000, level)
    rid = new_rid()
    assert (await money.reserve(rid, amount=100, user=USER)).status == "ok"
    denied = await money.reserve_whole(new_rid(), amount=151, user=USER)
    assert (denied.status, denied.left, denied.level, denied.period) == ("denied", 150, level, period)
    await money.dispatch(rid)
    assert await money.extend(rid, 1, 251) == Extended(status="denied", left=150)
    assert await money.extend(rid, 1, 200) == Extended(status="ok", amount=200)
    await money.settle(rid, 1, 120)
    assert (await money.topup(rid, 2, amount=131)).left == 130
    assert (await money.topup(rid, 2, amount=130)).status == "won"
    assert await all_held(money, "t", f"k:{KEY}") == [(120, 130, 0)] * 2


async def test_another_key_and_another_user_are_not_held_up(money: Money) -> None:
    await money.limit("day", 100, f"k:{KEY}")
    await money.limit("day", 100, f"u:{USER}")
    assert (await money.reserve(new_rid(), amount=100, user=USER)).status == "ok"
    assert (await money.reserve(new_rid(), amount=1, user=USER, key="other")).status == "denied"
    assert (await money.reserve(new_rid(), amount=100, key="other", user="somebody")).status == "ok"
    assert await all_held(money, "t", "k:other", f"u:{USER}", "u:somebody") == [
        (0, 200, 0), (0, 100, 0), (0, 100, 0), (0, 0, 0)
    ]  # fmt: skip


async def test_a_user_counts_where_one_has_a_limit(money: Money) -> None:
    """S0-22, issue 4: and a request that began with it ends with it."""
    before, counted = new_rid(), new_rid()
    assert (await money.reserve_whole(before, user=USER)).user is False
    await money.limit("month", 500, f"u:{USER}")
    assert (await money.reserve_whole(counted, user=USER)).user is True
    await money.limit("month", None, f"u:{USER}")
    assert (await money.reserve_whole(new_rid(), user=USER)).user is False
    for rid in (before, counted):
        await money.dispatch(rid)
        await money.settle(rid, cost=60, user=USER)
    assert await all_held(money, "t", f"u:{USER}") == [(120, 100, 0), (60, 0, 0)]


async def test_so_many_users_have_a_limit_at_most(money: Money) -> None:
    """Issue 4: 10,000 a tenant. One that has a limit may change it, one that gives it up makes room."""
    await money.limit("day", 5, "u:first")
    assert await money.raw("HGET", keys.balances(money.tenant), "users") == b"1"
    await money.raw("HSET", keys.balances(money.tenant), "users", MAX_USERS)
    with pytest.raises(ValueError, match="10000 users"):
        await money.limit("day", 5, "u:second")
    await money.limit("month", 7, "u:first")
    await money.limit("day", 5, f"k:{KEY}")
    for period in ("day", "day", "month"):
        await money.limit(period, None, "u:first")
    assert await money.raw("HGET", keys.balances(money.tenant), "users") == b"%d" % (MAX_USERS - 1)
    await money.limit("day", 5, "u:second")
    with pytest.raises(ValueError, match="10000 users"):
        await money.limit("day", 5, "u:first")


@pytest.mark.parametrize("junk", ["1 2", "0 -5 0", "0 0 0 0", "a 0 0", f"{10**18} 0 0", "0 0 1e3", ""])
@pytest.mark.parametrize("level", LEVELS)
async def test_a_damaged_balance_of_any_level_is_an_error(money: Money, level: str, junk: str) -> None:
    """D2: nothing is written by any verb, on any level."""
    await money.limit("day", 10_000, f"u:{USER}")
    rid = new_rid()
    await money.reserve(rid, user=USER)
    await money.dispatch(rid)
    field = keys.balance_field(level, "lifetime")
    await money.raw("HSET", keys.balances(money.tenant), field, junk)
    before = await money.raw("HGETALL", keys.balances(money.tenant)), await money.entries(), await money.journal()
    for verb in (
        money.reserve(new_rid(), user=USER), money.extend(rid, 1, 101), money.settle(rid, user=USER),
        money.correct(rid), money.void(rid, instance="A"), money.dispatch(rid, 2, "B", lost="A"),
    ):  # fmt: skip
        with pytest.raises(StateUnavailable, match="NOTINTEGER"):
            await verb
    after = await money.raw("HGETALL", keys.balances(money.tenant)), await money.entries(), await money.journal()
    assert after == before


@pytest.mark.parametrize("junk", ["- -", "-1 - -", "- 5- -", "- - 1e3", "- - -5", f"{10**16} - -", "", "- - nan"])
@pytest.mark.parametrize("level", LEVELS)
async def test_a_damaged_limit_of_any_level_is_an_error(money: Money, level: str, junk: str) -> None:
    """D2: never unlimited."""
    await money.limit("day", 10_000, f"u:{USER}")
    await money.raw("HSET", keys.balances(money.tenant), keys.limit_field(level), junk)
    with pytest.raises(StateUnavailable, match="NOTINTEGER"):
        await money.reserve(new_rid(), user=USER)
    assert await money.entries() == []


async def test_a_damaged_limit_does_not_doubt_a_call_twice(money: Money) -> None:
    """D2: a call whose holder is lost is unconfirmed, once, though the next one cannot be opened."""
    rid, other = new_rid(), new_rid()
    for each in (rid, other):
        await money.reserve(each)
        await money.dispatch(each)
    await money.raw("HSET", keys.balances(money.tenant), keys.limit_field(), "- 1e3 -")
    for _ in range(2):
        with pytest.raises(StateUnavailable, match="NOTINTEGER"):
            await money.dispatch(rid, 2, "B", lost="A")
    with pytest.raises(StateUnavailable, match="NOTINTEGER"):
        await money.topup(other, 2)
    assert await money.calls(rid) == await money.calls(other) == [(1, "unconfirmed")]
    await money.raw("HDEL", keys.balances(money.tenant), keys.limit_field())
    assert await money.held() == (0, 0, 200)
    assert (await money.dispatch(rid, 2, "B", lost="A")).status == "won"
    assert await money.held() == (0, 100, 200)


# ---- clamping, mid-stream, corrections -------------------------------------------------------------------------------


async def test_what_is_left_is_held_when_it_is_enough(money: Money) -> None:
    """DESIGN 4: the cap is lowered to the headroom, never below what the tenant allows."""
    await money.limit("day", 250, f"k:{KEY}")
    assert await money.reserve(new_rid(), amount=200, least=100) == Reserved(status="ok", amount=200)
    assert await money.reserve(new_rid(), amount=200, least=51) == Reserved(status="denied", left=50)
    assert await money.reserve(new_rid(), amount=200) == Reserved(status="denied", left=50)
    assert await money.reserve(new_rid(), amount=200, least=50) == Reserved(status="ok", amount=50)
    assert await money.reserve(new_rid(), amount=200, least=1) == Reserved(status="denied", left=0)
    assert await money.held() == (0, 250, 0)
    assert [line.more for line in await money.journal() if line.op == "reserve"] == [(200,), (50,)]


async def test_more_for_a_call_that_runs(money: Money) -> None:
    """DESIGN 4, mid-stream: absolute, so that asking twice takes once; only its holder, only while it is open."""
    rid = new_rid()
    assert (await money.extend(rid, 1, 200)).status == "missing"
    await money.reserve(rid)
    assert (await money.extend(rid, 1, 200)).status == "closed"  # not dispatched
    await money.dispatch(rid)
    for _ in range(2):
        assert await money.extend(rid, 1, 200) == Extended(status="ok", amount=200)
    assert await money.extend(rid, 1, 50) == Extended(status="ok", amount=200)
    assert (await money.extend(rid, 1, 300, stale=True)).status == "stale"
    assert (await money.extend(rid, 1, 300, 2)).status == "closed"
    assert (await money.extend(rid, 1, 300, 1, "B")).status == "closed"
    assert (await money.extend(rid, 2, 300)).status == "closed"
    assert await money.held() == (0, 200, 0)
    assert await money.settle(rid, 1, 201) == "overrun"
    assert (await money.extend(rid, 1, 300)).status == "closed"
    assert await money.held() == (201, 0, 0)


async def test_the_bill_puts_right_whatever_was_posted(money: Money) -> None:
    """I1: after reconcile the difference is 0, in whichever state the call was; twice is once."""
    estimated, lost, open_call = new_rid(), new_rid(), new_rid()
    for rid in (estimated, lost, open_call):
        await money.reserve(rid)
        await money.dispatch(rid)
    await money.settle(estimated, cost=60, estimated=True)
    await money.dispatch(lost, 2, "B", lost="A", max_calls=1)  # unconfirmed
    assert await money.held() == (60, 100, 100)
    assert await money.correct(estimated, cost=60) == "corrected"  # not estimated any more
    assert await money.correct(estimated, cost=60) == "duplicate"
    assert await money.correct(estimated, cost=45) == "corrected"
    assert await money.correct(lost, cost=70) == "late"
    assert await money.correct(open_call, cost=110) == "overrun"
    assert await money.correct(new_rid()) == "missing"
    assert await money.correct(new_rid(), was=60) == "duplicate"
    assert await money.correct(new_rid(), cost=10, was=30, day=money.now // DAY) == "corrected"
    assert await money.held() == (45 + 70 + 110 - 20, 0, 0)
    assert not [each for each in await money.entries() if each.estimated]


# ---- under a clock of the test's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "wait"),
    [(Rates(tokens=0, key_requests=60), 1000), (Rates(tokens=60, tenant_tokens=60), 1000),
     (Rates(tokens=600, key_tokens=600), 100), (Rates(tokens=6000, tenant_tokens=6000), 10)],
)  # fmt: skip
async def test_a_wait_is_exact_to_the_millisecond(
    state: State, clock: virtual.VirtualClock, rates: Rates, wait: int
) -> None:
    """Issue 4: at 1, 10 and 100 a second. A millisecond before it is up there is one to go; then it is let in."""
    money = Money(state, clock.tenant, virtual.ledger(state, clock))
    for _ in range(rates.key_requests or 1):
        assert (await money.reserve_whole(new_rid(), rates=rates)).status == "ok"
    one = rates if rates.key_requests else structs.replace(rates, tokens=1)
    for passed in (0, 1, wait - 1):
        await clock.set(NOON + passed)
        assert (await money.reserve_whole(new_rid(), rates=one)).wait_ms == wait - passed
    await clock.set(NOON + wait)
    assert (await money.reserve_whole(new_rid(), rates=one)).status == "ok"
    assert (await money.reserve_whole(new_rid(), rates=one)).wait_ms == wait


async def test_buckets_of_users_go_first(state: State, clock: virtual.VirtualClock) -> None:
    """I8: a user's days stay for three days, as there may be thousands; the others' for 62, months for two years."""
    money = Money(state, clock.tenant, virtual.ledger(state, clock))
    await money.limit("day", 1000, f"u:{USER}")
    rid = new_rid()
    await money.reserve(rid, user=USER)
    await money.settle(rid, user=USER)

    async def kept(days: int) -> dict[str, int]:
        await clock.set(NOON + days * DAY)
        await money.expire()
        names = [name.decode() for name in await money.raw("HKEYS", keys.balances(money.tenant))]
        return {level: sum(name.startswith(f"{level}:2027") for name in names) for level in LEVELS}

    assert await kept(3) == dict.fromkeys(LEVELS, 2)
    assert await kept(4) == {"t": 2, f"k:{KEY}": 2, f"u:{USER}": 0}  # 4 April: the month of three days ago is April
    assert await kept(62) == {"t": 2, f"k:{KEY}": 2, f"u:{USER}": 0}
    assert await kept(63) == {"t": 1, f"k:{KEY}": 1, f"u:{USER}": 0}
    assert await kept(800) == dict.fromkeys(LEVELS, 0)
    first = next(line for line in await money.journal() if line.op == "prune")
    assert first.more == ("2027-02-01", "2025-04", "2027-04-01", "2027-04")
    lifetime = (await money.levels(f"u:{USER}"))["lifetime"]
    assert lifetime.settled == 60


async def test_a_bucket_that_holds_something_is_not_dropped(state: State, clock: virtual.VirtualClock) -> None:
    """Nobody swept for five days: the call becomes unconfirmed only then, and is posted where it was held."""
    money = Money(state, clock.tenant, virtual.ledger(state, clock))
    await money.limit("day", 1000, f"u:{USER}")
    rid = new_rid()
    await money.reserve(rid, user=USER)
    await money.dispatch(rid)
    field = keys.balance_field(f"u:{USER}", "2027-03-31")
    for days, balance in ((5, b"0 0 100"), (6, None)):
        await clock.set(NOON + days * DAY)
        await money.expire()
        assert await money.raw("HGET", keys.balances(money.tenant), field) == balance
    replay = Replay()
    assert not [wrong for line in await money.journal() for wrong in replay.feed(line)]
    assert not replay.differences(await money.ledger.levels(tenant=money.tenant))
    assert (await money.levels(f"u:{USER}"))["lifetime"].settled == 100


async def test_midnight_during_a_request(state: State, clock: virtual.VirtualClock) -> None:
    """Faults 80: the day of the reserve is charged, its limit holds for more of it; the new day begins at nothing."""
    money = Money(state, clock.tenant, virtual.ledger(state, clock))
    await clock.set(NOON + DAY // 2 - MINUTE)
    await money.limit("day", 250)
    rid = new_rid()
    await money.reserve(rid, amount=200)
    await money.dispatch(rid)
    await clock.set(NOON + DAY // 2 + MINUTE)  # 1 April
    assert await money.extend(rid, 1, 251) == Extended(status="denied", left=50)
    assert (await money.reserve(new_rid(), amount=250)).status == "ok"
    await money.settle(rid, cost=190)
    rows = await money.levels()
    assert [(row.bucket, row.settled, row.pending) for row in rows.values()] == [
        ("2027-04-01", 0, 250), ("2027-04", 0, 250), ("lifetime", 190, 250)
    ]  # fmt: skip
