"""What `hotpath ledger verify` compares, on a real server: also while money moves (DESIGN 4, I2, I3)."""

import asyncio

import msgspec
import pytest

from shared.state import books, keys
from shared.state.audit import TOLD, Audit, Copied, audit
from tests.state.rig import HOUR, KEY, MINUTE, Money, new_rid


async def check(money: Money, copy: dict[tuple[str, int], Copied] | None = None) -> Audit:
    return await audit(money.state.ledger, money.tenant, copy)


def kinds(found: Audit) -> set[str]:
    assert all(each.do for each in found.differences)
    return {each.kind for each in found.differences}


async def test_books_that_are_right(money: Money) -> None:
    """Every state a call can be in, at three levels; nothing differs."""
    await money.limit("month", 10_000)
    await money.limit("day", 9_000, "u:u1")
    reserved, running, doubtful, done = (new_rid() for _ in range(4))
    for rid in (reserved, running, doubtful, done):
        await money.reserve(rid, user="u1")
    for rid in (running, done):
        await money.dispatch(rid)
    await money.dispatch(doubtful, 1, "A")
    await money.dispatch(doubtful, 2, "B", lost="A", amount=70)
    await money.settle(done, cost=60, estimated=True)
    found = await check(money)
    assert (found.differences, found.untold) == ([], 0)
    assert (found.settled, found.pending, found.unconfirmed) == (60, 270, 100)
    assert (found.calls, found.estimated, found.lines, found.last) == (1, 1, 12, (await money.journal())[-1].id)


async def test_a_tenant_without_books(money: Money) -> None:
    found = await check(money)
    assert (found.differences, found.lines, found.settled) == ([], 0, 0)


async def test_money_that_moves_meanwhile(money: Money, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live system: 400 requests go on while it is read again and again, page by page; nothing ever differs."""
    monkeypatch.setattr(books, "PAGE", 20)

    async def spend() -> None:
        for _ in range(20):
            rids = [new_rid() for _ in range(20)]
            await asyncio.gather(*(money.reserve(rid) for rid in rids))
            await asyncio.gather(*(money.dispatch(rid) for rid in rids))
            await asyncio.gather(*(money.settle(rid, cost=n) for n, rid in enumerate(rids[5:])))

    spending = asyncio.create_task(spend())
    looks = 0
    while not spending.done():
        found = await check(money)
        assert found.differences == []
        looks += 1
    await spending
    assert looks > 3
    assert (await check(money)).pending == 20 * 5 * 100


async def test_what_is_wrong_is_named(money: Money) -> None:
    """Faults 52: balances, entries and leases changed by hand, each with what to do."""
    rid = new_rid()
    await money.reserve(rid)
    await money.raw("HSET", keys.balances(money.tenant), "t:lifetime", "5 100 0")
    assert kinds(await check(money)) == {"balance"}
    await money.raw("DEL", keys.balances(money.tenant))
    found = await check(money)
    assert [(each.kind, each.do) for each in found.differences] == [("balance", "hotpath ledger rebuild")]


async def test_entries_that_hold_something_else(money: Money) -> None:
    """The entries' sums are the balances': one more, one less, by level and bucket."""
    rid, other = new_rid(), new_rid()
    await money.reserve(rid)
    await money.reserve(other)
    await money.raw("HDEL", keys.entries(money.tenant), bytes.fromhex(other))
    found = await check(money)
    assert kinds(found) == {"held"}
    assert {each.text.partition(": ")[0] for each in found.differences} == {
        f"{level}:{keys.bucket(period, money.now)}" for level in ("t", f"k:{KEY}") for period in keys.PERIODS
    }
    await money.raw("ZREM", keys.leases(money.tenant), bytes.fromhex(rid))
    assert kinds(await check(money)) == {"held", "lease"}


async def test_a_lease_that_nobody_ended(money: Money) -> None:
    """I3: older than its end + 5 s; a younger one is none of our business, nor is an old tombstone."""
    rid, done = new_rid(), new_rid()
    await money.reserve(rid, ttl=MINUTE)
    await money.reserve(done, ttl=MINUTE)
    await money.settle(done)
    await money.age(MINUTE + 10_000 + 4_000)
    assert (await check(money)).differences == []
    await money.age(2_000)
    (difference,) = (await check(money)).differences
    assert (difference.kind, rid in difference.text) == ("lease", True)
    await money.age(HOUR)
    assert len((await check(money)).differences) == 1


async def test_a_limit_that_was_passed_is_found_in_the_journal(money: Money) -> None:
    """I2 at every line, though the limit was lifted since: a line as no script would write it."""
    await money.limit("day", 150)
    await money.reserve(new_rid())
    line = ["reserve", 0, money.now // 86_400_000, KEY, "", 0, 100, 0, 100]
    packed = msgspec.msgpack.encode(line)
    await money.state._side.execute(
        b"XADD", keys.journal(money.tenant), b"*", b"r", bytes.fromhex(new_rid()), b"l", packed, within=1.0
    )
    await money.limit("day", None)
    found = await check(money)
    assert "limit" in kinds(found)


# ---- the second copy -------------------------------------------------------------------------------------------------


async def settled(money: Money, cost: int) -> tuple[str, str]:
    """A call's request id, and the line that posted it."""
    rid = new_rid()
    await money.reserve(rid)
    await money.dispatch(rid)
    await money.settle(rid, cost=cost)
    return rid, (await money.journal())[-1].id


async def test_the_second_copy_is_compared(money: Money) -> None:
    """Equal; another cost; in the copy alone (Redis lost it). What NATS lost is counted and no fault."""
    (good, line), (dear, other) = await settled(money, 60), await settled(money, 70)
    assert (await check(money, {(good, 1): Copied(60, line), (dear, 1): Copied(70, other)})).copied == 2
    found = await check(money, {(good, 1): Copied(60, line), (dear, 1): Copied(71, other)})
    assert (found.copied, kinds(found)) == (1, {"copy"})
    lost = f"{int(other.partition('-')[0]) + 1}-0"
    found = await check(
        money, {(good, 1): Copied(60, line), (dear, 1): Copied(70, other), (new_rid(), 1): Copied(5, lost)}
    )
    assert [(each.kind, each.do) for each in found.differences] == [("copy", "hotpath ledger rebuild")]
    waiting = {(good, 1): Copied(60, line), (dear, 1): Copied(70, other), (new_rid(), 1): Copied(5, "")}
    assert (await check(money, waiting)).differences == []  # Redis has yet to take it
    corrected = {(good, 1): Copied(61, ""), (dear, 1): Copied(70, other)}
    assert (await check(money, corrected)).differences == []  # reconcile knew the bill before the record came


async def test_many_differences_are_counted(money: Money) -> None:
    copy = {(new_rid(), 1): Copied(1, f"{money.now}-1") for _ in range(TOLD + 7)}
    found = await check(money, copy)
    assert (len(found.differences), found.untold) == (TOLD, 7)
