"""Routing on its own: MemoryBus around it, a real Valkey behind it."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from shared.state.base import StateUnavailable
from shared.wire import headers, subjects
from shared.wire.messages import (
    VERSION,
    Admission,
    Hop,
    Outcome,
    Outcomes,
    Price,
    ReplyTo,
    Route,
    Step,
    decode_call,
    encode,
)
from tests.state.rig import age_circuit
from tests.wire.samples import NOISE, newer
from tests.workers.guardian_rig import WAIT_S, Rig, ask, running, standing, without_redis
from workers.routing import learn
from workers.routing.route import Routing
from workers.routing.turns import Turns

ONE, TWO = Step("one", "m-1"), Step("two", "m-2")


@pytest.fixture
async def rig(valkey_url: str) -> AsyncIterator[Rig]:
    async with running(Routing(), valkey_url, "provider") as started:
        await started.ctx.state._hot.execute(b"DEL", b"hp:{circuits}", within=1)
        await started.ctx.state._poll()
        yield started


def admission(**fields: Any) -> Admission:
    given_fields: dict[str, Any] = {
        "reserved": True, "amount": 5, "estimate": 3_000_000, "input_tokens": 9, "output_cap": 9,
        "price": Price(1, 1, 1),
    }  # fmt: skip
    return Admission(**{**given_fields, **fields})


def route(**fields: Any) -> bytes:
    """A request as the guardian hands it over."""
    request = ask("t", "k", **fields)
    return encode(Route(ask=request, admission=admission(), hops=(Hop("guardian", "g", 1, 1),)))


async def end_calls(rig: Rig, *outcomes: Outcome) -> None:
    """Upstream calls ended so; returns when that is recorded and known here."""
    rig.outside.publish(subjects.OUTCOME, encode(Outcomes(calls=outcomes)))
    await asyncio.sleep(0)
    await asyncio.wait_for(rig.role._learner._idle.wait(), WAIT_S)  # type: ignore[attr-defined]
    await rig.ctx.state._poll()


async def test_a_queue_that_stands_is_shed(rig):
    """Issue 3: refused instead of planned late, and the reservation is given back."""
    away = without_redis(rig)
    rig.role._queue = standing()
    rig.to_role(route())
    failed = (await rig.next_failed()).error
    assert (failed.status, failed.code) == (503, "overloaded")
    assert failed.retry_after_ms > 0
    assert set(away.calls) == {"void"}
    assert rig.forwarded.empty()


async def test_planned_and_forwarded(rig):
    """The catalogue's order; 1 + ROUTING_MAX_RETRIES calls in all (I7)."""
    rig.to_role(route())
    call = decode_call(await rig.next_forwarded())
    assert call.plan.steps == (ONE, TWO)
    assert call.plan.max_calls == 3
    assert call.admission == admission()
    assert [hop.role for hop in call.hops] == ["guardian", "routing"]


async def test_an_open_circuit_leaves_rotation_and_everybody_is_told(rig):
    """S2-20, S2-21: five failures in a row; the notice goes out."""
    told = asyncio.Event()
    await rig.outside.subscribe(subjects.NOTICE_CIRCUIT, lambda *_: told.set())
    await end_calls(rig, *[Outcome("one", ok=False)] * 4)
    rig.to_role(route())
    assert decode_call(await rig.next_forwarded()).plan.steps == (ONE, TWO)
    assert not told.is_set()
    await end_calls(rig, Outcome("one", ok=False))
    await asyncio.wait_for(told.wait(), WAIT_S)
    rig.to_role(route())
    assert decode_call(await rig.next_forwarded()).plan.steps == (TWO,)


async def test_every_circuit_open_is_503_with_the_soonest_wait(rig):
    """Faults 95, D15; the reservation is given back."""
    await end_calls(rig, *[Outcome("one", ok=False), Outcome("two", ok=False)] * 5)
    away = without_redis(rig)
    rig.to_role(route())
    failed = await rig.next_failed()
    assert (failed.error.status, failed.error.code) == (503, "circuit_open")
    assert 25_000 < failed.error.retry_after_ms <= 30_000
    assert failed.head is not None
    assert failed.head[headers.BR_ESTIMATED_COST] == "$0.003"
    assert [hop.role for hop in failed.hops] == ["guardian", "routing"]
    await rig.role._behind.drain(1)
    assert "void" in away.calls


async def test_a_success_between_keeps_it_closed(rig):
    await end_calls(rig, *[Outcome("one", ok=False)] * 4, Outcome("one", ok=True), *[Outcome("one", ok=False)] * 4)
    rig.to_role(route())
    assert decode_call(await rig.next_forwarded()).plan.steps == (ONE, TWO)


