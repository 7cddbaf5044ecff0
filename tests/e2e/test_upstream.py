"""An upstream that misbehaves, seen from the client, through real processes (faults 61..69, DESIGN 4 and 5)."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from tests.e2e.books import Entry, entries
from tests.e2e.drive import Client, session
from tests.e2e.rig import Up
from tests.e2e.sim import Sim
from tests.interop.target import Target, says, with_v1

COMMIT_MS, COOLDOWN_MS, IDLE_MS = 300, 1500, 1200

ENDPOINT = """
[[endpoints]]
id = "{name}"
provider = "openai"
base_url = "{url}/e/{name}/v1"
allow_private = true
"""
MODEL = """
[[models]]
name = "{name}"
endpoints = [{endpoints}]
max_output_tokens = 4096
price = {{ input = "0.15", cached_input = "0.075", output = "0.60" }}
"""
#: Model -> its endpoints. A breaker is an endpoint's, so each test has endpoints of its own.
MODELS = {
    **{f"pair-{name}": [f"{name}-1", f"{name}-2"] for name in ("status", "rate", "drop", "html", "both", "slow")},
    **{name: [name] for name in ("again", "breaker", "rejects", "cut", "usage", "stall", "slow-head")},
    "sim-fast": ["talk"],
    "sim-tools": ["talk"],
}


def catalogue(url: str) -> str:
    """The TOML for these models over one simulator."""
    names = sorted({name for names in MODELS.values() for name in names})
    parts = [ENDPOINT.format(name=name, url=url) for name in names]
    for model, chosen in MODELS.items():
        upstream = model if model.startswith("sim-") else "sim-fast"
        steps = ", ".join(f'{{ endpoint = "{name}", model = "{upstream}" }}' for name in chosen)
        parts.append(MODEL.format(name=model, endpoints=steps))
    return "".join(parts)


@pytest.fixture(scope="module")
def provider(simulator: Sim) -> Sim:
    """The simulator behind all these endpoints."""
    simulator.reset()
    return simulator


@pytest.fixture(scope="module")
def faulty(provider: Sim, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A Hotpath whose catalogue names the endpoints above, with short timers."""
    directory = tmp_path_factory.mktemp("faulty")
    written = directory / "catalog.toml"
    written.write_text(catalogue(provider.url))
    env = {
        "HOTPATH_CATALOG": str(written),
        "STREAM_COMMIT_MS": str(COMMIT_MS),
        "KEEPALIVE_MS": "200",
        "CIRCUIT_BREAKER_COOLDOWN_MS": str(COOLDOWN_MS),
        "TIMEOUT_IDLE_MS": str(IDLE_MS),
        "TIMEOUT_FIRST_TOKEN_MS": "5000",
    }
    with Up(directory / "data", env=env) as running:
        yield running


@pytest.fixture
async def client(faulty: Up) -> AsyncIterator[Client]:
    """Its default tenant."""
    async with session() as http:
        yield Client(http, faulty.url, faulty.run["api_key"])


def strike(provider: Sim, endpoint: str, times: int = 1, **fault: Any) -> None:
    """The next `times` calls of an endpoint get the fault."""
    provider.fault(match={"endpoint": endpoint}, times=times, **fault)


async def booked(up: Up, rid: str) -> list[Entry]:
    """The calls of a request in the ledger."""
    found = await asyncio.to_thread(entries, up, "default")
    return sorted((entry for entry in found.values() if entry.rid == rid), key=lambda entry: entry.call)


# ---- fallback --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fault"),
    [("status", {"status": 500}), ("rate", {"status": 429, "retry_after": 5}), ("drop", {"drop": True}),
     ("html", {"html": True})],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_next_endpoint(
    faulty: Up, provider: Sim, client: Client, name: str, fault: dict[str, Any], stream: bool
) -> None:
    """Before the first token the next endpoint serves (I7); both calls are in the books, one of them paid."""
    strike(provider, f"{name}-1", **fault)
    began = time.monotonic()
    seen = await client.chat("[[sim chunks=5]]", model=f"pair-{name}", stream=stream)
    assert seen.ended_well, (seen.status, seen.body)
    assert seen.headers["x-br-endpoint"] == f"{name}-2"
    assert seen.headers["x-br-calls"] == "2"
    assert time.monotonic() - began < 0.4, "another endpoint needs no wait"
    (line,) = await asyncio.to_thread(provider.lines, seen.rid)
    assert (line["request_id"], line["endpoint"]) == (f"{seen.rid}.2", f"{name}-2")
    first, second = await booked(faulty, seen.rid)
    assert (second.call, second.cost, second.estimated) == (2, line["cost_nano_usd"], False)
    if "status" in fault:
        assert (first.cost, first.estimated) == (0, False)
    else:  # nobody knows whether that was billed: the prompt is held, and marked
        assert 0 < first.cost < second.cost
        assert first.estimated


