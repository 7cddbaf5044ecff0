"""More blows than one (acceptance 1; faults 1 to 4, 17, 19, 21): several at once, a whole role, an ingress.

What one blow costs is in test_kills.py.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.e2e import chaos, invariants, rounds
from tests.e2e.barrage import Barrage
from tests.e2e.books import entries
from tests.e2e.drive import Client
from tests.e2e.fleet import Fleet
from tests.e2e.invariants import Asked, prompt
from tests.e2e.rig import Up
from tests.e2e.sim import Sim, until

#: Shorter than a test's patience: the leases of killed providers end after it.
TIMEOUT_MS = 6_000
FROZEN_S = 4.0
#: What a busy machine may add to a time that is promised to the tenth of a second.
BUSY_S = 0.1


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two of each role, default liveness."""
    with Up(tmp_path_factory.mktemp("blows"), "--scale", rounds.SCALE, env=rounds.SETTINGS) as running:
        yield running


@pytest.fixture
async def fleet(up: Up) -> AsyncIterator[Fleet]:
    """Its processes."""
    async with Fleet(up).watched() as watched:
        yield watched


@pytest.fixture
async def client(up: Up, sim: Sim) -> AsyncIterator[Callable[..., Client]]:
    """Makes clients that use each connection once."""
    async with rounds.client_session() as http:
        yield lambda made: Client(http, up.url, made["key"])


@pytest.mark.timeout(90)
async def test_several_at_once_and_their_replacements(up: Up) -> None:
    """A guardian and a provider in the same moment; then more, each as soon as the last one is replaced."""

    async def work(fleet: Fleet, _: Barrage) -> None:
        fleet.kill("guardian")
        fleet.kill("provider")
        await fleet.whole()
        await asyncio.sleep(0.5)
        for role in ("provider", "provider", "guardian", "guardian", "routing"):
            old = set(fleet.pids(role))
            fleet.kill(role, -1)
            await new(fleet, role, old)
        await fleet.whole()

    costs = await rounds.under_load(up, work, timeout_ms=TIMEOUT_MS)
    assert costs["killed provider"].added


async def new(fleet: Fleet, role: str, old: set[int]) -> None:
    """Until the one that was killed has a successor."""
    found = await asyncio.to_thread(
        until, lambda: fleet.pids(role), lambda pids: len(pids) == 2 and set(pids) != old, 10, 0.005
    )
    assert len(found) == 2, f"no new {role} within 10 s"


async def ask(client: Client, chunks: int = 3, **body: Any) -> Asked:
    """One request, its text known."""
    wanted = prompt(chunks, **({"pace": 50} if body else {}))
    return Asked(prompt=wanted, seen=await client.chat(wanted, **body))


async def ask_for(seconds: float, client: Client) -> list[Asked]:
    """A request each 50 ms."""
    began, asking = time.monotonic(), []
    while time.monotonic() < began + seconds:
        asking.append(asyncio.create_task(ask(client)))
        await asyncio.sleep(0.05)
    return [await task for task in asking]


@pytest.mark.parametrize("how", ["killed", "frozen"])
@pytest.mark.parametrize("role", ["guardian", "routing", "provider"])
async def test_nobody_of_a_role_is_left(
    up: Up, sim: Sim, fleet: Fleet, client: Callable[..., Client], role: str, how: str
) -> None:
    """faults 19: 503 with Retry-After within 300 ms (killed) or 2 s (frozen), and all is well once somebody is back."""
    made = await asyncio.to_thread(rounds.make_tenant, up)
    one, frozen = client(made), how == "frozen"
    assert (await ask(one)).seen.ended_well
    blows = [fleet.freeze(role, number) if frozen else fleet.kill(role, number) for number in (1, 0)]
    asked = await ask_for(FROZEN_S if frozen else 0.4, one)
    for blow in blows if frozen else ():
        fleet.thaw(blow)
    await fleet.whole()
    refused = [each.seen for each in asked if not each.seen.ended_well]
    slowest = max(answer.took for answer in refused)
    print(f"{how} {role}: {len(refused)} of {len(asked)} refused, after at most {slowest:.3f} s")
    for answer in refused:
        assert (answer.status, answer.error["type"]) == (503, "service_unavailable"), (answer.status, answer.error)
        assert int(answer.headers["retry-after"]) >= 1
    assert slowest < (2.0 if frozen else 0.3) + BUSY_S
    assert len(refused) > (40 if frozen else 3)
    later = [await ask(one) for _ in range(4)]
    assert all(each.seen.ended_well for each in later)
    invariants.check_clients([*asked, *later], dead=True)
    stale = len(await asyncio.to_thread(sim.bill)) - 5 - (len(asked) - len(refused))
    assert stale == 0, "calls were made for requests that had been refused"


@pytest.mark.timeout(60)
async def test_an_ingress_is_killed_in_mid_stream(
    up: Up, sim: Sim, fleet: Fleet, client: Callable[..., Client]
) -> None:
    """faults 3: its upstream calls are closed within 6 s and settled; the other ingress's clients notice nothing."""
    made = await asyncio.to_thread(rounds.make_tenant, up)
    before = invariants.baseline(up)
    one, asking = client(made), []
    for _ in range(16):
        asking.append(asyncio.create_task(ask(one, 160, stream=True)))
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    busiest = max(range(2), key=lambda number: invariants.descriptors(fleet.pids("ingress")[number]))
    fleet.kill("ingress", busiest)
    killed = time.time() * 1000
    asked = await asyncio.gather(*asking)
    seen = [each.seen for each in asked]
    lost = [answer for answer in seen if answer.broken]
    assert lost
    assert all(answer.ended_well for answer in seen if not answer.broken)
    lines = {line["request_id"]: line for line in await asyncio.to_thread(sim.bill)}
    ends = [lines[f"{answer.rid}.1"]["ended_ms"] - killed for answer in lost]
    print(f"{len(lost)} of {len(seen)} lost; their upstream was closed after {min(ends):.0f} to {max(ends):.0f} ms")
    assert max(ends) < 6000
    assert min(ends) > 0, "ended by themselves"
    for answer in lost:
        answer.left = True
    counts = await invariants.check(up, sim, made, asked, before, dead=False)
    booked = await asyncio.to_thread(entries, up, made["tenant"])
    assert all(booked[f"{answer.rid}.1"].estimated for answer in lost)
    assert counts["calls settled (estimated)"] == len(lost)


@pytest.mark.timeout(60)
async def test_a_few_seconds_of_chaos(up: Up) -> None:
    """The random soak, so that its command does not rot; `python -m tests.e2e.chaos --minutes 10` is the real one."""
    costs = await chaos.run(up, 8, seed=7, timeout_ms=TIMEOUT_MS)
    assert costs
    assert [chaos.act(random.Random(3)) for _ in range(2)] == [chaos.act(random.Random(3))] * 2
