"""NATS and Redis killed and started again under load, and Redis put back from a copy one second old (faults 36, 42).

The servers are the test's own, behind proxies (`tests.e2e.outage.Servers`), JetStream and append-only file on.
"""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.e2e import invariants
from tests.e2e.drive import Client
from tests.e2e.money.prove import prove
from tests.e2e.outage import Load, Only, Servers
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

Say = Callable[[str], None]

#: Load before, in and after.
BEFORE_S: Final = 1.2
AWAY_S: Final = 1.5
AFTER_S: Final = 2.0
RATE: Final = 25.0


async def killed(
    server: str, around: Servers, up: Up, sim: Sim, client: Client, made: dict[str, Any], say: Say
) -> None:
    """`nats` or `redis`, by SIGKILL; started again with what it has on its disk."""
    victim = getattr(around, server)

    async def strike() -> None:
        await asyncio.to_thread(victim.end)
        await asyncio.sleep(AWAY_S)
        await asyncio.to_thread(victim.start)

    await _through(f"{server} killed", strike, up, sim, client, made, say)


async def older(
    around: Servers, up: Up, sim: Sim, client: Client, made: dict[str, Any], folder: Path, say: Say
) -> None:
    """Redis loses its last second: its disk is put back as it was. `hotpath ledger rebuild` brings it from the second
    copy."""
    data = around.redis_folder

    async def strike() -> None:
        copy = folder / "copy"
        await asyncio.to_thread(shutil.copytree, data, copy)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(around.redis.end)
        await asyncio.to_thread(shutil.rmtree, data)
        await asyncio.to_thread(shutil.copytree, copy, data)
        await asyncio.to_thread(around.redis.start)

    async def rebuild() -> None:
        done = await asyncio.to_thread(up.cli, "ledger", "rebuild", made["tenant"])
        say(f"rebuilt: {done}")

    await _through("redis one second older", strike, up, sim, client, made, say, rebuild)


async def _through(
    name: str, strike: Callable[[], Any], up: Up, sim: Sim, client: Client, made: dict[str, Any], say: Say,
    after: Callable[[], Any] | None = None,
) -> None:  # fmt: skip
    """Load before, in and after the blow; then the invariants, and the proof."""
    load = Load(client, rate=RATE)
    await load.warm()
    async with load:
        await asyncio.sleep(BEFORE_S)
        load.struck(name)
        await strike()
        load.healed()
        await asyncio.sleep(AFTER_S)
    if after is not None:
        await after()
    say(load.report(made["tenant"]))
    only: Any = Only(sim, load.asked)
    counts = await invariants.check(up, only, made, load.asked, dead=True, lease_s=6 + 6)
    counts += await prove(up, made["tenant"], await asyncio.to_thread(only.bill))
    say(invariants.show(counts))
