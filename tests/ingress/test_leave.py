"""SIGTERM to an ingress: what becomes of clients, connections and the listening socket (S1-H5, D8, faults 84)."""

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
import uvloop

from ingress import leave, listener
from ingress.listener import Listener
from shared import settings as environment
from tests.ingress.conftest import MakeWorld
from tests.ingress.test_streams import BODY, CHAT, REQUEST, STREAM, begin, code_of
from tests.ingress.world import ENV, HEAD, KEY, SUMMARY, World, event


async def beside(world: World) -> None:
    """Another ingress lives."""
    await world.add("ingress", "in2")


async def turned(world: World, *, draining: bool) -> None:
    """Until the ingress has chosen."""
    door = world.ingress._door
    assert door is not None
    async with asyncio.timeout(3):
        while (
            not door.leaving or door.draining is not draining or (world.ingress._listener._socket is None) is draining
        ):
            await asyncio.sleep(0.005)


def refused(world: World) -> bool:
    """Whether nothing listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", world.ingress.port)) != 0


async def test_one_with_a_sibling_serves_its_connections_and_lets_nobody_in(
    world: World, http: aiohttp.ClientSession
) -> None:
    """Nothing is refused: a request on an open connection is answered, and that connection takes no other."""
    await beside(world)
    ask, stream = await begin(world, http)
    world.deaf = False
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(REQUEST)
    assert b"Connection" not in await reader.readuntil(b"\r\n\r\n")
    await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    draining = asyncio.ensure_future(world.ingress.drain())
    await turned(world, draining=False)
    assert refused(world)

    writer.write(REQUEST)  # kept alive since before
    assert b"Connection: close" in await reader.readuntil(b"\r\n\r\n")
    assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    writer.close()
    assert not draining.done()
    world.provider.send(ask, world.provider.end(ask, SUMMARY))
    assert (await stream.read()).endswith(b"data: [DONE]\n\n")
    await http.close()
    async with asyncio.timeout(3):
        await draining


async def test_an_idle_connection_is_kept_until_its_client_would_not_use_it(
    world: World, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race that loses requests: a client sends on a connection that the server closes in the same moment."""
    monkeypatch.setattr(leave, "IDLE_S", 0.4)
    await beside(world)
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 200
    idle_since = time.monotonic()
    draining = asyncio.ensure_future(world.ingress.drain())
    await turned(world, draining=False)
    assert not draining.done()
    async with asyncio.timeout(3):
        await draining
    assert time.monotonic() - idle_since >= 0.4


