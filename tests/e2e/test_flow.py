"""Flow control and draining, in real processes (DESIGN 3; I10, D8, faults 58, 59, 84)."""

import asyncio
import json
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.drive import Client, Seen
from tests.e2e.raw import post
from tests.e2e.rig import Up
from tests.e2e.sim import Sim, until

CHOICES = 16  # of 4,000 tokens each, some 17 MB of events: no socket buffers swallow that


def memory(up: Up) -> int:
    """Resident bytes of the processes a stream goes through."""
    pids = [pid for role in ("ingress", "provider") for pid in up.run["pids"][role]]
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() for pid in pids)


def small_window(url: str) -> socket.socket:
    """A connection whose receive buffer is small: what is not read stays with the sender."""
    where = urlsplit(url)
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    made.connect((where.hostname, where.port))
    made.setblocking(False)
    return made


async def test_a_client_that_does_not_read(up: Up, sim: Sim, client: Client) -> None:
    """Its own upstream waits, everybody else's goes on, no memory is taken; read at last, nothing is missing."""
    prompt = "[[sim chunks=4000 seed=7]]"
    asked = {"model": "sim-fast", "messages": [{"role": "user", "content": prompt}], "stream": True, "n": CHOICES}
    began = memory(up)
    reader, writer = await asyncio.open_connection(sock=small_window(up.url), limit=4096)
    writer.write(post(up.run["api_key"], json.dumps(asked).encode()))
    assert await asyncio.to_thread(sim.wait, 5000, calls=1), await reader.read(2000)

    def written() -> int:
        return sum(int(line["output_tokens"]) for line in sim.bill() if line["stream"])

    await asyncio.sleep(1.5)
    before = await asyncio.to_thread(written)
    others = await asyncio.gather(*(client.chat("[[sim chunks=100 pace=5]]") for _ in range(4)))
    assert all(one.ended_well for one in others)
    assert await asyncio.to_thread(written) == before < 4000 * CHOICES, "nobody holds the upstream back"
    taken = (memory(up) - began) / 1e6
    print(f"{before} of {4000 * CHOICES} tokens written while nobody read; {taken:.1f} MB taken")
    assert taken < 30

    parts: list[bytes] = []
    async with asyncio.timeout(40):
        while b"data: [DONE]" not in (parts[-1] if parts else b""):
            parts.append(await reader.read(1 << 18))
            assert parts[-1], "cut"
    writer.close()
    seen = Seen(status=200, headers={"content-type": "text/event-stream"}, body=plain(b"".join(parts)))
    assert seen.terminals == 1
    assert len(seen.text.split()) == 4000 * CHOICES


def plain(body: bytes) -> bytes:
    """The body without head and chunk sizes."""
    _, _, rest = body.partition(b"\r\n\r\n")
    parts = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        parts.append(rest[:length])
        rest = rest[length + 2 :]
        if length == 0:
            break
    return b"".join(parts)


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
