"""The simulator's faults, cuts and books when things go wrong (issue 2, section 5; reference faults 61 to 77)."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from deploy.simulator import bill
from deploy.simulator.server import application
from tests.simulator.asking import Simulator, body, chunks, spoken

USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
async def simulator(simulator_process: str) -> AsyncIterator[Simulator]:
    async with aiohttp.ClientSession() as session:
        one = Simulator(simulator_process, session)
        await one.post("/_sim/reset")
        yield one


async def test_a_status_is_answered_instead_and_not_billed(simulator: Simulator) -> None:
    await simulator.fault({"status": 429, "retry_after": 7, "body": {"error": {"message": "slow"}}})
    async with simulator.session.post(simulator.url + "/v1/chat/completions", json=body()) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "7")
        assert await response.json() == {"error": {"message": "slow"}}
    assert await simulator.lines() == []
    assert (await simulator.post("/v1/chat/completions", body()))[0] == 200, "times: 1 is the default"


async def test_a_rule_strikes_whom_it_matches(simulator: Simulator) -> None:
    await simulator.fault({"status": 500}, times=0, endpoint="b", nth=2, every=2)
    await simulator.fault({"status": 503}, request_id="abc.", stream=False)
    path = "/e/b/v1/chat/completions"
    assert [(await simulator.post(path, body()))[0] for _ in range(5)] == [200, 500, 200, 500, 200]
    assert (await simulator.post("/v1/chat/completions", body()))[0] == 200
    assert (await simulator.post("/v1/chat/completions", body(), {"X-Request-ID": "abc.1"}))[0] == 503
    rules = (await simulator.get("/_sim/faults"))["rules"]
    assert [rule["struck"] for rule in rules] == [2, 1]


async def test_a_wrong_rule_is_refused(simulator: Simulator) -> None:
    status, raw = await simulator.post("/_sim/faults", {"fault": {"cut_affter": 3}})
    assert status == 400
    assert b"cut_affter" in raw


@pytest.mark.parametrize("cut", ["close", "reset", "clean"])
async def test_a_cut_stream_is_billed_for_what_was_written(simulator: Simulator, cut: str) -> None:
    """Fault 63: the connection ends without a terminal."""
    await simulator.fault({"cut_after": 3, "cut": cut})
    reader, writer = await simulator.connect(body("[[sim chunks=9 seed=1 burst=1]]", **USAGE), "c.1")
    raw = b""
    try:
        while got := await reader.read(4096):
            raw += got
    except ConnectionResetError:
        assert cut == "reset"
    writer.close()
    assert b"[DONE]" not in raw
    assert b'finish_reason":"' not in raw
    assert raw.endswith(b"0\r\n\r\n") is (cut == "clean")
    if cut != "reset":  # a reset may overtake what was written
        assert raw.count(b'"delta":{"content":" ') == 3
    line = await simulator.line("c.1")
    assert (line["output_tokens"], line["complete"], line["usage_sent"]) == (3, False, False)


async def test_a_cut_whole_answer_sends_half_and_bills_the_prompt(simulator: Simulator) -> None:
    await simulator.fault({"cut_after": 0})
    with pytest.raises(aiohttp.ClientPayloadError):
        await simulator.whole(body(), "h.1")
    line = await simulator.line("h.1")
    assert (line["output_tokens"], line["complete"]) == (0, False)


async def test_events_put_into_a_stream(simulator: Simulator) -> None:
    """Faults 64, 66: a malformed event, an endless one, an error object in place of the end."""
    await simulator.fault({"malformed_after": 2, "huge_after": 1, "huge_bytes": 1 << 20, "error_after": 3})
    raw = await simulator.raw(body("[[sim chunks=5]]", **USAGE), "m.1")
    events = raw.decode().split("\n\n")
    assert [len(event) > 1 << 20 for event in events].index(True) == 2
    with pytest.raises(json.JSONDecodeError):
        json.loads(events[4].removeprefix("data: "))
    assert json.loads(events[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert (await simulator.line())["output_tokens"] == 3


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("missing", None), ("zero", 0), ("negative", -5), ("string", "many"), ("huge", 10**15)],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_usage_is_told_but_not_billed(
    simulator: Simulator, kind: str, shown: int | str | None, stream: bool
) -> None:
    """Fault 77: the books stay true."""
    await simulator.fault({"usage": kind})
    wish = body("[[sim chunks=5]]", **(USAGE if stream else {}))
    told = chunks(await simulator.raw(wish))[-1] if stream else await simulator.whole(wish)
    assert (told.get("usage") or {}).get("completion_tokens") == shown
    line = await simulator.line()
    assert (line["output_tokens"], line["complete"], line["usage_sent"]) == (5, True, False)


async def test_the_cap_may_be_ignored(simulator: Simulator) -> None:
    await simulator.fault({"ignore_cap": True})
    answer = await simulator.whole(body("[[sim chunks=8]]", max_tokens=2))
    assert answer["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("fault", [{"no_done": True}, {"no_finish": True}])
async def test_a_stream_without_its_end(simulator: Simulator, fault: dict[str, bool]) -> None:
    await simulator.fault(fault)
    raw = await simulator.raw(body("[[sim chunks=4]]", **USAGE))
    assert b"[DONE]" not in raw
    assert (b'"finish_reason":"stop"' in raw) is ("no_done" in fault)
    line = await simulator.line()
    assert (line["output_tokens"], line["complete"]) == (4, "no_done" in fault)


async def test_other_line_ends_say_the_same(simulator: Simulator) -> None:
    """WHATWG HTML, "server-sent events": CRLF, CR, a BOM, comments and several data lines are all legal."""
    wish = body("[[sim chunks=6 seed=2 mixed=1]]", **USAGE)
    plain = await simulator.raw(wish)
    for lines, end in (("crlf", b"\r\n"), ("cr", b"\r")):
        await simulator.fault({"lines": lines, "bom": True, "comments": True, "multiline": True})
        raw = await simulator.raw(wish)
        assert raw.startswith(b"\xef\xbb\xbf: simulator" + end + b"data: {")
        assert raw.count(b"data:") == 2 * plain.count(b"data:") - 1
        undone = raw.removeprefix(b"\xef\xbb\xbf").replace(end, b"\n").replace(b": simulator\n", b"")
        assert undone.replace(b",\ndata: ", b",") == plain


async def test_html_drop_and_delay(simulator: Simulator) -> None:
    """Fault 76; a connection closed before the head; a slow first byte."""
    await simulator.fault({"html": True})
    assert (await simulator.raw(body())).startswith(b"<!doctype html>")
    await simulator.fault({"drop": True, "bill": True})
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await simulator.post("/v1/chat/completions", body(), {"X-Request-ID": "d.1"})
    assert (await simulator.line())["request_id"] == "d.1"
    await simulator.fault({"delay_ms": 120})
    before = time.monotonic()
    await simulator.raw(body(stream=True))
    assert time.monotonic() - before >= 0.12


async def test_slow_bytes_arrive_whole(simulator: Simulator) -> None:
    await simulator.fault({"slow_ms": 1})
    reader, writer = await simulator.connect(body("[[sim chunks=1]]", stream=True), "s.1")
    raw = await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    pieces = raw.partition(b"\r\n\r\n")[2].split(b"\r\n")
    assert {piece for piece in pieces[::2] if piece} == {b"1", b"0"}, "one byte in every HTTP chunk"


async def test_a_half_closed_client_stops_the_answer_and_gets_what_was_written(simulator: Simulator) -> None:
    """A gateway that cancels half-closes and drains: what it reads then is what it is billed for (I1)."""
    reader, writer = await simulator.connect(body("[[sim chunks=9000 pace=2]]", stream=True), "p.1")
    raw = await reader.readuntil(b'{"content":')
    writer.write_eof()
    raw += await asyncio.wait_for(reader.read(-1), 2)
    writer.close()
    line = await simulator.line("p.1")
    assert raw.count(b'"delta":{"content":" ') == line["output_tokens"]
    assert 1 <= line["output_tokens"] < 500
    assert not line["complete"]
    assert (await simulator.get("/_sim/wait?in_flight=0&left=1"))["in_flight"] == 0


async def test_a_half_closed_client_that_did_not_read_still_gets_all_that_was_written(simulator: Simulator) -> None:
    """The same with megabytes waiting in buffers on both sides."""
    reader, writer = await simulator.connect(body("[[sim chunks=90000]]", stream=True), "q.1")
    raw = await reader.readuntil(b'{"content":')
    for _ in range(100):  # until nothing more is written: the client's buffers and the simulator's are full
        before = (await simulator.line("q.1"))["output_tokens"]
        await asyncio.sleep(0.02)
        if before and (await simulator.line("q.1"))["output_tokens"] == before:
            break
    writer.write_eof()
    raw += await asyncio.wait_for(reader.read(-1), 5)
    writer.close()
    line = await simulator.line("q.1")
    assert 1000 < line["output_tokens"] < 90_000
    assert raw.count(b'"delta":{"content":" ') == line["output_tokens"]


async def test_a_client_that_leaves_stops_the_answer_at_once(simulator: Simulator) -> None:
    """Fault 55, 56: also while it waits for the first byte, and while the answer is held."""
    await simulator.post("/_sim/hold")
    waiting = await simulator.connect(body(stream=True), "l.1")
    assert (await simulator.get("/_sim/wait?held=1"))["held"] == 1
    await simulator.fault({"stall_after": 2}, request_id="l.2")
    waiting[1].close()
    assert (await simulator.get("/_sim/wait?left=1"))["held"] == 0
    await simulator.post("/_sim/release")
    reader, writer = await simulator.connect(body("[[sim chunks=5]]", stream=True), "l.2")
    await reader.readuntil(b'{"content":')
    writer.close()
    stats = await simulator.get("/_sim/wait?left=2&ms=500")
    assert (stats["left"], stats["in_flight"], stats["ended"]) == (2, 0, 2)
    assert [line["output_tokens"] for line in await simulator.lines()] == [0, 2]


async def test_hold_and_release(simulator: Simulator) -> None:
    """Acceptance 5 holds every answer until all are decided."""
    await simulator.post("/_sim/hold")
    asked = [asyncio.create_task(simulator.raw(body(stream=bool(i % 2)))) for i in range(20)]
    stats = await simulator.get("/_sim/wait?held=20")
    assert (stats["held"], stats["in_flight"], stats["ended"]) == (20, 20, 0)
    assert not any(task.done() for task in asked)
    await simulator.post("/_sim/release")
    assert len(await asyncio.gather(*asked)) == 20
    assert (await simulator.get("/_sim/wait?ended=20"))["peak"] == 20


async def test_a_hold_is_bounded(simulator: Simulator) -> None:
    await simulator.post("/_sim/hold", {"max_ms": 30})
    assert await asyncio.wait_for(simulator.raw(body()), 2)
    await simulator.post("/_sim/release")


async def test_the_prompt_may_ask_for_a_fault(simulator: Simulator) -> None:
    assert (await simulator.post("/v1/chat/completions", body("[[sim status=500]]")))[0] == 500
    raw = await simulator.raw(body("[[sim error_after=2]]", stream=True))
    assert raw.count(b'{"content":') == 2


async def test_the_bill_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest lines are kept and the dropped ones counted; the default is a million."""
    assert bill.MAX_LINES == 1_000_000
    async with TestClient(TestServer(application(max_lines=3))) as client:
        for number in range(5):
            await client.post("/v1/chat/completions", json=body(), headers={"X-Request-ID": str(number)})
        told = await (await client.get("/_sim/bill")).json()
        assert [line["request_id"] for line in told["calls"]] == ["2", "3", "4"]
        assert told["dropped"] == 2


async def test_a_configured_key_is_asked_for() -> None:
    """401 in OpenAI's shape; without one configured any key will do."""
    async with TestClient(TestServer(application(api_key="sk-right"))) as client:
        for headers, status in (({}, 401), ({"Authorization": "Bearer sk-wrong"}, 401)):
            response = await client.post("/v1/chat/completions", json=body(), headers=headers)
            assert response.status == status
            assert (await response.json())["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer sk-right"}
        assert (await client.post("/v1/chat/completions", json=body(), headers=right)).status == 200
        assert (await client.get("/v1/models")).status == 401


async def test_pace(simulator: Simulator) -> None:
    """sim-paced keeps its rate (--tps 100 here) whatever the writes cost."""
    before = time.monotonic()
    raw = await simulator.raw(body("[[sim chunks=30]]", model="sim-paced", stream=True))
    assert 0.29 <= time.monotonic() - before < 1.0
    assert len(spoken(chunks(raw)).split()) == 30
