"""The guardian on its own: MemoryBus around it, a real Valkey behind it."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.core import pricing, tokens
from shared.core.overload import Shares
from shared.state.base import Reserved
from shared.wire import headers
from shared.wire.messages import UNREADABLE, VERSION, Admit, Hop, Price, ReplyTo, decode_admit, decode_route, encode
from tests.wire.samples import NOISE, newer
from tests.workers.guardian_rig import Rig, admit, ask, running, standing, without_redis
from workers.guardian import admit as admit_room
from workers.guardian import envelope
from workers.guardian.admit import Guardian

LIMIT = 5_000_000_000


@pytest.fixture
async def rig(valkey_url: str) -> AsyncIterator[Rig]:
    async with running(Guardian(), valkey_url, "routing") as started:
        yield started


async def tenant(rig: Rig, limit: int | None = LIMIT, **options: Any) -> tuple[str, str]:
    """(tenant, key) of a new tenant."""
    made = await rig.ctx.state.create_key(f"t{secrets.token_hex(4)}", limit, "month", **options)
    return made.tenant_id, made.key_id


async def pending(rig: Rig, tenant_id: str) -> int:
    """What is held for the tenant, nano-USD."""
    return max(level.pending for level in await rig.ctx.state.ledger.balances(tenant=tenant_id))


async def test_assessed_reserved_and_forwarded(rig):
    """D1: the reservation is the bound of the prompt and the whole output cap, at the model's price."""
    owner = await tenant(rig)
    request = ask(*owner, label="mine", n=2)
    rig.to_role(encode(Admit(ask=request, hops=(Hop("ingress", "i", 5, 1, 2),))))
    route = decode_route(await rig.next_forwarded())
    bound = tokens.bound_prompt(request.body, "o200k")
    assert route.admission.reserved
    assert route.admission.status == "on"
    assert route.admission.amount == pricing.upper_bound(route.admission.price, bound, 200, 1_000_000)
    assert route.admission.output_cap == 100
    assert route.admission.input_tokens == bound
    assert route.admission.prices == {"two": Price(400_000_000, 400_000_000, 4 * 10**9)}  # pinned, with the epoch
    assert route.admission.epoch == rig.ctx.catalog.epoch
    likely = tokens.estimate_prompt(len("user" + "hello world"))  # S2-09; S2-10: as much output, for each choice
    price = route.admission.price
    assert route.admission.estimate == likely * price.input // 10**6 + 2 * likely * price.output // 10**6
    assert await pending(rig, owner[0]) == route.admission.amount
    assert [hop.role for hop in route.hops] == ["ingress", "guardian"]
    assert route.hops[1].took_us == route.admission.overhead_us > 0
    assert route.ask.body == request.body
    now = rig.ctx.state.clock.now()
    assert now + 29_000 < route.ask.deadline <= now + 30_000


@pytest.mark.parametrize(
    ("fields", "wait"),
    [({}, 30_000), ({"stream": True}, 120_000), ({"timeout_ms": 5000}, 5000), ({"timeout_ms": 1}, 100),
     ({"timeout_ms": -5}, 30_000), ({"timeout_ms": 10**12}, 600_000), ({"deadline": 10**17}, 600_000)],
)  # fmt: skip
async def test_deadline(rig, fields, wait):
    """S1-L1, S1-G03: the default by kind, or X-Timeout-Ms, clamped."""
    rig.to_role(admit(ask(*await tenant(rig), **fields)))
    route = decode_route(await rig.next_forwarded())
    assert abs(route.ask.deadline - rig.ctx.state.clock.now() - wait) < 1000


async def test_the_cap_is_never_above_the_models(rig):
    owner = await tenant(rig)
    for given_cap, cap in ((0, 1000), (10**6, 1000), (7, 7)):
        rig.to_role(admit(ask(*owner, max_output=given_cap)))
        assert decode_route(await rig.next_forwarded()).admission.output_cap == cap


async def test_a_free_model_reserves_nothing_but_is_fenced(rig):
    """The entry is what keeps a second delivery from making a second call."""
    owner = await tenant(rig, 0)
    rig.to_role(admit(ask(*owner, model="free")))
    route = decode_route(await rig.next_forwarded())
    assert route.admission.reserved
    assert route.admission.amount == route.admission.estimate == 0