async def test_no_provider_behind_and_says_503(rig):
    """Faults 19, 37."""
    made = await rig.ctx.state.create_key(f"t{secrets.token_hex(4)}", 10**9, "month")
    ledger, now = rig.ctx.state.ledger, rig.ctx.state.clock.now()
    request = ask(made.tenant_id, made.key_id)
    await ledger.reserve(
        tenant=made.tenant_id,
        rid=request.rid,
        delivery=1,
        amount=5,
        deadline=now + 9000,
        not_after=now + 1000,
        key=request.key,
    )
    rig.ctx.rosters["provider"].dead("next")
    rig.to_role(encode(Route(ask=request, admission=admission())))
    assert (await rig.next_failed()).error.code == "no_worker"
    await rig.role._behind.drain(3)
    assert {level.pending for level in await ledger.balances(tenant=made.tenant_id)} == {0}


async def test_what_was_not_reserved_is_not_voided(rig):
    away = without_redis(rig)
    rig.ctx.rosters["provider"].dead("next")
    rig.to_role(encode(Route(ask=ask("t", "k"), admission=admission(reserved=False))))
    await rig.next_failed()
    await rig.role._behind.drain(1)
    assert away.calls == []


async def test_the_lost_instance_is_not_tried_again(rig):
    """DESIGN 1: a re-delivery skips the instance that died."""
    rig.beat("provider", "dead")
    await rig.outside.subscribe(subjects.worker("provider", "dead"), lambda *_: pytest.fail("sent to the dead"))
    for _ in range(20):
        rig.to_role(route(lost="dead", delivery=2))
        await rig.next_forwarded()


async def test_a_model_it_does_not_know_is_404(rig):
    rig.to_role(route(model="nope"))
    assert (await rig.next_failed()).error.status == 404


async def test_garbage_is_dropped_and_counted(rig):
    for payload in (*NOISE, b"\xff" * 9):
        rig.to_role(payload)
        rig.outside.publish(subjects.OUTCOME, payload)
    rig.ctx.rosters["provider"].dead("next")
    rig.to_role(route(reply=ReplyTo("ingress", "y z", 1)))  # what it says about this one has nowhere to go
    rig.to_role(route())
    await rig.next_failed()
    assert rig.role._refusals.unreadable == len(NOISE) + 2 - NOISE.count(b"")  # an empty one asks after us
    assert rig.role._learner.lost == len(NOISE) + 1
    assert rig.ctx.bus.errors == {}


async def test_a_version_too_new_is_refused(rig):
    """Faults 83: 503 and the reservation given back; what is only added to a message is ignored."""
    rig.to_role(encode(Route(ask=ask("newer", "k", v=VERSION + 1), admission=admission(), hops=())))
    failed = (await rig.next_failed()).error
    assert (failed.status, failed.code) == (503, "no_worker")
    await rig.role._behind.drain(WAIT_S)
    assert {entry.state for entry in await rig.ctx.state.ledger.entries(tenant="newer")} == {"voided"}
    rig.outside.publish(subjects.OUTCOME, encode(Outcomes(v=VERSION + 1, calls=(Outcome("one", ok=False),))))
    rig.to_role(encode(newer(Route(ask=ask("t", "k"), admission=admission(), hops=(Hop("guardian", "g", 1, 1),)))))
    assert decode_call(await rig.next_forwarded()).hops[0] == Hop("guardian", "g", 1, 1)
    assert rig.role._learner.lost == 1


async def test_outcomes_of_unknown_endpoints_touch_nothing(rig):
    """An endpoint id of a message never becomes a key or field unless the catalogue has it."""
    await end_calls(rig, *[Outcome("nope", ok=False)] * 9)
    assert await rig.ctx.state._hot.execute(b"HLEN", b"hp:{circuits}", within=1) == 0


