"""A stream whose output passes what is reserved: more is asked of the real ledger, or it ends legally (DESIGN 4, I1,
I2; acceptance 4). The simulator writes on past its cap and bills it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from shared.state.base import Extended, StateUnavailable
from shared.wire.messages import Ask, Step
from tests.workers.provider.rig import Answer, Rig, running

INPUT = 15_000  # nano-USD of the rig's bound of 100 input tokens
TOKEN = 600  # of one output token
SIXTY = INPUT + 60 * TOKEN
READ = 40  # tokens of one upstream read: 8192 bytes, of events of 215
PACED = "[[sim chunks=%d pace=1 ignore_cap=1]]"
TOOL = {
    "type": "function",
    "function": {
        "name": "fill",
        "parameters": {"type": "object", "properties": {f"field_{n}": {"type": "string"} for n in range(60)}},
    },
}


@contextlib.asynccontextmanager
async def limited(rig: Rig, left: int) -> AsyncIterator[None]:
    """So much is left of the tenant's lifetime."""
    ledger = rig.ctx.state.ledger
    [used] = [level for level in await ledger.balances(tenant="default") if level.period == "lifetime"]
    limit = used.settled + used.pending + used.unconfirmed + left
    await ledger.set_limit(tenant="default", period="lifetime", limit=limit)
    try:
        yield
    finally:
        await ledger.set_limit(tenant="default", period="lifetime", limit=None)


def slices(rig: Rig) -> list[int]:
    """Notes what each extend asks for in all."""
    asked: list[int] = []
    ledger = rig.provider.ledger
    extend = ledger.extend

    async def noting(**given: Any) -> Extended:
        asked.append(given["total"])
        return await extend(**given)

    ledger.extend = noting  # type: ignore[method-assign]
    return asked


def away(rig: Rig, error: type[StateUnavailable] = StateUnavailable) -> None:
    """The ledger answers no extend."""

    async def silent(**_given: Any) -> Extended:
        raise error("no answer")

    rig.provider.ledger.extend = silent  # type: ignore[method-assign]


async def cut(rig: Rig, request: Ask) -> tuple[Answer, dict[str, Any]]:
    """The answer of a stream that was cut, and its line of the bill: settled at no less, marked, and told so."""
    answer = await rig.answer(request)
    assert await rig.sim("GET", "wait", in_flight=0)
    [line] = await rig.bill(request.rid)
    [entry] = await rig.settled(request.rid)
    summary = answer.end.summary
    assert (entry.state, entry.cost, entry.estimated) == ("settled", summary.cost, True)
    assert summary.settled
    assert line["cost_nano_usd"] <= entry.cost
    [payload] = [chunk["x_br"] for chunk in answer.chunks() if "x_br" in chunk]
    assert (payload["cut"], payload["estimated"]) == ("budget", True)
    assert payload["actual_cost_nano_usd"] == entry.cost
    return answer, line


# ---- more is asked for -----------------------------------------------------------------------------------------------


async def test_more_is_reserved_as_it_streams(valkey_url: str) -> None:
    """Ten times what was reserved, in slices of 256 tokens: exact, nothing cut, no overrun."""
    async with running(valkey_url, BUDGET_MIN_RESERVATION_USD="0.00001") as rig:
        asked = slices(rig)
        request = await rig.send(PACED % 600, cap=50, amount=SIXTY)
        answer = await rig.answer(request)
        [line] = await rig.bill(request.rid)
        [entry] = await rig.entries(request.rid)
        assert len(answer.text().split()) == line["output_tokens"] == 600
        assert answer.chunks()[-1]["choices"][0]["finish_reason"] == "stop"
        assert "cut" not in answer.chunks()[-1]["x_br"]
        assert (entry.cost, entry.estimated) == (line["cost_nano_usd"], False)
        assert 3 <= len(asked) <= 4
        assert asked == sorted(asked)
        assert (entry.amount, entry.cost <= entry.amount) == (asked[-1], True)
        assert rig.provider._counters.overruns._value.get() == 0


async def test_within_its_reservation_nothing_is_asked(valkey_url: str) -> None:
    """By the money, not by the cap: a floor that pays for more than the cap is no reason to ask."""
    async with running(valkey_url) as rig:
        asked = slices(rig)
        request = await rig.send(PACED % 200, cap=50)
        assert len((await rig.answer(request)).text().split()) == 200
        free = await rig.send("[[sim chunks=400 ignore_cap=1]]", reserved=False, amount=0)
        assert len((await rig.answer(free)).text().split()) == 400
        whole = await rig.send("[[sim chunks=400 ignore_cap=1]]", stream=False, amount=SIXTY)
        assert (await rig.answer(whole)).end
        [entry] = await rig.entries(whole.rid)
        assert entry.cost > entry.amount == SIXTY
        assert asked == []
        assert rig.provider._counters.overruns._value.get() == 1


