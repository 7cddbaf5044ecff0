"""At its bounds the ingress refuses at once, and what it refused leaves nothing (issue 3; faults 87, 91)."""

import asyncio
import collections
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import aiohttp
import pytest

from ingress.middleware import Visit
from ingress.protocol import Reply
from shared.core.overload import CREDIT
from shared.state.base import Principal
from shared.wire import errors
from shared.wire.messages import Ask
from tests.ingress.conftest import MakeWorld
from tests.ingress.test_refusals import AUTH, BODY, CHAT, HOST, POST, RAW, TYPE, error_of, raw
from tests.ingress.world import Worker, World, answer

OTHER = "other-key-other-key-other-key-other-key"


def nothing_left(world: World) -> None:
    """In no map, and nothing handed over."""
    door = world.ingress._door
    assert door is not None
    assert (door.in_flight, len(door._shares), len(world.ingress._desk.exchanges)) == (0, 0, 0)
    assert world.asks.empty()


async def test_the_in_flight_bound(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """503 at once while full of slow requests, with both ways of saying when to come back (D15)."""
    world = await make_world(MAX_IN_FLIGHT="3", HANDOFF_TIMEOUT_MS="10000")
    world.deaf = True
    waiting = [asyncio.ensure_future(http.post(world.url + CHAT, json=BODY)) for _ in range(3)]
    asks = [await world.ask() for _ in waiting]
    for _ in range(5):
        async with http.post(world.url + CHAT, json=BODY) as answer:
            assert answer.status == 503
            assert (await error_of(answer))["code"] == "overloaded"
            assert int(answer.headers["Retry-After"]) >= 1
            assert int(answer.headers["retry-after-ms"]) >= 1
    async with http.get(world.url + "/health") as answer:
        assert answer.status == 200
    assert world.ingress.in_flight() == 3
    assert len(world.ingress._desk.exchanges) == 3
    for ask in asks:
        world.script(ask, world.provider)
    for request in waiting:
        assert (await request).status == 200
    nothing_left(world)


async def test_refused_before_the_body_is_read(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """Neither key nor type nor body is looked at when it is full: a body that never comes is not waited for."""
    world = await make_world(MAX_IN_FLIGHT="1", HANDOFF_TIMEOUT_MS="10000")
    world.deaf = True
    waiting = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    ask = await world.ask()
    status, head, _ = await raw(world, POST, HOST, b"Content-Length: 1000000\r\n\r\n{")
    assert status == 503
    assert b"\r\nRetry-After: 1\r\n" in head
    world.script(ask, world.provider)
    assert (await waiting).status == 200
    nothing_left(world)


def chat(*fields: bytes, body: bytes = RAW) -> bytes:
    """One request as most clients write it."""
    return POST + HOST + AUTH + TYPE + b"".join(fields) + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


async def heads(reader: asyncio.StreamReader, count: int) -> list[tuple[int, bytes]]:
    """Status and head of so many answers, bodies read by their length."""
    got = []
    for _ in range(count):
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        got.append((int(head[9:12]), head))
    return got


async def full_world(make_world: MakeWorld, http: aiohttp.ClientSession) -> tuple[World, Ask, asyncio.Task[Any]]:
    """Full with one request that waits."""
    world = await make_world(MAX_IN_FLIGHT="1", HANDOFF_TIMEOUT_MS="10000")
    world.deaf = True
    waiting = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    return world, await world.ask(), waiting


async def test_a_refusal_without_parsing_is_like_any_other(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """The plainest requests are refused before the parser; the connection serves on, and the label is told."""
    world, ask, waiting = await full_world(make_world, http)
    parsed = world.ingress._server.requests_count
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    for fields in ((), (b"x-request-id: mine-1\r\n",), (b"X-Request-ID: mine-1\r\n", b"Accept: */*\r\n")):
        writer.write(chat(*fields))
        [(status, head)] = await heads(reader, 1)
        assert status == 503
        names = {line.partition(b":")[0] for line in head.split(b"\r\n")[1:-2]}
        assert names == {b"X-Request-ID", b"X-BR-Request-Id", b"Content-Type", b"Retry-After", b"retry-after-ms",
                         b"Content-Length", b"Date"}  # fmt: skip
        assert (b"\r\nX-Request-ID: mine-1\r\n" in head) == bool(fields)
    assert world.ingress._server.requests_count == parsed
    assert world.ingress._tally.requests(CHAT, 503) == 3
    world.script(ask, world.provider)
    assert (await waiting).status == 200
    world.deaf = False
    writer.write(chat())
    assert (await heads(reader, 1))[0][0] == 200
    await world.ask()
    writer.close()
    nothing_left(world)


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (chat(b"Connection: close\r\n"), [503]),
        (chat(b"Expect: 100-continue\r\n"), [503]),
        (chat(b"X-Request-ID: a b\r\n"), [503]),
        (chat(b"X-Request-ID: a\r\nX-Request-ID: b\r\n"), [503]),
        (chat() + chat(), [503, 503]),
        (chat()[:-5], []),
        (POST[:-3] + b"0\r\n" + chat()[len(POST) :], [503]),
        (POST + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [503]),
        (chat(b"Transfer-Encoding: chunked\r\n"), [400]),
        (chat(b"Content-Length: %d\r\n" % len(RAW)), [400]),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}", [200]),
        (b"POST /v1/nothing HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}", [404]),
    ],
    ids=["close", "expect", "label", "labels", "two", "half", "1.0", "chunked", "both", "lengths", "health", "404"],
)  # fmt: skip
async def test_whatever_says_more_goes_by_way_of_the_parser(
    make_world: MakeWorld, http: aiohttp.ClientSession, data: bytes, statuses: list[int]
) -> None:
    """Its rules hold when full as ever: what ends a connection ends it, what cannot be framed is refused as such."""
    world, ask, waiting = await full_world(make_world, http)
    parsed = world.ingress._server.requests_count
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(data)
    got = await heads(reader, len(statuses))
    assert [status for status, _ in got] == statuses
    assert world.ingress._server.requests_count - parsed == len(statuses)
    if not statuses:  # the rest comes, and belongs to it
        writer.write(chat()[-5:])
        assert (await heads(reader, 1))[0][0] == 503
    writer.close()
    world.script(ask, world.provider)
    assert (await waiting).status == 200


