"""The official `openai` Python client, unmodified, whole and streamed (acceptance 2; S2-33, S1-G17, D5, D11)."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.interop.target import TOOLS, Target, says

EIGHT = "whole [[sim chunks=8 seed=5]]"
ENDLESS = "long [[sim chunks=2000 pace=20]]"


@pytest.fixture
def client(target: Target) -> Iterator[OpenAI]:
    with OpenAI(base_url=target.url, api_key=target.key, max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture
async def async_client(target: Target) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=target.url, api_key=target.key, max_retries=0, timeout=20) as made:
        yield made


@pytest.fixture
def gateway(hotpath: Target) -> Iterator[OpenAI]:
    """Only in front of Hotpath: what a provider does not do."""
    with OpenAI(base_url=hotpath.url, api_key=hotpath.key, max_retries=0, timeout=20) as made:
        yield made


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def calls_of(chunks: list[ChatCompletionChunk]) -> list[tuple[str, str, str]]:
    """Streamed tool calls put together by index: (id, name, arguments)."""
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                call = calls.setdefault(part.index, ["", "", ""])
                call[0] += part.id or ""
                if part.function:
                    call[1] += part.function.name or ""
                    call[2] += part.function.arguments or ""
    return [(call[0], call[1], call[2]) for _, call in sorted(calls.items())]


def check_calls(calls: list[tuple[str, str, str]]) -> None:
    """Parallel calls: at least two, each with its own id, a tool that was offered, and arguments that parse."""
    assert len(calls) >= 2
    assert len({identity for identity, _, _ in calls}) == len(calls)
    for identity, name, arguments in calls:
        assert identity
        assert name in {"get_weather", "get_time"}
        assert isinstance(json.loads(arguments), dict)


# ---- whole ----------------------------------------------------------------------------------------------------------


def check_whole(answer: ChatCompletion) -> None:
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert len((choice.message.content or "").split()) == 8
    assert choice.finish_reason == "stop"
    assert answer.usage
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_whole_answer(client: OpenAI) -> None:
    """S1-G17."""
    check_whole(client.chat.completions.create(model="sim-fast", messages=says(EIGHT)))


async def test_a_whole_answer_async(async_client: AsyncOpenAI) -> None:
    """S1-G17."""
    check_whole(await async_client.chat.completions.create(model="sim-fast", messages=says(EIGHT)))


def test_max_tokens_ends_with_length(client: OpenAI) -> None:
    """The client's cap reaches the upstream (D1) and its finish_reason comes back."""
    answer = client.chat.completions.create(model="sim-fast", messages=says(EIGHT), max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 3


def test_tool_calls_whole(client: OpenAI) -> None:
    """Parallel tool calls of a whole answer."""
    answer = client.chat.completions.create(model="sim-tools", messages=says("weather and time"), tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls or []
    check_calls([(call.id, call.function.name, call.function.arguments) for call in calls if call.type == "function"])


# ---- streamed -------------------------------------------------------------------------------------------------------


def check_stream(chunks: list[ChatCompletionChunk], whole: ChatCompletion) -> None:
    """I5: the streamed text is the whole answer's, one finish_reason, all chunks of one id."""
    assert text_of(chunks) == whole.choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_without_usage(client: OpenAI) -> None:
    """Who did not ask for usage gets no usage chunk."""
    whole = client.chat.completions.create(model="sim-fast", messages=says(EIGHT))
    chunks = list(client.chat.completions.create(model="sim-fast", messages=says(EIGHT), stream=True))
    check_stream(chunks, whole)
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


def test_a_stream_with_usage(client: OpenAI) -> None:
    """`include_usage`: exactly one last chunk with usage and no choices, as OpenAI documents it."""
    whole = client.chat.completions.create(model="sim-fast", messages=says(EIGHT))
    chunks = list(
        client.chat.completions.create(
            model="sim-fast", messages=says(EIGHT), stream=True, stream_options={"include_usage": True}
        )
    )
    check_stream(chunks, whole)
    assert [index for index, chunk in enumerate(chunks) if chunk.usage] == [len(chunks) - 1]
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert whole.usage
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


async def test_a_stream_async(async_client: AsyncOpenAI) -> None:
    """The async client reads the same stream."""
    whole = await async_client.chat.completions.create(model="sim-fast", messages=says(EIGHT))
    stream = await async_client.chat.completions.create(model="sim-fast", messages=says(EIGHT), stream=True)
    check_stream([chunk async for chunk in stream], whole)


def test_tool_calls_streamed(client: OpenAI) -> None:
    """Parallel calls, their arguments in fragments: put together they are the whole answer's."""
    request: dict[str, Any] = {"model": "sim-tools", "messages": says("weather and time"), "tools": TOOLS}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    calls = calls_of(chunks)
    check_calls(calls)
    expected = [call for call in whole.choices[0].message.tool_calls or [] if call.type == "function"]
    assert [name for _, name, _ in calls] == [call.function.name for call in expected]
    assert [arguments for _, _, arguments in calls] == [call.function.arguments for call in expected]
    fragments = [
        part
        for chunk in chunks
        for choice in chunk.choices
        for part in choice.delta.tool_calls or []
        if part.function and part.function.arguments
    ]
    assert len(fragments) > len(calls), "the arguments were not streamed"


async def test_tool_calls_streamed_async(async_client: AsyncOpenAI) -> None:
    """The same with the async client."""
    stream = await async_client.chat.completions.create(
        model="sim-tools", messages=says("weather and time"), tools=TOOLS, stream=True
    )
    check_calls(calls_of([chunk async for chunk in stream]))


def test_the_sdk_accumulator(client: OpenAI) -> None:
    """`chat.completions.stream()` merges chunks strictly; it must find nothing odd, tools and usage included."""
    strict: list[Any] = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    with client.chat.completions.stream(
        model="sim-tools",
        messages=says("weather and time"),
        tools=strict,
        stream_options={"include_usage": True},
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "chunk" in kinds
    assert final.usage
    calls = final.choices[0].message.tool_calls or []
    check_calls([(call.id, call.function.name, call.function.arguments) for call in calls])


# ---- leaving and waiting ---------------------------------------------------------------------------------------------


def test_a_client_timeout_closes_the_upstream(client: OpenAI, target: Target) -> None:
    """The SDK gives up (S1-G05): its class of error, and nothing stays open at the provider."""
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.4).chat.completions.create(model="sim-fast", messages=says(ENDLESS))
    assert target.sim.wait(2000, in_flight=0)


def test_closing_a_stream_closes_the_upstream(client: OpenAI, target: Target) -> None:
    """S1-G05: the client leaves mid-stream."""
    stream = client.chat.completions.create(model="sim-fast", messages=says(ENDLESS), stream=True)
    for _ in range(3):
        next(stream)
    assert target.sim.in_flight() == 1
    stream.close()
    assert target.sim.wait(2000, in_flight=0)


async def test_cancelling_a_task_closes_the_upstream(async_client: AsyncOpenAI, target: Target) -> None:
    """S1-G05, by asyncio cancellation in the middle of a stream."""
    started = asyncio.Event()

    async def read() -> None:
        stream = await async_client.chat.completions.create(model="sim-fast", messages=says(ENDLESS), stream=True)
        async for _ in stream:
            started.set()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(target.sim.wait, 2000, in_flight=0)


def test_x_timeout_ms(gateway: OpenAI, hotpath: Target) -> None:
    """S1-G03: the gateway's own deadline, as the SDK sees it, and the upstream is closed."""
    began = time.monotonic()
    with pytest.raises(openai.InternalServerError) as caught:
        gateway.chat.completions.create(model="sim-fast", messages=says(ENDLESS), extra_headers={"X-Timeout-Ms": "400"})
    assert caught.value.status_code == 504
    assert caught.value.code in {"deadline_exceeded", "upstream_timeout"}
    assert 0.35 < time.monotonic() - began < 2
    assert hotpath.sim.wait(2000, in_flight=0)


def test_x_timeout_ms_in_a_stream(gateway: OpenAI) -> None:
    """A deadline that passes in mid-stream is an in-stream error, which the SDK raises."""
    stream = gateway.chat.completions.create(
        model="sim-fast", messages=says(ENDLESS), stream=True, extra_headers={"X-Timeout-Ms": "500"}
    )
    seen: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError, match="deadline"):
        seen.extend(stream)
    assert len(seen) > 3


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_wrong_key(hotpath: Target) -> None:
    """401 is AuthenticationError."""
    with (
        OpenAI(base_url=hotpath.url, api_key="br_live_aaaaaaaaaaaa_" + "A" * 43, max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model="sim-fast", messages=says("x"))
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id


def test_an_unknown_model(gateway: OpenAI) -> None:
    """404 is NotFoundError with OpenAI's own code (D6)."""
    with pytest.raises(openai.NotFoundError) as caught:
        gateway.chat.completions.create(model="no/such:model@v1", messages=says("x"))
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": -1}, {"max_tokens": "10"}, {"stream": "true"}, {"n": True}, {"messages": "hello"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_bad_request(gateway: OpenAI, wrong: dict[str, Any]) -> None:
    """400 is BadRequestError (S1-H4); no upstream call is made."""
    with pytest.raises(openai.BadRequestError) as caught:
        gateway.chat.completions.create(**{"model": "sim-fast", "messages": says("x"), **wrong})
    assert caught.value.type == "invalid_request_error"


def test_over_budget(up: Any, hotpath: Target) -> None:
    """402 `insufficient_budget` is an APIStatusError that says what is left (S0-15, D1)."""
    made = up.cli("keys", "create", "--tenant", "interop-poor", "--limit-usd", "0.0005", "--period", "day", "--json")
    with (
        OpenAI(base_url=hotpath.url, api_key=made["key"], max_retries=0) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.chat.completions.create(model="sim-fast", messages=says("x"))
    assert caught.value.status_code == 402
    assert caught.value.code == "insufficient_budget"
    assert "$0.0005" in caught.value.message


def test_the_providers_429(gateway: OpenAI, hotpath: Target) -> None:
    """429 is RateLimitError, with the provider's wait in Retry-After (D15)."""
    hotpath.sim.fault(status=429, retry_after="7", times=3)
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            gateway.chat.completions.create(model="sim-fast", messages=says("x"))
    finally:
        hotpath.sim.reset()
    assert caught.value.response.headers["retry-after"] == "7"


def test_a_stream_that_breaks(gateway: OpenAI) -> None:
    """The upstream is cut after the first tokens: the SDK raises the in-stream error, never ends quietly (I4)."""
    breaks = "whole [[sim chunks=8 seed=5 cut_after=5]]"
    seen: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError) as caught:
        seen.extend(gateway.chat.completions.create(model="sim-fast", messages=says(breaks), stream=True))
    assert text_of(seen)
    assert caught.value.code == "upstream_truncated"


# ---- what the gateway adds -------------------------------------------------------------------------------------------


def test_headers_of_a_whole_answer(gateway: OpenAI) -> None:
    """S1-H1, S2-11, D11, D12: the label comes back, ours beside it, and the costs."""
    raw = gateway.chat.completions.with_raw_response.create(
        model="sim-fast", messages=says(EIGHT), extra_headers={"X-Request-ID": "my.label-1"}
    )
    assert raw.headers["x-request-id"] == "my.label-1"
    assert re.fullmatch(r"[0-9a-f]{32}", raw.headers["x-br-request-id"])
    assert raw.headers["x-br-guardian-status"] == "on"
    assert float(raw.headers["x-br-guardian-overhead-ms"]) >= 0
    assert raw.headers["x-br-endpoint"]
    assert raw.headers["x-br-calls"] == "1"
    for name in ("x-br-estimated-cost", "x-br-actual-cost"):
        assert re.fullmatch(r"\$\d+\.\d{2,9}", raw.headers[name]), name
    assert raw.parse()._request_id == "my.label-1"


@pytest.mark.parametrize("label", ["", "a b", "x" * 65, "../../x", "<script>", "%0d%0a"])
def test_a_label_that_is_not_one(gateway: OpenAI, label: str) -> None:
    """S1-H1, faults 78: it is replaced, not echoed."""
    raw = gateway.chat.completions.with_raw_response.create(
        model="sim-fast", messages=says(EIGHT), extra_headers={"X-Request-ID": label}
    )
    assert raw.headers["x-request-id"] != label
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", raw.headers["x-request-id"])


def test_headers_of_a_stream(gateway: OpenAI) -> None:
    """D11: what is known when the headers go out, and no actual cost."""
    raw = gateway.chat.completions.with_raw_response.create(model="sim-fast", messages=says(EIGHT), stream=True)
    with raw.parse() as stream:
        list(stream)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.headers["x-accel-buffering"] == "no"
    assert raw.headers["x-br-guardian-status"] == "on"
    assert raw.headers["x-br-estimated-cost"].startswith("$")
    assert "x-br-actual-cost" not in raw.headers


def test_x_br_in_the_last_chunk(gateway: OpenAI, hotpath: Target) -> None:
    """D5: on the chunk that carries finish_reason, readable as `chunk.model_extra`; its cost is the provider's bill."""
    raw = gateway.chat.completions.with_raw_response.create(model="sim-fast", messages=says(EIGHT), stream=True)
    with raw.parse() as stream:
        chunks = list(stream)
    carriers = [chunk for chunk in chunks if "x_br" in (chunk.model_extra or {})]
    assert [chunk.choices[0].finish_reason for chunk in carriers] == ["stop"]
    payload = (carriers[0].model_extra or {})["x_br"]
    rid = raw.headers["x-br-request-id"]
    (line,) = hotpath.sim.lines(rid)
    assert payload["request_id"] == rid
    assert payload["actual_cost_nano_usd"] == line["cost_nano_usd"]
    assert payload["usage"] == {"input_tokens": line["input_tokens"], "cached_tokens": 0, "output_tokens": 8}
    assert payload["guardian"] == "on"
    assert payload["estimated"] is False
    assert payload["calls"] == 1
    assert payload["estimated_cost"].startswith("$")


def test_models(client: OpenAI) -> None:
    """S1-C1, S2-33: the catalogue's names."""
    models = list(client.models.list())
    assert {"sim-fast", "sim-paced", "sim-tools", "sim-free"} <= {model.id for model in models}
    assert {model.object for model in models} == {"model"}
