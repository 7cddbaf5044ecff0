"""GET /metrics/costs, and how often it and /metrics may be asked (S1-G12, S1-R1)."""

import aiohttp
import pytest

from ingress.app import METRICS_A_MINUTE
from ingress.limiter import MAX_CLIENTS, Limiter
from shared.wire.errors import RateLimited
from tests.ingress.world import ADMIN, KEY, World

HEADERS = {"Authorization": f"Bearer {ADMIN}"}
SPENT = {"requests": 2, "cost_usd": "$1.50", "cost_nano_usd": 1_500_000_000, "input_tokens": 10, "output_tokens": 5}


async def test_costs(world: World, http: aiohttp.ClientSession) -> None:
    url = world.url + "/metrics/costs"
    for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
        async with http.get(url, headers=headers) as answer:
            assert answer.status == 401, "a tenant's key is not enough"
    async with http.get(url, headers=HEADERS) as answer:
        page = await answer.json()
    assert [row["tenant"] for row in page["tenants"]] == [f"t{number:03}" for number in range(50)]
    assert page["tenants"][1] == {
        "tenant": "t001", "name": "name of t001", "since": 5, "total": SPENT, "models": {"m": SPENT},
        "days": {"2026-11-21": SPENT}, "alerts": {"lifetime:10": 7},
    }  # fmt: skip
    async with http.get(url, params={"after": page["next"]}, headers=HEADERS) as answer:
        rest = await answer.json()
    assert [row["tenant"] for row in rest["tenants"]] == [f"t{number:03}" for number in range(50, 60)]
    assert rest["next"] == ""
    async with http.get(url, params={"tenant": "t001"}, headers=HEADERS) as answer:
        [row] = (await answer.json())["tenants"]
    assert row["models_by_day"] == {"2026-11-21": {"m": SPENT}}
    async with http.get(url, params={"tenant": "nobody"}, headers=HEADERS) as answer:
        assert answer.status == 404
    world.registry.away = True
    async with http.get(url, headers=HEADERS) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "ledger_unavailable")


async def test_ten_a_minute_for_both_together(world: World, http: aiohttp.ClientSession) -> None:
    """S1-R1: with Retry-After (D15); who is not let in costs nobody his share, and the process's own port has none."""
    for _ in range(3):
        async with http.get(world.url + "/metrics") as answer:
            assert answer.status == 401
    for number in range(METRICS_A_MINUTE):
        path = "/metrics/costs" if number % 2 else "/metrics"
        async with http.get(world.url + path, headers=HEADERS) as answer:
            assert answer.status == 200
    for path in ("/metrics", "/metrics/costs"):
        async with http.get(world.url + path, headers=HEADERS) as answer:
            assert answer.status == 429
            assert 1 <= int(answer.headers["Retry-After"]) <= 6
            assert 0 < int(answer.headers["retry-after-ms"]) <= 6000
    async with http.get(world.url + "/metrics/targets", headers=HEADERS) as answer:
        assert answer.status == 200
    world.server.start()
    for _ in range(METRICS_A_MINUTE + 1):
        async with http.get(world.server.url) as answer:
            assert answer.status == 200


def test_the_bucket_fills_again_and_tells_when() -> None:
    now = 100.0
    limiter = Limiter(10, lambda: now)
    for _ in range(10):
        limiter.take("a")
    limiter.take("b")
    with pytest.raises(RateLimited) as refused:
        limiter.take("a")
    assert refused.value.retry_after_ms == 6000
    now += 5.999
    with pytest.raises(RateLimited) as refused:
        limiter.take("a")
    assert refused.value.retry_after_ms == 1
    now += 0.002
    limiter.take("a")
    for number in range(2 * MAX_CLIENTS):  # bounded, whoever asks
        limiter.take(str(number))
    assert len(limiter._full_at) == MAX_CLIENTS
