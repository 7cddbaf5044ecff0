"""Acceptance 5: a thousand at once against a limit of so many reservations; exactly so many get through (I2, D1)."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from tests.e2e.books import level, settled_level
from tests.e2e.drive import Client, Seen
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

CROWD = 1000
PROMPT = "hold [[sim chunks=20 seed=1]]"


async def reservation(client: Client, sim: Sim, up: Up, name: str, body: dict[str, Any]) -> int:
    """What one such request reserves, read off the budget while the simulator holds it; nano-USD."""
    await asyncio.to_thread(sim.hold)
    asked = asyncio.create_task(client.chat(PROMPT, **body))
    assert await asyncio.to_thread(sim.wait, 5000, held=1)
    pending: int = (await asyncio.to_thread(level, up, name, "day"))["pending"]
    await asyncio.to_thread(sim.release)
    assert (await asked).ended_well
    return pending


def usd(nano: int) -> str:
    """For --limit-usd."""
    return f"{Decimal(nano) / 10**9:f}"


async def crowd(client: Client, sim: Sim, body: dict[str, Any]) -> list[Seen]:
    """A thousand at once, every answer held until each is either refused or at the provider."""
    await asyncio.to_thread(sim.hold)
    tasks = [asyncio.create_task(client.chat(PROMPT, **body)) for _ in range(CROWD)]
    try:
        async with asyncio.timeout(30):
            while True:
                refused = sum(task.done() for task in tasks)
                if refused + (await asyncio.to_thread(sim.stats))["held"] >= CROWD:
                    break
                await asyncio.sleep(0.05)
    finally:
        held = (await asyncio.to_thread(sim.stats))["held"]
        await asyncio.to_thread(sim.release)
    seen = await asyncio.gather(*tasks)
    assert held == sum(answer.status == 200 for answer in seen)
    return seen


@pytest.mark.parametrize(
    ("fit", "spare", "body"),
    [(137, 0.0, {"max_tokens": 4000}), (41, 0.5, {"max_tokens": 2500, "stream": True})],
    ids=["137", "41 and a half"],
)
async def test_exactly_so_many(
    up: Up, sim: Sim, tenant: Callable[..., Any], http: Any, fit: int, spare: float, body: dict[str, Any]
) -> None:
    """Four guardians admit exactly what fits; the others get 402 with the amount left, and nothing upstream."""
    assert len(up.run["pids"]["guardian"]) == 4
    free = await asyncio.to_thread(tenant)
    amount = await reservation(Client(http, up.url, free["key"]), sim, up, free["tenant"], body)
    assert amount > 1_000_000
    left = int(amount * spare)
    limit = fit * amount + left

    made = await asyncio.to_thread(tenant, "--limit-usd", usd(limit), "--period", "day")
    await asyncio.to_thread(up.cli, "tenant", "set", made["tenant"], "--no-clamp")
    await asyncio.sleep(1.0)  # every process knows it then
    await asyncio.to_thread(sim.reset)
    seen = await crowd(Client(http, up.url, made["key"]), sim, body)

    assert Counter(answer.status for answer in seen) == {200: fit, 402: CROWD - fit}
    assert all(answer.ended_well for answer in seen if answer.status == 200)
    for answer in seen:
        if answer.status == 402:
            assert answer.error["code"] == "insufficient_budget"
            told = re.findall(r"\$(\d+\.\d{2,9})", answer.error["message"])
            assert any(Decimal(text) * 10**9 == left for text in told), answer.error["message"]
    bill = await asyncio.to_thread(sim.bill)
    assert len(bill) == fit
    row = await asyncio.to_thread(settled_level, up, made["tenant"], 5)
    row = await asyncio.to_thread(level, up, made["tenant"], "day")
    assert row["limit"] == limit
    assert (row["pending"], row["unconfirmed"]) == (0, 0)
    assert row["settled"] == sum(line["cost_nano_usd"] for line in bill)