async def test_one_that_leaves_says_so_when_full_too(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """S1-H5: each answer of an ingress that leaves is its connection's last."""
    world, ask, waiting = await full_world(make_world, http)
    door = world.ingress._door
    assert door is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(chat())
    assert b"\r\nConnection: close\r\n" not in (await heads(reader, 1))[0][1]
    door.leaving = True
    writer.write(chat())
    assert b"\r\nConnection: close\r\n" in (await heads(reader, 1))[0][1]
    assert await reader.read() == b""
    writer.close()
    world.script(ask, world.provider)
    assert (await waiting).status == 200


async def test_an_answer_under_way_is_never_overtaken(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """A pipelined request is refused after its predecessor's answer, not before it."""
    world = await make_world(MAX_IN_FLIGHT="1", HANDOFF_TIMEOUT_MS="10000")
    world.deaf = True
    reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
    writer.write(chat())
    ask = await world.ask()
    writer.write(chat())
    async with http.post(world.url + CHAT, json=BODY) as answer:  # what was written before it has been read
        assert answer.status == 503
    waiting = asyncio.ensure_future(heads(reader, 2))
    world.deaf = False
    world.script(ask, world.provider)
    assert [status for status, _ in await waiting] == [200, 200]
    writer.close()


async def test_91_a_tenants_own_limit(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    """429 in OpenAI's words for the hot one; nobody else notices; streams count until their end."""
    world = await make_world(MAX_IN_FLIGHT_PER_TENANT="2", MAX_IN_FLIGHT="10", HANDOFF_TIMEOUT_MS="10000")
    world.registry.known[OTHER.encode()] = Principal(tenant="cool", key="k2", tenant_name="cool")
    world.deaf = True
    stream = asyncio.ensure_future(http.post(world.url + CHAT, json={**BODY, "stream": True}))
    whole = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    asks = {ask.stream: ask for ask in (await world.ask(), await world.ask())}
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert int(answer.headers["retry-after-ms"]) >= 1
        error = await error_of(answer)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    world.deaf = False
    async with http.post(world.url + CHAT, json=BODY, headers={"Authorization": f"Bearer {OTHER}"}) as answer:
        assert answer.status == 200
    assert (await world.ask()).tenant == "cool"

    world.script(asks[False], world.provider)  # the whole one ends: one more may come
    assert (await whole).status == 200
    provider = world.provider
    provider.send(asks[True], provider.accepted(asks[True]), provider.delta(asks[True], b"data: x\n\n", {}))
    assert (await stream).status == 200  # its head is there; its body is not at its end
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 200
    await world.ask()
    world.deaf = True
    second = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    ask = await world.ask()
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 429
    provider.send(asks[True], provider.end(asks[True]))
    assert (await (await stream).read()).endswith(b"[DONE]\n\n")
    world.deaf = False
    async with http.post(world.url + CHAT, json=BODY) as answer:
        assert answer.status == 200
    await world.ask()
    world.script(ask, world.provider)
    assert (await second).status == 200
    nothing_left(world)


async def test_a_client_that_left_gives_its_share_back(make_world: MakeWorld, http: aiohttp.ClientSession) -> None:
    world = await make_world(MAX_IN_FLIGHT_PER_TENANT="1")
    world.deaf = True
    waiting = asyncio.ensure_future(http.post(world.url + CHAT, json=BODY))
    await world.ask()
    waiting.cancel()
    door = world.ingress._door
    assert door is not None
    async with asyncio.timeout(3):
        await door.emptied()
    nothing_left(world)


async def spin(visit: Visit) -> Reply:
    """A request whose work takes the loop for 20 ms."""
    time.sleep(0.02)
    return visit.json(b"{}")


async def test_a_queue_that_stands_is_shed(world: World) -> None:
    """What waits behind half a second of work is refused with 503, not begun late, once the queue stands."""
    door = world.ingress._door
    assert door is not None
    door.add("GET", "/spin", spin)
    head = b"GET /spin HTTP/1.1\r\n" + HOST + b"\r\n"
    with mock.patch.multiple("shared.core.overload", BURST=3, INTERVAL_S=0.0):
        clients = [await asyncio.open_connection("127.0.0.1", world.ingress.port) for _ in range(30)]
        for _, writer in clients:
            writer.write(head)
        heads = [await reader.readuntil(b"\r\n\r\n") for reader, _ in clients]
    statuses = Counter(int(head.split(b" ", 2)[1]) for head in heads)
    assert set(statuses) == {200, 503}
    assert door.queue.shed == statuses[503]
    assert all(b"\r\nRetry-After: " in head for head in heads if b" 503 " in head)
    assert door.queue.worst() > 0.05
    for _, writer in clients:
        writer.close()
    assert door.in_flight == 0


async def test_a_pipelined_request_does_not_wait_in_our_queue(world: World) -> None:
    """It waits behind its client's own: that is no overload, however long it takes."""
    door = world.ingress._door
    assert door is not None
    world.deaf = True
    request = POST + HOST + AUTH + TYPE + b"Content-Length: %d\r\n\r\n%b" % (len(RAW), RAW)
    with mock.patch.multiple("shared.core.overload", BURST=0, INTERVAL_S=0.0):
        reader, writer = await asyncio.open_connection("127.0.0.1", world.ingress.port)
        writer.write(request + request)
        ask = await world.ask()
        await asyncio.sleep(0.06)
        world.script(ask, world.provider)
        assert b" 200 " in await reader.readuntil(b"\r\n")
        world.script(await world.ask(), world.provider)
        assert b" 200 " in (await reader.readuntil(b"HTTP/1.1 200 OK\r\n"))
    assert door.queue.shed == 0
    writer.close()


# ---- a worker that declines


def declining(*hot: Worker) -> Callable[[Ask, Worker], None]:
    """These send back what they get, before they begin it; the provider serves the rest."""

    def script(ask: Ask, provider: Worker) -> None:
        for worker in hot:
            if ask in worker.asks:
                worker.send(ask, worker.failed(ask, errors.Overloaded()))
                return
        answer(ask, provider)

    return script


async def test_one_hot_guardian_fails_nobody(world: World, http: aiohttp.ClientSession) -> None:
    """No upstream call was made: another guardian gets the request, and the hot one no more until its next beat."""
    others = [await world.add("guardian", f"g{n}") for n in (2, 3, 4)]
    world._beats.cancel()  # nobody tells a new load
    world.guardian.beat(capacity=2500)
    world.script = declining(world.guardian)
    for _ in range(30):
        async with http.post(world.url + CHAT, json=BODY) as got:
            assert got.status == 200
    assert len(world.guardian.asks) <= 1
    assert sum(len(worker.asks) for worker in others) == 30


async def test_a_provider_that_declines_is_no_end_while_there_is_another(
    world: World, http: aiohttp.ClientSession
) -> None:
    second = await world.add("provider", "p2")

    def script(ask: Ask, provider: Worker) -> None:
        if ask.delivery == 1:
            provider.send(ask, provider.failed(ask, errors.Overloaded()))
        else:
            answer(ask, second)

    world.script = script
    async with http.post(world.url + CHAT, json=BODY) as got:
        assert got.status == 200


async def test_a_guardian_that_knows_nobody_yet_is_no_end(world: World, http: aiohttp.ClientSession) -> None:
    """It is back from a partition and has not heard who lives: another guardian has."""
    second = await world.add("guardian", "g2")

    def script(ask: Ask, provider: Worker) -> None:
        if ask in second.asks:
            answer(ask, provider)
        else:
            world.guardian.send(ask, world.guardian.failed(ask, errors.NoWorker()))

    world.script = script
    for _ in range(5):
        async with http.post(world.url + CHAT, json=BODY) as got:
            assert got.status == 200


async def test_nobody_else_is_there(world: World, http: aiohttp.ClientSession) -> None:
    """The only guardian is full: its 503 is the answer, at once."""
    world.script = declining(world.guardian)
    async with http.post(world.url + CHAT, json=BODY) as got:
        assert got.status == 503
        assert (await error_of(got))["code"] == "overloaded"
        assert got.headers["Retry-After"] == "1"
    assert len(world.guardian.asks) == 1


async def test_when_all_are_full_it_is_not_asked_for_ever(world: World, http: aiohttp.ClientSession) -> None:
    """At most four deliveries of a request, and a tenth of all requests once the credit is used up."""
    second = await world.add("guardian", "g2")
    world.script = declining(world.guardian, second)
    requests = 150
    for _ in range(requests):
        async with http.post(world.url + CHAT, json=BODY) as got:
            assert got.status == 503
    deliveries = [ask.delivery for worker in (world.guardian, second) for ask in worker.asks]
    assert max(deliveries) == 4
    assert CREDIT <= len(deliveries) - requests <= CREDIT + requests / 10 + 1


async def test_what_was_begun_is_never_delivered_again(world: World, http: aiohttp.ClientSession) -> None:
    """I7: once a provider said Accepted, its failure is one."""
    await world.add("provider", "p2")
    await world.add("guardian", "g2")
    world.script = lambda ask, provider: provider.send(
        ask, provider.accepted(ask), provider.failed(ask, errors.Overloaded())
    )
    async with http.post(world.url + CHAT, json=BODY) as got:
        assert got.status == 503
    assert [ask.delivery for worker in world.workers for ask in worker.asks] == [1]


# ---- other bounds


async def test_the_traces_kept_are_bounded(world: World, http: aiohttp.ClientSession) -> None:
    """The oldest goes: a request that is no longer kept is not found."""
    world.ingress._traces._kept = collections.deque(maxlen=2)
    rids = []
    for _ in range(3):
        async with http.post(world.url + CHAT, json=BODY) as got:
            rids.append(got.headers["X-BR-Request-Id"])
    assert [world.ingress._traces.find(rid) is not None for rid in rids] == [False, True, True]


async def test_a_flood_above_the_connections_is_told_so_within_bounds(make_world: MakeWorld) -> None:
    """503 for those above MAX_CONNECTIONS; only so many of them wait for the client to read it (faults 60)."""
    world = await make_world(MAX_CONNECTIONS="6")
    held = [await asyncio.open_connection("127.0.0.1", world.ingress.port) for _ in range(6)]
    for reader, writer in held:
        writer.write(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
    flood = [await asyncio.open_connection("127.0.0.1", world.ingress.port) for _ in range(20)]
    async with asyncio.timeout(5):
        told = [await reader.read(12) for reader, _ in flood]
    assert set(told) == {b"HTTP/1.1 503"}
    assert len(world.ingress._server.turned_away) <= 2
    for _, writer in (*held, *flood):
        writer.close()
