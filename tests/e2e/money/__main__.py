"""The named command; see the package."""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.e2e import kill_points
from tests.e2e.drive import Client
from tests.e2e.money import losses, scenes
from tests.e2e.money.prove import prove
from tests.e2e.outage import Servers
from tests.e2e.rig import Up
from tests.e2e.rounds import SCALE, client_session, make_tenant
from tests.e2e.sim import Sim


async def answers(up: Up, around: Servers, times: int) -> None:
    """Every lost answer so many times, then the proof."""
    sim = Sim(up.run["simulator_url"])
    sim.reset()
    made = await asyncio.to_thread(make_tenant, up)
    async with client_session() as http:
        client = Client(http, up.url, made["key"])
        await losses.run(up, around.to_redis, client, sim, made, losses.all_losses(times))
    await prove(up, made["tenant"], await asyncio.to_thread(sim.bill))


async def servers(up: Up, around: Servers, folder: Path) -> None:
    """Each scene with a tenant of its own."""
    sim = Sim(up.run["simulator_url"])
    async with client_session() as http:
        for name in ("nats", "redis"):
            made = await asyncio.to_thread(make_tenant, up)
            await scenes.killed(name, around, up, sim, Client(http, up.url, made["key"]), made, print)
        made = await asyncio.to_thread(make_tenant, up)
        await scenes.older(around, up, sim, Client(http, up.url, made["key"]), made, folder, print)


def main() -> int:
    """Three parts; the first that fails ends it."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.money", description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--part", choices=("points", "answers", "servers"), help="only this one")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if wanted.part in (None, "points"):
            arms = folder / "arms"
            arms.mkdir()
            with Up(folder / "points", "--scale", SCALE, env={**kill_points.SETTINGS, "KILLAT_DIR": str(arms)}) as up:
                asyncio.run(kill_points.run(up, arms, kill_points.visits(wanted.times)))
        if wanted.part != "points":
            with Servers(folder) as around, Up(folder / "up", "--scale", SCALE, env=around.env()) as up:
                if wanted.part in (None, "answers"):
                    asyncio.run(answers(up, around, wanted.times))
                if wanted.part in (None, "servers"):
                    asyncio.run(servers(up, around, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