async def test_waiting_outcomes_are_bounded_and_keep_their_order(rig, monkeypatch):
    monkeypatch.setattr(learn, "MAX_WAITING", 3)
    seen: list[learn.Events] = []
    held = asyncio.Event()

    async def record(_endpoint: str, events: learn.Events) -> None:
        await held.wait()
        seen.append(events)

    monkeypatch.setattr(rig.ctx.state.circuits, "record", record)
    for number in range(1, 7):
        rig.outside.publish(subjects.OUTCOME, encode(Outcomes(calls=(Outcome("one", ok=True),) * number)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    held.set()
    await rig.role.drain()
    assert [len(batch) for batch in seen] == [1, 4, 5, 6]
    assert rig.role._learner.lost == 2


async def test_outcomes_are_lost_not_stuck_while_redis_is_away(rig, monkeypatch):
    async def record(_endpoint: str, _events: learn.Events) -> None:
        raise StateUnavailable("away")

    monkeypatch.setattr(rig.ctx.state.circuits, "record", record)
    await end_calls(rig, Outcome("one", ok=False))
    assert rig.role._learner.lost == 1


async def half_open(rig: Rig, *endpoints: str) -> None:
    """Let these fail until their circuits open, and the cooldown go by."""
    for endpoint in endpoints:
        await end_calls(rig, *[Outcome(endpoint, ok=False)] * 5)
        await age_circuit(rig.ctx.state, endpoint, 30_000)
    await rig.ctx.state._poll()


async def test_after_the_cooldown_one_request_a_second_tries_first(rig):
    """S1-C2e: the endpoint that is half open is first for one, last for the others; nobody waits for it."""
    await half_open(rig, "one")
    plans = []
    for _ in range(20):
        rig.to_role(route())
        plans.append(decode_call(await rig.next_forwarded()).plan.steps)
    assert plans == [(ONE, TWO), *[(TWO, ONE)] * 19]


async def test_only_half_open_circuits_and_somebody_else_s_turn_is_503(rig):
    """S1-C2a, faults 95: of a herd that comes back at once one goes on; the others are told to wait a second."""
    await half_open(rig, "one", "two")
    for _ in range(30):
        rig.to_role(route(rid=secrets.token_hex(16)))
    failed = [await rig.next_failed() for _ in range(28)]
    assert {(each.error.status, each.error.code, each.error.retry_after_ms) for each in failed} == {
        (503, "circuit_open", 1000)
    }
    plans = [decode_call(await rig.next_forwarded()).plan.steps for _ in range(2)]
    assert plans == [(ONE, TWO), (TWO, ONE)]
    assert rig.forwarded.empty()


async def test_a_probe_s_outcome_moves_the_circuit(rig):
    """S1-C2d: only the one that carries the id; what the version before sends is an ordinary call."""
    await half_open(rig, "one")
    assert await rig.ctx.state.circuits.claim("one", "p1")
    await end_calls(rig, Outcome("one", ok=True), Outcome("one", ok=True, probe="p2"))
    assert rig.ctx.state.circuits.look("one").probes == ("p1",)
    await end_calls(rig, Outcome("one", ok=False, probe="p1", verdict=False))
    assert rig.ctx.state.circuits.look("one").probes == ()
    assert await rig.ctx.state.circuits.claim("one", "p3")
    await end_calls(rig, Outcome("one", ok=False, probe="p3"))
    rig.to_role(route())
    assert decode_call(await rig.next_forwarded()).plan.steps == (TWO,)
    await age_circuit(rig.ctx.state, "one", 60_000)
    assert await rig.ctx.state.circuits.claim("one", "p4")
    await end_calls(rig, Outcome("one", ok=True, probe="p4"))
    assert rig.ctx.state.circuits.look("one") is None
    shown = rig.ctx.metrics.render().decode()
    assert 'hotpath_circuit_state{endpoint="one"} 0.0' in shown
    assert 'hotpath_circuit_changes_total{endpoint="one",state="open"} 2.0' in shown


async def test_what_a_provider_decided_is_told_to_all(rig):
    """It told Redis itself (a frozen routing process would not); with its outcome here, every process hears of it."""
    told = asyncio.Event()
    await rig.outside.subscribe(subjects.NOTICE_CIRCUIT, lambda *_: told.set())
    await half_open(rig, "one")
    assert await rig.ctx.state.circuits.claim("one", "p1")
    assert await rig.ctx.state.circuits.record("one", [("probe_good", "p1")]) == "closed"
    told.clear()
    await end_calls(rig, Outcome("one", ok=True))
    assert not told.is_set()
    await end_calls(rig, Outcome("one", ok=True, probe="p1"))
    assert told.is_set()


async def test_outcomes_between_versions():
    """A rolling update: the older reader ignores what was appended, the newer one has its defaults."""

    class Older(Struct, frozen=True, array_like=True):
        endpoint: str
        ok: bool

    new = msgspec.msgpack.encode(Outcome("one", ok=False, probe="p", verdict=False))
    assert msgspec.msgpack.decode(new, type=Older) == Older("one", ok=False)  # keeps it open
    old = msgspec.msgpack.encode(Older("one", ok=True))
    assert msgspec.msgpack.decode(old, type=Outcome) == Outcome("one", ok=True, probe="", verdict=True)


@given(st.lists(st.integers(0, 5000), max_size=60))
def test_turns_are_a_second_apart(waits):
    """Whatever the times: one a second, and always one after a second without."""
    turns, now, last = Turns(), 10**12, None
    for wait in waits:
        now += wait
        granted = turns.take("one", now)
        assert granted == (last is None or now - last >= 1000)
        last = now if granted else last
    assert turns.take("two", now)
    assert turns.take("two", now - 3_600_000), "the clock was set back"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30))
def test_by_endpoint_keeps_the_order(calls):
    outcomes = Outcomes(calls=tuple(Outcome(endpoint, ok) for endpoint, ok in calls))
    found = learn.by_endpoint(outcomes, frozenset("ab"))
    assert found == {
        each: [("good" if ok else "failed", "") for endpoint, ok in calls if endpoint == each]
        for each in "ab"
        if each in dict(calls)
    }


def test_a_probe_id_that_cannot_be_one_touches_nothing():
    outcomes = Outcomes(calls=tuple(Outcome("a", True, probe) for probe in ("x y", "x" * 65, "\n", "fine")))
    assert learn.by_endpoint(outcomes, frozenset("a")) == {"a": [("probe_good", "fine")]}