async def test_over_the_limit_says_what_is_left(rig):
    """I2: 402 with the amount left; nothing is held."""
    owner = await tenant(rig, 1_500_000)
    rig.to_role(admit(ask(*owner)))
    amount = decode_route(await rig.next_forwarded()).admission.amount
    rig.to_role(admit(ask(*owner)))
    failed = await rig.next_failed()
    assert (failed.error.status, failed.error.code) == (402, "insufficient_budget")
    assert f"${(1_500_000 - amount) / 1e9:.7f}".rstrip("0") in failed.error.message
    assert failed.stream == 7
    assert failed.head is not None
    assert failed.head[headers.BR_GUARDIAN_STATUS] == "on"
    assert [hop.role for hop in failed.hops] == ["guardian"]
    assert await pending(rig, owner[0]) == amount


async def test_the_same_delivery_twice_holds_once(rig):
    """Faults 33: idempotent per rid."""
    owner = await tenant(rig)
    request = admit(ask(*owner))
    rig.to_role(request)
    rig.to_role(request)
    first, second = decode_route(await rig.next_forwarded()), decode_route(await rig.next_forwarded())
    assert first.admission.amount == second.admission.amount == await pending(rig, owner[0])


async def test_a_delivery_after_a_settled_call_brings_its_own_amount(rig):
    """I2: its holder died after settling. Nothing is held any more, and the further call opens with this amount."""
    owner = await tenant(rig)
    request = ask(*owner)
    rig.to_role(admit(request))
    first = decode_route(await rig.next_forwarded())
    ledger, now = rig.ctx.state.ledger, rig.ctx.state.clock.now
    dead: dict[str, Any] = {"tenant": owner[0], "rid": request.rid}
    await ledger.dispatch(
        **dead, delivery=1, instance="dead", lost="", amount=1, max_calls=3, not_after=now() + 500
    )  # fmt: skip
    await ledger.settle(**dead, call=1, cost=5)
    assert await pending(rig, owner[0]) == 0
    rig.to_role(admit(ask(*owner, rid=request.rid, delivery=2, lost="dead")))
    second = decode_route(await rig.next_forwarded())
    assert second.admission.amount == first.admission.amount > 0


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [({"model": "nope"}, 404, "model_not_found"), ({"key": "unknown"}, 401, "invalid_api_key"),
     ({"tenant": "nobody"}, 401, "invalid_api_key"), ({"tenant": "../x {y}"}, 401, "invalid_api_key"),
     ({"deadline": 1}, 504, "deadline_exceeded"), ({"rid": "x"}, 400, "invalid_request")],
)  # fmt: skip
async def test_refused(rig, fields, status, code):
    tenant_id, key = await tenant(rig)
    rig.to_role(admit(ask(**{"tenant": tenant_id, "key": key, **fields})))
    failed = await rig.next_failed()
    assert (failed.error.status, failed.error.code) == (status, code)
    assert await pending(rig, tenant_id) == 0


async def test_a_revoked_key_is_refused(rig):
    tenant_id, key = await tenant(rig)
    await rig.ctx.state.revoke_key(key)
    await rig.ctx.state._poll()
    rig.to_role(admit(ask(tenant_id, key)))
    assert (await rig.next_failed()).error.status == 401


async def test_overloaded_at_once(rig):
    """The bound of requests in flight: 503 with Retry-After, without a reservation or a share."""
    owner = await tenant(rig)
    rig.role.capacity = 1
    first, second = ask(*owner), ask(*owner)
    rig.to_role(admit(first))
    rig.to_role(admit(second))
    failed = await rig.next_failed()
    assert (failed.error.status, failed.error.code) == (503, "overloaded")
    assert failed.error.retry_after_ms > 0
    await rig.next_forwarded()
    assert [entry.rid for entry in await rig.ctx.state.ledger.entries(tenant=owner[0])] == [first.rid]
    assert (rig.role.in_flight(), len(rig.role._shares)) == (0, 0)


@pytest.mark.parametrize("direct", [False, True])
async def test_91_a_tenants_own_limit(rig, direct):
    """429 for the hot tenant, without a reservation; another one is served beside it. Direct publishers too."""
    hot, cool = await tenant(rig, None, synthetic=True), await tenant(rig, None, synthetic=True)
    rig.role._shares = Shares(2)
    send = rig.direct if direct else rig.to_role
    reply = ReplyTo("loadgen" if direct else "ingress", "asker", 7)
    asks = [ask(*owner, reply=reply) for owner in (hot, hot, hot, cool)]
    for request in asks:
        send(admit(request))
    failed = await rig.next_failed()
    assert (failed.error.status, failed.error.code) == (429, "rate_limit_exceeded")
    assert failed.error.retry_after_ms > 0
    assert {decode_route(await rig.next_forwarded()).ask.rid for _ in range(3)} == {
        asks[n].rid for n in (0, 1, 3)
    }  # fmt: skip
    assert len(await rig.ctx.state.ledger.entries(tenant=hot[0])) == 2
    assert len(rig.role._shares) == 0


