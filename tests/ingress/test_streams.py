"""When something goes wrong around a stream: errors, lost clients, dead workers, slow readers (DESIGN 3)."""

import asyncio
import json
import socket
import time
from typing import Any

import aiohttp
import msgspec
import pytest

from shared.wire import errors, subjects
from shared.wire.messages import VERSION, Ask, Batch, Cancel, Credit, encode
from tests.ingress.conftest import MakeWorld
from tests.ingress.world import HEAD, KEY, Worker, World, event
from tests.wire.samples import newer

CHAT = "/v1/chat/completions"
BODY = {"model": "sim-fast", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**BODY, "stream": True}
RAW = json.dumps(STREAM).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b" % (KEY.encode(), len(RAW), RAW)
)


def code_of(text: bytes) -> str:
    """The code of the in-stream error a stream ends with."""
    last = text.removesuffix(b"\n\n").rsplit(b"\n\n", 1)[-1]
    assert last.startswith(b"data: {")
    return str(json.loads(last.removeprefix(b"data: "))["error"]["code"])


async def begin(world: World, http: aiohttp.ClientSession) -> tuple[Ask, aiohttp.ClientResponse]:
    """A stream whose first text has come."""
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=STREAM))
    ask = await world.ask()
    provider = world.provider
    provider.send(ask, provider.accepted(ask), provider.delta(ask, event("a"), HEAD))
    answer = await posting
    assert await answer.content.readuntil(b"\n\n") == event("a")
    return ask, answer


def empty(world: World) -> None:
    """I8: nothing of any request is left."""
    assert world.ingress.in_flight() == 0
    assert not world.ingress._desk.exchanges
    assert len(world.ingress._desk.wheel) == 0
    assert all(not pair.open for pair in world.ingress._replies._pairs.values())


# ---- errors


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_failed_before_the_first_text_is_a_status(
    world: World, http: aiohttp.ClientSession, body: dict[str, Any]
) -> None:
    world.script = lambda ask, worker: worker.send(
        ask, worker.failed(ask, errors.InsufficientBudget("2 cents left"), {"X-BR-Estimated-Cost": "$0.03"})
    )
    async with http.post(world.url + CHAT, json=body) as answer:
        assert answer.status == 402
        error = (await answer.json())["error"]
        assert error == {
            "message": "2 cents left", "type": "insufficient_quota", "param": None, "code": "insufficient_budget"
        }  # fmt: skip
        assert answer.headers["X-BR-Estimated-Cost"] == "$0.03"
    async with http.post(world.url + CHAT, json=body) as answer:
        assert answer.status == 402, "the connection lives on"
    empty(world)


async def test_retry_after_is_whole_seconds_and_exact_ms(world: World, http: aiohttp.ClientSession) -> None:
    """D15."""
    for ms, seconds in ((1, "1"), (1000, "1"), (1001, "2"), (2500, "3")):
        error = errors.LedgerDown(retry_after_ms=ms)
        world.script = lambda ask, worker, error=error: worker.send(ask, worker.failed(ask, error))  # type: ignore[misc]
        async with http.post(world.url + CHAT, json=BODY) as answer:
            assert answer.status == 503
            assert (answer.headers["Retry-After"], answer.headers["retry-after-ms"]) == (seconds, str(ms))


async def test_failed_after_text_is_one_event_and_no_done(world: World, http: aiohttp.ClientSession) -> None:
    """DESIGN 3, errors after a 200."""
    world.script = lambda ask, worker: worker.send(
        ask,
        worker.accepted(ask),
        worker.delta(ask, event("a"), HEAD),
        worker.failed(ask, errors.UpstreamTruncated("cut\r\nshort")),
    )
    async with http.post(world.url + CHAT, json=STREAM) as answer:
        assert answer.status == 200
        text = await answer.read()
    assert text.startswith(event("a") + b'data: {"error":')
    assert code_of(text) == "upstream_truncated"
    assert b"[DONE]" not in text
    assert b"\r" not in text
    empty(world)


async def test_a_whole_answer_that_fails_half_way_is_a_status(world: World, http: aiohttp.ClientSession) -> None:
    world.script = lambda ask, worker: worker.send(
        ask, worker.accepted(ask), worker.delta(ask, b'{"half', HEAD), worker.failed(ask, errors.UpstreamTruncated())
    )
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 502
        assert (await answer.json())["error"]["code"] == "upstream_truncated"


