"""Every outcome of every verb of the ledger, on the real Lua in a real server (DESIGN 3 "Stale work never runs", 4)."""

import pytest

from shared.state import keys
from shared.state.base import Dispatched, Reserved
from tests.state.rig import HOUR, MINUTE, Money, new_rid

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
    for delivery, amount in ((1, 100), (1, 100), (3, 50), (2, 100)):
        assert await money.reserve(rid, delivery, amount) == Reserved(status="ok", amount=100)
    await money.dispatch(rid)
    assert await money.reserve(rid, 4, 250) == Reserved(status="ok", amount=100)
    assert await money.held() == (0, 100, 0)


async def test_reserve_again_with_more_holds_the_rest(money: Money) -> None:
    """I2: whichever delivery wins the dispatch finds at least its own amount held; what does not fit is denied."""
    await money.limit("day", 300)
    rid = new_rid()
    await money.reserve(rid, 1, 0)  # a free model
    assert await money.reserve(rid, 2, 250) == Reserved(status="ok", amount=250)
    assert await money.reserve(rid, 1, 301) == Reserved(status="denied", left=50)
    assert await money.held() == (0, 250, 0)
    await money.dispatch(rid)
    await money.settle(rid, cost=250)
    assert await money.held() == (250, 0, 0)


async def test_reserve_again_is_clamped_as_the_first_time(money: Money) -> None:
    """DESIGN 4 (`least`): a later delivery needs more than is held, and all of it does not fit, but enough does."""
    await money.limit("day", 300)
    rid = new_rid()
    await money.reserve(rid, 1, 100)
    assert await money.reserve(rid, 2, 500, least=301) == Reserved(status="denied", left=200)
    assert await money.reserve(rid, 2, 500, least=300) == Reserved(status="ok", amount=300)
    assert await money.reserve(rid, 3, 500, least=250) == Reserved(status="ok", amount=300)  # clamped, and stays so
    assert await money.held() == (0, 300, 0)


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


async def test_nobody_takes_the_place_of_nobody(money: Money) -> None:
    """A call that was settled before its dispatch has no holder, and an empty `lost` names none."""
    rid = new_rid()
    await money.reserve(rid)
    await money.settle(rid)
    assert await money.dispatch(rid, lost="") == Dispatched(status="closed", holder="", delivery=1)


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
    assert await money.settle(rid, 1, 5000) == "overrun"
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
