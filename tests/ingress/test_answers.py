"""What a client gets when all goes well: whole answers, streams, the three forms of D5, models."""

import asyncio
import re
import socket

import aiohttp
import pytest

from ingress.listener import Listener
from shared import settings as environment
from shared.service import BootError
from shared.wire.messages import Ask
from tests.ingress.conftest import MakeWorld
from tests.ingress.world import ADMIN, ENV, HEAD, KEY, PAYLOAD, SUMMARY, Worker, World, event

CHAT = "/v1/chat/completions"
BODY = {"model": "sim-fast", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**BODY, "stream": True}


async def test_a_whole_answer(world: World, http: aiohttp.ClientSession) -> None:
    """S1-G17, S1-H1b, S2-23."""
    async with http.post(world.url + CHAT, json=BODY, headers={"X-Request-ID": "my-id.1"}) as answer:
        assert answer.status == 200
        assert await answer.json() == {"object": "chat.completion", "choices": []}
        assert answer.headers["X-Request-ID"] == "my-id.1"
        assert answer.headers["Content-Type"] == "application/json"
        assert "Content-Length" in answer.headers
        for name, value in HEAD.items():
            assert answer.headers[name] == value
        rid = answer.headers["X-BR-Request-Id"]
    ask = await world.ask()
    assert re.fullmatch("[0-9a-f]{32}", rid)
    assert (ask.rid, ask.label, ask.model, ask.tenant, ask.key) == (rid, "my-id.1", "sim-fast", "default", "bootstrap")
    assert (ask.delivery, ask.stream, ask.timeout_ms, ask.epoch) == (1, False, 30000, 7)
    assert world.ingress.in_flight() == 0
    assert not world.ingress._desk.exchanges


@pytest.mark.parametrize(
    ("form", "tail"),
    [
        ("inline", b"data: [DONE]\n\n"),
        ("append", b"data: [DONE] " + PAYLOAD + b"\n\n"),
        ("comment", b": x-br " + PAYLOAD + b"\ndata: [DONE]\n\n"),
    ],
)
async def test_a_stream_in_the_three_forms_of_d5(
    world: World, http: aiohttp.ClientSession, form: str, tail: bytes
) -> None:
    async with http.post(world.url + CHAT, json=STREAM, headers={"X-BR-Done-Payload": form}) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["X-Accel-Buffering"] == "no"
        assert answer.headers["X-BR-Endpoint"] == "sim"
        assert await answer.read() == event("a") + event("b") + event("c") + tail
    assert (await world.ask()).done == form


async def test_one_connection_carries_many_requests(world: World, http: aiohttp.ClientSession) -> None:
    for body in (BODY, STREAM, BODY, STREAM):
        async with http.post(world.url + CHAT, json=body) as answer:
            assert answer.status == 200
            await answer.read()
    assert len(world.ingress._server.connections) == 1