async def test_the_same_endpoint_waits(provider: Sim, client: Client) -> None:
    """At least 500 ms before the same endpoint again."""
    strike(provider, "again", times=2, status=503)
    seen = await client.chat("[[sim chunks=5]]", model="again")
    assert seen.ended_well, (seen.status, seen.body)
    assert seen.headers["x-br-calls"] == "3"
    assert 1.0 <= seen.took < 2.5


async def test_both_and_then_the_first_again(provider: Sim, client: Client) -> None:
    """a fails, b fails, a again: the wait counts from a's own call."""
    strike(provider, "both-1", status=500)
    strike(provider, "both-2", status=500)
    seen = await client.chat("[[sim chunks=5]]", model="pair-both")
    assert seen.ended_well, (seen.status, seen.body)
    assert (seen.headers["x-br-calls"], seen.headers["x-br-endpoint"]) == ("3", "both-1")
    assert 0.5 <= seen.took < 2


async def test_a_refusal_is_passed_on(provider: Sim, client: Client) -> None:
    """The provider's 400 is the client's 400: one call, no retry, and the breaker does not count it (faults 71)."""
    strike(provider, "rejects", times=6, status=400)
    for _ in range(6):
        seen = await client.chat("[[sim chunks=5]]", model="rejects")
        assert (seen.status, seen.error["type"]) == (400, "invalid_request_error")
    assert (await client.chat("[[sim chunks=5]]", model="rejects")).ended_well


# ---- the breaker -----------------------------------------------------------------------------------------------------


async def test_the_breaker(provider: Sim, client: Client) -> None:
    """Five failures in a row open it: then 503 at once without a call, until the cooldown is over (S1-M5, D15)."""
    await asyncio.to_thread(provider.reset)
    strike(provider, "breaker", times=0, status=500)
    for _ in range(4):
        seen = await client.chat("x", model="breaker")
        if seen.error["code"] == "circuit_open":
            break
        assert (seen.status, seen.error["code"]) == (502, "upstream_error")
    calls = (await asyncio.to_thread(provider.stats))["calls"]
    assert 5 <= calls <= 7
    for _ in range(10):
        seen = await client.chat("x", model="breaker")
        assert (seen.status, seen.error["code"]) == (503, "circuit_open")
        assert 1 <= int(seen.headers["retry-after"]) <= COOLDOWN_MS / 1000 + 1
        assert 0 < int(seen.headers["retry-after-ms"]) <= COOLDOWN_MS
        assert seen.took < 0.2
    assert (await asyncio.to_thread(provider.stats))["calls"] == calls
    await asyncio.to_thread(provider.clear_faults)
    await asyncio.sleep(COOLDOWN_MS / 1000 + 0.6)
    assert (await client.chat("[[sim chunks=5]]", model="breaker")).ended_well


# ---- in the middle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("cut_after=5", "upstream_truncated"),
        ("malformed_after=5", "upstream_invalid_response"),
        ("error_after=5", None),
        ("stall_after=5", "upstream_timeout"),
    ],
)
async def test_broken_in_the_middle(provider: Sim, client: Client, fault: str, code: str | None) -> None:
    """One error event in OpenAI's shape, then the end, without [DONE]; no second call (I4, faults 62..64)."""
    model = "stall" if "stall" in fault else "cut"
    seen = await client.chat(f"[[sim chunks=20 burst=1 {fault}]]", model=model, stream=True)
    assert seen.status == 200
    assert seen.terminals == 1
    assert b"[DONE]" not in seen.body
    last = json.loads(seen.events[-1])
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    if code is not None:
        assert last["error"]["code"] == code
    assert len(seen.text.split()) == 5
    assert len(await asyncio.to_thread(provider.lines, seen.rid)) == 1


