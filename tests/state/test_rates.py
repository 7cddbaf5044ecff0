"""Rate limits where they run: token buckets of a minute in the real Lua (S1-G07, S1-M5a, S2-13)."""

import asyncio
import secrets

import msgspec
import pytest

from shared.state.base import Rates, Reserved
from shared.state.redis import State

MINUTE = 60_000


class Limited:
    """A tenant of the test's own."""

    def __init__(self, state: State) -> None:
        self.state, self.tenant = state, f"t{secrets.token_hex(6)}"

    async def reserve(self, rates: Rates | None = None, key: str = "k", rid: str = "", delivery: int = 1) -> Reserved:
        now = self.state.clock.now()
        return await self.state.ledger.reserve(
            tenant=self.tenant, rid=rid or secrets.token_hex(16), delivery=delivery, amount=1, deadline=now + 30_000,
            not_after=now + 10_000, key=key, rates=rates,
        )  # fmt: skip

    async def empty(self, scope: str) -> None:
        """Nothing is left in a scope's buckets, as of now."""
        seconds, micros = await self.state._side.execute(b"TIME", within=1.0)
        packed = msgspec.msgpack.encode([0.0, 0.0, int(seconds) * 1000 + int(micros) / 1000, 0, 0, 0, 0])
        await self.state._side.execute(
            b"HSET", b"hp:{%b}:rate" % self.tenant.encode(), scope.encode(), packed, within=1.0
        )


@pytest.fixture
def limited(state: State) -> Limited:
    return Limited(state)


@pytest.mark.parametrize(("a_second", "wait"), [(1, 1000), (10, 100), (100, 10)])
@pytest.mark.parametrize("kind", ["requests", "tokens"])
async def test_the_wait_is_exact(limited: Limited, a_second: int, wait: int, kind: str) -> None:
    """S1-M5a, D15: at 1, 10 and 100 a second; after it the request fits."""
    rates = Rates(tokens=1, **{f"key_{kind}": 60 * a_second})
    for _ in range(20):  # on a machine that was busy for all of the 10 ms: once more
        began = asyncio.get_running_loop().time()
        await limited.empty("k:k")
        answer = await limited.reserve(rates)
        late = (asyncio.get_running_loop().time() - began) * 1000
        if late < wait:
            break
    assert (answer.status, answer.level, answer.period) == ("limited", "k:k", kind)
    assert wait - late - 1 <= answer.wait_ms <= wait
    assert answer.counted is not None
    bucket = getattr(answer.counted, kind)
    assert (bucket.limit, bucket.left) == (60 * a_second, 0)
    assert MINUTE - late - wait - 1 <= bucket.full_ms <= MINUTE
    await asyncio.sleep(answer.wait_ms / 1000 + 0.003)  # uvloop counts from the turn's beginning, in whole ms
    assert (await limited.reserve(rates)).status == "ok"


async def test_the_longest_wait_and_the_tighter_bucket(limited: Limited) -> None:
    """One answer for four buckets: whoever waits for it is not refused by the next one."""
    rates = Rates(tokens=10, tenant_requests=60, tenant_tokens=600, key_requests=600, key_tokens=60)
    first = await limited.reserve(rates)
    assert first.status == "ok"
    assert first.counted is not None
    assert first.counted.requests is not None
    assert first.counted.tokens is not None
    assert (first.counted.requests.limit, first.counted.requests.left) == (60, 59)
    assert (first.counted.tokens.limit, first.counted.tokens.left) == (60, 50)
    await limited.empty("t")
    await limited.empty("k:k")
    second = await limited.reserve(rates)
    assert (second.level, second.period) == ("k:k", "tokens")
    assert 9_900 <= second.wait_ms <= 10_000
    never = await limited.reserve(Rates(tokens=601, tenant_tokens=600))
    assert (never.status, never.wait_ms, never.level) == ("limited", -1, "t")


