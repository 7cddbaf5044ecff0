"""Out of descriptors (faults 87): accepting pauses or is answered 503, nothing crashes or spins, others go on."""

import asyncio
import contextlib
import os
import resource
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.e2e.drive import Client
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

LIMIT = 128
FLOOD = 400
HEALTH = b"GET /health HTTP/1.1\r\nHost: gateway\r\n\r\n"
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Up(tmp_path_factory.mktemp("descriptors") / "data", descriptors=LIMIT) as running:
        yield running


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def knock(port: int, open_ones: contextlib.AsyncExitStack) -> int:
    """A connection and its answer to /health: the status, 0 when it was closed without one, -1 when nothing comes."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        open_ones.push_async_callback(hang_up, writer)
        writer.write(HEALTH)
        async with asyncio.timeout(3):
            line = await reader.readline()
    except TimeoutError:
        return -1
    except OSError:
        return 0
    return int(line.split()[1]) if line else 0


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close it; it may have been reset."""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def limited(pid: int, spare: int) -> AsyncIterator[None]:
    """A process that may open only so many more descriptors."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    held = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (held + spare, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


async def flood(up: Up, http: aiohttp.ClientSession, sim: Sim) -> Counter[int]:
    """FLOOD connections beside one that is being served; what they were told. Everything recovers."""
    [pid] = up.run["pids"]["ingress"]
    port = int(up.url.rpartition(":")[2])
    client = Client(http, up.url, up.run["api_key"])
    await asyncio.to_thread(sim.hold)
    open_one = asyncio.create_task(client.chat("held [[sim chunks=20]]", stream=True))
    assert await asyncio.to_thread(sim.wait, 5000, held=1)
    used = cpu_s(pid)
    async with contextlib.AsyncExitStack() as open_ones:
        told = Counter(await asyncio.gather(*(knock(port, open_ones) for _ in range(FLOOD))))
        await asyncio.sleep(1.0)  # full, with nobody speaking: is it idle?
        assert cpu_s(pid) - used < 0.75
        await asyncio.to_thread(sim.release)
        assert (await open_one).ended_well
    async with contextlib.AsyncExitStack() as open_ones, asyncio.timeout(10):
        while await knock(port, open_ones) != 200:
            await asyncio.sleep(0.05)
    assert (await client.chat("after [[sim chunks=2]]")).ended_well
    assert up.run["pids"]["ingress"] == [pid]
    return told


async def test_above_what_the_limit_allows_503(up: Up, http: aiohttp.ClientSession, sim: Sim) -> None:
    """`ulimit -n 128`: fewer connections than MAX_CONNECTIONS, and whoever is too many is told so."""
    told = await flood(up, http, sim)
    assert told[200] >= LIMIT // 3
    assert told[503] > 0
    assert set(told) <= {200, 503, 0}


async def test_no_descriptor_left_at_all(up: Up, http: aiohttp.ClientSession, sim: Sim) -> None:
    """EMFILE at accept itself, from one moment to the next."""
    [pid] = up.run["pids"]["ingress"]
    async with limited(pid, 8):
        told = await flood(up, http, sim)
    assert 0 < told[200] <= 9


async def test_a_provider_without_descriptors(up: Up, http: aiohttp.ClientSession, sim: Sim) -> None:
    """An honest 503 for the calls it cannot make, no event against the endpoint's circuit, and well again at once."""
    [pid] = up.run["pids"]["provider"]
    client = Client(http, up.url, up.run["api_key"])
    await asyncio.to_thread(sim.hold)
    async with limited(pid, 3):
        asked = [asyncio.create_task(client.chat(f"n{number} [[sim chunks=2]]")) for number in range(15)]
        async with asyncio.timeout(20):
            while sum(task.done() for task in asked) + (await asyncio.to_thread(sim.stats))["held"] < len(asked):
                await asyncio.sleep(0.02)
    await asyncio.to_thread(sim.release)
    seen = await asyncio.gather(*asked)
    statuses = Counter(answer.status for answer in seen)
    assert set(statuses) == {200, 503}, statuses
    assert statuses[503] > 5  # CIRCUIT_FAILURE_THRESHOLD: it would be open
    for answer in seen:
        if answer.status == 503:
            assert answer.error["code"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
    again = await asyncio.gather(*(client.chat(f"again{number} [[sim chunks=2]]") for number in range(5)))
    assert all(answer.ended_well for answer in again)
    bill = await asyncio.to_thread(sim.bill)
    assert len(bill) == statuses[200] + len(again)
