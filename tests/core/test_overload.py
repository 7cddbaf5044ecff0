"""What a process does not take on: a loop in miniature with every arrival known, and the rule that sees only polls."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from shared.core.overload import (
    ALLOWED,
    BURST,
    CREDIT,
    FEW,
    INTERVAL_S,
    PAUSE_S,
    TURN_S,
    WAIT_S,
    Allowance,
    Queue,
    Shares,
)

READ_S = 0.000_015
SHED_S = 0.000_030
EARLY_S = 0.000_008
costs = st.floats(0.000_02, 0.001)


class Begun(Struct, frozen=True):
    """One request as it was taken up: when, how long it had waited in truth, and whether it was begun."""

    now: float
    waited: float
    begun: bool


def loop(
    arrivals: Sequence[float], cost: float, stalls: dict[int, float] | None = None, *, early: bool = False
) -> list[Begun]:
    """An event loop: poll, read all there is, begin it in order. `stalls`: before the n-th begin it stands still.
    `early`: as the ingress, which need not parse what it refuses."""
    queue, seen, now, taken = Queue(), [], 10.0, 0
    arrivals = [10.0 + at for at in arrivals]
    while taken < len(arrivals):
        now = max(now, arrivals[taken])  # sleeps in its poll
        polled = now
        parsed = []
        while taken < len(arrivals) and arrivals[taken] <= polled:
            since = queue.read(polled)
            if early and queue.stands and queue.turn_is_full():
                seen.append(Begun(now, now - arrivals[taken], False))
                now += EARLY_S
            else:
                parsed.append(taken)
                now += READ_S
            taken += 1
        for number in parsed:
            now += (stalls or {}).get(number, 0.0)
            assert since <= arrivals[number]  # the rule's bound is one
            begun = queue.begin(since, now)
            seen.append(Begun(now, now - arrivals[number], begun))
            now += cost if begun else SHED_S
    assert queue.shed == sum(not each.begun for each in seen)
    return seen


def steady(rate: float, seconds: float, seed: int = 1) -> list[float]:
    """Arrivals of a Poisson process."""
    dice, at, arrivals = random.Random(seed), 0.0, []
    while at < seconds:
        at += dice.expovariate(rate)
        arrivals.append(at)
    return arrivals


@given(st.integers(1, BURST), costs, st.floats(0, 0.5))
def test_a_burst_is_worked_off_on_any_machine(size, cost, within):
    """A thousand at once, worked off within a second or so: nobody is shed."""
    arrivals = sorted(random.Random(size).uniform(0, within) for _ in range(size))
    assert all(each.begun for each in loop(arrivals, cost))


@given(st.floats(0.01, 0.7), st.floats(0.06, 2.0), st.integers(0, 200))
def test_a_stall_fails_nobody(load, stall, at):
    """With little under way what came meanwhile is worked off at once (here up to some 600 requests)."""
    cost = 0.0005
    rate = min(load / cost, 300.0)
    seen = loop(steady(rate, stall + 2.0), cost, {at: stall})
    assert all(each.begun for each in seen)


def test_stalls_one_after_the_other_fail_nobody_on_a_busy_process():
    """64 callers in a closed loop keep it from ever sleeping; a hiccup of 60 ms every half second makes all 64 late."""
    queue, now, polled = Queue(), 10.0, 10.0
    for turn in range(20_000):
        since = queue.read(polled)
        for _ in range(64):
            assert queue.begin(since, now)
            now += 0.0001
        now += 0.06 if turn % 80 == 79 else 0.0
        polled = now


@pytest.mark.parametrize("over", [1.2, 2.0, 3.0])
@pytest.mark.parametrize("cost", [0.0002, 0.0004, 0.004])
@pytest.mark.parametrize("early", [False, True])
def test_a_queue_that_stands_is_shed_and_nobody_begun_waits_longer(over, cost, early):
    """Issue 3: after the burst nobody is begun later than WAIT_S, and the process stays at work."""
    seen = loop(steady(over / cost, 8.0), cost, early=early)
    onset = next(each.now for each in seen if not each.begun)
    late = [each for each in seen if each.begun and each.waited > WAIT_S and each.now < onset]
    assert len(late) <= BURST + WAIT_S / cost
    after = [each for each in seen if each.now > onset + 4.0]  # the backlog of the burst is gone
    assert max(each.waited for each in after) <= 1.1 * WAIT_S + cost
    useful = sum(each.begun for each in after) * cost
    refusing = sum(not each.begun for each in after) * (EARLY_S if early else SHED_S + READ_S)
    assert useful + refusing >= 0.85 * (after[-1].now - after[0].now)


@pytest.mark.parametrize("over", [5.0, 20.0])
def test_a_flood_that_cannot_even_be_refused_does_not_stop_the_work(over):
    """Refusing all of it would take more than the whole process: waits are what they are then, but some are begun."""
    cost = 0.0001
    seen = loop(steady(over / cost, 2.0), cost)
    onset = next(each.now for each in seen if not each.begun)
    after = [each for each in seen if each.now > onset]
    early = [each for each in loop(steady(over / cost, 2.0), cost, early=True) if each.now > onset]
    assert share(after, cost) >= 0.05
    assert share(early, cost) >= 0.05


def share(seen: Sequence[Begun], cost: float) -> float:
    """Of the time, spent on what was begun."""
    return sum(each.begun for each in seen) * cost / (seen[-1].now - seen[0].now)


def test_it_ends_with_the_overload():
    cost = 0.0004
    arrivals = steady(3 / cost, 3.0)
    calm = [arrivals[-1] + at for at in steady(0.7 / cost, 3.0, seed=2)]
    seen = loop(arrivals + calm, cost)
    assert not all(each.begun for each in seen[: len(arrivals)])
    assert all(each.begun for each in seen if each.now > 10.0 + calm[0] + INTERVAL_S)


def late(queue: Queue, count: int, at: float, step: float) -> list[bool]:
    """So many begins in a row, each in a turn of its own, that each waited a second."""
    begun = []
    for number in range(count):
        now = at + number * step
        queue.read(now)
        begun.append(queue.begin(now - 1.0, now))
    return begun


def test_the_bound_to_the_request():
    """BURST late ones are begun, the next is shed; one that did not wait starts the count again."""
    queue = Queue()
    assert all(late(queue, BURST, 100.0, 0.0005))
    assert queue.begin(99.0, 100.5)  # the turn's own share ...
    assert not queue.begin(99.0, 100.501 + TURN_S)  # ... and no more
    queue = Queue()
    assert all(late(queue, BURST - 1, 100.0, 0.0005))
    assert queue.begin(101.0, 101.0)
    assert all(late(queue, BURST, 101.0, 0.0005))


def test_slow_requests_stand_after_a_second():
    queue = Queue()
    assert all(late(queue, 11, 100.0, 0.1))
    assert all(late(queue, FEW - 11, 101.1, 0.001))
    assert queue.begin(100.0, 101.2)
    assert not queue.begin(100.0, 101.201 + TURN_S)


def test_a_pause_starts_it_again():
    queue = Queue()
    assert all(late(queue, BURST - 1, 100.0, 0.0005))
    at = 100.0 + (BURST - 2) * 0.0005 + PAUSE_S
    assert all(late(queue, BURST - 1, at, 0.0005))


def test_the_worst_wait_is_told_once():
    queue = Queue()
    queue.begin(1.0, 1.03)
    queue.begin(1.0, 1.01)
    assert queue.worst() == pytest.approx(0.03)
    assert queue.worst() == 0.0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=80))
def test_the_allowance_is_a_tenth_and_a_hundred(events):
    """However declines come, second deliveries stay under CREDIT + ALLOWED of the requests."""
    allowance, requests, made = Allowance(), 0, 0
    for more, declined in events:
        requests += more
        made += sum(allowance.spend(requests) for _ in range(declined))
        assert made <= CREDIT + ALLOWED * requests + 1e-6
    fresh = Allowance()
    assert sum(fresh.spend(0) for _ in range(200)) == CREDIT
    assert sum(fresh.spend(200) for _ in range(200)) == pytest.approx(200 * ALLOWED, abs=1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), st.integers(1, 4))
def test_shares_are_exact_and_leave_nothing(events, most):
    """Faults 91: at most `most` of each tenant, whatever the others do; the map is empty when nothing is under way."""
    shares = Shares(most)
    held: Counter[str] = Counter()
    for tenant, takes in events:
        if takes:
            taken = shares.take(tenant)
            assert taken == (held[tenant] < most)
            held[tenant] += taken
        elif held[tenant]:
            shares.give(tenant)
            held[tenant] -= 1
        assert len(shares) == sum(count > 0 for count in held.values())
    for tenant, count in held.items():
        for _ in range(count):
            shares.give(tenant)
    assert len(shares) == 0
