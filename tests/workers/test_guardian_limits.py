"""What the guardian refuses, lowers and tells by a tenant's rules: modes, clamping, rate limits (issue 4)."""

import re
import secrets
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import orjson
import pytest

from shared.core import pricing, tokens
from shared.core.money import show_usd
from shared.core.users import user_id
from shared.state.base import RATIO_ONE
from shared.state.policies import KeyChange, TenantChange
from shared.wire import headers
from shared.wire.messages import Ask, Failed, ReplyTo, Route, decode_route
from tests.workers.guardian_rig import SECRETS, Rig, admit, ask, running, without_redis
from workers.guardian.admit import Guardian

FLOOR = 1_000_000
LIMITS = {"x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"}


@pytest.fixture
async def rig(valkey_url: str) -> AsyncIterator[Rig]:
    async with running(Guardian(), valkey_url, "routing") as started:
        yield started


class Owner:
    """A tenant of the test's own, under these rules."""

    def __init__(self, rig: Rig, tenant: str, key: str) -> None:
        self.rig, self.tenant, self.key = rig, tenant, key

    async def rule(self, **rules: Any) -> None:
        """Rules of the tenant; of the key those that only a key has, and `key_rpm` and `key_tpm`."""
        of_key = {
            name.removeprefix("key_"): rules.pop(name)
            for name in ("key_rpm", "key_tpm", "expires", "models")
            if name in rules
        }
        admin = self.rig.ctx.state.admin
        await admin.set_policy(self.tenant, TenantChange(**rules))
        await admin.set_key(self.key, KeyChange(**of_key))
        await self.rig.ctx.state._poll()

    def ask(self, **fields: Any) -> Ask:
        return ask(self.tenant, self.key, **fields)

    async def forwarded(self, request: Ask | None = None, **fields: Any) -> Route:
        self.rig.to_role(admit(request or self.ask(**fields)))
        return decode_route(await self.rig.next_forwarded())

    async def failed(self, request: Ask | None = None, **fields: Any) -> Failed:
        self.rig.to_role(admit(request or self.ask(**fields)))
        return await self.rig.next_failed()

    async def pending(self, level: str = "t") -> int:
        return max(row.pending for row in await self.rig.ctx.state.ledger.balances(tenant=self.tenant, level=level))


async def owner(rig: Rig, limit: int | None = None, **rules: Any) -> Owner:
    """A new tenant with a monthly limit."""
    made = await rig.ctx.state.create_key(f"t{secrets.token_hex(4)}", limit, "month", synthetic=True)
    found = Owner(rig, made.tenant_id, made.key_id)
    await found.rule(**rules)
    return found


# ---- modes and the seatbelt ------------------------------------------------------------------------------------------


async def test_mode_off_gives_no_advice(rig):
    """S2-15: no estimate, nothing counted, no seatbelt; the budget holds all the same."""
    quiet = await owner(rig, 2 * FLOOR, mode="off")
    admission = (await quiet.forwarded(max_estimate=0)).admission
    assert (admission.status, admission.estimate, admission.reserved) == ("off", -1, True)
    assert await rig.ctx.state._side.execute(b"EXISTS", b"hp:{%b}:rate" % quiet.tenant.encode(), within=1.0) == 0
    failed = await quiet.failed(max_output=1000)
    assert (failed.error.status, failed.error.code) == (402, "insufficient_budget")
    assert failed.head is not None
    assert failed.head[headers.BR_GUARDIAN_STATUS] == "off"
    assert headers.BR_ESTIMATED_COST not in failed.head
    assert headers.BR_GUARDIAN_OVERHEAD in failed.head


@pytest.mark.parametrize(("mode", "refused"), [("observe", False), ("active", True)])
async def test_the_seatbelt(rig, mode, refused):
    """S2-12: 402 above X-BR-Max-Estimated-Cost in mode active, saying both figures, before anything is held."""
    careful = await owner(rig, 10**12, mode=mode)
    estimate = (await careful.forwarded(max_estimate=10**12)).admission.estimate
    assert (await careful.forwarded(max_estimate=estimate)).admission.status == "on"
    held = await careful.pending()
    if not refused:
        assert (await careful.forwarded(max_estimate=estimate - 1)).admission.estimate == estimate
        return
    failed = await careful.failed(max_estimate=estimate - 1)
    assert (failed.error.status, failed.error.code) == (402, "estimated_cost_exceeded")
    assert show_usd(estimate) in failed.error.message
    assert show_usd(estimate - 1) in failed.error.message
    assert failed.head is not None
    assert failed.head[headers.BR_ESTIMATED_COST] == show_usd(estimate)
    assert await careful.pending() == held