async def test_the_bucket_that_refuses_is_told(limited: Limited) -> None:
    """The tenant has less left, and is sooner there: it is the key's limit that the client runs into."""
    rates = Rates(tokens=500, tenant_tokens=1_000, key_tokens=900)
    for key in ("k", "other"):
        assert (await limited.reserve(rates, key=key)).status == "ok"
    answer = await limited.reserve(msgspec.structs.replace(rates, tenant_tokens=100_000, key_tokens=1_000))
    assert (answer.level, answer.counted and answer.counted.tokens and answer.counted.tokens.limit) == ("k:k", 1_000)


async def test_a_refused_request_takes_and_holds_nothing(limited: Limited) -> None:
    """I2: neither money nor a place in another bucket."""
    tight = Rates(tokens=1, tenant_requests=100, key_requests=1)
    assert (await limited.reserve(tight)).status == "ok"
    held = (await limited.state.ledger.balances(tenant=limited.tenant))[0].pending
    assert (await limited.reserve(tight)).status == "limited"
    assert (await limited.state.ledger.balances(tenant=limited.tenant))[0].pending == held
    other = await limited.reserve(tight, key="other")
    assert other.counted is not None
    assert (other.counted.minute, other.counted.hour) == (1, 1)


async def test_velocity_by_key_and_once_per_request(limited: Limited) -> None:
    """S2-13; a second delivery is the same request."""
    rid = secrets.token_hex(16)
    for number in (1, 2):
        answer = await limited.reserve(Rates(), rid=rid if number == 1 else "")
        assert answer.counted is not None
        assert (answer.counted.hour, answer.counted.requests, answer.counted.tokens) == (number, None, None)
    assert (await limited.reserve(Rates(), rid=rid, delivery=2)).counted is None
    third = await limited.reserve(Rates())
    assert third.counted is not None
    assert third.counted.hour == 3
    unrated = await limited.reserve()
    assert (unrated.status, unrated.counted) == ("ok", None)


@pytest.mark.parametrize("junk", [b"junk", b"\xc3", b"\x91\x01", b"\x97\xa1x\x01\x01\x01\x01\x01\x01", b"\xdc", None])
async def test_money_does_not_hang_on_damaged_buckets(limited: Limited, junk: bytes | None) -> None:
    """D4: they are advice. None: the key is of another type."""
    rates, rid, ledger, now = (
        Rates(tokens=9, key_requests=5),
        secrets.token_hex(16),
        limited.state.ledger,
        limited.state.clock.now,
    )
    key = b"hp:{%b}:rate" % limited.tenant.encode()
    assert (await limited.reserve(rates, rid=rid)).status == "ok"
    await ledger.dispatch(
        tenant=limited.tenant, rid=rid, delivery=1, instance="i", lost="", amount=1, max_calls=1, not_after=now() + 9000
    )
    damage = (b"SET", key, b"x") if junk is None else (b"HSET", key, b"t", junk, b"k:k", junk)
    await limited.state._side.execute(*damage, within=1.0)
    assert (await ledger.settle(tenant=limited.tenant, rid=rid, call=1, cost=1, tokens=5)).status == "settled"
    again = await limited.reserve(rates)
    assert (again.status, again.counted and again.counted.requests and again.counted.requests.left) == ("ok", 4)


async def test_what_was_not_used_goes_back(limited: Limited) -> None:
    """Tokens are taken by estimate and settled by usage; what is used beyond is owed. A void gives all of them back."""
    rates, rid, voided = Rates(tokens=100, tenant_tokens=1000), secrets.token_hex(16), secrets.token_hex(16)
    ledger, now = limited.state.ledger, limited.state.clock.now
    assert (await limited.reserve(rates, rid=rid)).status == "ok"
    await ledger.dispatch(
        tenant=limited.tenant, rid=rid, delivery=1, instance="i", lost="", amount=1, max_calls=1, not_after=now() + 9000
    )
    await ledger.settle(tenant=limited.tenant, rid=rid, call=1, cost=1, tokens=700)
    after = await limited.reserve(rates, rid=voided)
    assert after.counted is not None
    assert after.counted.tokens is not None
    assert 200 <= after.counted.tokens.left <= 210  # 16.7 a second come in
    await ledger.void(tenant=limited.tenant, rid=voided, delivery=1)
    again = await limited.reserve(rates)
    assert again.counted is not None
    assert again.counted.tokens is not None
    assert 200 <= again.counted.tokens.left <= 220
