"""NATS killed, frozen, slow, cut in mid-message, and cut off from one process alone (DESIGN 5, faults 22-40).

A tenant asks at a steady rate across each outage. Killed: 503 within 300 ms; frozen: within 2 s; a stream that began
ends with one error in it; all is well within 2 s of NATS's return; no request runs whose client was told otherwise, nor
after its deadline; the books agree with the provider's bill, since settlements go by Redis.

    OUTAGES=1 pytest tests/e2e/test_outages_nats.py -s        the whole matrix, 10 s freezes included, with figures
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import invariants
from tests.e2e.books import Entry, entries, level
from tests.e2e.drive import Client
from tests.e2e.invariants import Asked
from tests.e2e.outage import SETTINGS, Extra, Load, Only, Servers, check_stale, codes, eventually, ready, refusals
from tests.e2e.proxy import Proxy
from tests.e2e.rig import Up
from tests.e2e.sim import Sim, until

FULL = os.environ.get("OUTAGES") == "1"
#: DESIGN 5, in seconds.
KILLED_S, FROZEN_S, BACK_S = 0.3, 2.0, 2.0
GONE = {"503 bus_unavailable", "503 no_worker"}

whole_matrix = pytest.mark.skipif(not FULL, reason="OUTAGES=1")


@pytest.fixture(scope="module")
def up(proxied: Up) -> Up:
    """Behind the proxies."""
    return proxied


class Fault:
    """What happens to NATS, how it ends, and within how long a refusal must come."""

    within = KILLED_S

    def __init__(self, around: Servers) -> None:
        self.nats, self.proxy = around.nats, around.to_nats

    def strike(self) -> None:
        """It begins."""
        raise NotImplementedError

    def heal(self) -> None:
        """It is over."""
        self.proxy.heal()


class Killed(Fault):
    """kill -9."""

    def strike(self) -> None:
        self.nats.end()

    def heal(self) -> None:
        self.nats.start()


class Stopped(Killed):
    """SIGTERM."""

    def strike(self) -> None:
        self.nats.end(signal.SIGTERM)


class Frozen(Fault):
    """SIGSTOP: what was published lies in its sockets and is delivered when it thaws."""

    within = FROZEN_S

    def strike(self) -> None:
        self.nats.send(signal.SIGSTOP)

    def heal(self) -> None:
        self.nats.send(signal.SIGCONT)


class Refused(Fault):
    """Every connection is reset, new ones too."""

    def strike(self) -> None:
        self.proxy.refuse()
        self.proxy.reset()


class Swallowed(Fault):
    """A partition of everybody: nothing passes, nothing is closed."""

    within = FROZEN_S

    def strike(self) -> None:
        self.proxy.blackhole(up=True, down=True)


#: One after the other in CI, seconds each.
IN_TURN: list[tuple[type[Fault], float]] = [(Killed, 0.8), (Frozen, 2.6)]
MATRIX: list[tuple[type[Fault], float]] = [
    (Killed, 0.1), (Killed, 10), (Stopped, 3), (Frozen, 1), (Frozen, 2), (Frozen, 3), (Frozen, 10), (Refused, 3),
    (Swallowed, 3), (Swallowed, 10),
]  # fmt: skip


class Asking:
    """One tenant with a hard limit, asked throughout."""

    def __init__(self, up: Up, sim: Sim, made: dict[str, Any], http: Any) -> None:
        self.up, self.sim, self.made, self.http = up, sim, made, http
        self.before = invariants.baseline(up)
        self.load = self.another(up.url)
        self.loads = [self.load]

    def another(self, url: str) -> Load:
        """A load of the same tenant at another ingress."""
        return Load(Client(self.http, url, self.made["key"]), rate=25)

    async def stream(self, **options: int) -> Asked:
        """One long stream."""
        prompt, at = invariants.prompt(options.pop("chunks"), **options), time.monotonic()
        client = Client(self.http, self.up.url, self.made["key"])
        one = Asked(prompt=prompt, seen=await client.chat(prompt, stream=True), at=at)
        self.load.asked.append(one)
        return one

    async def through(self, *faults: tuple[Fault, float]) -> None:
        """Ask before, in and after each fault, which lasts so many seconds."""
        async with self.load:
            await asyncio.sleep(1.2)
            for fault, seconds in faults:
                self.load.struck(type(fault).__name__)
                await asyncio.to_thread(fault.strike)
                await asyncio.sleep(seconds)
                await asyncio.to_thread(fault.heal)
                self.load.healed()
                await asyncio.sleep(2.5)

    async def check(self) -> None:
        """Report, and every invariant: nobody died, so nothing is unconfirmed."""
        await self.http.close()  # its idle connections would count
        asked = [one for load in self.loads for one in load.asked]
        for load in self.loads:
            print("\n" + load.report("one tenant"))
            refusals(load.asked)
            await asyncio.to_thread(check_stale, self.sim, load)
        only: Any = Only(self.sim, asked)
        counts = await invariants.check(self.up, only, self.made, asked, self.before, dead=True)
        print(invariants.show(counts))
        assert counts["calls unconfirmed"] == 0, counts


@pytest.fixture
async def asking(up: Up, sim: Sim, http: Any, tenant: Callable[..., Any]) -> Asking:
    made = await asyncio.to_thread(tenant, "--limit-usd", "5", "--period", "day")
    found = Asking(up, sim, made, http)
    await found.load.warm()
    return found


def promises(load: Load, *faults: Fault) -> None:
    """DESIGN 5, the row of NATS."""
    for outage, fault in zip(load.outages, faults, strict=True):
        asked = load.during(outage)
        assert set(codes(asked)) <= GONE | {"served"}, (outage, codes(asked))
        late = [one for one in asked if not one.seen.ended_well and one.seen.took > fault.within]
        assert not late, (outage, late[0])
        assert load.cut_after(outage) <= fault.within, outage
        assert load.recovery(outage) <= BACK_S, outage
    assert all(one.seen.ended_well for one in load.asked if one.at + one.seen.took < load.outages[0].struck)


async def test_outages_in_turn(around: Servers, asking: Asking) -> None:
    """Killed, then frozen."""
    faults = [(kind(around), seconds) for kind, seconds in IN_TURN]
    await asking.through(*faults)
    await asking.check()
    promises(asking.load, *(fault for fault, _ in faults))


@whole_matrix
@pytest.mark.parametrize(("kind", "seconds"), MATRIX, ids=lambda value: getattr(value, "__name__", f"{value} s"))
async def test_an_outage(around: Servers, asking: Asking, kind: type[Fault], seconds: float) -> None:
    """Each alone."""
    fault = kind(around)
    await asking.through((fault, seconds))
    await asking.check()
    promises(asking.load, fault)


# ---- one process alone -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(around: Servers, up: Up, role: str) -> Iterator[tuple[Extra, Proxy]]:
    """One more process of the role with its own way to NATS."""
    with Proxy(around.nats.port) as proxy:
        url = f"nats://127.0.0.1:{proxy.port}"
        with Extra(up, role, NATS_URL=url, **{f"NATS_URL_{role.upper()}": ""}) as extra:
            yield extra, proxy


WAYS = [{"up": True}, {"down": True}, {"up": True, "down": True}] if FULL else [{"up": True, "down": True}]


@pytest.mark.parametrize("ways", WAYS, ids="+".join)
async def test_an_ingress_cut_off(around: Servers, up: Up, asking: Asking, ways: dict[str, bool]) -> None:
    """Faults 25: its requests are refused in time, the others' are served, and it says so; then it is well again."""
    with alone(around, up, "ingress") as (extra, proxy):
        cut_off = asking.another(extra.url)
        asking.loads.append(cut_off)
        async with asking.load, cut_off:
            await asyncio.sleep(1.0)
            for load in asking.loads:
                load.struck("an ingress cut off")
            proxy.blackhole(**ways)
            await asyncio.sleep(7.0 if FULL else 2.6)
            assert (await asyncio.to_thread(ready, extra.url))[0] == 503
            proxy.heal()
            for load in asking.loads:
                load.healed()
            await asyncio.sleep(2.5)
        await asking.check()
        assert all(one.seen.ended_well for one in asking.load.asked), codes(asking.load.asked)
        await asyncio.to_thread(lambda: promises(cut_off, Swallowed(around)))


