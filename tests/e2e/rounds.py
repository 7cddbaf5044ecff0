"""Kills and freezes under an open-loop load (acceptance 1 of the faults; DESIGN 3), and the rounds as a command:

    python -m tests.e2e.rounds [--rounds 20] [--seed 1] [--rate 50]

Each round deals one blow: a guardian, a routing or a provider in turn is killed, or stopped for 5 s and let go again,
while the load runs; then the fleet becomes whole. At the end every request is judged (verdict.py) and everything is
checked (invariants.py).
"""

import argparse
import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e import invariants, verdict
from tests.e2e.barrage import RATE, TIMEOUT_MS, Barrage, Shot, normal
from tests.e2e.books import entries
from tests.e2e.drive import Client
from tests.e2e.fleet import Fleet
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

FROZEN_S = 5.0
#: Load before the first blow: what is usual.
QUIET_S = 2.5
#: Load after the fleet is whole again, so that one round's requests are not the next one's.
SETTLE_S = 1.0
#: The grace, and the 5 s of I3: added to the time-out, how long money may be held.
LEASE_S = 1 + 5
#: A provider keeps the upstream connections of its busiest moment for 15 s: all of the load at once, while its sibling
#: was away.
SPARE_FDS = 120

#: What a fleet for these tests runs with. The breaker is another test's matter.
SETTINGS = {
    "CIRCUIT_FAILURE_THRESHOLD": "1000000", "CIRCUIT_MIN_REQUESTS": "1000000", "LEDGER_LEASE_GRACE_MS": "1000",
    "HOTPATH_TEST": "1",
}  # fmt: skip
SCALE = "ingress=2,guardian=2,routing=2,provider=2"

Say = Callable[[str], None]
Work = Callable[[Fleet, Barrage], Awaitable[None]]

_numbers = itertools.count(1)


def make_tenant(up: Up) -> dict[str, Any]:
    """A tenant with a limit that is never reached: money fails closed for it."""
    name = f"blows{next(_numbers)}"
    made: dict[str, Any] = up.cli("keys", "create", "--tenant", name, "--limit-usd", "1000", "--period", "lifetime")
    return {"tenant": name, **made}


def client_session() -> aiohttp.ClientSession:
    """Each request on a connection of its own: none goes to an ingress that is dead already."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))


async def under_load(
    up: Up, work: Work, *, seed: int = 1, rate: float = RATE, timeout_ms: int = TIMEOUT_MS, say: Say = print
) -> dict[str, verdict.Cost]:
    """Do `work` while the load runs, then judge and check everything. Raises AssertionError for what was broken."""
    sim = Sim(up.run["simulator_url"])
    sim.reset()
    made = await asyncio.to_thread(make_tenant, up)
    async with client_session() as http, Fleet(up).watched() as fleet:
        before = invariants.baseline(up)
        async with Barrage(Client(http, up.url, made["key"]), random.Random(seed), rate, timeout_ms) as barrage:
            await asyncio.sleep(QUIET_S)
            first = time.monotonic()
            await work(fleet, barrage)
        await fleet.whole()
    costs = await settle_up(up, sim, made, barrage.shots, before, fleet, first, timeout_ms / 1000 + LEASE_S, say)
    verdict.show(costs, say)
    return costs


async def settle_up(
    up: Up, sim: Sim, made: dict[str, Any], shots: list[Shot], before: invariants.Baseline, fleet: Fleet, first: float,
    lease_s: float, say: Say,
) -> dict[str, verdict.Cost]:  # fmt: skip
    """Everything about what was asked: the invariants, who is unconfirmed, and what each blow cost."""
    asked = [shot.asked for shot in shots]
    lost = [shot for shot in shots if shot.seen.broken]  # their ingress was killed: judged below
    for shot in lost:
        shot.seen.left = True
    counts = await invariants.check(
        up, sim, made, asked, before, dead=True, lease_s=lease_s, spare_fds=SPARE_FDS
    )  # fmt: skip
    booked = await asyncio.to_thread(entries, up, made["tenant"])
    verdict.only_the_dead(booked, fleet.dead)
    counts["connections lost"] = len(lost)
    say(invariants.show(counts))
    return verdict.judge(shots, fleet.blows, booked, normal(shots, first))


def blows(count: int) -> Iterator[tuple[str, bool]]:
    """(role, frozen) of each round: guardian, routing, provider killed, then each frozen, and so on."""
    for number in range(count):
        yield ("guardian", "routing", "provider")[number % 3], bool(number // 3 % 2)


async def strike(fleet: Fleet, role: str, number: int, *, frozen: bool) -> None:
    """One blow, and until the fleet is whole again."""
    if frozen:
        blow = fleet.freeze(role, number)
        await asyncio.sleep(FROZEN_S)
        fleet.thaw(blow)
    else:
        fleet.kill(role, number)
    await fleet.whole()


async def run(up: Up, count: int, *, seed: int = 1, rate: float = RATE, say: Say = print) -> dict[str, verdict.Cost]:
    """So many rounds against a running Up."""
    dice = random.Random(seed)

    async def work(fleet: Fleet, barrage: Barrage) -> None:
        for number, (role, frozen) in enumerate(blows(count), 1):
            began = time.monotonic()
            await strike(fleet, role, dice.randrange(2), frozen=frozen)
            back = time.monotonic() - began
            await asyncio.sleep(SETTLE_S)
            say(f"round {number} of {count}: {fleet.blows[-1].kind}, whole after {back:.1f} s,"
                f" {len(barrage.shots)} answered, {barrage.open} open")  # fmt: skip

    return await under_load(up, work, seed=seed, rate=rate, say=say)


def main() -> int:
    """The named command."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.rounds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=RATE)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Up(Path(folder) / "up", "--scale", SCALE, env=SETTINGS) as up:
        asyncio.run(run(up, wanted.rounds, seed=wanted.seed, rate=wanted.rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