# ---- denied ----------------------------------------------------------------------------------------------------------


async def test_denied_it_ends_as_at_its_cap(valkey_url: str) -> None:
    """The rest of the budget is used up, then: finish_reason, usage, the note; the bill passes it by a read at most."""
    async with running(valkey_url, BUDGET_MIN_RESERVATION_USD="0.00001") as rig:
        async with limited(rig, SIXTY + 300 * TOKEN):
            asked = slices(rig)
            request = await rig.send(PACED % 3000, cap=50, amount=SIXTY, hard=True, include_usage=True)
            answer, line = await cut(rig, request)
        text = len(answer.text().split())
        assert 360 <= text <= line["output_tokens"] <= 360 + READ
        *_, last, usage = answer.chunks()
        assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
        assert last["usage"] is None
        assert "x_br" in last
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] >= line["output_tokens"]
        assert len({(chunk["id"], chunk["model"], chunk["created"]) for chunk in answer.chunks()}) == 1
        assert SIXTY + 256 * TOKEN < asked[0] <= SIXTY + (256 + READ) * TOKEN
        assert SIXTY + 300 * TOKEN in asked
        assert answer.end.summary.cost <= SIXTY + (300 + READ) * TOKEN
        assert rig.outcomes == []  # it says nothing of the endpoint


@pytest.mark.parametrize("interleave", [0, 1])
async def test_open_tool_calls_and_choices_end_too(valkey_url: str, interleave: int) -> None:
    """What OpenAI does at a cap: the arguments so far, and "length"; each choice that is open ends."""
    async with running(valkey_url, BUDGET_MIN_RESERVATION_USD="0.00001") as rig:
        prompt = f"[[sim tools=2 pace=1 ignore_cap=1 interleave={interleave}]]"
        async with limited(rig, SIXTY):
            request = await rig.send(
                prompt, steps=(Step("sim", "sim-tools"),), amount=SIXTY, hard=True, extra={"tools": [TOOL]}
            )
            answer, _ = await cut(rig, request)
        chunks = answer.chunks()
        assert chunks[-1]["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
        parts = [c for chunk in chunks for choice in chunk["choices"] for c in choice["delta"].get("tool_calls") or ()]
        arguments = "".join(part["function"]["arguments"] for part in parts if part["index"] == 0)
        assert arguments.startswith('{"field_0":')
        with pytest.raises(orjson.JSONDecodeError):
            orjson.loads(arguments)

        async with limited(rig, SIXTY):
            request = await rig.send(PACED % 100, amount=SIXTY, hard=True, extra={"n": 3}, n=3)
            answer, _ = await cut(rig, request)
        ends = [c for chunk in answer.chunks() for c in chunk["choices"] if c["finish_reason"]]
        assert ends == [{"index": index, "delta": {}, "finish_reason": "length"} for index in range(3)]


# ---- the ledger does not answer --------------------------------------------------------------------------------------


async def test_without_an_answer_a_hard_limit_cuts(valkey_url: str) -> None:
    """D4: a tenant with a hard limit fails closed, in mid-stream too."""
    async with running(valkey_url) as rig:
        away(rig)
        answer, line = await cut(rig, await rig.send(PACED % 3000, amount=SIXTY, hard=True))
        assert 60 <= len(answer.text().split()) <= line["output_tokens"] <= 60 + READ


async def test_without_an_answer_others_go_on(valkey_url: str) -> None:
    """D4: no hard limit: unmetered from then on, settled in full, an overrun."""
    async with running(valkey_url) as rig:
        away(rig)
        request = await rig.send(PACED % 400, amount=SIXTY)
        assert len((await rig.answer(request)).text().split()) == 400
        [line] = await rig.bill(request.rid)
        [entry] = await rig.entries(request.rid)
        assert (entry.cost, entry.estimated) == (line["cost_nano_usd"], False)
        assert rig.provider._counters.overruns._value.get() == 1


async def test_a_client_that_leaves_while_the_ledger_is_asked(valkey_url: str) -> None:
    """Settled once, at no less than the bill, and nothing is left open."""
    async with running(valkey_url) as rig:
        asking, answered = asyncio.Event(), asyncio.Event()

        async def slow(**_given: Any) -> Extended:
            asking.set()
            await answered.wait()
            return Extended(status="denied")

        rig.provider.ledger.extend = slow  # type: ignore[method-assign]
        request = await rig.send(PACED % 3000, amount=SIXTY, hard=True)
        await asyncio.wait_for(asking.wait(), 5)
        rig.asker.cancel(request.reply.stream)
        assert await rig.sim("GET", "wait", in_flight=0)
        answered.set()
        [entry] = await rig.settled(request.rid)
        [line] = await rig.bill(request.rid)
        assert line["cost_nano_usd"] <= entry.cost
        assert line["output_tokens"] <= 60 + READ