async def test_a_whole_answer_cut(client: Client) -> None:
    """Half a body is no answer: 502, never half of it."""
    seen = await client.chat("[[sim chunks=20 cut_after=1]]", model="cut")
    assert seen.status == 502
    assert seen.error["type"] == "upstream_error"


@pytest.mark.parametrize("usage", ["missing", "null", "zero", "negative", "string"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_usage_that_is_none(faulty: Up, provider: Sim, client: Client, usage: str, stream: bool) -> None:
    """A provider that tells no usable usage: counted by us, marked, and equal to its bill (faults 77)."""
    strike(provider, "usage", usage=usage)
    seen = await client.chat("Count me [[sim chunks=33 seed=8]]", model="usage", stream=stream)
    assert seen.ended_well, (seen.status, seen.body)
    (line,) = await asyncio.to_thread(provider.lines, seen.rid)
    (entry,) = await booked(faulty, seen.rid)
    assert (entry.cost, entry.estimated) == (line["cost_nano_usd"], True)


# ---- keep-alives -----------------------------------------------------------------------------------------------------


async def test_keep_alives(provider: Sim, faulty: Up, client: Client) -> None:
    """Headers after STREAM_COMMIT_MS, comments until the first token; the Python SDK does not notice them."""
    strike(provider, "slow-head", times=2, delay_ms=1500)
    seen = await client.chat("[[sim chunks=5]]", model="slow-head", stream=True)
    assert seen.ended_well
    lines = seen.body.split(b"\n\n")
    comments = [number for number, line in enumerate(lines) if line.startswith(b":")]
    assert len(comments) >= 3
    assert comments == list(range(len(comments))), "a comment in the middle of the chunks"
    async with openai.AsyncOpenAI(base_url=with_v1(faulty.url), api_key=faulty.run["api_key"], max_retries=0) as sdk:
        stream = await sdk.chat.completions.create(model="slow-head", messages=says("[[sim chunks=5]]"), stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert len("".join(texts).split()) == 5


async def test_fallback_after_the_headers_went_out(provider: Sim, client: Client) -> None:
    """The headers are gone, the first token is not: the next endpoint may still serve; x_br has the values (D11)."""
    strike(provider, "slow-1", status=500, delay_ms=800)
    seen = await client.chat("[[sim chunks=5]]", model="pair-slow", stream=True)
    assert seen.ended_well
    carriers = [json.loads(text)["x_br"] for text in seen.events if b'"x_br"' in text]
    assert [(payload["calls"], payload["endpoint"]) for payload in carriers] == [(2, "slow-2")]


async def test_an_error_after_the_headers_went_out(provider: Sim, client: Client) -> None:
    """The status is spent: the error comes in the stream."""
    strike(provider, "slow-head", times=3, status=400, delay_ms=800)
    seen = await client.chat("[[sim chunks=5]]", model="slow-head", stream=True)
    await asyncio.to_thread(provider.clear_faults)
    assert seen.status == 200
    assert seen.terminals == 1
    assert seen.error["type"] == "invalid_request_error"


@pytest.mark.interop
async def test_keep_alives_break_no_javascript_client(provider: Sim, faulty: Up) -> None:
    """The node clients' whole programme with every head 600 ms late."""
    from tests.interop.test_node import install, results  # noqa: PLC0415 - node is there only with --interop

    await asyncio.to_thread(install)
    strike(provider, "talk", times=0, delay_ms=600)
    target = Target(with_v1(faulty.url), faulty.run["api_key"], provider, gateway=True)
    try:
        ai = await asyncio.to_thread(results, "ai.mjs", target)
        openai_js = await asyncio.to_thread(results, "openai.mjs", target)
    finally:
        await asyncio.to_thread(provider.clear_faults)
    assert ai["stream"]["errors"] == []
    assert ai["stream"]["text"] == ai["generate"]["text"] == openai_js["streamed"]["text"]
    assert ai["stream"]["finishReason"] == "stop"
    assert openai_js["tools_streamed"]["finish"] == "tool_calls"
