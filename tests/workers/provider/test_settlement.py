"""What a call is charged (I1, faults 77): never below the bill, and marked when counted by us."""

from typing import Any

import msgspec
import orjson
import pytest

from shared.core import tokens
from shared.core.translators.base import Usage
from shared.core.translators.openai import OpenAITranslator
from shared.wire.errors import UpstreamTruncated
from shared.wire.messages import Admission, Call, Plan, Price, Step
from tests.core.translating import ask, translator
from workers.provider import settlement
from workers.provider.ended import Ended
from workers.provider.settlement import ALLOWANCE, Charge

ADMISSION = Admission(
    reserved=True,
    amount=10**6,
    estimate=42_500,
    input_tokens=9,
    output_cap=100,
    price=Price(10**9, 10**9 // 2, 2 * 10**9),
)
STEP = Step("main", "real")
REQUEST = ask(orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}))
PROMPT = tokens.count_prompt(REQUEST.body, "o200k")
ERROR = UpstreamTruncated().body()


def said(*words: str, finish: bool = False, usage: str = "") -> OpenAITranslator:
    call = translator()
    call.feed(b'{"choices":[{"index":0,"delta":{"content":""}}]}')
    for word in words:
        call.feed(orjson.dumps({"choices": [{"index": 0, "delta": {"content": word}}]}))
    if finish:
        call.feed(b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}')
    if usage:
        call.feed(b'{"choices":[],"usage":' + usage.encode() + b"}")
    return call


GOOD = '{"prompt_tokens":50,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":10}}'


@pytest.mark.parametrize(
    ("call", "ended", "expected"),
    [
        (said(" a", finish=True, usage=GOOD), {}, (50, 10, 7, False)),
        (said(" a", finish=True, usage=GOOD), {"error": ERROR}, (50, 10, 7, False)),  # came in the drain
        (said(" a", " b", finish=True), {}, (PROMPT, 0, 2, True)),
        (
            said(" a", usage=GOOD),
            {"error": ERROR, "complete": True},
            (50, 10, 7, True),
        ),  # a running count is no bill, but the bill is not below it
        (said(*[" a"] * 9, usage=GOOD), {"error": ERROR}, (50, 10, 9 + ALLOWANCE, True)),
        (said(" a", finish=True, usage='{"prompt_tokens":5,"completion_tokens":0}'), {}, (PROMPT, 0, 1, True)),
        (said(finish=True, usage='{"prompt_tokens":5,"completion_tokens":0}'), {}, (5, 0, 0, False)),
        (said(" a", " b"), {"error": ERROR, "complete": True}, (PROMPT, 0, 2, True)),
        (said(" a", " b"), {"error": ERROR}, (PROMPT, 0, 2 + ALLOWANCE, True)),
        (said(*[" a"] * 90), {"error": ERROR}, (PROMPT, 0, 100, True)),  # up to the cap
        (said(*[" a"] * 120), {"error": ERROR}, (PROMPT, 0, 120 + ALLOWANCE, True)),  # the cap was ignored
        (said(" a"), {"error": ERROR, "readable": False}, (PROMPT, 0, 100, True)),
        (said(" a"), {"error": ERROR, "readable": False, "size": 40}, (PROMPT, 0, 40, True)),  # a token has a byte
        (said(" a"), {"error": ERROR, "readable": False, "size": 900}, (PROMPT, 0, 100, True)),
        (said(*"hello"), {"error": ERROR, "complete": True}, (PROMPT, 0, 5, True)),  # deltas, not tokens
        (said(" a"), {"error": ERROR, "billed": False}, (0, 0, 0, False)),
    ],
)
def test_the_table(call: OpenAITranslator, ended: dict[str, Any], expected: tuple[int, int, int, bool]) -> None:
    prompt, cached, output, estimated = expected
    found = settlement.charge(REQUEST, ADMISSION, STEP, call, Ended(**{"billed": True, **ended}), "o200k")
    cost = (prompt - cached) * 1000 + cached * 500 + output * 2000
    assert (found.cost, found.usage, found.estimated) == (cost, Usage(prompt - cached, cached, output), estimated)


