"""Every named kill point (shared/service/killat.py), with whole answers and with streams, in a running fleet.

    python -m tests.e2e.kill_points [--times 3] [--only provider.after_send] [--seed 1]

One fleet for all: a point is armed by a file, a handful of requests is sent, one process dies at the point, its
supervisor starts another. What each client must see (DESIGN 3; faults 1 to 17):

    ingress.*    the requests of that process: their connection is lost. Everybody else's: 200
    others       no Delta had reached the client: 200. Else one in-stream error, or the good end if that was on its way

With `frozen` the process is stopped at the point instead, and let go again 5 s later. At the end everything is checked.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from shared.service.killat import POINTS, STOP
from tests.e2e import invariants, rounds, verdict
from tests.e2e.barrage import Order, Shot
from tests.e2e.books import entries
from tests.e2e.drive import Client
from tests.e2e.fleet import Blow, Fleet
from tests.e2e.invariants import prompt
from tests.e2e.money.prove import prove
from tests.e2e.rig import Up
from tests.e2e.rounds import LEASE_S, SCALE, SPARE_FDS, client_session, make_tenant
from tests.e2e.sim import Sim

#: Requests in flight around each death.
HANDFUL = 6
REACHED_S = 8.0
FROZEN_S = 5.0
TIMEOUT_MS = 6_000
#: Points that only a further call passes: the first one is refused by the upstream.
SECOND_CALL = frozenset({"provider.before_topup", "provider.after_topup"})
#: Points that only a stream passes that generates more than is reserved for it.
EXTENDING = frozenset({"provider.before_extend", "provider.after_extend"})
#: Points that only a stream passes.
STREAMS_ONLY = frozenset({"ingress.mid_stream", "provider.after_delta", "provider.mid_stream", *EXTENDING})
#: Of the fleet: a reservation is what the request may cost, without a floor that pays for more.
SETTINGS = {**rounds.SETTINGS, "BUDGET_MIN_RESERVATION_USD": "0.000001"}


class Visit(Struct):
    """One point, once."""

    point: str
    stream: bool
    frozen: bool = False

    @property
    def name(self) -> str:
        """For progress and failures."""
        return f"{self.point} ({'streamed' if self.stream else 'whole'}{', frozen' if self.frozen else ''})"

    @property
    def role(self) -> str:
        """Whose point it is."""
        return self.point.partition(".")[0]


def visits(times: int = 1, only: Iterable[str] = (), *, frozen: bool = False) -> list[Visit]:
    """Every point whole and streamed, in an order in which no role dies twice running where that can be."""
    wanted = [
        Visit(point, stream, frozen)
        for _ in range(times)
        for point in only or POINTS
        for stream in (False, True)
        if stream or point not in STREAMS_ONLY
    ]
    return list(_spread(wanted))


def _spread(wanted: list[Visit]) -> Iterator[Visit]:
    """Round robin over the roles: while one comes back, another dies."""
    by_role: dict[str, list[Visit]] = {}
    for visit in wanted:
        by_role.setdefault(visit.role, []).append(visit)
    most = max(map(len, by_role.values()))
    for number in range(most):
        for found in by_role.values():
            # a role with fewer points is spread over the whole run
            first, last = number * len(found) // most, (number + 1) * len(found) // most
            yield from found[first:last]


def order(visit: Visit) -> Order:
    """What is in flight around the death."""
    if visit.point in EXTENDING:
        # The margin of the prompt's bound covers what the provider writes until it sees that we are dead: without one a
        # worker that dies here leaves some tokens unheld until reconcile, as DESIGN 4 allows (one read).
        asked = "word " * 400 + prompt(30, pace=8, delay_ms=60, ignore_cap=1)
        return Order(kind="stream, past its cap", prompt=asked, takes=0.3, body={"stream": True, "max_tokens": 5})
    if visit.stream:
        asked = prompt(30, pace=8, delay_ms=60)
        return Order(kind="stream", prompt=asked, takes=0.3, body={"stream": True})
    return Order(kind="whole", prompt=prompt(12, delay_ms=120), takes=0.12)


class Points:
    """Runs visits against a fleet and keeps what every client saw."""

    def __init__(self, fleet: Fleet, folder: Path, client: Client, sim: Sim) -> None:
        self.shots: list[Shot] = []
        self.lost: list[Shot] = []  # whose ingress was killed
        self.wrong: list[str] = []
        self.slowest: dict[str, float] = {}
        self._fleet = fleet
        self._folder = folder
        self._client = client
        self._sim = sim

    async def visit(self, visit: Visit) -> None:
        """Arm, ask, and look at what the clients saw."""
        # where the first calls are refused all of them must come at once, so that no refusal is left for a second one
        await self._fleet.whole(*(() if visit.point in SECOND_CALL else (visit.role,)))
        await self._fleet.served(visit.role)
        before = set(self._fleet.pids(visit.role))
        if visit.point in SECOND_CALL:
            self._sim.fault(status=503, times=HANDFUL)
        file = self._folder / visit.point
        file.write_text(STOP if visit.frozen else "")
        asking = asyncio.gather(*(self._ask(visit) for _ in range(HANDFUL)))
        at, frozen = await self._reached(visit, file, before)
        if frozen is not None:
            await asyncio.sleep(FROZEN_S)
            self._fleet.thaw(frozen)
        shots = await asking
        if visit.point in SECOND_CALL:
            self._sim.clear_faults()
        for shot in shots:
            self._look(visit, shot, at)
        if frozen is not None:
            await self._fleet.whole()

    async def _ask(self, visit: Visit) -> Shot:
        what, at = order(visit), time.monotonic()
        headers = {"X-Timeout-Ms": str(TIMEOUT_MS)}
        seen = await self._client.chat(what.prompt, model=what.model, headers=headers, **what.body)
        return Shot(what, at, seen)

    async def _reached(self, visit: Visit, file: Path, before: set[int]) -> tuple[float, Blow | None]:
        """When somebody came to the point, and who stands still there."""
        end = time.monotonic() + REACHED_S
        while file.exists():
            if time.monotonic() > end:
                file.unlink(missing_ok=True)
                self.wrong.append(f"{visit.name}: nobody came there")
                break
            await asyncio.sleep(0.002)
        at = time.monotonic()
        if not visit.frozen:
            return at, None
        await asyncio.sleep(0.02)
        (pid,) = [pid for pid in before if stopped(pid)]
        return at, self._fleet.found(visit.role, pid, at)

    def _look(self, visit: Visit, shot: Shot, at: float) -> None:
        seen = shot.seen
        if seen.broken and visit.role == "ingress" and not visit.frozen:
            self.lost.append(shot)
            return
        self.shots.append(shot)
        self.slowest[visit.name] = max(self.slowest.get(visit.name, 0.0), shot.beyond)
        fault = ""
        if seen.broken or (seen.streamed and seen.terminals != 1):
            fault = f"cut in silence, {seen.terminals} terminals"
        elif not seen.ended_well and not (seen.streamed and len(seen.events) > 1):
            fault = f"no Delta had come, but {seen.status} {seen.error}"
        elif not seen.ended_well and seen.error.get("code") != "upstream_worker_lost":
            fault = f"{seen.error}"
        elif not seen.ended_well and shot.end - at > (verdict.CUT_FROZEN_S if visit.frozen else verdict.CUT_KILLED_S):
            fault = f"cut after {shot.end - at:.2f} s"
        elif seen.ended_well and shot.beyond > self._allowed(visit):
            fault = f"answered {shot.beyond:.2f} s later"
        if fault:
            self.wrong.append(f"{visit.name}: {fault} ({seen.rid})")

    @staticmethod
    def _allowed(visit: Visit) -> float:
        """What was done by then is done again; a further call to the same endpoint waits ROUTING_RETRY_BACKOFF_MS."""
        again = 0.3 + (0.5 if visit.point in SECOND_CALL else 0.0)
        return again + (verdict.FROZEN_S if visit.frozen else verdict.KILLED_S)


def stopped(pid: int) -> bool:
    """Whether SIGSTOP has got it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def run(
    up: Up, folder: Path, wanted: list[Visit], *, say: Callable[[str], None] = print
) -> tuple[Points, Counter[str]]:
    """Visit them all; raises AssertionError with everything that was wrong."""
    sim = Sim(up.run["simulator_url"])
    sim.reset()
    made: dict[str, Any] = await asyncio.to_thread(make_tenant, up)
    async with client_session() as http, Fleet(up).watched() as fleet:
        before = invariants.baseline(up)
        points = Points(fleet, folder, Client(http, up.url, made["key"]), sim)
        began = time.monotonic()
        for number, visit in enumerate(wanted, 1):
            await points.visit(visit)
            slow = points.slowest.get(visit.name, 0.0)
            say(f"{time.monotonic() - began:5.1f} s  {number:3} of {len(wanted)}  {visit.name}: at most +{slow:.2f} s,"
                f" {len(points.wrong)} wrong")  # fmt: skip
        await fleet.whole()
    if points.wrong:
        calls = verdict.calls(await asyncio.to_thread(entries, up, made["tenant"]))
        told = [f"{wrong}\n    {calls.get(wrong.rpartition('(')[2].rstrip(')'))}" for wrong in points.wrong]
        raise AssertionError("\n".join(told))
    asked = [shot.asked for shot in points.shots]
    for shot in points.lost:
        asked.append(shot.asked)
        shot.seen.left = True  # its connection is gone: nobody is there to see an end
    counts = await invariants.check(
        up, sim, made, asked, before, dead=True, lease_s=TIMEOUT_MS / 1000 + LEASE_S, spare_fds=SPARE_FDS
    )
    booked = await asyncio.to_thread(entries, up, made["tenant"])
    verdict.only_the_dead(booked, fleet.dead)
    counts += await prove(up, made["tenant"], await asyncio.to_thread(sim.bill))
    say(invariants.show(counts))
    return points, counts


def main() -> int:
    """The named command."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.kill_points", description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], choices=POINTS)
    parser.add_argument("--frozen", action="store_true", help="stop there for 5 s instead (a minute per ten points)")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arms = Path(folder, "arms")
        arms.mkdir()
        env = {**SETTINGS, "KILLAT_DIR": str(arms)}
        with Up(Path(folder) / "up", "--scale", SCALE, env=env) as up:
            asyncio.run(run(up, arms, visits(wanted.times, wanted.only, frozen=wanted.frozen)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
