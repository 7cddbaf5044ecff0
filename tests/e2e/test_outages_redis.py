"""Redis killed, frozen, restarted, read-only, full, slow, busy, cut off (D4, DESIGN 5, faults 42-50, S1-G18).

Two tenants ask at a steady rate across each outage, one with a hard limit and one without. Then: a hard limit is
refused with 503 `ledger_unavailable` and Retry-After within 250 ms, the other is served degraded, nothing hangs, all is
well within 2 s of Redis's return, and the books agree with the provider's bill to the last call: nothing was lost, no
reservation is left, nobody is refused for money that was never spent.

    OUTAGES=1 pytest tests/e2e/test_outages_redis.py -s        the whole matrix, 30 s freezes included, with figures
"""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import redis as redis_py

from deploy import servers
from tests.e2e import books, invariants
from tests.e2e.drive import Client
from tests.e2e.outage import (
    SETTINGS,
    Extra,
    Load,
    Only,
    Server,
    Servers,
    check_stale,
    codes,
    environment,
    eventually,
    ready,
    refusals,
)
from tests.e2e.proxy import Proxy
from tests.e2e.rig import Up
from tests.e2e.sim import Sim
from tests.interop.target import says, with_v1

FULL = os.environ.get("OUTAGES") == "1"
#: DESIGN 5 promises 250 ms; what the client and its loop add on a busy machine is not the gateway's.
LATE_S = 0.25


@pytest.fixture(scope="module")
def up(proxied: Up) -> Up:
    """Behind the proxies."""
    return proxied


class Pair:
    """A tenant with a hard limit and one without, asked at the same rate."""

    def __init__(self, up: Up, sim: Sim, http: aiohttp.ClientSession, make: Callable[..., dict[str, Any]]) -> None:
        self._up, self._sim, self._http = up, sim, http
        self._made = (make("--limit-usd", "5", "--period", "day"), make())
        self.hard, self.free = (Load(Client(http, up.url, made["key"]), rate=15) for made in self._made)
        self._before = invariants.baseline(up)

    async def through(self, *faults: tuple["Fault", float]) -> None:
        """Ask before, in and after each fault, which lasts so many seconds."""
        async with self.hard, self.free:
            await asyncio.sleep(1.2)
            for fault, seconds in faults:
                await asyncio.to_thread(fault.strike)
                self.struck(type(fault).__name__)
                await asyncio.sleep(seconds)
                await asyncio.to_thread(fault.heal)
                self.healed()
                await asyncio.sleep(2.5 if FULL else 1.7)

    def struck(self, name: str) -> None:
        """It begins now, for both."""
        self.hard.struck(name)
        self.free.struck(name)

    def healed(self) -> None:
        """It is over."""
        self.hard.healed()
        self.free.healed()

    async def check(self) -> None:
        """Report, and every invariant for both: no phantom reservation, nothing unconfirmed, nothing lost."""
        await self._http.close()  # its idle connections would count
        for load, made, kind in zip((self.hard, self.free), self._made, ("hard limit", "no limit"), strict=True):
            print("\n" + load.report(kind))
            refusals(load.asked)
            await asyncio.to_thread(check_stale, self._sim, load)
            only: Any = Only(self._sim, load.asked)
            counts = await invariants.check(self._up, only, made, load.asked, self._before, dead=True)
            print(invariants.show(counts))
            assert counts["calls unconfirmed"] == 0, counts


@pytest.fixture
async def pair(up: Up, sim: Sim, http: aiohttp.ClientSession, tenant: Callable[..., Any]) -> Pair:
    """Their keys are in every process's copy."""
    made = await asyncio.to_thread(Pair, up, sim, http, tenant)
    for load in (made.hard, made.free):
        await load.warm()
    return made


class Fault:
    """What happens to Redis, and how it ends."""

    def __init__(self, around: Servers) -> None:
        self.around = around
        self.redis = around.redis

    def strike(self) -> None:
        """It begins."""
        raise NotImplementedError

    def heal(self) -> None:
        """It is over."""
        self.around.to_redis.heal()

    def command(self, *words: object) -> Any:
        """One command, past the proxy."""
        with redis_py.Redis(port=self.redis.port) as direct:
            return direct.execute_command(*words)