@whole_matrix
@pytest.mark.parametrize("role", ["guardian", "routing"])
async def test_a_worker_cut_off(around: Servers, up: Up, asking: Asking, role: str) -> None:
    """It was begun nowhere, so another one serves it: no request fails, for none of which text had come."""
    with alone(around, up, role) as (_extra, proxy):
        async with asking.load:
            await asyncio.sleep(1.5)
            asking.load.struck(f"a {role} cut off")
            proxy.blackhole(up=True, down=True)
            await asyncio.sleep(7.0)
            proxy.heal()
            asking.load.healed()
            await asyncio.sleep(2.0)
        await asking.check()
        assert all(one.seen.ended_well for one in asking.load.asked), codes(asking.load.asked)
        assert max(one.seen.took for one in asking.load.asked) <= 1.0 + 2.0


async def test_a_provider_cut_off_while_it_streams(around: Servers, up: Up, asking: Asking, sim: Sim) -> None:
    """Faults 26: its clients get one error within 3 s; it cancels its upstream calls after 5 s and settles by Redis."""
    with alone(around, up, "provider") as (extra, proxy):
        streams = [asyncio.create_task(asking.stream(chunks=280, pace=25)) for _ in range(24)]
        await asyncio.to_thread(sim.wait, in_flight=24)
        await asyncio.sleep(0.7)
        cut_at = time.monotonic()
        asking.load.struck("a provider cut off")
        proxy.blackhole(up=True, down=True)
        done, _ = await asyncio.wait(streams, timeout=5.0)
        cut = [task.result() for task in done]
        took = [one.at + one.seen.took - cut_at for one in cut]
        assert 1 <= len(cut) < 24
        for one in cut:
            assert (one.seen.status, one.seen.error["code"]) == (200, "upstream_worker_lost"), one.seen.body[-300:]
        closed = await eventually(lambda: sim.in_flight() <= 24 - len(cut), 5.0, "its upstream calls are closed")
        print(f"{len(cut)} cut, told after {min(took):.2f} to {max(took):.2f} s, upstream closed after"
              f" {time.monotonic() - cut_at:.2f} s ({closed:.2f})")  # fmt: skip
        assert max(took) <= 3.0
        assert time.monotonic() - cut_at <= 6.5
        # settled by Redis while it is still cut off
        rids = {one.seen.rid for one in cut}
        books = await asyncio.to_thread(
            until, lambda: entries(up, asking.made["tenant"]), lambda b: _over(b, rids), 5, 0.2
        )
        assert _over(books, rids)
        proxy.heal()
        asking.load.healed()
        await asyncio.gather(*streams)
        async with asking.load:
            await asyncio.sleep(0.5)
        assert extra.process.poll() is None
    await asking.check()