async def test_a_request_that_waits_unread_keeps_its_connection(
    world: World, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle for long enough, but its next request is in the kernel already: it is answered."""
    monkeypatch.setattr(leave, "IDLE_S", 0.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(REQUEST)
    await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    client = writer.get_extra_info("socket")
    assert len(world.ingress._server.connections) == 1
    os.write(client.fileno(), REQUEST)  # by the kernel at once; the loop has not turned since
    world.ingress._server.close_idle(0.0)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    await asyncio.sleep(0)
    world.ingress._server.close_idle(0.0)
    assert await reader.read() == b"", "and closed when nothing is there"
    writer.close()


async def test_all_told_to_end_at_once_are_nobodys_sibling(world: World, http: aiohttp.ClientSession) -> None:
    """Ctrl-C: the first choice falls before the others' beats tell; then the listening socket is opened again, and new
    requests are refused in words instead of waiting in a queue that nobody reads."""
    sibling = await world.add("ingress", "in2")
    ask, stream = await begin(world, http)
    draining = asyncio.ensure_future(world.ingress.drain())
    await turned(world, draining=False)
    world.workers.remove(sibling)
    sibling.beat(draining=True)
    await turned(world, draining=True)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {KEY}"}) as other:
        async with other.post(world.url + CHAT, json=BODY) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "shutting_down")
        sibling.beat()
        await turned(world, draining=False)
    sibling.beat(draining=True)
    world.provider.send(ask, world.provider.end(ask, SUMMARY))
    assert (await stream.read()).endswith(b"data: [DONE]\n\n")
    async with asyncio.timeout(3):
        await draining


async def test_a_stream_accepted_before_and_begun_after_says_close(world: World, http: aiohttp.ClientSession) -> None:
    """Its head is written when the first text comes."""
    await beside(world)
    world.deaf = True
    posting = asyncio.ensure_future(http.post(world.url + CHAT, json=STREAM))
    ask = await world.ask()
    draining = asyncio.ensure_future(world.ingress.drain())
    await turned(world, draining=False)
    provider = world.provider
    provider.send(ask, provider.accepted(ask), provider.delta(ask, event("a"), HEAD), provider.end(ask, SUMMARY))
    async with await posting as answer:
        assert answer.headers["Connection"] == "close"
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")
    async with asyncio.timeout(3):
        await draining


async def test_the_last_bytes_reach_a_slow_client(world: World) -> None:
    """An answer is in flight until the client has it, not until it is written."""
    size = 1_500_000
    body = b'{"object":"chat.completion","choices":[],"x":"%b"}' % (b"x" * size)
    world.script = lambda ask, one: one.send(ask, one.accepted(ask), one.delta(ask, body, HEAD), one.end(ask))
    raw = json.dumps(BODY).encode()
    request = REQUEST.partition(b"Content-Length")[0] + b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port, limit=1024)
    writer.write(request)
    await reader.readuntil(b"\r\n\r\n")
    async with asyncio.timeout(3):
        while world.ingress.in_flight():
            await asyncio.sleep(0)
    draining = asyncio.ensure_future(world.ingress.drain())
    await asyncio.sleep(0.2)
    assert not draining.done()
    assert await reader.readexactly(len(body)) == body
    async with asyncio.timeout(3):
        await draining
    writer.close()


async def test_the_last_one(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """S1-H5a, H5b: /ready 503, new requests 503, those in flight finish, then nothing listens."""
    world = await make_world()
    world.deaf = True
    whole = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    first = await world.ask()
    stream = asyncio.ensure_future(http.post(world.url + CHAT, json=STREAM))
    second = await world.ask()
    provider = world.provider
    provider.send(second, provider.accepted(second), provider.delta(second, event("a"), HEAD))
    draining = asyncio.ensure_future(world.ingress.drain())
    await asyncio.sleep(0.01)
    async with http.get(world.url + "/ready") as answer:
        assert answer.status == 503
        assert (await answer.json())["draining"] is True
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 503
        error = (await answer.json())["error"]
        assert (error["code"], error["message"]) == ("shutting_down", "Service Unavailable - shutting down")
        assert answer.headers["Connection"] == "close"
        assert int(answer.headers["Retry-After"]) >= 1
    world.script(first, provider)
    assert (await whole).status == 200
    assert not draining.done()
    provider.send(second, provider.end(second, SUMMARY))
    async with await stream as answer:
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")
    async with asyncio.timeout(3):
        await draining
    with pytest.raises(aiohttp.ClientConnectorError):
        await http.get(world.url + "/health")


async def test_drain_ends_what_does_not_finish(
    make_world: MakeWorld, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """D8: whole requests get SHUTDOWN_DRAIN_MS, streams SHUTDOWN_STREAM_DRAIN_MS."""
    world = await make_world(SHUTDOWN_DRAIN_MS="150", SHUTDOWN_STREAM_DRAIN_MS="400")
    world.deaf = True
    whole = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    asked = await world.ask()
    stream = asyncio.ensure_future(http.post(world.url + CHAT, json=STREAM))
    ask = await world.ask()
    world.provider.send(ask, world.provider.accepted(ask), world.provider.delta(ask, event("a"), HEAD))
    begun = time.monotonic()
    draining = asyncio.ensure_future(world.ingress.drain())
    async with await whole as answer:
        assert answer.status == 503
    assert 0.1 < time.monotonic() - begun < 0.35
    async with await stream as answer:
        assert code_of(await answer.read()) == "shutting_down"
    assert 0.35 < time.monotonic() - begun < 1.0
    await world.provider.cancelled()
    await draining
    assert "did not finish" in caplog.text
    named = [name for record in caplog.records for name in getattr(record, "requests", [])]
    assert named == [f"{one.label} ({one.rid})" for one in (asked, ask)], "S1-H5c: the log names them"


async def test_a_body_that_does_not_come_holds_nobody_up(make_world: MakeWorld) -> None:
    """A client that sends its body for a minute has as long as a whole answer, once we leave as the last one."""
    world = await make_world(SHUTDOWN_DRAIN_MS="200", SHUTDOWN_STREAM_DRAIN_MS="60000")
    _, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(REQUEST[:-5])
    async with asyncio.timeout(3):
        while not world.ingress.in_flight():
            await asyncio.sleep(0)
        await world.ingress.drain()
    writer.close()


async def test_a_port_that_was_taken_meanwhile(
    world: World, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """The last one cannot listen again: it says so once and serves what it has."""
    sibling = await world.add("ingress", "in2")
    ask, stream = await begin(world, http)
    draining = asyncio.ensure_future(world.ingress.drain())
    await turned(world, draining=False)
    with socket.create_server(("127.0.0.1", world.ingress.port)):
        world.workers.remove(sibling)
        sibling.beat(draining=True)
        await asyncio.sleep(0.35)
        world.provider.send(ask, world.provider.end(ask, SUMMARY))
        assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        async with asyncio.timeout(3):
            await draining
    assert caplog.text.count("cannot listen again") == 1


# ---- the listening socket


class Counting(asyncio.Protocol):
    """Connections that answer whatever comes with one byte."""

    made = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport
        type(self).made += 1

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"!" * len(data))


def test_closing_a_socket_of_our_own_resets_nobody() -> None:
    """SO_REUSEPORT: clients connect all the time while one of two processes stops listening; each gets its answer.

    Closing the socket at once resets 77 of the 300 (tried).
    """
    settings = environment.load(ENV)

    async def run() -> None:
        stays, leaves = Listener(settings), Listener(settings)
        await stays.start(Counting)
        leaves.port = stays.port
        await leaves.start(Counting)

        async def ask() -> bytes:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", stays.port)
                writer.write(b"?")
                answer = await reader.read(1)
                writer.close()
                return answer

        asking = [asyncio.create_task(ask()) for _ in range(150)]
        while Counting.made < 10:
            await asyncio.sleep(0)
        time.sleep(0.05)  # the queues fill while the loop is away
        stopping = asyncio.create_task(leaves.stop())
        asking += [asyncio.create_task(ask()) for _ in range(150)]
        answers = await asyncio.gather(*asking, return_exceptions=True)
        await stopping
        assert not leaves.open
        await stays.close()
        lost = [answer for answer in answers if answer != b"!"]
        assert not lost, f"{len(lost)} of 300"

    uvloop.run(run())


def test_the_queue_is_emptied_even_without_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in the queue when we stop is taken; not one of 50 clients is reset."""
    monkeypatch.setattr(listener, "drop_handshakes", lambda _: False)

    async def run() -> None:
        one = Listener(environment.load(ENV))
        await one.start(Counting)
        clients = [socket.create_connection(("127.0.0.1", one.port), timeout=5) for _ in range(50)]
        await one.stop()
        for client in clients:
            client.sendall(b"?")
        for client in clients:
            assert await asyncio.to_thread(client.recv, 1) == b"!"
            client.close()

    uvloop.run(run())


def test_new_handshakes_are_dropped_and_not_refused() -> None:
    """With the filter a SYN is not answered at all; a connection made before goes on."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        early = socket.create_connection(server.getsockname(), timeout=5)
        assert listener.drop_handshakes(server)
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.connect(server.getsockname())
        accepted, _ = server.accept()
        accepted.sendall(b"x")
        assert early.recv(1) == b"x"
        accepted.close()
        early.close()


@pytest.fixture
async def handed_down() -> AsyncIterator[socket.socket]:
    """The supervisor's socket."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


async def test_a_socket_that_was_handed_down_stays_open_for_the_others(handed_down: socket.socket) -> None:
    """Who connects after we stopped waits for the next process, which takes it."""
    fd = handed_down.dup().detach()
    one = Listener(environment.load({**ENV, "HOTPATH_LISTEN_FD": str(fd)}))
    await one.start(Counting)
    await one.stop()
    with socket.create_connection(handed_down.getsockname(), timeout=5) as client:
        client.sendall(b"?")
        other = Listener(environment.load({**ENV, "HOTPATH_LISTEN_FD": str(handed_down.dup().detach())}))
        await other.start(Counting)
        assert await asyncio.to_thread(client.recv, 1) == b"!"
    await other.close()
    await one.close()