async def test_a_queue_that_stands_is_shed(rig):
    """Issue 3: not begun late but refused, and nothing was reserved."""
    owner = await tenant(rig)
    rig.role._queue = standing()
    rig.to_role(admit(ask(*owner)))
    failed = await rig.next_failed()
    assert (failed.error.status, failed.error.code) == (503, "overloaded")
    assert failed.error.retry_after_ms > 0
    assert await rig.ctx.state.ledger.entries(tenant=owner[0]) == []
    assert (rig.role.in_flight(), len(rig.role._shares), rig.role._queue.shed) == (0, 0, 1)


# ---- nobody behind ---------------------------------------------------------------------------------------------------


async def test_no_routing_worker_behind_at_once(rig):
    """Faults 37: no responders -> 503 and nothing held."""
    owner = await tenant(rig)
    rig.ctx.rosters["routing"].dead("next")
    rig.to_role(admit(ask(*owner)))
    failed = await rig.next_failed()
    assert (failed.error.status, failed.error.code) == (503, "no_worker")
    await rig.role._behind.drain(3)
    assert await pending(rig, owner[0]) == 0


async def test_a_503_of_nats_moves_on_to_the_next_instance_and_then_behind(rig):
    """DESIGN 3: the reply of each hop is the sender's own inbox."""
    owner = await tenant(rig)
    rig.ctx.rosters["routing"].dead("next")
    rig.beat("routing", "gone")
    rig.to_role(admit(ask(*owner)))
    assert (await rig.next_failed()).error.code == "no_worker"
    await rig.role._behind.drain(3)
    assert await pending(rig, owner[0]) == 0


async def test_the_bus_gone_between_is_voided(rig):
    owner = await tenant(rig)
    request = ask(*owner)
    ctx = rig.ctx
    reserve = ctx.state.ledger.reserve

    async def reserve_then_cut(**fields: Any) -> Reserved:
        answer: Reserved = await reserve(**fields)
        ctx.bus.cut()
        return answer

    ctx.state.ledger.reserve = reserve_then_cut
    rig.to_role(admit(request))
    while not rig.role._behind.under_way:
        await asyncio.sleep(0)
    await rig.role._behind.drain(3)
    assert await pending(rig, owner[0]) == 0


# ---- the ledger gone (D4) --------------------------------------------------------------------------------------------


async def test_money_fails_closed_with_a_limit(rig):
    """D4: 503 with Retry-After within 250 ms; a timed-out reserve is followed by a void."""
    owner = await tenant(rig)
    await rig.ctx.state._poll()
    away = without_redis(rig)
    began = asyncio.get_running_loop().time()
    rig.to_role(admit(ask(*owner)))
    failed = await rig.next_failed()
    assert asyncio.get_running_loop().time() - began < 0.25
    assert (failed.error.status, failed.error.code) == (503, "ledger_unavailable")
    assert failed.error.retry_after_ms > 0
    assert failed.head is not None
    assert failed.head[headers.BR_GUARDIAN_STATUS] == "degraded"
    await rig.role._behind.drain(1)
    assert away.calls[:3] == ["reserve", "void", "void"]  # and again, until the drain's time was over
    assert rig.role._behind.given_up == 1


async def test_money_fails_open_without_a_limit(rig):
    """D4: proceeds, unreserved and marked."""
    owner = await tenant(rig, None)
    await rig.ctx.state._poll()
    without_redis(rig)
    rig.to_role(admit(ask(*owner)))
    admission = decode_route(await rig.next_forwarded()).admission
    assert not admission.reserved
    assert admission.status == "degraded"
    assert admission.amount > 0
    assert admission.day == rig.ctx.state.clock.now() // 86_400_000  # charged to today, whenever it is billed


async def test_what_was_given_up_is_not_begun(rig):
    """DESIGN 3, nothing stale runs: a delivery that lay in a frozen NATS reserves nothing and says nothing."""
    owner, now = await tenant(rig), rig.ctx.state.clock.now()
    rig.to_role(admit(ask(*owner, answer_by=now - 1)))
    rig.to_role(admit(ask(*owner, answer_by=now + 5000, label="in-time")))
    assert decode_route(await rig.next_forwarded()).ask.label == "in-time"
    assert rig.forwarded.empty()
    assert rig.failed.empty()