async def test_a_lost_frame_is_an_error_never_silence(world: World, http: aiohttp.ClientSession) -> None:
    """faults 30."""
    ask, answer = await begin(world, http)
    provider = world.provider
    provider.delta(ask, event("lost"))
    provider.send(ask, provider.delta(ask, event("c")))
    text = await answer.read()
    assert code_of(text) == "stream_gap"
    assert (await provider.cancelled()).reason == "gap"
    empty(world)


async def test_an_answer_above_the_bound(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """S1-R5, whole and streamed."""
    world = await make_world(MAX_RESPONSE_BYTES="2048")
    world.script = lambda ask, worker: worker.send(
        ask, worker.accepted(ask), worker.delta(ask, b"x" * 2048, HEAD), worker.delta(ask, b"y"), worker.end(ask)
    )
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 502
        assert (await answer.json())["error"]["code"] == "response_too_large"
    async with http.post(world.url + CHAT, json=STREAM) as answer:
        text = await answer.read()
        assert code_of(text[2048:]) == "response_too_large"
    await world.provider.cancelled()


async def test_frames_of_a_kind_not_known_are_skipped(world: World, http: aiohttp.ClientSession) -> None:
    """faults 83: a newer worker may say more."""
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    ask = await world.ask()
    provider = world.provider
    frames = [
        msgspec.Raw(encode(provider.accepted(ask))),
        msgspec.Raw(encode(["z", 1, 2, 3])),
        msgspec.Raw(encode([*msgspec.msgpack.decode(encode(provider.delta(ask, b"{}", HEAD))), "more"])),
        msgspec.Raw(encode(provider.end(ask))),
    ]
    reply = subjects.reply("ingress", "in1")
    provider.bus.publish(reply, b"\xc1 not msgpack")
    provider.bus.publish(reply, encode(Batch(1, "provider", "no subject * this", 0, [])))
    provider.bus.publish(reply, encode(Batch(VERSION + 2, "provider", "p1", 2, frames)))
    provider.bus.publish(reply, encode(Batch(VERSION + 1, "provider", "p1", 2, frames)))
    async with await posting as answer:
        assert await answer.read() == b"{}"
    assert world.ingress._replies.unknown_frames == 1
    assert world.ingress._replies.bad_batches == 3


async def test_a_newer_worker_says_more(world: World, http: aiohttp.ClientSession) -> None:
    """Faults 83: frames of unknown kinds between the others, which take a seq each, and more fields in those known."""

    def script(ask: Ask, worker: Worker) -> None:
        reply = subjects.reply("ingress", "in1")
        frames = (
            unknown(worker, ask), worker.accepted(ask), unknown(worker, ask), worker.delta(ask, event("a"), HEAD),
            unknown(worker, ask), worker.delta(ask, event("b")), unknown(worker, ask), worker.end(ask),
        )  # fmt: skip
        for number, frame in enumerate(frames):
            raw = encode(newer(frame) if isinstance(frame, msgspec.Struct) else frame)
            batch = newer(Batch(VERSION, "provider", "p1", number, []))
            batch[4] = [msgspec.Raw(raw)]
            worker.bus.publish(reply, encode(batch))

    world.script = script
    async with http.post(world.url + CHAT, json=STREAM) as answer:
        assert await answer.read() == event("a") + event("b") + b"data: [DONE]\n\n"
    assert world.ingress._replies.unknown_frames == 4
    assert world.ingress._replies.bad_batches == 0


def unknown(worker: Worker, ask: Ask) -> list[object]:
    """A frame of a kind this build does not know."""
    return ["newer", *worker._seq(ask), {"what": ["ever"]}]


@pytest.mark.parametrize("hole", [["d", 7, b"x"], ["d", 7, 1, 1, "text"], b"\xa1d"])
async def test_a_broken_frame_is_a_hole(world: World, http: aiohttp.ClientSession, hole: object) -> None:
    """It is skipped like an unknown one, but what follows it cannot end well."""

    def script(ask: Ask, worker: Worker) -> None:
        worker.send(ask, worker.accepted(ask), worker.delta(ask, event("a"), HEAD))
        worker._seq(ask)
        frames = [msgspec.Raw(encode(hole)), msgspec.Raw(encode(worker.end(ask)))]
        worker.bus.publish(subjects.reply("ingress", "in1"), encode(Batch(VERSION, "provider", "p1", 99, frames)))

    world.script = script
    async with http.post(world.url + CHAT, json=STREAM) as answer:
        assert code_of(await answer.read()) == "stream_gap"
    assert world.ingress._replies.unknown_frames == 1


async def test_frames_for_another_stream_do_nothing(world: World, http: aiohttp.ClientSession) -> None:
    """I6, and an Accepted for a stream that is gone is answered with cancel."""
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    ask = await world.ask()
    other = msgspec.structs.replace(ask, reply=msgspec.structs.replace(ask.reply, stream=999))
    provider = world.provider
    provider.send(other, provider.accepted(other), provider.delta(other, b"evil"), provider.delta(other, b"evil"))
    provider.send(ask, provider.accepted(ask), provider.delta(ask, b"{}", HEAD), provider.end(ask))
    async with await posting as answer:
        assert await answer.read() == b"{}"
    cancel = await provider.cancelled()
    assert (cancel.stream, cancel.role, cancel.instance) == (999, "ingress", "in1")
    assert len([m for m in provider.controls if isinstance(m, Cancel)]) == 1


# ---- timers


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_the_total_timer(world: World, http: aiohttp.ClientSession, body: dict[str, Any]) -> None:
    """S1-G03; X-Timeout-Ms is the whole request."""
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=body, headers={"X-Timeout-Ms": "150"}))
    ask = await world.ask()
    world.provider.send(ask, world.provider.accepted(ask))
    begun = time.monotonic()
    async with await posting as answer:
        assert answer.status == 504
        assert (await answer.json())["error"]["code"] == "deadline_exceeded"
    assert time.monotonic() - begun < 1
    await world.provider.cancelled()
    empty(world)


