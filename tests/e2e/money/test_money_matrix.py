"""The money matrix, once (I1, I2, I3): lost answers of Redis, NATS and Redis killed, Redis one second older.

The kill points run in tests/e2e/test_kills.py, with the same proof at their end. More: `python -m tests.e2e.money`.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.drive import Client
from tests.e2e.money import losses, scenes
from tests.e2e.money.prove import prove
from tests.e2e.outage import Servers
from tests.e2e.rig import Up
from tests.e2e.rounds import client_session
from tests.e2e.sim import Sim


@pytest.fixture(scope="module")
def up(proxied: Up) -> Up:
    """Behind the proxies."""
    return proxied


@pytest.fixture
def made(tenant: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A tenant with a hard limit."""
    return tenant("--limit-usd", "1000", "--period", "lifetime")


async def test_lost_answers(up: Up, around: Servers, sim: Sim, made: dict[str, Any]) -> None:
    """D4, I1: what was done and not told is neither lost nor done twice; nobody is unconfirmed, as nobody died."""
    async with client_session() as http:
        client = Client(http, up.url, made["key"])
        await losses.run(up, around.to_redis, client, sim, made, losses.all_losses())
    await prove(up, made["tenant"], await asyncio.to_thread(sim.bill))


@pytest.mark.parametrize("server", ["nats", "redis"])
async def test_a_server_killed(up: Up, around: Servers, sim: Sim, made: dict[str, Any], server: str) -> None:
    """I1 through the death of NATS, and of Redis with its append-only file."""
    async with client_session() as http:
        await scenes.killed(server, around, up, sim, Client(http, up.url, made["key"]), made, print)


async def test_redis_one_second_older(
    up: Up, around: Servers, sim: Sim, made: dict[str, Any], tmp_path: Path
) -> None:  # fmt: skip
    """DESIGN 4, the second copy: `hotpath ledger rebuild` brings back what Redis lost with its disk."""
    async with client_session() as http:
        await scenes.older(around, up, sim, Client(http, up.url, made["key"]), made, tmp_path, print)
