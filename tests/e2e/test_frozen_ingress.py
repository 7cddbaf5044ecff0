"""An ingress that stands still for 3 s (faults 38): its streams wait and lose nothing (I5, I10)."""

import asyncio
import os
import signal
import urllib.request
from pathlib import Path

import aiohttp

from tests.e2e import invariants
from tests.e2e.drive import Client
from tests.e2e.invariants import Asked
from tests.e2e.rig import Up
from tests.e2e.sim import Sim, until

STREAMS = 12  # at a time
MOST = 96
FROZEN_S = 3.0


def holds(url: str) -> int:
    """Requests in flight in the ingress behind a metrics URL."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    return int(float(text.partition('hotpath_in_flight{role="ingress"} ')[2].partition("\n")[0]))


async def test_it_goes_on_where_it_stood(tmp_path: Path) -> None:
    with Up(tmp_path / "data", "--scale", "ingress=2") as up:
        sim = Sim(up.run["simulator_url"])
        made = {"tenant": "frozen", **up.cli("keys", "create", "--tenant", "frozen", "--limit-usd", "1")}
        urls = up.run["metrics"]["ingress"]

        async def ask(client: Client) -> Asked:
            prompt = invariants.prompt(200, pace=25)
            return Asked(prompt=prompt, seen=await client.chat(prompt, stream=True))

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            client = Client(http, up.url, made["key"])
            asking: list[asyncio.Future[Asked]] = []
            split = [0, 0]
            while min(split) == 0 and len(asking) < MOST:  # the kernel gives them to whom it likes
                asking += [asyncio.ensure_future(ask(client)) for _ in range(STREAMS)]
                wanted = len(asking)
                split = await asyncio.to_thread(
                    until, lambda: [holds(url) for url in urls], lambda found, n=wanted: sum(found) == n, 5.0, 0.05
                )
            assert min(split) > 0, ("one ingress took them all", split)
            pid = up.run["pids"]["ingress"][0]
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(FROZEN_S)
            os.kill(pid, signal.SIGCONT)
            asked = await asyncio.gather(*asking)
        counts = await invariants.check(up, sim, made, list(asked))
        print(split)
        assert counts["ended well"] == len(asked)
        said = (up.data / "logs").rglob("*nats*")
        assert not any("slow consumer" in path.read_text(errors="replace").lower() for path in said)