async def test_http_1_0_gets_a_stream_without_chunks(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    body = b'{"model":"sim-fast","stream":true,"messages":[{"role":"user","content":"hi"}]}'
    writer.write(
        b"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nAuthorization: Bearer %b\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (KEY.encode(), len(body), body)
    )
    head, _, text = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK")
    assert b"chunked" not in head
    assert text == event("a") + event("b") + event("c") + b"data: [DONE]\n\n"
    writer.close()


async def test_keep_alives_after_the_commit_time_and_in_each_silence(
    make_world: MakeWorld, http: aiohttp.ClientSession
) -> None:
    """DESIGN 3: headers go out after STREAM_COMMIT_MS at the latest, without X-BR values not yet known."""
    world = await make_world(STREAM_COMMIT_MS="60", KEEPALIVE_MS="50")
    world.deaf = True
    async with http.post(world.url + CHAT, json=STREAM) as answer:
        ask = await world.ask()
        world.provider.send(ask, world.provider.accepted(ask))
        assert answer.status == 200
        assert "X-BR-Calls" not in answer.headers
        assert await answer.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        assert await answer.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        world.provider.send(ask, world.provider.delta(ask, event("a"), HEAD))
        text = await answer.content.readuntil(b"\n\n")
        while text == b": keep-alive\n\n":
            text = await answer.content.readuntil(b"\n\n")
        assert text == event("a")
        assert await answer.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        world.provider.send(ask, world.provider.end(ask))
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_a_large_whole_answer_in_many_deltas(world: World, http: aiohttp.ClientSession) -> None:
    """It drains into the ingress, credit by credit, and arrives whole."""
    parts = [bytes([65 + k % 26]) * 32_768 for k in range(40)]

    def script(ask: Ask, provider: Worker) -> None:
        provider.send(ask, provider.accepted(ask))
        for k, part in enumerate(parts):
            provider.send(ask, provider.delta(ask, part, HEAD if k == 0 else None))
        provider.send(ask, provider.end(ask, SUMMARY))

    world.script = script
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert await answer.read() == b"".join(parts)


async def test_models(world: World, http: aiohttp.ClientSession) -> None:
    async with http.get(world.url + "/v1/models") as answer:
        page = await answer.json()
    assert [row["id"] for row in page["data"]] == ["sim-fast", "vendor/model:v1@eu"]
    for path in ("vendor/model:v1@eu", "vendor%2Fmodel%3Av1%40eu"):
        async with http.get(world.url + "/v1/models/" + path) as answer:
            assert answer.status == 200
            assert (await answer.json())["id"] == "vendor/model:v1@eu"
    async with http.get(world.url + "/v1/models/nothing") as answer:
        assert answer.status == 404
        assert (await answer.json())["error"]["code"] == "model_not_found"
    async with http.head(world.url + "/v1/models") as answer:
        assert answer.status == 200


async def test_health_ready_metrics_targets_trace(world: World, http: aiohttp.ClientSession) -> None:
    """S1-G14, S1-G01, issue 2 acceptance 3."""
    async with http.post(world.url + CHAT, json=BODY) as answer:
        rid = answer.headers["X-BR-Request-Id"]
    async with http.get(world.url + "/health") as answer:
        assert (answer.status, await answer.json()) == (200, {"status": "ok"})
    async with http.get(world.url + "/ready") as answer:
        assert answer.status == 200
        assert (await answer.json())["workers"] == {"guardian": 1, "routing": 1, "provider": 1}
    for path in ("/metrics", "/metrics/targets", f"/trace/{rid}"):
        async with http.get(world.url + path) as answer:
            assert answer.status == 401, "a tenant's key is not enough"
    admin = {"Authorization": f"Bearer {ADMIN}"}
    async with http.get(world.url + "/metrics", headers=admin) as answer:
        text = await answer.text()
        assert 'hotpath_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
        assert 'hotpath_request_seconds_count{route="/v1/chat/completions"} 1.0' in text
    async with http.get(world.url + "/metrics/targets", headers=admin) as answer:
        assert await answer.json() == [{"targets": ["127.0.0.1:1"], "labels": {"role": "guardian,provider,routing"}}]
    async with http.get(world.url + f"/trace/{rid}", headers=admin) as answer:
        trace = await answer.json()
        assert trace["outcome"] == "ok"
        assert [hop["role"] for hop in trace["hops"]] == ["guardian", "routing", "provider"]
    async with http.get(world.url + "/trace/unknown", headers=admin) as answer:
        assert answer.status == 404
    world.server.start()
    base = world.server.url.removesuffix("/metrics")
    async with http.get(base + f"/trace/{rid}") as answer:
        assert (await answer.json())["rid"] == rid
    async with http.get(base + "/metrics/targets") as answer:
        assert answer.status == 200


async def test_ready_says_what_is_missing(world: World, http: aiohttp.ClientSession) -> None:
    for stored in (True, False):  # told, and no reason to send nothing here: the spool takes it
        world.provider.beat(stored=stored)
        async with http.get(world.url + "/ready") as answer:
            assert (answer.status, (await answer.json())["jetstream"]) == (200, stored)
    world.registry.fresh = False
    async with http.get(world.url + "/ready") as answer:
        assert answer.status == 503
        assert (await answer.json())["redis"] is False
    world.registry.fresh = True
    world.provider.kill()
    world.ctx.rosters["provider"].dead("p1")
    async with http.get(world.url + "/ready") as answer:
        assert answer.status == 503
        assert (await answer.json())["workers"]["provider"] == 0


async def test_the_first_three_requests_log_their_stages(
    world: World, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """S0-02, S0-03."""
    caplog.set_level("INFO", "hotpath.ingress")
    for k in range(5):
        async with http.post(world.url + CHAT, json=STREAM, headers={"X-Request-ID": f"r{k}"}) as answer:
            await answer.read()
    lines = [record for record in caplog.records if record.getMessage() == "[COLD-START]"]
    assert [vars(line)["requestId"] for line in lines] == ["r0", "r1", "r2"]
    stages = vars(lines[0])["stages_ms"]
    assert list(stages) == ["auth", "read", "parse", "validate", "hand over", "first text", "end"]


async def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    """Boot failures say what to do, without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = environment.load({**ENV, "GATEWAY_PORT": str(port)})
        with pytest.raises(BootError, match=rf"cannot listen on 127.0.0.1 port {port} .*GATEWAY_PORT"):
            await Listener(settings).start(asyncio.Protocol)
