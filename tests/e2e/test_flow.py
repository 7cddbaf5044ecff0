"""Flow control and draining, in real processes (DESIGN 3; I5, I8, I10, D8, faults 58, 59, 84).

The first two are the small versions of `python -m tests.load slow-reader` and `... stalled`, which hold the figures of
the acceptance; times are checked coarsely here, since CI machines have neighbours.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from tests.e2e.drive import Client, Seen
from tests.e2e.rig import Up
from tests.e2e.sim import Sim, until
from tests.load import flow, streams

CHOICES = 16  # of 4,000 tokens each, some 17 MB of events: no socket buffers swallow that


async def test_a_slow_reader(up: Up, sim: Sim) -> None:
    """1 KiB/s of a 69 MB answer beside 40 streams: its upstream waits, no memory is taken, nobody else waits (A3)."""
    assert sim.stats()["blocked"] == 0
    made = await flow.slow_reader(up, others=40, pace_ms=20, span=1.5, rounds=2, warm=1.0, say=print)
    shown = flow.median_of(made)
    print(shown)
    assert all(one.blocked for one in made), "the simulator's writes do not block"
    assert shown["KiB grown"] < flow.SLOW_KIB
    assert shown["ms added to p99"] < 50


async def test_stalled_clients(up: Up, sim: Sim) -> None:
    """Each costs at most 100 KiB; they leave, and nothing goes on for them (I8)."""
    await flow.stalled(up, count=20, prompt="[[sim chunks=1600]]", settle=0.5, say=print)
    sim.reset()
    found = await flow.stalled(up, count=150, prompt="[[sim chunks=1600]]", settle=1.0, say=print)
    print(found)
    assert found.kib_each <= flow.STALLED_KIB


async def test_a_client_that_reads_late(up: Up, sim: Sim, client: Client) -> None:
    """Its own upstream waits, everybody else's goes on; read at last, nothing is missing (I5)."""
    sock = await streams.connect(up.url, 65536)
    ask = streams.request(up.run["api_key"], "[[sim chunks=4000 seed=7]]", n=CHOICES)
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    writer.write(ask)
    assert await asyncio.to_thread(sim.wait, 5000, calls=1), await reader.read(2000)

    def written() -> int:
        return sum(int(line["output_tokens"]) for line in sim.bill() if line["stream"])

    await asyncio.sleep(1.5)
    before = await asyncio.to_thread(written)
    others = await asyncio.gather(*(client.chat("[[sim chunks=100 pace=5]]") for _ in range(4)))
    assert all(one.ended_well for one in others)
    assert await asyncio.to_thread(written) == before < 4000 * CHOICES, "nobody holds the upstream back"

    parts: list[bytes] = []
    async with asyncio.timeout(40):
        while b"data: [DONE]" not in (parts[-1] if parts else b""):
            parts.append(await reader.read(1 << 18))
            assert parts[-1], "cut"
    writer.close()
    body = streams.plain(b"".join(parts))
    seen = Seen(status=200, headers={"content-type": "text/event-stream"}, body=body)
    assert seen.terminals == 1
    assert len(seen.text.split()) == 4000 * CHOICES


@pytest.fixture
async def load(client: Client) -> AsyncIterator[list[Seen]]:
    """Eight clients that ask all the time, and four streams of about 2 s; checked at the end."""
    seen: list[Seen] = []
    going = True

    async def ask(number: int) -> None:
        while going:
            seen.append(await client.chat("[[sim chunks=5]]", stream=bool(number % 2)))

    streams = [asyncio.create_task(client.chat("[[sim chunks=200 pace=10]]", stream=True)) for _ in range(4)]
    askers = [asyncio.create_task(ask(number)) for number in range(8)]
    await asyncio.sleep(0.3)
    yield seen
    seen += await asyncio.gather(*streams)
    going = False
    await asyncio.gather(*askers)
    failed = [(one.status, one.error, one.broken, one.body[-200:]) for one in seen if not one.ended_well]
    print(f"{len(seen)} requests, {len(failed)} failed")
    assert len(seen) > 50
    assert failed == []


@pytest.mark.parametrize("role", ["guardian", "provider"])
async def test_a_rolling_restart(up: Up, load: list[Seen], role: str) -> None:
    """SIGTERM to one after the other: each finishes what it has, takes nothing new; nobody notices (D8, faults 84)."""
    before = up.run["pids"][role]
    for pid in before:
        os.kill(pid, signal.SIGTERM)

        def replaced(found: list[int], gone: int = pid) -> bool:
            return len(found) == len(before) and gone not in found

        assert replaced(await asyncio.to_thread(until, lambda: up.run["pids"][role], replaced, 10, 0.05))
        assert len(load) > 0
    assert not set(before) & set(up.run["pids"][role])
