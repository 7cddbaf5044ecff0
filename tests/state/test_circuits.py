"""Circuits: five failures in a row open one for 30 s, shared by all processes, read from a map (S2-05, S2-20)."""

import asyncio

import pytest

from shared.state import keys
from shared.state.base import StateUnavailable
from shared.state.redis import State
from tests.state.conftest import Connect

GOOD, BAD = True, False


async def test_five_failures_in_a_row_open_it_for_every_process(own_valkey: str, connect: Connect) -> None:
    here, there = await connect(own_valkey), await connect(own_valkey)
    assert here.circuits.open_until("openai-main") == 0
    assert not await here.circuits.record("openai-main", [BAD, BAD, BAD, BAD, GOOD, BAD, BAD, BAD])
    assert not await there.circuits.record("openai-main", [BAD])
    assert not await there.circuits.record("openai-other", [BAD] * 4)
    assert await there.circuits.record("openai-main", [BAD])
    assert there.circuits.open_until("openai-main") == pytest.approx(there.clock.now() + 30_000, abs=200)
    await here.circuits.poll()
    assert here.circuits.open_until("openai-main") == there.circuits.open_until("openai-main")
    assert here.circuits.open_until("openai-other") == 0


async def test_while_open_nothing_counts(own_valkey: str, connect: Connect) -> None:
    """S1-C2d: those calls began before it opened; a straggler's success must not close it, nor a failure prolong it."""
    state = await connect(own_valkey)
    await state.circuits.record("e", [BAD] * 5)
    until = state.circuits.open_until("e")
    assert not await state.circuits.record("e", [GOOD, BAD, GOOD])
    await state.circuits.poll()
    assert state.circuits.open_until("e") == until


async def test_after_the_cool_down_calls_pass_until_the_next_failure(own_valkey: str, connect: Connect) -> None:
    state = await connect(own_valkey, CIRCUIT_BREAKER_COOLDOWN_MS="60")
    await state.circuits.record("e", [BAD] * 5)
    await past(state, "e")
    assert await state.circuits.record("e", [BAD])  # one is enough now
    assert state.circuits.open_until("e") > state.clock.now()
    await past(state, "e")
    assert await state.circuits.record("e", [GOOD])
    assert state.circuits.open_until("e") == 0
    assert not await state.circuits.record("e", [BAD] * 4)


async def past(state: State, endpoint: str) -> None:
    while state.clock.now() <= state.circuits.open_until(endpoint) + 5:
        await asyncio.sleep(0.01)


async def test_it_is_polled_and_a_notice_makes_it_sooner(own_valkey: str, connect: Connect) -> None:
    here, there = await connect(own_valkey), await connect(own_valkey)
    there.run()
    await here.circuits.record("e", [BAD] * 5)
    there.circuits.refresh_soon()
    async with asyncio.timeout(0.3):
        while not there.circuits.open_until("e"):
            await asyncio.sleep(0.002)
    await here.circuits.record("f", [BAD] * 5)
    async with asyncio.timeout(1.0):
        while not there.circuits.open_until("f"):
            await asyncio.sleep(0.01)


async def test_odd_input(own_valkey: str, connect: Connect) -> None:
    state = await connect(own_valkey)
    assert not await state.circuits.record("e", [])
    for endpoint in ("", "a b", "x:until", "y" * 65):
        with pytest.raises(ValueError, match="endpoint"):
            await state.circuits.record(endpoint, [BAD])
    await state._side.execute(b"HSET", keys.CIRCUITS, "e:until", "soon", "version", 9, within=1.0)
    with pytest.raises(StateUnavailable, match="damaged"):
        await state.circuits.poll()


async def test_counts_of_an_endpoint_nobody_calls_go(own_valkey: str, connect: Connect) -> None:
    """I8."""
    state = await connect(own_valkey)
    await state.circuits.record("e", [BAD])
    assert 86_000_000 < await state._side.execute(b"PTTL", keys.CIRCUITS, within=1.0) <= 86_400_000
