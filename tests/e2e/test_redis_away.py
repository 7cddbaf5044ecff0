"""What a stopped Redis does to requests (D4, DESIGN 5): a hard limit fails closed at once, the rest goes on."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

from tests.e2e.books import entries, level
from tests.e2e.drive import Client
from tests.e2e.rig import Up
from tests.e2e.sim import Sim, until
from tests.interop.target import says, with_v1


class Redis:
    """The embedded Valkey, to be frozen and thawed."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def freeze(self) -> None:
        """It keeps its connections and answers nobody."""
        os.kill(self._pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        os.kill(self._pid, signal.SIGCONT)


@pytest.fixture
async def redis(up: Up) -> AsyncIterator[Redis]:
    """Thawed again whatever happens, and every role back at work."""
    (pid,) = up.run["pids"]["redis"]
    frozen = Redis(pid)
    yield frozen
    frozen.thaw()
    await asyncio.to_thread(until, lambda: up.cli("budget", "show", "default"), bool, 5)


async def known(client: Client) -> None:
    """The key is in every process's copy before Redis goes."""
    for _ in range(8):
        assert (await client.chat("[[sim chunks=1]]")).ended_well


async def test_a_hard_limit_fails_closed(up: Up, sim: Sim, redis: Redis, tenant: Callable[..., Any], http: Any) -> None:
    """503 `ledger_unavailable` with Retry-After within 250 ms, every time, and no call upstream; then all is well."""
    made = await asyncio.to_thread(tenant, "--limit-usd", "5", "--period", "day")
    client = Client(http, up.url, made["key"])
    await known(client)
    calls = (await asyncio.to_thread(sim.stats))["calls"]
    redis.freeze()
    seen = [await client.chat("x", stream=bool(number % 2)) for number in range(12)]
    together = await asyncio.gather(*(client.chat("x") for _ in range(50)))
    async with openai.AsyncOpenAI(base_url=with_v1(up.url), api_key=made["key"], max_retries=0) as sdk:
        with pytest.raises(openai.InternalServerError) as caught:
            await sdk.chat.completions.create(model="sim-fast", messages=says("x"))
    redis.thaw()
    assert (caught.value.status_code, caught.value.code) == (503, "ledger_unavailable")
    for answer in seen + together:
        assert (answer.status, answer.error.get("code")) == (503, "ledger_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    print("ms until refused:", " ".join(f"{1000 * answer.took:.0f}" for answer in seen))
    assert max(answer.took for answer in seen) <= 0.25
    assert (await asyncio.to_thread(sim.stats))["calls"] == calls
    end = time.monotonic() + 3
    while (answer := await client.chat("x")).status != 200:
        assert time.monotonic() < end, answer.error
        await asyncio.sleep(0.05)
    row = await asyncio.to_thread(until, lambda: level(up, made["tenant"]), lambda row: row["pending"] == 0, 5)
    assert (row["pending"], row["unconfirmed"]) == (0, 0)


async def test_no_limit_proceeds_degraded(
    up: Up, sim: Sim, redis: Redis, tenant: Callable[..., Any], http: Any
) -> None:
    """Without a limit the request goes on, says so, and is billed once Redis is back."""
    made = await asyncio.to_thread(tenant)
    client = Client(http, up.url, made["key"])
    await known(client)
    redis.freeze()
    asked = asyncio.create_task(client.chat("[[sim chunks=150 pace=10]]", stream=True))
    await asyncio.sleep(0.8)
    redis.thaw()
    seen = await asked
    assert seen.ended_well, (seen.status, seen.error)
    assert seen.headers["x-br-guardian-status"] == "degraded"
    (line,) = await asyncio.to_thread(sim.lines, seen.rid)
    label = f"{seen.rid}.1"
    booked = await asyncio.to_thread(until, lambda: entries(up, made["tenant"]), lambda found: label in found, 5, 0.2)
    assert booked[label].cost == line["cost_nano_usd"]


async def test_known_and_unknown_keys(up: Up, redis: Redis, client: Client, http: Any) -> None:
    """A known key is served from the copy; an unknown one gets 503, not 401: nobody can say that it is wrong."""
    await known(client)
    redis.freeze()
    await asyncio.sleep(1.2)  # the copy's poll has failed by then
    assert (await client.chat("[[sim chunks=2]]")).ended_well
    stranger = await Client(http, up.url, "br_live_aaaaaaaaaaaa_" + "A" * 43).chat("x")
    assert (stranger.status, stranger.error["code"]) == (503, "registry_unavailable")
