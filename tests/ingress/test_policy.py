"""What a key may and what a request asks of the guardian: expiry, models, the seatbelt, the user (S2-12, D6)."""

import aiohttp
import pytest

from shared.core.users import user_id
from shared.state.base import Principal
from tests.ingress.world import ENV, KEY, World

CHAT = "/v1/chat/completions"
BODY = {"model": "sim-fast", "messages": [{"role": "user", "content": "hi"}]}


def give(world: World, **rules: object) -> None:
    """The tenant's key gets these rules."""
    world.registry.known[KEY.encode()] = Principal(tenant="default", key="bootstrap", tenant_name="default", **rules)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "nano"), [("0.05", 50_000_000), ("$0.05", 50_000_000), ("0", 0), ("2", 2_000_000_000)]
)
async def test_the_most_it_may_be_estimated_at(world: World, http: aiohttp.ClientSession, given: str, nano: int):
    """S2-12: X-BR-Max-Estimated-Cost travels as nano-USD."""
    async with http.post(world.url + CHAT, json=BODY, headers={"X-BR-Max-Estimated-Cost": given}) as answer:
        assert answer.status == 200
    assert (await world.ask()).max_estimate == nano


@pytest.mark.parametrize(
    "given", [["junk"], [""], ["-1"], ["1e3"], ["NaN"], ["0.0000000001"], ["0.05, 0.06"], ["1", "2"], ["$"], ["٣"]]
)
async def test_a_most_that_is_no_amount(world: World, http: aiohttp.ClientSession, given: list[str]):
    """S2-12: junk is the client's mistake, never "no limit"."""
    sent = [("X-BR-Max-Estimated-Cost", value) for value in given]
    async with http.post(world.url + CHAT, json=BODY, headers=sent) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_request")
    assert "X-BR-Max-Estimated-Cost" in error["message"]
    assert world.asks.empty()


async def test_the_user_travels_as_an_opaque_id(world: World, http: aiohttp.ClientSession):
    """D6: the field is the level of a budget, and no text of a client's becomes part of a key."""
    for body, user in (
        (BODY, ""),
        ({**BODY, "user": ""}, ""),
        ({**BODY, "user": None}, ""),
        ({**BODY, "user": "ann"}, "ann"),
    ):
        async with http.post(world.url + CHAT, json=body) as answer:
            assert answer.status == 200
        ask = await world.ask()
        assert ask.user == user_id(ENV["KEY_PEPPER"].encode(), "default", user)
        assert ask.max_estimate == -1
    assert ask.user


async def test_a_key_that_expired(world: World, http: aiohttp.ClientSession):
    """Issue 4: at its minute, on every route, and it is told so."""
    now = world.ctx.state.clock.now()
    give(world, expires=now + 60_000)
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 200
    give(world, expires=now)
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/sim-fast")):
        async with http.request(method, world.url + path, json=BODY if method == "POST" else None) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (401, "expired_api_key")
        assert "expired" in error["message"]


async def test_the_models_a_key_may_use(world: World, http: aiohttp.ClientSession):
    """Issue 4: others read as if they did not exist, as at OpenAI, and are not listed."""
    give(world, models=frozenset({"vendor/model:v1@eu", "gone"}))
    async with http.post(world.url + CHAT, json=BODY) as answer:
        forbidden = await answer.json()
    async with http.post(world.url + CHAT, json={**BODY, "model": "nope"}) as unknown:
        assert await unknown.json() == forbidden
    assert (answer.status, forbidden["error"]["code"]) == (404, "model_not_found")
    async with http.post(world.url + CHAT, json={**BODY, "model": "vendor/model:v1@eu"}) as answer:
        assert answer.status == 200
    async with http.get(world.url + "/v1/models") as answer:
        assert [row["id"] for row in (await answer.json())["data"]] == ["vendor/model:v1@eu"]
    for name, status in (("sim-fast", 404), ("vendor/model:v1@eu", 200)):
        async with http.get(world.url + "/v1/models/" + name) as answer:
            assert answer.status == status