async def test_a_reserve_that_ran_too_late_counts_as_away(rig, monkeypatch):
    """DESIGN 3: refused when it runs after its not-after."""
    monkeypatch.setattr(admit_room, "RESERVE_MS", -1)
    owner = await tenant(rig)
    rig.to_role(admit(ask(*owner)))
    assert (await rig.next_failed()).error.code == "ledger_unavailable"
    assert await pending(rig, owner[0]) == 0


async def test_an_unknown_key_is_503_while_the_registry_is_away(rig, monkeypatch):
    """DESIGN 5: known keys from the copy; unknown keys 503, not 401."""
    registry = rig.ctx.state.registry
    monkeypatch.setattr(type(registry), "fresh", property(lambda _self: False))
    rig.to_role(admit(ask("nobody", "nothing")))
    failed = await rig.next_failed()
    assert (failed.error.status, failed.error.code) == (503, "registry_unavailable")


async def test_advice_fails_open(rig, monkeypatch):
    """D4: when tokens cannot be counted bytes are, and the status says so."""

    def broken(*_args: Any) -> None:
        raise RuntimeError("no tables")

    monkeypatch.setattr(tokens, "size_prompt", broken)
    request = ask(*await tenant(rig))
    rig.to_role(admit(request))
    admission = decode_route(await rig.next_forwarded()).admission
    assert admission.status == "degraded"
    assert admission.reserved
    assert admission.input_tokens >= tokens.count_prompt(request.body, "o200k")


async def test_a_fault_of_ours_is_one_error_and_nothing_held(rig, monkeypatch, caplog):
    """The process's door: 500 for one request, the next is served."""

    def broken(*_args: Any, **_fields: Any) -> None:
        raise ZeroDivisionError

    owner = await tenant(rig)
    with monkeypatch.context() as patch:
        patch.setattr(Guardian, "_forward", broken)
        rig.to_role(admit(ask(*owner)))
        failed = await rig.next_failed()
    assert (failed.error.status, failed.error.code) == (500, "internal_error")
    assert "ZeroDivisionError" in caplog.text
    await rig.role._behind.drain(3)
    assert await pending(rig, owner[0]) == 0
    rig.to_role(admit(ask(*owner)))
    assert decode_route(await rig.next_forwarded()).admission.reserved


async def test_leases_of_an_idle_tenant_are_swept(valkey_url):
    """I3, faults 20: nobody sends anything, the guardian sweeps."""
    async with running(Guardian(), valkey_url, "routing", LEDGER_LEASE_GRACE_MS="0") as rig:
        owner = await tenant(rig)
        await rig.ctx.state._poll()
        rig.to_role(admit(ask(*owner, timeout_ms=100)))
        await rig.next_forwarded()
        assert await pending(rig, owner[0]) > 0
        async with asyncio.timeout(6):
            while await pending(rig, owner[0]):
                await asyncio.sleep(0.05)


async def test_drain_finishes_what_came(rig):
    """S1-H5: what was taken is forwarded, what comes later is not taken."""
    owner = await tenant(rig)
    for _ in range(5):
        rig.to_role(admit(ask(*owner)))
    await rig.role.drain()
    assert rig.forwarded.qsize() == 5
    assert rig.role.in_flight() == 0
    rig.to_role(admit(ask(*owner)))
    await asyncio.sleep(0)
    assert rig.role.in_flight() == 0


# ---- direct publishers -----------------------------------------------------------------------------------------------


def direct(owner: tuple[str, str], **fields: Any) -> Any:
    """A request as loadgen publishes it: raw JSON, nothing filled in."""
    raw = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": 9,
        "api_key": "x",
    }
    given = {"reply": ReplyTo("loadgen", "asker", 7), "model": "", "max_output": 0, "body": orjson.dumps(raw)}
    return ask(*owner, **{**given, **fields})


