"""The one probe of a half open circuit (S1-C2a..e): who may call, what it costs the others, when it is decided."""

import asyncio
import secrets
from collections.abc import AsyncIterator

import pytest

from shared.core.circuit import CLOSED, Circuit, state
from shared.state import circuits
from shared.state.base import StateUnavailable
from shared.wire import headers
from shared.wire.messages import Outcome, Step
from tests.state.rig import age_circuit
from tests.workers.provider.rig import Rig, running

SIM, TWO, GONE = Step("sim", "sim-fast"), Step("two", "sim-fast"), Step("gone", "sim-fast")
PACED = Step("sim", "sim-paced")
COOLDOWN = 30_000


@pytest.fixture
async def rig(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(circuits, "_CLAIM_TIMEOUT", 5.0)  # a busy machine is not what these tests are about
    async with running(valkey_url) as started:
        await started.ctx.state._hot.execute(b"DEL", b"hp:{circuits}", within=1)
        await started.ctx.state._poll()
        yield started
        await started.ctx.state._hot.execute(b"DEL", b"hp:{circuits}", within=1)


async def broken(rig: Rig, *endpoints: str, half_open: bool = True) -> None:
    """Their circuits are open, or half open."""
    for endpoint in endpoints:
        await rig.ctx.state.circuits.record(endpoint, [("failed", "")] * 5)
        if half_open:
            await age_circuit(rig.ctx.state, endpoint, COOLDOWN)
    await rig.ctx.state._poll()


def circuit(rig: Rig, endpoint: str = "sim") -> Circuit | None:
    return rig.ctx.state.circuits.look(endpoint)


async def became(rig: Rig, wanted: str) -> None:
    """The provider itself has told Redis: no routing runs here."""
    async with asyncio.timeout(3):
        while True:
            found = (await rig.ctx.state.circuits.all()).get("sim", CLOSED)
            if state(found, rig.ctx.state.clock.now()) == wanted:
                return
            await asyncio.sleep(0.005)


async def told(rig: Rig, count: int = 1) -> list[Outcome]:
    """What the breakers heard, when it is so many."""
    async with asyncio.timeout(3):
        while len(rig.outcomes) < count:
            await asyncio.sleep(0.005)
    return rig.outcomes


async def calls(rig: Rig) -> int:
    """What the simulator saw."""
    return int((await rig.sim("GET", "stats"))["calls"])


async def test_of_many_requests_one_is_the_probe(rig: Rig) -> None:
    """S1-C2a: the others make no call, are settled at 0 and told to come back (>= 1 s)."""
    await broken(rig, "sim")
    await rig.fault({"delay_ms": 1500})
    requests = [await rig.send("[[sim chunks=3]]", stream=False) for _ in range(20)]
    answers = [await rig.answer(request) for request in requests]
    served = [answer for answer in answers if not hasattr(answer.terminal, "error")]
    assert len(served) == 1
    assert await calls(rig) == 1
    for request, answer in zip(requests, answers, strict=True):
        if answer in served:
            continue
        error = answer.failed.error
        assert (error.status, error.code) == (503, "circuit_open")
        assert 1000 <= error.retry_after_ms <= 5000
        assert answer.head[headers.BR_CALLS] == "0"
        assert [entry.cost for entry in await rig.settled(request.rid)] in ([0], [])
    [outcome] = await told(rig)
    assert (outcome.endpoint, outcome.ok, outcome.verdict) == ("sim", True, True)
    assert len(outcome.probe) == 32
    await became(rig, "closed")


async def test_denied_means_the_next_step(rig: Rig) -> None:
    """Somebody else is probing: the next endpoint serves, as call 1; nothing was asked of the first."""
    await broken(rig, "sim")
    rid = secrets.token_hex(16)
    look = rig.ctx.state.circuits.look
    before = look("sim")
    assert await rig.ctx.state.circuits.claim("sim", "another")
    assert before is not None
    rig.ctx.state.circuits._known["sim"] = before  # this process has not heard of that claim
    request = await rig.send("[[sim chunks=3]]", steps=(SIM, TWO), rid=rid)
    answer = await rig.answer(request)
    assert (answer.end.summary.endpoint, answer.end.summary.call) == ("two", 1)
    assert answer.head[headers.BR_CALLS] == "1"
    [line] = await rig.bill(rid)
    assert [entry.cost for entry in await rig.settled(rid)] == [line["cost_nano_usd"]]


async def test_an_open_circuit_is_no_call_and_no_claim(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """S2-21: routing planned with older knowledge; the reservation is given back."""
    await broken(rig, "sim", half_open=False)
    monkeypatch.setattr(rig.ctx.state.circuits, "claim", None)
    request = await rig.send("[[sim chunks=3]]")
    error = (await rig.answer(request)).failed.error
    assert error.code == "circuit_open"
    assert 25_000 < error.retry_after_ms <= COOLDOWN
    assert [entry.state for entry in await rig.settled(request.rid)] == ["voided"]
    assert (await rig.answer(await rig.send("[[sim chunks=3]]", steps=(SIM, TWO)))).end.summary.endpoint == "two"


async def test_no_retry_where_the_circuit_has_opened(valkey_url: str, rig: Rig) -> None:
    """The second try of a request is not made when the circuit opened after the first: the client gets its error."""
    async with running(valkey_url, ROUTING_RETRY_BACKOFF_MS="1000") as patient:
        await patient.fault({"status": 503}, times=9)
        request = await patient.send("[[sim chunks=3]]", max_calls=3)
        await told(patient)
        await broken(patient, "sim", half_open=False)
        error = (await patient.answer(request)).failed.error
        assert (error.status, error.code) == (502, "upstream_error")
        assert await calls(patient) == 1
        assert [entry.cost for entry in await patient.settled(request.rid)] == [0, 0]


async def test_a_stream_s_probe_is_decided_at_its_first_token(rig: Rig) -> None:
    """A long stream must not hold the circuit half open; and the verdict does not wait for the batch."""
    await broken(rig, "sim")
    request = await rig.send("[[sim chunks=2000 pace=20]]", steps=(PACED,))
    [verdict] = await told(rig)
    assert (verdict.ok, verdict.verdict, len(verdict.probe)) == (True, True, 32)
    await became(rig, "closed")
    rig.asker.cancel(request.reply.stream)
    assert (await rig.settled(request.rid))[0].estimated
    assert len(rig.outcomes) == 1, "a cancel says nothing"


async def test_a_stream_that_breaks_later_counts_as_any_call(rig: Rig) -> None:
    await broken(rig, "sim")
    await rig.fault({"cut_after": 3, "cut": "clean"})
    assert (await rig.answer(await rig.send("[[sim chunks=40 pace=3]]", steps=(PACED,)))).failed
    first, second = await told(rig, 2)
    assert (first.ok, bool(first.probe)) == (True, True)
    assert (second.ok, second.probe) == (False, "")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("fault", "ok"), [({"status": 500}, False), ({"drop": True}, False), ({}, True)])
async def test_a_verdict_at_the_end(rig: Rig, stream: bool, fault: dict[str, object], ok: bool) -> None:
    """Failed before its first token, or a whole answer; the next endpoint serves."""
    await broken(rig, "sim")
    if fault:
        await rig.fault(fault, endpoint="default")
    answer = await rig.answer(await rig.send("[[sim chunks=3]]", stream=stream, steps=(SIM, TWO)))
    assert answer.end.summary.endpoint == ("sim" if ok else "two")
    verdict = (await told(rig))[0]
    assert (verdict.endpoint, verdict.ok, verdict.verdict, bool(verdict.probe)) == ("sim", ok, True, True)
    await became(rig, "closed" if ok else "open")


@pytest.mark.parametrize("fault", [{"status": 429, "retry_after": 5}, {"status": 400}])
async def test_a_429_says_nothing_about_the_circuit(rig: Rig, fault: dict[str, object]) -> None:
    """decisions/0011; the probe is given back, so that a client with a bad request cannot keep the circuit open."""
    await broken(rig, "sim")
    await rig.fault(fault)
    assert (await rig.answer(await rig.send("[[sim chunks=3]]"))).failed.error.status == fault["status"]
    [verdict] = await told(rig)
    assert (verdict.ok, verdict.verdict) == (False, False)
    await became(rig, "half_open")


async def test_a_429_of_an_ordinary_call_is_not_told_at_all(rig: Rig) -> None:
    await rig.fault({"status": 429, "retry_after": 5})
    assert (await rig.answer(await rig.send("[[sim chunks=3]]"))).failed.error.status == 429
    assert (await rig.answer(await rig.send("[[sim chunks=3]]"))).end
    assert [outcome.ok for outcome in await told(rig)] == [True]


async def test_a_client_that_leaves_gives_the_probe_back(rig: Rig) -> None:
    await broken(rig, "sim")
    await rig.fault({"delay_ms": 5000})
    request = await rig.send("[[sim chunks=3]]")
    async with asyncio.timeout(3):
        while not (found := circuit(rig)) or not found.probes:
            await asyncio.sleep(0.005)
    rig.asker.cancel(request.reply.stream)
    [verdict] = await told(rig)
    assert (verdict.verdict, verdict.probe) == (False, found.probes[0])
    await became(rig, "half_open")


async def test_without_redis_no_probe_is_made(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN 5: the last known snapshot rules; a claim that may stand is given back."""
    await broken(rig, "sim")

    async def claim(_endpoint: str, _probe: str) -> bool:
        raise StateUnavailable("away")

    monkeypatch.setattr(rig.ctx.state.circuits, "claim", claim)
    answer = await rig.answer(await rig.send("[[sim chunks=3]]", reserved=False))
    assert (answer.failed.error.code, answer.failed.error.retry_after_ms) == ("circuit_open", 1000)
    assert await calls(rig) == 0
    [verdict] = await told(rig)
    assert not verdict.verdict
    assert 'hotpath_circuit_probes_total{endpoint="sim",result="unavailable"} 1.0' in rig.ctx.metrics.render().decode()


async def test_another_s_probe_went_well_meanwhile(rig: Rig) -> None:
    """This process has yet to hear that the circuit is closed: the claim says so, and the call is an ordinary one."""
    await broken(rig, "sim")
    old = circuit(rig)
    assert old is not None
    await rig.ctx.state.circuits.claim("sim", "another")
    await rig.ctx.state.circuits.record("sim", [("probe_good", "another")])
    rig.ctx.state.circuits._known["sim"] = old
    assert (await rig.answer(await rig.send("[[sim chunks=3]]"))).end
    [outcome] = await told(rig)
    assert (outcome.ok, outcome.probe) == (True, "")
