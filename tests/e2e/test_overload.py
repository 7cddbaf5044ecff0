"""A hot tenant beside a modest one, on real processes (faults 91, I10)."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest

from tests.e2e.drive import Client, Seen
from tests.e2e.rig import Up
from tests.e2e.sim import Sim, until
from tests.load.report import percentile

SHARE = 20  # requests of one tenant under way
DELAY_MS = 200
PROMPT = f"hello [[sim chunks=4 delay_ms={DELAY_MS}]]"
MAY = SHARE * 1000 / DELAY_MS  # a second
COOL = 20.0  # a second
SECONDS = 3.0


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    env = {"MAX_IN_FLIGHT": "60", "MAX_IN_FLIGHT_PER_TENANT": str(SHARE)}
    with Up(tmp_path_factory.mktemp("overload") / "data", env=env) as running:
        yield running


async def on_time(client: Client, rate: float, seconds: float) -> list[Seen]:
    """An open loop: a request at each due time, whatever becomes of the others."""
    tasks, begun = [], time.monotonic()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(begun + number / rate - time.monotonic())
        tasks.append(asyncio.create_task(client.chat(PROMPT)))
    return await asyncio.gather(*tasks)


def p99(seen: list[Seen]) -> float:
    found = percentile(sorted(answer.took for answer in seen), 99)
    assert found is not None
    return found


async def test_91_a_hot_tenant_gets_its_429_and_the_other_nothing(
    up: Up, http: aiohttp.ClientSession, sim: Sim, tenant: Callable[..., dict[str, Any]]
) -> None:
    """Ten times what it may have: 200 and 429 for the hot one, not one failure for the other; nothing is left."""
    hot, cool = [Client(http, up.url, (await asyncio.to_thread(tenant))["key"]) for _ in range(2)]
    alone = await on_time(cool, COOL, SECONDS)
    flood, beside = await asyncio.gather(on_time(hot, 10 * MAY, SECONDS), on_time(cool, COOL, SECONDS))

    assert all(answer.ended_well for answer in alone + beside)
    statuses = Counter(answer.status for answer in flood)
    print(f"hot: {dict(statuses)}; p99 of the other: {p99(alone):.3f} s alone, {p99(beside):.3f} s beside it")
    assert set(statuses) == {200, 429}
    assert statuses[200] >= MAY  # it keeps what it may have
    for answer in flood:
        if answer.status == 429:
            assert answer.error["code"] == "rate_limit_exceeded"
            assert int(answer.headers["retry-after"]) >= 1
            assert int(answer.headers["retry-after-ms"]) >= 1
    assert (await asyncio.to_thread(sim.stats))["peak"] <= SHARE + COOL
    assert await asyncio.to_thread(until, sim.in_flight, lambda count: count == 0, 5.0) == 0
    assert len(await asyncio.to_thread(sim.bill)) == statuses[200] + len(alone) + len(beside)


async def test_the_process_is_full_503_at_once(
    up: Up, http: aiohttp.ClientSession, sim: Sim, tenant: Callable[..., dict[str, Any]]
) -> None:
    """Three tenants fill it with slow requests; a fourth gets 503 with Retry-After, and its turn when they are done."""
    clients = [Client(http, up.url, (await asyncio.to_thread(tenant))["key"]) for _ in range(4)]
    await asyncio.to_thread(sim.hold)
    slow = [asyncio.create_task(client.chat(PROMPT)) for client in clients[:3] for _ in range(SHARE)]
    assert await asyncio.to_thread(sim.wait, 10_000, held=3 * SHARE)
    refused = [await clients[3].chat(PROMPT) for _ in range(20)]
    took = percentile(sorted(answer.took for answer in refused), 50)
    print(f"refused in {1000 * (took or 0):.1f} ms (median)")
    assert {answer.status for answer in refused} == {503}
    assert {answer.error["code"] for answer in refused} == {"overloaded"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    await asyncio.to_thread(sim.release)
    assert all(answer.ended_well for answer in await asyncio.gather(*slow))
    assert (await clients[3].chat(PROMPT)).ended_well
    assert len(await asyncio.to_thread(sim.bill)) == 3 * SHARE + 1