async def test_degraded_advice_never_refuses(rig, monkeypatch):
    """D4: what could not be counted is guessed high; the seatbelt is advice."""
    careful = await owner(rig, mode="active")
    monkeypatch.setattr("shared.core.tokens.size_prompt", lambda *_: 1 / 0)
    admission = (await careful.forwarded(max_estimate=0)).admission
    assert admission.status == "degraded"
    assert admission.estimate > 0


async def test_the_output_ratio_comes_back_with_each_reserve(rig):
    """S2-10: the next estimate uses what the last answer said; a re-delivery, which counts nothing, says nothing."""
    chatty = await owner(rig)
    first = await chatty.forwarded()
    price, likely = first.admission.price, first.admission.input_estimate
    assert first.admission.estimate == likely * (price.input + price.output) // 10**6
    await rig.ctx.state._side.execute(
        b"HSET", b"hp:{%b}:bal" % chatty.tenant.encode(), b"ratio", b"2500000", within=1.0
    )
    request = chatty.ask()
    assert (await chatty.forwarded(request)).admission.estimate == first.admission.estimate
    await chatty.forwarded(msgspec.structs.replace(request, delivery=2))
    output = -(-likely * 25 // 10)
    assert (await chatty.forwarded()).admission.estimate == -(-(likely * price.input + output * price.output) // 10**6)
    capped = (await chatty.forwarded(max_output=1)).admission
    assert capped.estimate == -(-(likely * price.input + price.output) // 10**6)
    assert rig.role._seen.ratio("nobody") == RATIO_ONE


# ---- clamping --------------------------------------------------------------------------------------------------------


async def test_the_cap_is_lowered_to_what_is_left(rig):
    """Issue 4: rather than 402 the output cap goes down to the headroom; what is held never passes the limit (I2)."""
    poor = await owner(rig, 5_000_000)
    admission = (await poor.forwarded(max_output=1000, n=2)).admission
    assert admission.amount == await poor.pending() == 5_000_000
    bound = pricing.upper_bound(admission.price, admission.input_tokens, 2 * admission.output_cap, FLOOR)
    more = pricing.upper_bound(admission.price, admission.input_tokens, 2 * admission.output_cap + 2, FLOOR)
    assert bound <= 5_000_000 < more
    assert admission.extra[headers.BR_CLAMPED] == str(admission.output_cap)
    assert admission.hard
    failed = await poor.failed(max_output=1000)
    assert (failed.error.status, failed.error.code) == (402, "insufficient_budget")
    assert "monthly budget of this tenant" in failed.error.message
    assert "$0.00 is left" in failed.error.message


async def test_a_clamped_request_stays_so_when_delivered_again(rig):
    """DESIGN 3: the second delivery's provider writes the same cap."""
    poor = await owner(rig, 5_000_000)
    request = poor.ask(max_output=1000)
    first = (await poor.forwarded(request)).admission
    second = (await poor.forwarded(msgspec.structs.replace(request, delivery=2))).admission
    assert (second.output_cap, second.amount) == (first.output_cap, first.amount)
    assert await poor.pending() == 5_000_000


@pytest.mark.parametrize(("limit", "rules"), [(FLOOR - 1, {}), (5_000_000, {"clamp": False})])
async def test_not_clamped(rig, limit, rules):
    """Never below a $0.001 reservation, and not at all if the tenant does not want it."""
    poor = await owner(rig, limit, **rules)
    failed = await poor.failed(max_output=1000)
    assert (failed.error.status, failed.error.code) == (402, "insufficient_budget")
    assert show_usd(limit) in failed.error.message
    assert await poor.pending() == 0


async def test_402_names_the_key_and_the_user(rig):
    """Issue 4: which level, which period, what is left."""
    some = await owner(rig, 10**12, clamp=False)
    user = user_id(SECRETS["KEY_PEPPER"].encode(), some.tenant, "ann")
    ledger = rig.ctx.state.ledger
    await ledger.set_limit(tenant=some.tenant, period="day", limit=FLOOR, level=f"u:{user}")
    told = (await some.failed(max_output=1000, user=user)).error.message
    assert "daily budget of this user" in told
    assert "$0.001 is left" in told
    await ledger.set_limit(tenant=some.tenant, period="lifetime", limit=2 * FLOOR, level=f"k:{some.key}")
    assert "The budget of this key" in (await some.failed(max_output=1000)).error.message


# ---- the user's level ------------------------------------------------------------------------------------------------


async def test_a_user_with_a_limit(rig):
    """Issue 4: the level moves only where there is a limit; its id is made of a direct publisher's body, too."""
    some = await owner(rig)
    user = user_id(SECRETS["KEY_PEPPER"].encode(), some.tenant, "ann")
    plain = (await some.forwarded(user=user)).admission
    assert (plain.user, plain.hard) == ("", False)
    await rig.ctx.state.ledger.set_limit(tenant=some.tenant, period="day", limit=10**12, level=f"u:{user}")
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "user": "ann"})
    rig.direct(admit(some.ask(reply=ReplyTo("loadgen", "asker", 7), body=body, user="0" * 16)))
    limited = decode_route(await rig.next_forwarded()).admission
    assert (limited.user, limited.hard) == (user, True)
    assert limited.day == rig.ctx.state.clock.now() // 86_400_000
    assert await some.pending(f"u:{user}") == limited.amount
    without_redis(rig)  # D4: known to have one, so this user's money fails closed; the others' does not
    assert (await some.failed(user=user)).error.code == "ledger_unavailable"
    away = (await some.forwarded(user="1" * 16)).admission
    assert (away.reserved, away.status, away.user, away.day) == (False, "degraded", "", limited.day)
    await rig.role._behind.drain(0.05)


async def test_a_user_without_a_limit_never_gets_a_level(rig):
    """Issue 4: at most 10,000 users a tenant: a void of what was never reserved, settled after all, makes none."""
    some, ledger, user = await owner(rig), rig.ctx.state.ledger, "2" * 16
    await some.forwarded(user=user)
    gone = some.ask(user=user)
    await ledger.void(tenant=some.tenant, rid=gone.rid, delivery=1, key=some.key, user=user)
    assert (await ledger.settle(tenant=some.tenant, rid=gone.rid, call=1, cost=7)).status == "late"
    assert not [name for name in await ledger.levels(tenant=some.tenant) if name.startswith("u:")]


# ---- rate limits -----------------------------------------------------------------------------------------------------


async def test_requests_a_minute(rig):
    """S1-G07, D15, S1-M5a: 429 in OpenAI's shape with the exact wait, and nothing held."""
    fast = await owner(rig, key_rpm=2, rpm=60)
    first, second = await fast.forwarded(), await fast.forwarded()
    assert first.admission.extra.keys() == LIMITS
    assert first.admission.extra["x-ratelimit-limit-requests"] == "2"  # the tighter of the two
    assert [each.admission.extra["x-ratelimit-remaining-requests"] for each in (first, second)] == ["1", "0"]
    assert re.fullmatch(r"(29(\.\d+)?|30)s", first.admission.extra["x-ratelimit-reset-requests"])
    held = await fast.pending()
    failed = await fast.failed()
    assert (failed.error.status, failed.error.code) == (429, "rate_limit_exceeded")
    assert 29_000 < failed.error.retry_after_ms <= 30_000
    assert "this key on requests per min (RPM): Limit 2" in failed.error.message
    assert failed.head is not None
    assert failed.head["x-ratelimit-remaining-requests"] == "0"
    assert headers.SHOULD_RETRY not in failed.head
    assert await fast.pending() == held


@pytest.mark.parametrize("mode", ["off", "observe"])
async def test_tokens_a_minute_are_taken_by_estimate_and_put_right_by_usage(rig, mode):
    """S1-G07: in every mode; input and likely output, then what was really used."""
    fast = await owner(rig, tpm=100, mode=mode)
    request = fast.ask()
    admission = (await fast.forwarded(request)).admission
    taken = 2 * admission.input_estimate
    assert admission.extra["x-ratelimit-remaining-tokens"] == str(100 - taken)
    ledger, now = rig.ctx.state.ledger, rig.ctx.state.clock.now()
    await ledger.dispatch(
        tenant=fast.tenant, rid=request.rid, delivery=1, instance="i", lost="", amount=admission.amount, max_calls=1,
        not_after=now + 5000,
    )  # fmt: skip
    await ledger.settle(tenant=fast.tenant, rid=request.rid, call=1, cost=1, tokens=99)
    failed = await fast.failed()
    assert failed.error.status == 429
    assert "this tenant on tokens per min (TPM): Limit 100" in failed.error.message
    assert abs(failed.error.retry_after_ms - (taken - 1) * 600) < 600  # 100 a minute: 600 ms each


async def test_an_answer_that_may_be_larger_than_the_limit(rig, monkeypatch):
    """How long it gets is a guess: a tenant of long answers to short prompts is not locked out by its own ratio, which
    it could never lower again. It takes all there is, and waits for a full bucket."""
    fast = await owner(rig, tpm=100, key_tpm=40)
    monkeypatch.setattr(rig.role._seen, "ratio", lambda _tenant: 50 * RATIO_ONE)
    first = (await fast.forwarded()).admission
    assert first.extra["x-ratelimit-remaining-tokens"] == "0"
    failed = await fast.failed()
    assert "Limit 40, Left 0, Requested 40" in failed.error.message
    assert 59_000 < failed.error.retry_after_ms <= 60_000


async def test_a_prompt_larger_than_the_limit(rig):
    """S1-M5a: a Retry-After as with every 429; no SDK should try again."""
    fast = await owner(rig, key_tpm=3)
    failed = await fast.failed()
    assert (failed.error.status, failed.error.code, failed.error.retry_after_ms) == (429, "rate_limit_exceeded", 60_000)
    assert "Request too large for this key on tokens per min (TPM): Limit 3" in failed.error.message
    assert failed.head is not None
    assert failed.head[headers.SHOULD_RETRY] == "false"


async def test_velocity_is_counted_without_limits(rig):
    """S2-13: per tenant and key; no header tells it."""
    some = await owner(rig)
    assert (await some.forwarded()).admission.extra == {}
    assert b'hotpath_guardian_key_velocity_bucket{le="1.0"} 1.0' in rig.ctx.metrics.render()


# ---- keys ------------------------------------------------------------------------------------------------------------


async def test_direct_publishers_obey_the_keys_rules(rig):
    """Issue 4: the guardian checks what the ingress does."""
    some = await owner(rig, models=["free"])
    error = (await some.failed()).error
    assert (error.status, error.code) == (404, "model_not_found")
    await some.forwarded(model="free")
    await some.rule(expires=rig.ctx.state.clock.now() - 1)
    error = (await some.failed(model="free")).error
    assert (error.status, error.code) == (401, "expired_api_key")


# ---- personal data and keywords --------------------------------------------------------------------------------------


def about(text: str, **more: Any) -> bytes:
    """A body with this prompt."""
    return orjson.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **more})


