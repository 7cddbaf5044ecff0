"""An older and a newer build side by side serve without an error (issue 3, faults 83): the real processes of both.

Three stages of a rolling restart on one NATS and one Redis: both ingresses over old workers only, over old and new ones
(every combination of builds serves), over new workers only. Nothing is incompatible by design: an older ingress asks
for life signs from another subject (decision 15), which new workers still answer.
"""

import asyncio
import contextlib
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from shared.core.stream import Fail, Finish
from tests.e2e import invariants
from tests.e2e.books import entries, settled_level
from tests.e2e.builds import Fleet, tree_of
from tests.e2e.drive import Client, session
from tests.e2e.invariants import Asked, prompt
from tests.e2e.sim import Sim, until
from tests.load.nats_client import NatsClient

#: The older build, and how many stages: both side by side for the one before the last commit. (Builds from before the
#: ledger had levels and a journal keep other balances: CHANGELOG says that those cannot be rolled from.)
COMMITS: Final = (("HEAD~1", 1),)
WORKERS: Final = ("guardian", "routing", "provider")
#: Since senders ask after whom they handed work to (bus/sender.py), a provider from before that counts the empty
#: question as a message it does not know. It does no more than count.
ASKED: Final = ("old", "provider_messages_ignored_total")
MOST: Final = 600  # requests until every combination of builds has served
NUMBERS: Final = ("bus_errors", "messages_ignored", "unknown_frames", "bad_batches", "provider_messages_ignored_total")


@pytest.fixture
def mixed(request: pytest.FixtureRequest, simulator: Sim, tmp_path: Path) -> Iterator[Fleet]:
    """Both ingresses, and the older build's workers."""
    old = tmp_path / "old"
    old.mkdir()
    simulator.reset()
    with Fleet(tmp_path, simulator, tree_of(request.param, old), CIRCUIT_FAILURE_THRESHOLD="1000000") as running:
        running.start("old", "ingress", *WORKERS)
        running.start("new", "ingress")
        yield running


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with session() as made:
        yield made