async def test_first_token_and_idle_timers(
    make_world: MakeWorld, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-L1: three separate timers."""
    monkeypatch.setattr("shared.core.stream.BACKSTOP_S", 0.0)
    world = await make_world(TIMEOUT_FIRST_TOKEN_MS="150", TIMEOUT_IDLE_MS="150")
    world.script = lambda ask, worker: worker.send(ask, worker.accepted(ask))
    async with http.post(world.url + CHAT, json=STREAM) as answer:
        assert answer.status == 504
    world.script = lambda ask, worker: worker.send(ask, worker.accepted(ask), worker.delta(ask, event("a"), HEAD))
    async with http.post(world.url + CHAT, json=STREAM) as answer:
        assert answer.status == 200
        assert code_of(await answer.read()) == "upstream_timeout"
    world.deaf = True
    async with http.post(world.url + CHAT, json=BODY, headers={"X-Timeout-Ms": "400"}) as answer:
        assert (await answer.json())["error"]["code"] == "deadline_exceeded", "a whole answer has only the total timer"


# ---- the client leaves


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_53_56_the_client_leaves(world: World, text: bool, stream: bool) -> None:
    """S1-G05: client gone -> upstream closed."""
    world.deaf = True
    raw = json.dumps({**BODY, "stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(REQUEST.partition(b"Content-Length")[0] + b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw))
    ask = await world.ask()
    provider = world.provider
    provider.send(ask, provider.accepted(ask))
    if text:
        provider.send(ask, provider.delta(ask, event("a"), HEAD))
        if stream:
            await reader.readuntil(b'"a"')
    await asyncio.sleep(0.02)
    begun = time.monotonic()
    writer.transport.abort()
    cancel = await provider.cancelled()
    assert (cancel.stream, cancel.delivery) == (ask.reply.stream, 1)
    assert time.monotonic() - begun < 0.3
    await asyncio.sleep(0.02)
    empty(world)
    provider.controls.clear()
    provider.send(ask, provider.delta(ask, event("b")))
    assert (await provider.cancelled()).reason == "no such stream"
    assert world.ingress._tally.requests(CHAT, 499) == 1


async def test_a_client_that_left_before_anybody_accepted(world: World) -> None:
    """faults 54: the Accepted that comes later is answered with cancel."""
    world.deaf = True
    _, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(REQUEST)
    ask = await world.ask()
    writer.transport.abort()
    await asyncio.sleep(0.05)
    empty(world)
    world.provider.send(ask, world.provider.accepted(ask))
    await world.provider.cancelled()


# ---- deliveries and deaths


async def test_no_accepted_so_it_is_delivered_again(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """faults 5, 29."""
    world = await make_world(HANDOFF_TIMEOUT_MS="60")
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    first, second = await world.ask(), await world.ask()
    assert (first.delivery, second.delivery) == (1, 2)
    assert (first.rid, first.reply, first.lost, second.lost) == (second.rid, second.reply, "", "")
    world.script(second, world.provider)
    provider = world.provider
    async with await posting as answer:
        assert answer.status == 200
    provider.controls.clear()
    provider.send(first, provider.accepted(first))
    await provider.cancelled()
    empty(world)


async def test_nobody_ever_accepts(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    world = await make_world(HANDOFF_TIMEOUT_MS="200")
    world.deaf = True
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["code"] == "no_worker"
    assert [ask.delivery for ask in world.guardian.asks] == [1, 2, 3, 4]
    empty(world)


async def test_36_a_killed_guardian_is_passed_over(world: World, http: aiohttp.ClientSession) -> None:
    second = await world.add("guardian", "g2")
    world.guardian.kill()
    for _ in range(4):
        async with http.post(world.url + CHAT, json=BODY) as answer:
            assert answer.status == 200
    assert len(second.asks) == 4


async def test_every_guardian_is_killed(world: World, http: aiohttp.ClientSession) -> None:
    world.guardian.kill()
    begun = time.monotonic()
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["code"] == "no_worker"
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 503
    assert time.monotonic() - begun < 0.3


@pytest.mark.parametrize("role", ["routing", "provider"])
async def test_19_503_at_once_when_a_role_is_gone(world: World, http: aiohttp.ClientSession, role: str) -> None:
    world.ctx.rosters[role].dead("r1" if role == "routing" else "p1")
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 503
        assert role in (await answer.json())["error"]["message"]
    assert not world.guardian.asks


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_the_holder_dies_before_the_first_text(
    world: World, http: aiohttp.ClientSession, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faults 12, 13, 17: delivered again, the dead one named."""
    monkeypatch.setattr("ingress.replies.SILENT_S", 0.4)
    second = await world.add("provider", "p2")
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=STREAM))
    ask = await world.ask()
    world.provider.send(ask, world.provider.accepted(ask))
    await asyncio.sleep(0.01)
    if how == "killed":
        world.provider.kill()
    else:
        world.provider.frozen = True
    begun = time.monotonic()
    again = await world.ask()
    assert time.monotonic() - begun < (0.35 if how == "killed" else 0.9)
    assert (again.delivery, again.lost) == (2, "p1")
    second.send(again, second.accepted(again, call=2), second.delta(again, event("new"), HEAD), second.end(again))
    async with await posting as answer:
        assert await answer.read() == event("new") + b"data: [DONE]\n\n"
    empty(world)