async def test_personal_data_is_redacted_before_it_is_counted(rig, caplog):
    """S2-28, S2-30, I9: what goes on, and is paid for, is the redacted body; the log has the kind, never the text."""
    private = await owner(rig, pii="redact", keywords=["falcon"])
    route = await private.forwarded(body=about("write to ann@example.com about falcon"))
    assert b"ann@example.com" not in route.ask.body
    assert b"[REDACTED:email]" in route.ask.body
    assert b"falcon" not in route.ask.body
    assert route.admission.input_tokens == tokens.bound_prompt(route.ask.body, "o200k")
    (record,) = [each for each in caplog.records if getattr(each, "event", "") == "personal_data"]
    assert "email" in record.__dict__["kinds"]
    assert "ann@" not in repr(record.__dict__)
    clean = about("write to her")
    assert (await private.forwarded(body=clean)).ask.body == clean


async def test_personal_data_is_flagged_or_blocked(rig, caplog):
    """S2-28: by the tenant's policy; blocked means that nothing is held."""
    strict, watched = await owner(rig, 10**12, pii="block"), await owner(rig, pii="flag")
    body = about("ssn 536-22-8726, mail bob@example.org " + "x " * 30_000)  # large: scanned in a thread
    failed = await strict.failed(body=body)
    assert (failed.error.status, failed.error.code) == (400, "content_policy_violation")
    assert failed.head is not None
    assert failed.head.keys() == {headers.BR_GUARDIAN_STATUS, headers.BR_GUARDIAN_OVERHEAD}  # S2-23
    assert failed.head[headers.BR_GUARDIAN_STATUS] == "on"
    assert await strict.pending() == 0
    route = await watched.forwarded(body=body)
    assert (route.ask.body, route.admission.status) == (body, "on")
    assert b'hotpath_guardian_found_total{kind="email",policy="flag"} 1.0' in rig.ctx.metrics.render()
    assert "bob@" not in caplog.text


async def test_a_scan_that_fails(rig, monkeypatch):
    """D4: `flag` is advice and goes on, degraded; `redact` and `block` are promises and fail closed."""
    monkeypatch.setattr("shared.core.pii.compile_policy", lambda *_: 1 / 0)
    watched, private = await owner(rig, pii="flag", mode="active"), await owner(rig, pii="redact")
    assert (await watched.forwarded(max_estimate=0)).admission.status == "degraded"
    failed = await private.failed()
    assert (failed.error.status, failed.error.code) == (503, "scan_unavailable")
    assert failed.head is not None
    assert failed.head[headers.BR_GUARDIAN_STATUS] == "degraded"