def _over(books: dict[str, Entry], rids: set[str]) -> bool:
    return all(books[f"{rid}.1"].state == "settled" for rid in rids)


# ---- slow, and cut in mid-message ------------------------------------------------------------------------------------


@whole_matrix
async def test_slow(around: Servers, asking: Asking) -> None:
    """Faults 28: 50 ms and 1 MB/s each way: slower, no error."""
    async with asking.load:
        await asyncio.sleep(0.5)
        asking.load.struck("slow")
        around.to_nats.delay(0.05)
        around.to_nats.throttle(1_000_000)
        await asyncio.sleep(10.0)
        around.to_nats.heal()
        asking.load.healed()
        await asyncio.sleep(1.0)
    await asking.check()
    assert all(one.seen.ended_well for one in asking.load.asked), codes(asking.load.asked)


async def test_cut_in_mid_message(around: Servers, asking: Asking) -> None:
    """Faults 23, 29, 30: connections are reset in the middle of whatever was being sent: what was lost is delivered
    again or ends with an error, never with silence; all is well within 2 s."""
    async with asking.load:
        await asyncio.sleep(0.5)
        for way in ({"up": True}, {"down": True}):
            for count in (1, 700) if FULL else (700,):
                asking.load.struck("cut")
                around.to_nats.cut_after(count, **way)
                await asyncio.sleep(0.1)
                asking.load.healed()
                await asyncio.sleep(2.0 if FULL else 1.2)
    await asking.check()
    promises(asking.load, *(Killed(around) for _ in asking.load.outages))


# ---- the servers of `hotpath up` -------------------------------------------------------------------------------------


async def test_the_supervisor_brings_the_servers_back(tmp_path: Path, http: Any) -> None:
    """kill -9 of the embedded NATS, then of the embedded Valkey: restarted and well again within 2 s, the keys, limits
    and books as they were."""
    with Up(tmp_path / "up", env=SETTINGS) as own:
        made = await asyncio.to_thread(own.cli, "keys", "create", "--tenant", "t", "--limit-usd", "5")
        client = Client(http, own.url, made["key"])
        assert (await client.chat(invariants.prompt(3))).ended_well
        for server in ("nats", "redis"):
            spent = (await asyncio.to_thread(level, own, "t"))["settled"]
            (pid,) = own.run["pids"][server]
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            first = await client.chat("x")
            while not (await client.chat(invariants.prompt(3))).ended_well:
                assert time.monotonic() < killed + 5
                await asyncio.sleep(0.01)
            back = time.monotonic() - killed
            print(f"{server}: first answer {first.status} after {first.took:.3f} s, well again after {back:.2f} s")
            assert first.took <= KILLED_S
            assert back <= BACK_S
            assert (await asyncio.to_thread(level, own, "t"))["settled"] >= spent > 0