async def test_a_refused_names_a_holder_that_has_been_frozen_for_long(
    world: World, http: aiohttp.ClientSession
) -> None:
    """faults 17: its Accepted was lost in the freeze. Its silence began when it was last heard, so half a second more
    is enough, not another 1.5 s."""
    second = await world.add("provider", "p2")
    world.deaf = True
    world.provider.frozen = True
    world.ctx.rosters["provider"]._members["p1"].heard -= 1.2  # its last beat
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=STREAM))
    await world.ask()
    second_ask = await world.ask()  # nobody accepted
    begun = time.monotonic()
    second.send(second_ask, second.refused(second_ask, "p1", 1))
    third = await world.ask()
    assert time.monotonic() - begun < 1.2
    assert (third.delivery, third.lost) == (3, "p1")
    second.send(third, second.accepted(third, call=2), second.delta(third, event("new"), HEAD), second.end(third))
    async with await posting as answer:
        assert await answer.read() == event("new") + b"data: [DONE]\n\n"
    empty(world)


async def test_each_delivery_says_until_when_somebody_waits(world: World, http: aiohttp.ClientSession) -> None:
    """DESIGN 3, stale work: three times the hand-off from the first delivery, a little more for the last; then 503."""
    world.deaf = True
    begun = world.ctx.state.clock.now()
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    asks = [await world.ask() for _ in range(4)]
    async with await posting as answer:
        assert answer.status == 503
    ended = world.ctx.state.clock.now()
    assert [ask.delivery for ask in asks] == [1, 2, 3, 4]
    assert all(begun + 1500 <= ask.answer_by <= ended + 10 for ask in asks)
    empty(world)


