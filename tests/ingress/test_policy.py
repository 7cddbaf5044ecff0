"""What a key may and what a request asks of the guardian: expiry, models, the seatbelt, the user (S2-12, D6)."""

import aiohttp
import pytest

from shared.core.users import user_id
from shared.state.base import Principal
from shared.wire.errors import RateLimited
from shared.wire.messages import Ask
from tests.ingress.world import ENV, KEY, Worker, World, event

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


LIMITS = {
    "x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59", "x-ratelimit-reset-requests": "1s",
    "x-ratelimit-limit-tokens": "6000", "x-ratelimit-remaining-tokens": "5900", "x-ratelimit-reset-tokens": "1.5s",
    "X-BR-Max-Tokens-Clamped": "7",
}  # fmt: skip


def limited_answer(ask: Ask, provider: Worker) -> None:
    """An answer with everything a guardian may say, and what no worker may."""
    head = {"X-BR-Guardian-Status": "on", **LIMITS, "Set-Cookie": "a=b", "x-ratelimit-limit-cookies": "9"}
    data = event("a") if ask.stream else b"{}"
    provider.send(ask, provider.accepted(ask), provider.delta(ask, data, head), provider.end(ask))


@pytest.mark.parametrize("stream", [False, True])
async def test_rate_limits_reach_the_client(world: World, http: aiohttp.ClientSession, stream: bool):
    """S2-23, issue 4: whole and streamed; nothing but what is on the list."""
    world.script = limited_answer
    async with http.post(world.url + CHAT, json={**BODY, "stream": stream}) as answer:
        await answer.read()
    assert LIMITS.items() <= dict(answer.headers).items()
    assert not {"Set-Cookie", "x-ratelimit-limit-cookies"} & set(answer.headers)


@pytest.mark.parametrize("stream", [False, True])
async def test_429_says_when_to_come_back(
    world: World, http: aiohttp.ClientSession, stream: bool, caplog: pytest.LogCaptureFixture
):
    """D15: Retry-After in whole seconds, at least 1, and the exact wait; S1-R3: told to the SIEM."""

    def refuse(ask: Ask, provider: Worker) -> None:
        provider.send(ask, provider.failed(ask, RateLimited("Rate limit reached", retry_after_ms=10), LIMITS))

    world.script = refuse
    async with http.post(world.url + CHAT, json={**BODY, "stream": stream}) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert (answer.headers["Retry-After"], answer.headers["retry-after-ms"]) == ("1", "10")
    assert LIMITS.items() <= dict(answer.headers).items()
    (record,) = [each for each in caplog.records if getattr(each, "event", "") == "rate_limited"]
    assert (record.__dict__["security"], record.__dict__["tenant"]) == (True, "default")
