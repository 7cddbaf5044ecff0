"""Circuits: shared by all processes, read from a map (S2-05, S2-20), with one probe per fleet (S1-C2a..e)."""

import asyncio
import secrets

import pytest

from shared.core.circuit import Event, state
from shared.state import keys
from shared.state.base import StateUnavailable
from shared.state.redis import State
from tests.state.conftest import Connect
from tests.state.rig import age_circuit

GOOD: tuple[Event, str] = ("good", "")
BAD: tuple[Event, str] = ("failed", "")
COOLDOWN = 30_000


def seen(by: State, endpoint: str) -> str:
    """The state as this process sees it."""
    found = by.circuits.look(endpoint)
    return "closed" if found is None else state(found, by.clock.now())


async def test_five_failures_in_a_row_open_it_for_every_process(own_valkey: str, connect: Connect) -> None:
    here, there = await connect(own_valkey), await connect(own_valkey)
    assert here.circuits.look("openai-main") is None
    assert await here.circuits.record("openai-main", [BAD, BAD, GOOD, GOOD, GOOD, BAD, BAD, BAD]) is None
    assert await there.circuits.record("openai-main", [BAD]) is None
    assert await there.circuits.record("openai-other", [BAD] * 4) is None
    assert await there.circuits.record("openai-main", [BAD]) == "open"
    found = there.circuits.look("openai-main")
    assert found is not None
    assert found.open_until == pytest.approx(there.clock.now() + COOLDOWN, abs=200)
    await here.circuits.poll()
    assert here.circuits.look("openai-main") == found
    assert here.circuits.look("openai-other") is None


async def test_while_open_nothing_counts(own_valkey: str, connect: Connect) -> None:
    """S1-C2d: those calls began before it opened; a straggler's success must not close it, nor a failure prolong it."""
    here = await connect(own_valkey)
    await here.circuits.record("e", [BAD] * 5)
    opened = here.circuits.look("e")
    assert await here.circuits.record("e", [GOOD, BAD, GOOD]) is None
    assert not await here.circuits.claim("e", "early")
    await here.circuits.poll()
    assert here.circuits.look("e") == opened


async def test_one_probe_over_all_processes(own_valkey: str, connect: Connect) -> None:
    """S1-C2a: of 120 claims from three processes at once one is granted; ordinary outcomes change nothing then."""
    fleet = [await connect(own_valkey) for _ in range(3)]
    await fleet[0].circuits.record("e", [BAD] * 5)
    await age_circuit(fleet[0], "e", COOLDOWN)
    probes = [secrets.token_hex(16) for _ in range(120)]
    granted = await asyncio.gather(*(fleet[n % 3].circuits.claim("e", probe) for n, probe in enumerate(probes)))
    assert sum(granted) == 1
    probe = probes[granted.index(True)]
    assert await fleet[1].circuits.record("e", [GOOD, BAD] * 9) is None
    assert [seen(each, "e") for each in fleet] == ["probing"] * 3
    assert await fleet[1].circuits.record("e", [("probe_good", "another"), ("probe_good", probe), BAD]) == "closed"
    await fleet[2].circuits.poll()
    assert seen(fleet[2], "e") == "closed"


async def test_a_failed_probe_restarts_the_cooldown(own_valkey: str, connect: Connect) -> None:
    """S1-C2d, S2-21: twice as long, and no second probe."""
    here = await connect(own_valkey)
    await here.circuits.record("e", [BAD] * 5)
    await age_circuit(here, "e", COOLDOWN)
    assert await here.circuits.claim("e", "one")
    assert await here.circuits.record("e", [("probe_failed", "one")]) == "open"
    assert not await here.circuits.claim("e", "two")
    found = here.circuits.look("e")
    assert found is not None
    assert found.open_until == pytest.approx(here.clock.now() + 2 * COOLDOWN, abs=200)


async def test_a_silent_probe_lets_the_next_one_start(own_valkey: str, connect: Connect) -> None:
    """S1-C2c, faults 10: its worker was killed; 5 s later, not before, another process has it."""
    here, there = await connect(own_valkey), await connect(own_valkey)
    await here.circuits.record("e", [BAD] * 5)
    await age_circuit(here, "e", COOLDOWN)
    assert await here.circuits.claim("e", "one")
    assert not await there.circuits.claim("e", "two")
    found = there.circuits.look("e")
    assert found is not None
    assert found.probe_until == pytest.approx(there.clock.now() + 5000, abs=500)
    await age_circuit(here, "e", 5000)
    assert await there.circuits.claim("e", "two")
    assert await there.circuits.record("e", [("probe_void", "two")]) == "half_open"
    assert await here.circuits.claim("e", "three")


async def test_a_claim_that_runs_late_is_refused(own_valkey: str, connect: Connect) -> None:
    """DESIGN 3, stale work never runs: Redis was frozen and thawed, nobody waits for this probe any more."""
    here = await connect(own_valkey)
    await here.circuits.record("e", [BAD] * 5)
    await age_circuit(here, "e", COOLDOWN)
    moved, claimed, *_ = await here.circuits._run("e", (("claim", "late"),), here.clock.now() - 1000, 10.0)
    assert (moved, claimed) == (0, 0)
    assert await here.circuits.claim("e", "in-time")


async def test_it_is_polled_and_a_notice_makes_it_sooner(own_valkey: str, connect: Connect) -> None:
    here, there = await connect(own_valkey), await connect(own_valkey)
    there.run()
    await here.circuits.record("e", [BAD] * 5)
    there.circuits.refresh_soon()
    async with asyncio.timeout(0.3):
        while there.circuits.look("e") is None:
            await asyncio.sleep(0.002)
    await here.circuits.record("f", [BAD] * 5)
    async with asyncio.timeout(1.0):
        while there.circuits.look("f") is None:
            await asyncio.sleep(0.01)


async def test_what_the_version_before_wrote_is_understood(own_valkey: str, connect: Connect) -> None:
    """A rolling update: it knew failures and until, and finds both under the same names."""
    here = await connect(own_valkey)
    until = here.clock.now() + COOLDOWN
    await here._side.execute(b"HSET", keys.CIRCUITS, "e:failures", 5, "e:until", until, "version", 1, within=1.0)
    await here.circuits.poll()
    found = here.circuits.look("e")
    assert found is not None
    assert (found.failures, found.open_until, found.openings) == (5, until, 0)
    await age_circuit(here, "e", COOLDOWN)
    assert await here.circuits.claim("e", "one")
    assert await here._side.execute(b"HGET", keys.CIRCUITS, "e:failures", within=1.0) == b"5"


async def test_odd_input(own_valkey: str, connect: Connect) -> None:
    here = await connect(own_valkey)
    assert await here.circuits.record("e", []) is None
    for odd in ("", "a b", "x:until", "y" * 65):
        with pytest.raises(ValueError, match="not an id"):
            await here.circuits.record(odd, [BAD])
        with pytest.raises(ValueError, match="not an id"):
            await here.circuits.claim("e", odd)
    await here._side.execute(b"HSET", keys.CIRCUITS, "e:until", "soon", "version", 9, within=1.0)
    with pytest.raises(StateUnavailable, match="damaged"):
        await here.circuits.poll()


async def test_counts_of_an_endpoint_nobody_calls_go(own_valkey: str, connect: Connect) -> None:
    """I8."""
    here = await connect(own_valkey)
    await here.circuits.record("e", [BAD])
    assert 86_000_000 < await here._side.execute(b"PTTL", keys.CIRCUITS, within=1.0) <= 86_400_000