class Killed(Fault):
    """kill -9; started again with its AOF."""

    def strike(self) -> None:
        self.redis.end()

    def heal(self) -> None:
        self.redis.start()


class Stopped(Killed):
    """SIGTERM: it saves and goes."""

    def strike(self) -> None:
        self.redis.end(signal.SIGTERM)


class Frozen(Fault):
    """SIGSTOP: it keeps its connections and answers nobody."""

    def strike(self) -> None:
        self.redis.send(signal.SIGSTOP)

    def heal(self) -> None:
        self.redis.send(signal.SIGCONT)


class Paused(Fault):
    """CLIENT PAUSE: what was asked runs later. It holds back an UNPAUSE too, and ends by itself."""

    def strike(self) -> None:
        self.command("CLIENT", "PAUSE", 10_000, "ALL")

    def heal(self) -> None:
        self.command("PING")


class ReadOnly(Fault):
    """A failover made it somebody's replica."""

    def strike(self) -> None:
        self.command("REPLICAOF", "127.0.0.1", 1)

    def heal(self) -> None:
        self.command("REPLICAOF", "NO", "ONE")


class Full(Fault):
    """Out of memory under noeviction."""

    def strike(self) -> None:
        self.command("CONFIG", "SET", "maxmemory", 1)

    def heal(self) -> None:
        self.command("CONFIG", "SET", "maxmemory", 0)


class Busy(Fault):
    """Somebody's endless script."""

    def strike(self) -> None:
        self.command("CONFIG", "SET", "busy-reply-threshold", 20)
        threading.Thread(target=self._spin, daemon=True).start()
        with contextlib.suppress(redis_py.ResponseError):  # BUSY
            while self.command("PING"):
                time.sleep(0.005)

    def _spin(self) -> None:
        with contextlib.suppress(redis_py.RedisError):
            self.command("EVAL", "while true do end", 0)

    def heal(self) -> None:
        self.command("SCRIPT", "KILL")


class Slow(Fault):
    """100 ms each way: no answer comes in time."""

    def strike(self) -> None:
        self.around.to_redis.delay(0.1)


class DeafServer(Fault):
    """What we send is swallowed."""

    def strike(self) -> None:
        self.around.to_redis.blackhole(up=True)


class DeafClient(Fault):
    """What it answers is swallowed: everything is applied, nobody hears of it."""

    def strike(self) -> None:
        self.around.to_redis.blackhole(down=True)


class Refused(Fault):
    """Every connection is reset, new ones too."""

    def strike(self) -> None:
        self.around.to_redis.refuse()
        self.around.to_redis.reset()


#: One after the other in CI, seconds each: a run of two minutes in half a minute.
IN_TURN: list[tuple[type[Fault], float]] = [
    (Killed, 1.5),
    (Full, 1.2),
    (ReadOnly, 1.2),
    (DeafClient, 1.5),
    (Frozen, 3.0),
]
MATRIX: list[tuple[type[Fault], float]] = [
    (Killed, 5), (Stopped, 5), (Frozen, 30), (Paused, 10), (ReadOnly, 5), (Full, 5), (Busy, 5), (Slow, 10),
    (DeafServer, 12), (DeafClient, 3), (DeafClient, 12), (Refused, 5),
]  # fmt: skip