async def test_the_holder_of_a_whole_answer_dies_with_half_of_it_here(
    world: World, http: aiohttp.ClientSession
) -> None:
    """No byte of it is with the client: 200, with the next provider's answer and headers."""
    second = await world.add("provider", "p2")
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    ask = await world.ask()
    world.provider.send(ask, world.provider.accepted(ask), world.provider.delta(ask, b'{"old', {"X-BR-Calls": "1"}))
    await asyncio.sleep(0.01)
    world.provider.kill()
    again = await world.ask()
    assert (again.delivery, again.lost) == (2, "p1")
    head = {"X-BR-Calls": "2"}
    second.send(again, second.accepted(again, call=2), second.delta(again, b'{"new":1}', head), second.end(again))
    async with await posting as answer:
        assert (answer.status, await answer.read()) == (200, b'{"new":1}')
        assert answer.headers["X-BR-Calls"] == "2"
    empty(world)


async def test_a_redelivery_goes_to_another_guardian(world: World, http: aiohttp.ClientSession) -> None:
    """DESIGN 1: who did not accept before is passed over."""
    await world.add("guardian", "g2")
    world.deaf = True
    posting = [asyncio.ensure_future(http.post(world.url + CHAT, json=BODY)) for _ in range(6)]
    asks = [await world.ask() for _ in range(12)]
    assert [ask.delivery for ask in asks] == [1] * 6 + [2] * 6
    for ask in asks[:6]:
        (taken,) = [worker for worker in world.workers if any(one.rid == ask.rid for one in worker.asks[:6]) and
                    any(one.rid == ask.rid and one.delivery == 1 for one in worker.asks)]  # fmt: skip
        (other,) = [worker for worker in world.workers if any(
            one.rid == ask.rid and one.delivery == 2 for one in worker.asks)]  # fmt: skip
        assert taken is not other
    for ask in asks[6:]:
        world.script(ask, world.provider)
    for answer in await asyncio.gather(*posting):
        assert answer.status == 200


async def test_14_the_holder_dies_after_text(world: World, http: aiohttp.ClientSession) -> None:
    _, answer = await begin(world, http)
    world.provider.kill()
    begun = time.monotonic()
    assert code_of(await answer.read()) == "upstream_worker_lost"
    assert time.monotonic() - begun < 0.4
    empty(world)


async def test_a_lively_holder_is_not_presumed_dead(
    world: World, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingress.replies.SILENT_S", 0.6)
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=STREAM))
    ask = await world.ask()
    world.provider.send(ask, world.provider.accepted(ask))
    await asyncio.sleep(1.2)
    provider = world.provider
    provider.send(ask, provider.delta(ask, event("a"), HEAD), provider.end(ask))
    async with await posting as answer:
        assert answer.status == 200
    assert world.ingress._replies.deaths == 0


