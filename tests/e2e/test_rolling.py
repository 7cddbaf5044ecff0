"""Issue 3, acceptance 5: every role is replaced while 100 streams are open and requests come; nobody notices.

The short version; `python -m tests.e2e.rolling` is the long one (streams of 60 s, 70 % of capacity).
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from deploy import servers
from tests.e2e import invariants
from tests.e2e.drive import Client, Seen, session
from tests.e2e.rig import Up
from tests.e2e.rolling import roll
from tests.e2e.sim import Sim

STREAMS = 100
SECONDS = 5.0


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Up]:
    """One of each role but two guardians: with a single one nobody is there to take over but its replacement."""
    with Up(tmp_path / "data", "--scale", "guardian=2", env={"SHUTDOWN_STREAM_DRAIN_MS": "120000"}) as up:
        yield up


async def test_every_role_is_replaced_under_load(fleet: Up) -> None:
    """S1-H5, D8, faults 84: 0 failed requests, 0 cut streams, by aiohttp and by the openai SDK that tries nothing
    twice; the books and the bill agree."""
    sim = Sim(fleet.run["simulator_url"])
    before = fleet.pids()
    made = {"tenant": "rolling", **fleet.cli("keys", "create", "--tenant", "rolling")}
    result = await roll(fleet, made, role="all", streams=STREAMS, seconds=SECONDS, rate=30, say=print)
    assert result.failed == []
    names = [one["name"] for one in result.restarted]
    assert names == ["provider.1", "routing.1", "guardian.1", "guardian.2", "ingress.1"]
    assert len(set(before) & set(fleet.pids())) == 3, "the servers and the simulator"
    counts = await invariants.check(fleet, sim, made, result.asked)
    print(invariants.show(counts))
    print(f"{result.sdk_answers} by the SDK, {result.held_back} not offered, {result.seconds} s")
    assert counts["ended well"] == len(result.asked)
    assert result.sdk_answers > 50
    assert not [line for line in fleet.said().splitlines() if "did not finish" in line or "killed" in line]


async def test_ctrl_c_under_load(tmp_path: Path) -> None:
    """S1-H5a-c: streams end well; whoever comes now is refused in words, by two ingresses that both leave."""
    with Up(tmp_path / "data", "--scale", "ingress=2", env={"SHUTDOWN_STREAM_DRAIN_MS": "20000"}) as up:
        url, key = up.url, up.run["api_key"]
        async with session() as http:
            client = Client(http, url, key)
            streams = [asyncio.create_task(client.chat("[[sim chunks=40 pace=100]]", stream=True)) for _ in range(20)]
            await asyncio.to_thread(Sim(up.run["simulator_url"]).wait, 5000, calls=20)
            up.signal()
            refused = Seen()
            async with asyncio.timeout(3), session() as fresh:
                while refused.status != 503:  # 200 while they still think that the other one stays
                    refused = await Client(fresh, url, key).chat("[[sim chunks=1]]")
                    assert refused.status in {200, 503}, refused
                async with fresh.get(url + "/ready") as ready:
                    assert ready.status == 503
            assert refused.error["message"] == "Service Unavailable - shutting down"
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["connection"] == "close"
            ended = await asyncio.gather(*streams)
            assert [one for one in ended if not one.ended_well] == []
        assert await asyncio.to_thread(up.wait) == 0


async def test_an_ingress_with_its_own_socket_leaves(up: Up, tmp_path: Path) -> None:
    """honcho: two share a port by SO_REUSEPORT; one leaves while every request comes on a connection of its own."""
    port = servers.free_port()
    env = {**up.env, **up.cli("env"), "GATEWAY_PORT": str(port)}
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("wb") as log:
        two = [
            subprocess.Popen([sys.executable, "-m", "ingress"], env=env, stdout=log, stderr=log, cwd=Path.cwd())
            for _ in range(2)
        ]
        try:
            seen = await _by_new_connections(url, up.run["api_key"], two)
        finally:
            for process in two:
                process.terminate()
                process.wait(10)
    print(f"{len(seen)} requests")
    assert [one for one in seen if not one.ended_well] == []
    assert len(seen) > 30, "too few to say anything"


async def _by_new_connections(url: str, key: str, two: "list[subprocess.Popen[bytes]]") -> list[Seen]:
    """What clients saw while the first of the two was told to end and ended."""
    seen: list[Seen] = []
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:
        client = Client(http, url, key)
        async with asyncio.timeout(20):
            while not await _both_listen(http, url, two):
                await asyncio.sleep(0.1)

        async def ask() -> None:
            while two[0].poll() is None or two[0].returncode != 0:
                seen.append(await client.chat("[[sim chunks=3]]"))

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        while len(seen) < 30:
            await asyncio.sleep(0.01)
        os.kill(two[0].pid, signal.SIGTERM)
        async with asyncio.timeout(20):
            await asyncio.gather(*asking)
    return seen


async def _both_listen(http: aiohttp.ClientSession, url: str, two: "list[subprocess.Popen[bytes]]") -> bool:
    """Whether both have a queue of their own at the port, and serve."""
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{int(url.rpartition(':')[2]):04X}") and line.split()[3] == "0A"
    }
    if len(inodes) < len(two):
        return False
    async with http.get(url + "/ready") as ready:
        return ready.status == 200
