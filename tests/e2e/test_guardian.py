"""What the guardian tells a client over HTTP, whole and streamed, through real processes (S2-23, issue 4)."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

from tests.e2e.drive import Client, Seen
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

TELLS_S = 5.0


async def ruled(client: Client, header: str, **more: Any) -> Seen:
    """The first answer under rules that were set a moment ago (they reach every process within 1 s)."""
    async with asyncio.timeout(TELLS_S):
        while header not in (seen := await client.chat("[[sim chunks=2]]", **more)).headers:
            await asyncio.sleep(0.1)
    return seen


async def test_headers_of_rules(up: Up, sim: Sim, tenant: Callable[..., Any], http: Any) -> None:
    """S2-12, S2-23, S1-G07, D15: real values on whole and streamed answers, and on refusals."""
    made = await asyncio.to_thread(tenant)
    await asyncio.to_thread(up.cli, "tenant", "set", made["tenant"], "--mode", "active", "--rpm", "60", "--tpm", "9000")
    client = Client(http, up.url, made["key"])
    left: list[int] = []
    for stream in (False, True):
        seen = await ruled(client, "x-ratelimit-limit-tokens", stream=stream, headers={"X-BR-Max-Estimated-Cost": "$1"})
        assert seen.ended_well
        assert seen.headers["x-br-guardian-status"] == "on"
        assert re.fullmatch(r"\$0\.0\d+", seen.headers["x-br-estimated-cost"])
        assert 0 < float(seen.headers["x-br-guardian-overhead-ms"]) < 1000
        assert (seen.headers["x-ratelimit-limit-requests"], seen.headers["x-ratelimit-limit-tokens"]) == ("60", "9000")
        assert re.fullmatch(r"(\d+m)?[\d.]+m?s", seen.headers["x-ratelimit-reset-requests"])
        left.append(int(seen.headers["x-ratelimit-remaining-requests"]))
    assert 60 > left[0] > left[1]
    refused = await client.chat("[[sim chunks=2]]", headers={"X-BR-Max-Estimated-Cost": "0.000000001"})
    assert (refused.status, refused.error["code"]) == (402, "estimated_cost_exceeded")
    crowd = await asyncio.gather(*(client.chat("[[sim chunks=2]]", stream=bool(number % 2)) for number in range(70)))
    refused = next(each for each in crowd if each.status == 429)
    assert refused.error["code"] == "rate_limit_exceeded"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert int(refused.headers["retry-after"]) >= 1
    assert 0 < int(refused.headers["retry-after-ms"]) <= 1000 * int(refused.headers["retry-after"])


async def test_a_lowered_cap_reaches_the_provider(up: Up, sim: Sim, tenant: Callable[..., Any], http: Any) -> None:
    """Issue 4, D1: what the header says is what the upstream was allowed, so the bill stays within the budget."""
    made = await asyncio.to_thread(tenant, "--limit-usd", "0.002", "--period", "lifetime")
    await asyncio.to_thread(sim.reset)
    client = Client(http, up.url, made["key"])
    seen = await client.chat("[[sim chunks=5000]]", max_tokens=16_000)
    assert seen.ended_well
    cap = int(seen.headers["x-br-max-tokens-clamped"])
    (line,) = await asyncio.to_thread(sim.bill)
    assert line["output_tokens"] == cap
    assert line["cost_nano_usd"] <= 2_000_000
