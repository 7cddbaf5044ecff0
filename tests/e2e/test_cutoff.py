"""Acceptance 4: a provider that ignores its cap, and a budget that ends in mid-stream: the official client sees a legal
end, the bill passes the limit by one upstream read at most (DESIGN 4, I1, I2)."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import openai
import redis
from msgspec import Struct
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from tests.e2e.books import OUTPUT_NANO, entries, settled_level
from tests.e2e.rig import Up
from tests.e2e.sim import Sim

#: Tokens of one upstream read, at most: 8192 bytes (upstream.READ_BYTES), of events of 190 or more.
READ = 8192 // 190
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "fill",
        "parameters": {"type": "object", "properties": {f"field_{number}": {} for number in range(60)}},
    },
}


class Told(Struct):
    """What the client got."""

    chunks: list[ChatCompletionChunk]
    headers: Mapping[str, str]

    @property
    def rid(self) -> str:
        return self.headers["x-br-request-id"]


async def ask(up: Up, made: dict[str, Any], **body: Any) -> Told:
    """A stream, by the official client."""
    async with openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key=made["key"], max_retries=0, timeout=30) as client:
        stream = await client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
        return Told([chunk async for chunk in stream], stream.response.headers)


def said(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def journal(up: Up, made: dict[str, Any]) -> list[list[Any]]:
    """The tenant's journal, from Redis itself."""
    with redis.Redis.from_url(up.run["redis_url"]) as server:
        lines: Any = server.xrange(f"hp:{{{made['tenant_id']}}}:journal")
    return [msgspec.msgpack.decode(fields[b"l"]) for _, fields in lines]


async def check(up: Up, sim: Sim, made: dict[str, Any], told: Told, *, extends: bool) -> dict[str, Any]:
    """The end as the client saw it, and the money; the bill's line. `extends`: whether more was reserved in between."""
    rid, chunks = told.rid, told.chunks
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(chunk)
    assert {choice.finish_reason for choice in state.current_completion_snapshot.choices} == {"length"}
    *_, last, usage = chunks
    payload: dict[str, Any] = last.model_extra["x_br"] if last.model_extra else {}
    assert (payload["cut"], payload["estimated"]) == ("budget", True)
    row = await asyncio.to_thread(settled_level, up, made["tenant"], 5)
    assert await asyncio.to_thread(sim.wait, 5000, in_flight=0)
    [line] = await asyncio.to_thread(sim.lines, rid)
    entry = (await asyncio.to_thread(entries, up, made["tenant"]))[f"{rid}.1"]
    print(f"limit {row['limit']}, billed {line['cost_nano_usd']}, settled {entry.cost}, held {entry.amount}")
    assert entry.state == "settled"
    assert entry.cost == payload["actual_cost_nano_usd"] == row["settled"]
    assert row["limit"] - 2 * READ * OUTPUT_NANO <= line["cost_nano_usd"] <= entry.cost
    assert line["cost_nano_usd"] <= row["limit"] + READ * OUTPUT_NANO, "the bill passes the limit by more than a read"
    assert usage.usage is not None
    assert usage.usage.completion_tokens == payload["usage"]["output_tokens"] >= line["output_tokens"]
    ops = [each[0] for each in journal(up, made)]
    assert ("extend" in ops) == extends, ops
    assert ops[-1] == ("overrun" if entry.cost > entry.amount else "settle"), ops
    return line


async def test_a_text_and_tool_calls_end_as_at_their_cap(up: Up, sim: Sim, tenant: Callable[..., Any]) -> None:
    """0.003 USD are left. Two choices of 4000 tokens cost more: their cap is lowered, and ignored. The tool calls are
    reserved piece by piece, and end with the arguments so far."""
    texts, tools = await asyncio.gather(
        *(asyncio.to_thread(tenant, "--limit-usd", usd, "--period", "lifetime") for usd in ("0.003", "0.002"))
    )
    text, calls = await asyncio.gather(
        ask(
            up, texts, model="sim-fast", max_tokens=4000, n=2,
            messages=said("[[sim chunks=5000 pace=1 burst=30 ignore_cap=1]]"),
        ),
        ask(
            up, tools, model="sim-tools", max_tokens=100, tools=[TOOL],
            messages=said("[[sim tools=20 pace=1 ignore_cap=1]]"),
        ),
    )  # fmt: skip
    line = await check(up, sim, texts, text, extends=False)
    assert line["cost_nano_usd"] > 3_000_000, "a read of 30 tokens ends 19 past what is paid for: an overrun"
    assert 2400 < int(text.headers["x-br-max-tokens-clamped"]) < 2500
    written = "".join(choice.delta.content or "" for chunk in text.chunks for choice in chunk.choices)
    assert 4900 < len(written.split()) <= line["output_tokens"]

    await check(up, sim, tools, calls, extends=True)
    parts = [part for chunk in calls.chunks for choice in chunk.choices for part in choice.delta.tool_calls or ()]
    assert {part.index for part in parts} == set(range(max(part.index for part in parts) + 1))
    assert all(part.function is not None for part in parts)
