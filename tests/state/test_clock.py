"""The shared clock: the shortest round trip wins, a server whose clock was set is believed."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.state.clock import SAMPLES, SharedClock
from tests.state.conftest import Connect


class Hands:
    """A monotonic clock set by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def offer(clock: SharedClock, hands: Hands, server_ms: float, there: float, back: float) -> None:
    """A sample: the question took `there` ms, the answer `back`; the server's clock is ahead by server_ms."""
    sent = hands.at
    seen = (sent * 1000 + there) + server_ms
    hands.at = sent + (there + back) / 1000
    clock.offer(sent, hands.at, int(seen // 1000), int(seen % 1000 * 1000))


@given(st.lists(st.tuples(st.floats(0.05, 400), st.floats(0.05, 400)), min_size=1, max_size=40))
def test_it_is_never_wrong_by_more_than_half_the_shortest_round_trip(trips: list[tuple[float, float]]) -> None:
    hands = Hands()
    clock = SharedClock(hands)
    for there, back in trips:
        offer(clock, hands, 1_700_000_000_000, there, back)
        hands.at += 1
    shortest = min(there + back for there, back in trips[-SAMPLES:])
    assert abs(clock.now() - (hands.at * 1000 + 1_700_000_000_000)) <= shortest / 2 + 2


def test_a_server_whose_clock_was_set_is_believed_at_once() -> None:
    """Faults 78; also a failover to a host with another clock."""
    hands = Hands()
    clock = SharedClock(hands)
    for _ in range(5):
        offer(clock, hands, 5000, 0.1, 0.1)
    offer(clock, hands, 3_605_000, 2, 2)
    assert clock.now() == pytest.approx(hands.at * 1000 + 3_605_000, abs=3)


def test_a_slow_sample_changes_nothing() -> None:
    hands = Hands()
    clock = SharedClock(hands)
    assert not clock.ready
    offer(clock, hands, 5000, 0.1, 0.1)
    offer(clock, hands, 5000, 900, 1)
    assert clock.ready
    assert clock.now() == pytest.approx(hands.at * 1000 + 5000, abs=1)


async def test_two_processes_agree_and_keep_it_without_redis(own_valkey: str, connect: Connect) -> None:
    here, there = await connect(own_valkey), await connect(own_valkey)
    seconds, micros = await here._side.execute(b"TIME", within=1.0)
    assert here.clock.now() == pytest.approx(int(seconds) * 1000 + int(micros) // 1000, abs=50)
    assert abs(here.clock.now() - there.clock.now()) < 20
    await here._side.close()
    before = here.clock.now()
    await asyncio.sleep(0.05)
    assert 40 <= here.clock.now() - before < 500