@pytest.mark.parametrize(("hidden", "output"), [(0, 2), (30, 32), (1000, 100)])
def test_reasoning_that_was_not_shown_is_charged_by_the_time_it_ran(hidden: int, output: int) -> None:
    """I1: what was billed and not shown cannot be counted; the cap bounds it. Usage, when there is any, is the bill."""
    cut = Ended(error=ERROR, billed=True, complete=True)
    found = settlement.charge(REQUEST, ADMISSION, STEP, said(" a", " b"), cut, "o200k", hidden)
    assert (found.usage.output_tokens, found.estimated) == (output, True)
    ended_well = settlement.charge(
        REQUEST, ADMISSION, STEP, said(" a", finish=True, usage=GOOD), Ended(billed=True), "o200k", hidden
    )
    assert (ended_well.usage.output_tokens, ended_well.estimated) == (7, False)


def test_head_and_payload() -> None:
    """D12, and the shape of D5's payload."""
    assert settlement.head(ADMISSION, STEP, 2, 28_000_000, 0.87) == {
        "X-BR-Guardian-Status": "on",
        "X-BR-Estimated-Cost": "$0.0000425",
        "X-BR-Guardian-Overhead-Ms": "0.0",
        "X-BR-Calls": "2",
        "X-BR-Endpoint": "main",
        "X-BR-Actual-Cost": "$0.028",
        "X-BR-Efficiency": "0.87",
    }
    found = orjson.loads(
        settlement.payload(REQUEST, ADMISSION, STEP, 2, Charge(28_000_000, Usage(4, 1, 2), estimated=True), 0.5)
    )
    assert found == {
        "request_id": "0" * 32, "guardian": "on", "estimated_cost": "$0.0000425", "actual_cost": "$0.028",
        "actual_cost_nano_usd": 28_000_000, "efficiency": 0.5,
        "overhead_ms": 0.0, "endpoint": "main", "model": "real", "calls": 2,
        "usage": {"input_tokens": 5, "cached_tokens": 1, "output_tokens": 2}, "estimated": True,
    }  # fmt: skip


def test_the_endpoints_own_price_and_the_providers_own_words() -> None:
    """I1: a fallback that charges less is billed at less; what the provider said is kept, believed or not."""
    admission = msgspec.structs.replace(ADMISSION, prices={"main": Price(10**8, 10**8, 10**8)})
    well = Ended(billed=True)
    found = settlement.charge(REQUEST, admission, STEP, said(" a", finish=True, usage=GOOD), well, "o200k")
    assert found.cost == 57 * 100
    assert orjson.loads(found.raw) == orjson.loads(GOOD)
    other = settlement.charge(REQUEST, admission, Step("b", "m"), said(" a", finish=True, usage=GOOD), well, "o200k")
    assert other.cost == 40_000 + 5000 + 14_000
    bad = settlement.charge(
        REQUEST, admission, STEP, said(" a", finish=True, usage='{"prompt_tokens":-1}'), well, "o200k"
    )
    assert (bad.estimated, bad.raw) == (True, b'{"prompt_tokens":-1}')


def test_usage_that_contradicts_itself_is_marked() -> None:
    """Faults 77: reconcile may correct it."""
    usage = '{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":9}}'
    found = settlement.charge(
        REQUEST, ADMISSION, STEP, said(" a", finish=True, usage=usage), Ended(billed=True), "o200k"
    )
    assert (found.estimated, found.usage.input_tokens) == (True, 5)


def test_efficiency_of_a_dear_endpoint_and_of_a_bad_answer() -> None:
    """D13: quality x what the cheapest endpoint of the Plan would have taken."""
    plan = Plan(steps=(STEP, Step("b", "m")), max_calls=2)
    admission = msgspec.structs.replace(ADMISSION, prices={"b": Price(10**8, 10**8, 10**9)})
    message = Call(ask=REQUEST, admission=admission, plan=plan)
    call = said(" a", finish=True, usage='{"prompt_tokens":10,"completion_tokens":10}')
    paid = settlement.charge(REQUEST, admission, STEP, call, Ended(billed=True), "o200k")
    assert settlement.efficiency(message, call, paid) == round(11 / 30, 2)
    assert settlement.efficiency(msgspec.structs.replace(message, admission=ADMISSION), call, paid) == 1.0
    assert settlement.efficiency(message, said(finish=True), paid) == 0.0