class Load:
    """Asks both ingresses, and the guardians directly; keeps what came of it."""

    def __init__(self, fleet: Fleet, http: aiohttp.ClientSession, sim: Sim, made: list[dict[str, Any]]) -> None:
        self.fleet = fleet
        self.sim = sim
        self.made = made
        self.asked: list[Asked] = []
        self.direct = 0
        # each ingress with a key that either build's command line made
        urls = [f"http://127.0.0.1:{port}" for port in fleet.ports.values()]
        self.clients = [Client(http, url, key["key"]) for url in urls for key in made]

    async def ready(self) -> None:
        """Both ingresses know a worker of each role."""
        for port in self.fleet.ports.values():
            assert await asyncio.to_thread(until, partial(_status, port), lambda got: got == 200, 10) == 200

    async def one(self, number: int, chunks: int, **options: Any) -> None:
        """One request, by turns to either ingress with either key."""
        sim = {name: options.pop(name) for name in ("pace", "delay_ms") if name in options}
        text = prompt(chunks, **sim)
        seen = await self.clients[number % len(self.clients)].chat(text, **options)
        self.asked.append(Asked(prompt=text, seen=seen))

    async def stage(self) -> None:
        """Whole, streamed, with a fallback, longer than a window, left, direct, and a silent one."""
        self.sim.fault(match={"endpoint": "sim"}, times=4, status=500)
        work = [self.one(number, 1 + number % 40, stream=bool(number // 4 % 2)) for number in range(32)]
        work += [self.one(number, 1500, stream=True) for number in range(4)]
        work += [self.one(number, 400, pace=5, stream=True, leave_at=3000) for number in range(4)]
        await asyncio.gather(*work, *(self.directly(number) for number in range(2)))
        self.sim.clear_faults()
        # nobody says anything for longer than 1.5 s: only the answer to "are you there?" tells that the provider lives
        await asyncio.gather(*(self.one(number, 5, delay_ms=1900, stream=True) for number in range(4)))

    async def directly(self, number: int) -> None:
        """As a direct publisher."""
        ids = self.made[number % len(self.made)]
        body = {"model": "sim-fast", "messages": [{"role": "user", "content": prompt(20)}], "stream": bool(number % 2)}
        async with (
            NatsClient(self.fleet.loadgen_url) as client,
            aclosing(client.ask(ids["tenant_id"], ids["key_id"], body)) as events,
        ):
            ended = [event async for event in events if isinstance(event, Finish | Fail)]
        assert [type(event) for event in ended] == [Finish], ended
        self.direct += 1


def _status(port: int) -> int:
    """Of /ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def combinations(fleet: Fleet, rids: set[str]) -> set[tuple[str, ...]]:
    """The builds each of these requests went through, as the ingress that had it tells."""
    builds, found = fleet.builds(), set()
    for one in fleet.running:
        if one.role == "ingress":
            for rid in rids:
                with contextlib.suppress(urllib.error.HTTPError):  # 404: the other one had it
                    address = one.metrics.removesuffix("/metrics") + f"/trace/{rid}"
                    with urllib.request.urlopen(address, timeout=5) as answer:
                        found.add(tuple(builds[hop["instance"]] for hop in json.loads(answer.read())["hops"]))
    return found


async def every_combination(load: Load) -> None:
    """Ask until each of the sixteen has served."""
    wanted = set(itertools.product(("old", "new"), repeat=4))
    found: set[tuple[str, ...]] = set()
    for begin in range(0, MOST, 40):
        before = len(load.asked)
        await asyncio.gather(*(load.one(number, 10, stream=bool(number % 2)) for number in range(begin, begin + 40)))
        rids = {one.seen.rid for one in load.asked[before:]}
        found |= await asyncio.to_thread(combinations, load.fleet, rids)
        if found == wanted:
            return
    raise AssertionError(f"never served: {wanted - found}")


def numbers(fleet: Fleet) -> dict[str, float]:
    """Every counter of something not understood or refused on the bus, of every process, that is not 0."""
    found = {}
    for one in fleet.running:
        with urllib.request.urlopen(one.metrics, timeout=5) as answer:
            text = answer.read().decode()
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            short = name.removeprefix("hotpath_")
            if short in NUMBERS and float(value) and (one.build, short) != ASKED:
                found[f"{one.build} {one.role} {name}"] = float(value)
    return found


async def check_books(load: Load) -> None:
    """Each build's books are the simulator's bill, and both read the same."""
    fleet, sim = load.fleet, load.sim
    row = await asyncio.to_thread(settled_level, fleet, "mixed", 20)
    assert await asyncio.to_thread(sim.wait, 5000, in_flight=0)
    counts = invariants.check_clients(load.asked)
    booked = await asyncio.to_thread(entries, fleet, "mixed")
    lines = await asyncio.to_thread(sim.bill)
    counts += invariants.check_money(booked, lines, row, dead=False)
    counts += invariants.check_calls(lines)
    counts["fallbacks"] = sum(entry.call > 1 for entry in booked.values())
    counts["asked directly"] = load.direct
    print(invariants.show(counts))
    assert counts["ended well"] + counts["left"] == len(load.asked)
    assert counts["fallbacks"] >= 4
    old, new = [await asyncio.to_thread(show_ledger, fleet, build) for build in fleet.trees]
    assert old == new, "the two builds read different books"


def show_ledger(fleet: Fleet, build: str) -> Any:
    return fleet.cli("ledger", "show", "mixed", build=build)


def create_keys(fleet: Fleet) -> list[dict[str, Any]]:
    """A key of the same tenant by either build's command line."""
    return [fleet.cli("keys", "create", "--tenant", "mixed", "--synthetic", build=build) for build in fleet.trees]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("mixed", "stages"), COMMITS, indirect=["mixed"])
async def test_both_builds_side_by_side(mixed: Fleet, simulator: Sim, http: aiohttp.ClientSession, stages: int) -> None:
    """0 errors, exactly one good end each, all of the text, and the books of both builds are the simulator's bill."""
    load = Load(mixed, http, simulator, await asyncio.to_thread(create_keys, mixed))
    await load.ready()
    if stages > 1:
        await load.stage()  # a new ingress, and an old one, over old workers
    old = [one for one in mixed.running if one.build == "old" and one.role != "ingress"]
    await asyncio.to_thread(mixed.start, "new", *WORKERS)
    await every_combination(load)
    await load.stage()
    assert await asyncio.to_thread(numbers, mixed) == {}
    if stages > 1:
        await asyncio.to_thread(mixed.stop, old)
        await load.ready()
        await load.stage()  # a new ingress, and an old one, over new workers
        assert await asyncio.to_thread(numbers, mixed) == {}
    await check_books(load)
    assert list(mixed.complaints()) == []
    assert "iolation" not in mixed.nats_log.read_text()