def promises(pair: Pair) -> None:
    """D4, the row of DESIGN 5."""
    for outage in pair.hard.outages:
        hard = pair.hard.during(outage)
        for one in hard:
            assert (one.seen.status, one.seen.error.get("code")) == (503, "ledger_unavailable"), (outage, one)
            assert one.seen.headers["x-br-guardian-status"] == "degraded"
        took = sorted(one.seen.took for one in hard)
        # typically 10 to 110 ms; in CI a handful of answers, and a busy machine's stalls among them
        assert took[int(len(took) * (0.99 if FULL else 0.95))] <= LATE_S, (outage, took[-5:])
        assert took[-1] <= 4 * LATE_S, (outage, took[-5:])
    for outage in pair.free.outages:
        free = codes(pair.free.during(outage))
        assert set(free) <= {"served degraded"}, (outage, free)
        cut = pair.free.cut(outage)  # those whose dispatch was on its way just then (deploy/decisions/0018)
        assert len(cut) <= 6, (outage, codes(cut))
        assert set(codes(cut)) <= {"503 ledger_unavailable"}, (outage, codes(cut))
    for load in (pair.hard, pair.free):
        assert all(one.seen.ended_well for one in load.asked if one.at + one.seen.took < load.outages[0].struck - 0.3)
        for outage in load.outages:
            assert load.recovery(outage) <= 2.0, outage


async def test_outages_in_turn(around: Servers, pair: Pair) -> None:
    """Killed, full, read-only, its answers lost, frozen: each kept as promised, and the books right at the end."""
    await pair.through(*((kind(around), seconds) for kind, seconds in IN_TURN))
    await pair.check()
    promises(pair)


@pytest.mark.skipif(not FULL, reason="OUTAGES=1")
@pytest.mark.parametrize(("kind", "seconds"), MATRIX, ids=lambda value: getattr(value, "__name__", f"{value} s"))
async def test_an_outage(around: Servers, pair: Pair, kind: type[Fault], seconds: float) -> None:
    """Each alone, and long."""
    await pair.through((kind(around), seconds))
    await pair.check()
    promises(pair)


async def test_scripts_flushed_and_replies_cut(around: Servers, pair: Pair) -> None:
    """Faults 49: SCRIPT FLUSH under load costs nobody anything. A connection that is reset in the middle of a reply
    costs at most what was being asked just then."""
    fault = Fault(around)
    async with pair.hard, pair.free:
        for _ in range(5):
            await asyncio.to_thread(fault.command, "SCRIPT", "FLUSH")
            await asyncio.sleep(0.2)
        pair.struck("replies cut")
        for count in (1, 40, 300):
            around.to_redis.cut_after(count, down=True)
            await asyncio.sleep(0.4)
        pair.healed()
        await asyncio.sleep(0.5)
    await pair.check()
    for load in (pair.hard, pair.free):
        bad = [one for one in load.asked if not one.seen.ended_well]
        assert all(one.at + one.seen.took >= load.outages[0].struck for one in bad), codes(bad)
        assert len(bad) <= 6, codes(bad)