async def test_a_direct_publisher_is_parsed_as_strictly(rig):
    """Acceptance 3: the same as over HTTP; the guardian fills what the ingress would have."""
    owner = await tenant(rig, synthetic=True)
    rig.direct(admit(direct(owner, n=16, stream=False, include_usage=True, max_output=10**9)))
    sent = decode_route(await rig.next_forwarded()).ask
    assert (sent.model, sent.stream, sent.include_usage, sent.max_output, sent.n) == ("m", True, False, 9, 1)
    assert b"api_key" not in sent.body


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"body": b"{"}, 400), ({"body": b'{"messages":[]}'}, 400), ({"label": "a b"}, 400), ({"label": "x" * 65}, 400),
     ({"trace": "x"}, 400), ({"lost": "a b"}, 400), ({"rid": "A" * 32}, 400), ({"rid": ""}, 400),
     ({"key": "unknown"}, 401), ({"tenant": "default", "key": "bootstrap"}, 403)],
)  # fmt: skip
async def test_a_direct_publisher_is_refused(rig, fields, status):
    """Threat model: only synthetic tenants, only sane envelopes."""
    tenant_id, key = await tenant(rig, synthetic=True)
    request = direct((tenant_id, key))
    rig.direct(admit(msgspec.structs.replace(request, **fields)))
    assert (await rig.next_failed()).error.status == status
    assert rig.forwarded.empty()


async def test_a_real_tenant_is_refused_to_a_direct_publisher(rig):
    rig.direct(admit(direct(await tenant(rig))))
    assert (await rig.next_failed()).error.status == 403


async def test_too_large_a_body_is_413(valkey_url):
    async with running(Guardian(), valkey_url, "routing", MAX_BODY_BYTES="1024") as rig:
        owner = await tenant(rig, synthetic=True)
        rig.direct(admit(direct(owner, body=b'{"x":"' + b"a" * 1100 + b'"}')))
        assert (await rig.next_failed()).error.status == 413


async def test_what_cannot_be_answered_is_dropped_and_counted(rig, caplog):
    """Never a crash on garbage, and one log line for many."""
    owner = await tenant(rig, synthetic=True)
    bad = [
        b"", b"\xff" * 50, b"\x91" * 5000, encode({"kind": "admit"}),
        *(admit(direct(owner, reply=reply)) for reply in (
            ReplyTo("ingress", "asker", 7), ReplyTo("guardian", "asker", 7), ReplyTo("loadgen", "a.b", 7),
            ReplyTo("loadgen", "asker>", 7), ReplyTo("loadgen", "", 7), ReplyTo("loadgen", "asker", -1),
            ReplyTo("loadgen", "asker", 2**60),
        )),
        admit(direct(owner, delivery=0)), admit(direct(owner, delivery=10**6)),
    ]  # fmt: skip
    for payload in bad:
        rig.direct(payload)
    rig.direct(admit(direct(owner)))
    await rig.next_forwarded()
    assert rig.role._refusals.unreadable == len(bad)
    assert rig.failed.empty()
    assert caplog.text.count("could not be read") == 1


async def test_a_version_too_new_is_refused(rig):
    """Faults 83: 503, nothing reserved, by both doors; what is only added to a message is ignored."""
    owner = await tenant(rig, synthetic=True)
    rig.to_role(admit(ask(*owner, v=VERSION + 1)))
    rig.direct(admit(direct(owner, v=VERSION + 1)))
    for _ in range(2):
        failed = (await rig.next_failed()).error
        assert (failed.status, failed.code) == (503, "no_worker")
    assert await rig.ctx.state.ledger.entries(tenant=owner[0]) == []
    rig.to_role(encode(newer(Admit(ask=ask(*owner)))))
    assert decode_route(await rig.next_forwarded()).ask.tenant == owner[0]
    for noise in NOISE:
        rig.to_role(noise)
        rig.direct(noise)
    rig.to_role(admit(ask(*owner)))
    await rig.next_forwarded()
    assert rig.role._refusals.unreadable == 2 * len(NOISE)
    assert rig.ctx.bus.errors == {}


async def test_a_direct_publishers_hops_are_bounded(rig):
    owner = await tenant(rig, synthetic=True)
    good = (Hop("loadgen", "asker", 1, 1),)
    for hops, kept in ((good, good), ((Hop("x y", "z", 1, 1),), ()), (good * 5, ())):
        rig.direct(encode(Admit(ask=direct(owner), hops=hops)))
        assert decode_route(await rig.next_forwarded()).hops[:-1] == kept


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300), st.data())
def test_no_bytes_make_the_decoder_raise_what_is_not_caught(noise, data):
    """Garbage, and a valid message with a part of it overwritten."""
    message = bytearray(admit(ask("t", "k")))
    at = data.draw(st.integers(0, len(message)))
    message[at : at + len(noise)] = noise
    for payload in (noise, bytes(message)):
        try:
            request = decode_admit(payload).ask
        except UNREADABLE:
            continue
        envelope.is_sane(request)
