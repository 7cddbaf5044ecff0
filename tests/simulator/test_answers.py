"""What the simulator answers, and that its bill says the same (issue 2, section 5; I12)."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from rs_bpe.bpe import openai

from deploy.simulator import words
from deploy.simulator.bill import Price, cost, prompt_tokens
from tests.simulator.asking import Simulator, body, called, chunks, spoken

ENCODING = openai.o200k_base()
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "größe": {"type": "integer"}}},
        },
    }
    for name in ("find", "measure_everything")
]


@pytest.fixture
async def simulator(simulator_process: str) -> AsyncIterator[Simulator]:
    async with aiohttp.ClientSession() as session:
        one = Simulator(simulator_process, session)
        await one.post("/_sim/reset")
        yield one


@pytest.mark.parametrize("mixed", [False, True])
def test_every_word_is_one_token(mixed: bool) -> None:
    """The bill counts chunks; that must be what a tokenizer counts, wherever the text was cut."""
    for word in words.MIXED if mixed else words.PLAIN:
        assert len(ENCODING.encode(" " + word)) == 1, word
    text = words.text(5, 400, mixed=mixed)
    for cut in (1, 7, 399, 400):
        assert ENCODING.count("".join(text[:cut])) == cut


def test_the_prompt_is_counted_by_the_published_rule() -> None:
    """OpenAI cookbook: 3 a message, role, content, name + 1, 3 for the reply; tool calls and tools as documented."""
    plain = {"messages": [{"role": "user", "content": "hello world"}]}
    assert prompt_tokens(plain) == 3 + 3 + 1 + 2
    named = {"messages": [{"role": "user", "name": "ann", "content": [{"type": "text", "text": "hello world"}]}]}
    assert prompt_tokens(named) == prompt_tokens(plain) + 1 + ENCODING.count("ann")
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"a":1}'}}
    agent = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert prompt_tokens(agent) == 3 + 3 + 1 + ENCODING.count("find") + ENCODING.count('{"a":1}')
    tools = json.dumps(TOOLS, separators=(",", ":"), ensure_ascii=False)
    assert prompt_tokens({**plain, "tools": TOOLS}) == prompt_tokens(plain) + ENCODING.count(tools)


async def test_a_cap_can_be_ignored(simulator: Simulator) -> None:
    """A provider that generates past max_tokens bills what it wrote."""
    asked = body("[[sim chunks=30 ignore_cap=1]]", max_tokens=5)
    answer = await simulator.whole(asked)
    assert answer["usage"]["completion_tokens"] == 30
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert [line["output_tokens"] for line in await simulator.lines()] == [30]


def test_the_cost_is_rounded_up_once() -> None:
    assert cost(Price(150_000_000, 75_000_000, 600_000_000), 10, 4, 3) == 6 * 150 + 4 * 75 + 3 * 600
    assert cost(Price(1, 1, 1), 1, 0, 1) == 1
    assert cost(Price(0, 0, 0), 10**9, 0, 10**9) == 0


async def test_a_whole_answer_and_its_line(simulator: Simulator) -> None:
    answer = await simulator.whole(body("Hi [[sim chunks=9 seed=3]]"), "r.1")
    message = answer["choices"][0]["message"]
    assert message["content"] == "".join(words.text(3, 9))
    assert answer["choices"][0]["finish_reason"] == "stop"
    line = await simulator.line()
    assert time.time() * 1000 - 60_000 < line.pop("at_ms") <= line.pop("ended_ms") <= time.time() * 1000
    usage = answer["usage"]
    assert line == {
        "request_id": "r.1",
        "model": "sim-fast",
        "endpoint": "default",
        "input_tokens": usage["prompt_tokens"],
        "cached_tokens": 0,
        "output_tokens": 9,
        "cost_nano_usd": usage["prompt_tokens"] * 150 + 9 * 600,
        "complete": True,
        "usage_sent": True,
        "stream": False,
    }
    assert usage["total_tokens"] == usage["prompt_tokens"] + 9


async def test_the_same_request_gives_the_same_bytes(simulator: Simulator) -> None:
    """I12; and another prompt gives another text."""
    wish = body("Hi", stream=True)
    first = await simulator.raw(wish, "r.1")
    assert await simulator.raw(wish, "r.1") == first
    assert spoken(chunks(await simulator.raw(body("Ho", stream=True)))) != spoken(chunks(first))


@pytest.mark.parametrize("include_usage", [False, True])
async def test_the_grammar_of_a_stream(simulator: Simulator, include_usage: bool) -> None:
    """OpenAI API reference, "Streaming": role, content, finish; usage last and null before, only when asked for."""
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    events = chunks(await simulator.raw(body("Hi [[sim chunks=5 seed=1]]", stream=True, **options), "r.1"))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    said = events[1:6]
    assert [event["choices"][0]["delta"] for event in said] == [{"content": word} for word in words.text(1, 5)]
    assert events[6]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all(event["choices"][0]["finish_reason"] is None for event in events[:6])
    if include_usage:
        assert all(event["usage"] is None for event in events[:7])
        assert events[7]["choices"] == []
        assert events[7]["usage"]["completion_tokens"] == 5
    assert len(events) == 7 + include_usage
    assert all("usage" not in event for event in events) is not include_usage
    line = await simulator.line()
    assert (line["output_tokens"], line["complete"], line["usage_sent"]) == (5, True, include_usage)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(("cap", "finish"), [(3, "length"), (5, "stop")])
async def test_the_cap_holds(simulator: Simulator, field: str, cap: int, finish: str) -> None:
    wish = body("Hi [[sim chunks=5]]", **{field: cap})
    whole = (await simulator.whole(wish))["choices"][0]
    events = chunks(await simulator.raw({**wish, "stream": True}))
    assert whole["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == finish
    assert ENCODING.count(whole["message"]["content"]) == cap
    assert spoken(events) == whole["message"]["content"]


async def test_several_choices_are_interleaved_and_all_billed(simulator: Simulator) -> None:
    events = chunks(await simulator.raw(body("Hi [[sim chunks=4 seed=2]]", stream=True, n=3)))
    assert [event["choices"][0]["index"] for event in events[:9]] == [0, 1, 2] * 3
    assert [spoken(events, index) for index in range(3)] == ["".join(words.text(2 + i, 4)) for i in range(3)]
    assert (await simulator.line())["output_tokens"] == 12


@pytest.mark.parametrize("interleave", [0, 1])
async def test_parallel_tool_calls(simulator: Simulator, interleave: int) -> None:
    """Output tokens of a tool call: those of its name and of its arguments."""
    wish = body(f"Go [[sim tools=3 seed=4 interleave={interleave}]]", tools=TOOLS, n=1)
    whole = (await simulator.whole(wish, "w"))["choices"][0]
    events = chunks(await simulator.raw({**wish, "stream": True, "stream_options": {"include_usage": True}}, "s"))
    streamed = called(events)
    assert [call["name"] for call in streamed.values()] == ["find", "measure_everything", "find"]
    assert [
        {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in streamed.values()
    ] == whole["message"]["tool_calls"]
    assert all(set(json.loads(call["arguments"])) == {"place", "größe"} for call in streamed.values())
    tokens = sum(ENCODING.count(call["name"]) + ENCODING.count(call["arguments"]) for call in streamed.values())
    assert events[-1]["usage"]["completion_tokens"] == tokens
    assert [line["output_tokens"] for line in await simulator.lines()] == [tokens, tokens]
    assert whole["finish_reason"] == events[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_tool_calls_end_with_the_tools_answer_and_with_the_cap(simulator: Simulator) -> None:
    wish = body("Go", model="sim-tools", tools=TOOLS)
    first = (await simulator.whole(wish))["choices"][0]["message"]
    assert len(first["tool_calls"]) == 2
    answers = [{"role": "tool", "tool_call_id": call["id"], "content": "42"} for call in first["tool_calls"]]
    then = await simulator.whole({**wish, "messages": [*wish["messages"], first, *answers]})
    assert then["choices"][0]["finish_reason"] == "stop"
    short = (await simulator.whole({**wish, "max_tokens": 5}))["choices"][0]
    assert short["finish_reason"] == "length"
    assert (await simulator.lines())[-1]["output_tokens"] == 5
    alone = await simulator.whole({**wish, "parallel_tool_calls": False})
    assert len(alone["choices"][0]["message"]["tool_calls"]) == 1
    named = {"type": "function", "function": {"name": "measure_everything"}}
    chosen = (await simulator.whole({**wish, "tool_choice": named}))["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in chosen] == ["measure_everything"]


async def test_cached_tokens_cost_less(simulator: Simulator) -> None:
    usage = (await simulator.whole(body("Hi [[sim cached=6 chunks=1]]")))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 6
    line = await simulator.line()
    assert line["cost_nano_usd"] == (usage["prompt_tokens"] - 6) * 150 + 6 * 75 + 600


@pytest.mark.parametrize(
    ("wish", "status", "param"),
    [
        (body(model="gpt-nothing"), 404, "model"),
        ({"model": "sim-fast", "messages": []}, 400, "messages"),
        ({"model": "sim-fast", "messages": [1]}, 400, "messages[0]"),
        (body(max_tokens=0), 400, "max_tokens"),
        (body(max_tokens=True), 400, "max_tokens"),
        (body(max_tokens=4, max_completion_tokens=4), 400, "max_tokens"),
        (body(n=129), 400, "n"),
        (body(tools={"a": 1}), 400, "tools"),
        (body(tools=[{}]), 400, "tools[0]"),
        (body("[[sim chunk=3]]"), 400, "messages"),
    ],
)
async def test_a_wrong_request_is_refused_and_not_billed(
    simulator: Simulator, wish: dict[str, Any], status: int, param: str
) -> None:
    got, raw = await simulator.post("/v1/chat/completions", wish)
    assert (got, json.loads(raw)["error"]["param"]) == (status, param)
    assert await simulator.lines() == []
    assert (await simulator.get("/_sim/stats"))["refused"] == 1


async def test_endpoints_and_models(simulator: Simulator) -> None:
    """One process stands for several endpoints of a catalogue."""
    await simulator.post("/e/second/v1/chat/completions", body())
    assert (await simulator.line())["endpoint"] == "second"
    models = await simulator.get("/e/second/v1/models")
    assert [model["id"] for model in models["data"]] == ["sim-fast", "sim-paced", "sim-tools", "sim-free"]