@pytest.mark.skipif(not FULL, reason="OUTAGES=1")
@pytest.mark.parametrize("role", ["guardian", "provider"])
async def test_one_cut_off_alone(around: Servers, up: Up, pair: Pair, role: str) -> None:
    """A worker that alone does not reach Redis refuses what comes in the first second; then its siblings, who do, have
    its work, and it has it again within 2 s of the end. What it was calling is settled when it can be."""
    with Proxy(around.redis.port) as proxy, Extra(up, role, REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0"):
        async with pair.hard, pair.free:
            await asyncio.sleep(1.5)
            pair.struck(f"a {role} cut off")
            proxy.blackhole(up=True, down=True)
            await asyncio.sleep(8.0)
            proxy.heal()
            pair.healed()
            await asyncio.sleep(2.5)
        await pair.check()
    for load in (pair.hard, pair.free):
        bad = [one for one in load.asked if not one.seen.ended_well]
        assert all(one.seen.error["code"] == "ledger_unavailable" and one.seen.took <= LATE_S for one in bad), codes(
            bad
        )
        assert all(one.at - load.outages[0].struck <= 1.5 for one in bad), [
            one.at - load.outages[0].struck for one in bad
        ]
        assert load.recovery(load.outages[0]) <= 2.0


@pytest.fixture
def frozen(around: Servers) -> Iterator[Frozen]:
    """A Redis that may be frozen by the test, thawed whatever happens."""
    made = Frozen(around)
    yield made
    made.heal()


async def test_what_the_sdk_makes_of_it(up: Up, frozen: Frozen, tenant: Callable[..., Any], http: Any) -> None:
    """D4 as the official client sees it, and fifty at once: 503, the code, Retry-After, none waits for another."""
    made = await asyncio.to_thread(tenant, "--limit-usd", "5", "--period", "day")
    load = Load(Client(http, up.url, made["key"]))
    await load.warm()
    frozen.strike()
    together = await asyncio.gather(*(load._client.chat("x", stream=bool(n % 2)) for n in range(50)))
    async with openai.AsyncOpenAI(base_url=with_v1(up.url), api_key=made["key"], max_retries=0) as sdk:
        with pytest.raises(openai.InternalServerError) as caught:
            await sdk.chat.completions.create(model="sim-fast", messages=says("x"))
    assert (caught.value.status_code, caught.value.code) == (503, "ledger_unavailable")
    for seen in together:
        assert (seen.status, seen.error["code"]) == (503, "ledger_unavailable")
        assert int(seen.headers["retry-after"]) >= 1


async def test_known_and_unknown_keys(up: Up, frozen: Frozen, client: Client, http: Any) -> None:
    """A known key is served from the copy; an unknown one gets 503, not 401: nobody can say that it is wrong."""
    assert (await client.chat("[[sim chunks=2]]")).ended_well
    frozen.strike()
    await asyncio.sleep(1.7)  # the copy's poll has failed by then
    assert (await client.chat("[[sim chunks=2]]")).ended_well
    stranger = await Client(http, up.url, "br_live_aaaaaaaaaaaa_" + "A" * 43).chat("x")
    assert (stranger.status, stranger.error["code"]) == (503, "registry_unavailable")
    status, detail = await asyncio.to_thread(ready, up.url)
    assert (status, detail["redis"], detail["registry"]) == (503, False, True)


async def test_born_in_an_outage(around: Servers, up: Up, tenant: Callable[..., Any], http: Any) -> None:
    """S1-M6a: a process that starts while Redis is away starts, says so in one CRITICAL line, leaves the work to those
    who know the tenants, refuses what comes to it all the same, and heals by itself."""
    made = await asyncio.to_thread(tenant)
    load = Load(Client(http, up.url, made["key"]))
    await load.warm()
    around.redis.end()
    try:
        roles = await asyncio.gather(
            *(asyncio.to_thread(Extra, up, role) for role in ("ingress", "guardian", "provider"))
        )
        with contextlib.ExitStack() as stack:
            ingress, guardian, provider = (stack.enter_context(role) for role in roles)
            for _ in range(30):  # the elder ones serve on: nothing is left to the young
                seen = await load._client.chat(invariants.prompt(1))
                assert (seen.status, seen.headers.get("x-br-guardian-status")) == (200, "degraded"), seen.error
            status, detail = await asyncio.to_thread(ready, ingress.url)
            assert (status, detail["redis"], detail["registry"], detail["nats"]) == (503, False, False, True)
            for key, code in ((up.run["api_key"], "ledger_unavailable"), (made["key"], "registry_unavailable")):
                refused = await Client(http, ingress.url, key).chat("x")
                assert (refused.status, refused.error["code"]) == (503, code)
                assert int(refused.headers["retry-after"]) >= 1
            for role in (ingress, guardian, provider):
                assert sum("starting without Redis" in line for line in role.log.read_text().splitlines()) == 1
            around.redis.start()
            await eventually(lambda: ready(ingress.url)[0] == 200, 2.0, "ready again")
            young, end = Client(http, ingress.url, made["key"]), time.monotonic() + 2.0
            while not (seen := await young.chat(invariants.prompt(1))).ended_well:
                assert time.monotonic() < end, seen.error
                await asyncio.sleep(0.05)
    finally:
        if not around.redis.running:
            around.redis.start()
    strict = await asyncio.to_thread(strict_start, up, f"redis://127.0.0.1:{servers.free_port()}/0")
    assert strict == 1


def strict_start(up: Up, redis_url: str) -> int:
    """The exit code of a guardian that may not start without Redis; its ten seconds are made short."""
    script = (
        "from shared.service import main, process; from workers.guardian.admit import Guardian;"
        "process.CONNECT_S = 0.2; main(Guardian)"
    )
    env = {**environment(up, "guardian"), "STATE_REQUIRED": "true", "REDIS_URL": redis_url, "HOTPATH_READY_FD": "-1"}
    return subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, timeout=20, check=False
    ).returncode