async def test_our_own_stalled_loop_condemns_nobody(
    world: World, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN 3: one beat of grace."""
    monkeypatch.setattr("ingress.replies.SILENT_S", 0.6)
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=STREAM))
    ask = await world.ask()
    world.provider.send(ask, world.provider.accepted(ask))
    await asyncio.sleep(0.05)
    time.sleep(1.0)
    await asyncio.sleep(0.3)
    assert world.ingress._replies.deaths == 0
    provider = world.provider
    provider.send(ask, provider.delta(ask, event("a"), HEAD), provider.end(ask))
    async with await posting as answer:
        assert answer.status == 200


async def test_24_the_bus_goes(world: World, http: aiohttp.ClientSession) -> None:
    """Started streams end with an error, waiting requests and new ones get 503; back, all is well."""
    _, answer = await begin(world, http)
    waiting = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    await world.ask()
    world.bus.cut()
    assert code_of(await answer.read()) == "bus_unavailable"
    assert (await waiting).status == 503
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 503
        assert (await answer.json())["error"]["code"] == "bus_unavailable"
    async with http.get(world.url + "/ready") as answer:
        assert answer.status == 503
    empty(world)
    world.bus.cut(connected=True)
    world.deaf = False
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 200


# ---- credit


async def test_a_reader_gets_credit_and_a_slow_one_does_not(world: World) -> None:
    """DESIGN 3, flow control; I10: the slow reader holds up nobody else."""
    world.deaf = True
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", world.ingress.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    writer.write(REQUEST)
    ask = await world.ask()
    provider = world.provider
    stream = ask.reply.stream
    provider.send(ask, provider.accepted(ask))
    sent = 0
    chunk = event("x" * 16_000)

    def taken() -> int:
        seen = [row[2] for m in provider.controls if isinstance(m, Credit) for row in m.streams if row[0] == stream]
        return max(seen, default=0)

    # a provider that keeps the window: it stops when nobody reads
    idle = 0
    while idle < 3:
        if sent + len(chunk) - taken() <= 65_536:
            provider.send(ask, provider.delta(ask, chunk, HEAD if not sent else None))
            sent += len(chunk)
            idle = 0
            await asyncio.sleep(0.001)
        else:
            idle += 1
            await asyncio.sleep(0.2)
        assert sent < 64_000_000, "credit was given for what nobody took"
    exchange = world.ingress._desk.exchanges[stream]
    held = exchange.machine.received - exchange.machine.taken
    assert 0 < held <= 65_536
    connection = next(iter(world.ingress._server.connections))
    assert connection.transport is not None
    assert connection.transport.get_write_buffer_size() <= 70_000

    before = taken()
    assert sent < 1_000_000, "the kernel holds what nobody reads"
    begun = time.monotonic()
    while taken() <= before:
        async with asyncio.timeout(5):
            await reader.read(65_536)
    assert time.monotonic() - begun < 5
    row = [r for m in provider.controls if isinstance(m, Credit) for r in m.streams if r[0] == stream][-1]
    assert row[1] == 1
    writer.transport.abort()
    await provider.cancelled()


async def test_credit_is_repeated_while_anything_is_open(world: World, http: aiohttp.ClientSession) -> None:
    """A lost credit heals within 500 ms, and the pair's offset travels with it."""
    ask, answer = await begin(world, http)
    provider = world.provider
    await asyncio.sleep(1.2)
    told = [m for m in provider.controls if isinstance(m, Credit)]
    assert 2 <= len(told) <= 3
    assert told[-1].read == len(event("a"))
    assert told[-1].streams == ((ask.reply.stream, 1, len(event("a"))),)
    provider.send(ask, provider.end(ask))
    await answer.read()
    provider.controls.clear()
    await asyncio.sleep(0.6)
    assert not provider.controls, "nothing is open"


async def test_the_pairs_window(world: World, http: aiohttp.ClientSession) -> None:
    """16 MiB a pair: read is told before half of it is gone, whatever the streams do."""
    ask, answer = await begin(world, http)
    provider = world.provider
    provider.offset += 9 * 1024 * 1024  # as if other streams of ours had taken it
    provider.controls.clear()
    provider.send(ask, provider.end(ask))
    await answer.read()
    credit = await provider.wait_control(lambda m: isinstance(m, Credit))
    assert isinstance(credit, Credit)
    assert credit.read == provider.offset


async def test_58_59_a_client_that_takes_nothing_is_cut(make_world: MakeWorld) -> None:
    world = await make_world(CLIENT_STALLED_MS="300")
    world.deaf = True
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", world.ingress.port))
    await loop.sock_sendall(sock, REQUEST)
    ask = await world.ask()
    provider = world.provider
    provider.send(ask, provider.accepted(ask))
    for k in range(400):
        provider.send(ask, provider.delta(ask, b"y" * 32_000, HEAD if k == 0 else None))
    cancel = await provider.cancelled()
    assert cancel.reason == "client gone"
    await asyncio.sleep(0.05)
    assert not world.ingress._server.connections
    empty(world)
    sock.close()