async def test_both_away_and_the_provider_killed(
    around: Servers, up: Up, sim: Sim, tenant: Callable[..., Any], http: Any
) -> None:
    """DESIGN 4: what neither Redis nor JetStream took is on disk; whoever lives publishes the spool of the dead, and a
    guardian posts each record, once, at exactly the provider's bill."""
    made = await asyncio.to_thread(tenant)
    client = Client(http, up.url, made["key"])
    assert (await client.chat("x")).ended_well
    before = len(await asyncio.to_thread(books.entries, up, made["tenant"]))
    asking = [asyncio.ensure_future(client.chat("[[sim chunks=40 pace=40]]", stream=True)) for _ in range(12)]
    await asyncio.sleep(0.8)  # each streams, and has as much to go
    around.nats.end()
    around.redis.end()
    seen = await asyncio.gather(*asking)
    rids = {one.rid for one in seen if one.rid}
    assert len(rids) == 12, seen
    spool = up.data / "spool"
    await eventually(lambda: rids <= spooled(spool), 8.0, "on disk")
    os.kill(up.run["pids"]["provider"][0], signal.SIGKILL)
    around.redis.start()
    around.nats.start()
    await eventually(lambda: not spooled(spool), 8.0, "collected")

    def posted() -> bool:
        found = books.entries(up, made["tenant"])
        return len(found) == 12 + before and {entry.state for entry in found.values()} == {"settled"}

    await eventually(posted, 5.0, "posted")
    found = await asyncio.to_thread(books.entries, up, made["tenant"])
    for rid in rids:
        [bill] = sim.lines(rid)
        assert (found[f"{rid}.1"].cost, found[f"{rid}.1"].estimated) == (bill["cost_nano_usd"], False), bill
    level = await asyncio.to_thread(books.level, up, made["tenant"])
    assert (level["settled"], level["pending"]) == (sum(entry.cost for entry in found.values()), 0)


def spooled(folder: Path) -> set[str]:
    """The rids in the spool's files."""
    try:
        data = b"".join(path.read_bytes() for path in folder.iterdir())
    except FileNotFoundError:  # not made yet, or collected meanwhile
        return set()
    return {found.decode() for found in re.findall(rb"[0-9a-f]{32}", data)}


async def test_a_fleet_that_boots_before_its_redis(tmp_path: Path, http: Any) -> None:
    """`hotpath up` starts, answers 503, and is ready within 2 s of Redis's coming, without a restart."""
    port = servers.free_port()
    redis = Server(servers.valkey_command(tmp_path / "valkey", port), port, tmp_path / "valkey.log")
    fleet = Up(tmp_path / "up", env={**SETTINGS, "REDIS_URL": f"redis://127.0.0.1:{port}/0"})
    fleet.launch()
    try:
        await eventually(lambda: ready(fleet.url)[0] == 503, 30, "the ingress answers")
        pids = fleet.pids()
        seen = await Client(http, fleet.url, fleet.run["api_key"]).chat("x")
        assert (seen.status, seen.error["code"]) == (503, "ledger_unavailable")
        redis.start()
        await eventually(lambda: ready(fleet.url)[0] == 200, 2.5, "ready")
        await asyncio.to_thread(fleet.wait_ready, 5)
        assert (await Client(http, fleet.url, fleet.run["api_key"]).chat(invariants.prompt(1))).ended_well
        assert set(pids) <= set(fleet.pids())  # nobody was started again
    finally:
        await asyncio.to_thread(fleet.stop)
        redis.end()
