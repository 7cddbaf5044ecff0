"""The HTTP client and the exchange against a scripted server, on both loops (faults 61-76, 115-143)."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from shared.core import addresses
from shared.core.translators.openai import OpenAI
from tests.core.translating import ask
from workers.provider import upstream
from workers.provider.ended import Ended, Limits
from workers.provider.exchange import Exchange
from workers.provider.origin import Origin
from workers.provider.upstream import Pool

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
JSON_BODY = b'{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(JSON_BODY),
    JSON_BODY,
)


def event(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % text.encode()


FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunked(*parts: bytes, last: bool = True) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + (b"0\r\n\r\n" if last else b"")


STREAM = SSE_HEAD + chunked(event("a"), event("b"), FINISH, USAGE, DONE)


class Server(Struct):
    """`requests`: each one as it came; `connections`: how many were accepted."""

    url: str
    requests: list[bytes] = []
    connections: int = 0


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head + await reader.readexactly(length)


@contextlib.asynccontextmanager
async def serving(serve: Serve | bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Bytes: written after each request; a function gets (reader, writer, number of the connection)."""
    server = Server("")
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        server.connections += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                if not isinstance(serve, bytes):
                    await serve(reader, writer, server.connections)
                else:
                    while True:
                        server.requests.append(await read_request(reader))
                        writer.write(serve)
                        await writer.drain()
        finally:
            writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    server.url = f"{'https' if tls else 'http'}://localhost:{port}/v1"
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Result(Struct):
    ended: Ended
    out: bytes
    texts: list[str]
    took_s: float


class Client:
    """Makes calls on one pool."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None, *, private: bool = True, limit: int = 100) -> None:
        self.loop = asyncio.get_running_loop()
        headers = OpenAI().headers("the-key-of-the-endpoint")
        self.pool = Pool(Origin.of(url, headers, allow_private=private), self.loop, limit, tls)

    def exchange(self, out: list[bytes], *, stream: bool = True, **limits: Any) -> tuple[Exchange, Any]:
        now = self.loop.time()
        given: dict[str, Any] = {
            "blame": now + 2, "connect_s": 2.0, "head": now + 2, "first_token": now + 2, "idle_s": 2.0,
            "deadline": now + 5, "drain_s": 0.2, "max_bytes": 1 << 20,
        }  # fmt: skip
        for name, value in limits.items():
            given[name] = now + value if name in ("blame", "head", "first_token", "deadline") else value
        translator = OpenAI().translator(ask(stream=stream), ("the-key-of-the-endpoint",))
        return Exchange(self.loop, self.pool, translator, Limits(**given), stream=stream, out=out.append), translator

    def request(self, body: bytes = b'{"model":"m"}') -> bytes:
        return self.pool.origin.request("/chat/completions", (("X-Request-ID", "r.1"),), body)

    async def call(self, *, stream: bool = True, **limits: Any) -> Result:
        out: list[bytes] = []
        exchange, translator = self.exchange(out, stream=stream, **limits)
        began = self.loop.time()
        ended = await asyncio.wait_for(exchange.run(self.request()), 6)
        out.append(translator.tail(b""))
        return Result(ended, b"".join(out), [text for text, _ in translator.texts()], self.loop.time() - began)


@contextlib.asynccontextmanager
async def client_of(serve: Serve | bytes, **options: Any) -> AsyncIterator[tuple[Client, Server]]:
    async with serving(serve) as server:
        client = Client(server.url, **options)
        try:
            yield client, server
        finally:
            client.pool.close()
            await asyncio.sleep(0.01)
            assert client.pool.open_connections == 0


def after_request(answer: bytes, *, close: bool = True) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(answer)
        await writer.drain()
        if not close:
            await reader.read()

    return serve


# ---- a good way ------------------------------------------------------------------------------------------------------


async def test_request_bytes_and_reuse_of_the_connection() -> None:
    async with client_of(STREAM) as (client, server):
        for _ in range(3):
            result = await client.call()
            assert result.ended.error is None
            assert result.out == event("a") + event("b") + FINISH
        assert server.connections == 1
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0] == b"POST /v1/chat/completions HTTP/1.1"
        assert b"Authorization: Bearer the-key-of-the-endpoint" in lines
        assert b"Accept-Encoding: identity" in lines
        assert b"X-Request-ID: r.1" in lines
        assert any(line.startswith(b"Host: localhost:") for line in lines)
        assert body == b'{"model":"m"}'


async def test_whole_answer() -> None:
    async with client_of(WHOLE) as (client, _):
        result = await client.call(stream=False)
        assert result.ended.body == JSON_BODY
        assert result.ended.outcome is True


@pytest.mark.parametrize("step", [1, 7, 50])
async def test_an_answer_in_small_pieces(step: int) -> None:
    """I11 at the socket: heads and chunk sizes cut anywhere."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        for start in range(0, len(STREAM), step):
            writer.write(STREAM[start : start + step])
            await asyncio.sleep(0)

    async with client_of(serve) as (client, _):
        assert (await client.call()).out == event("a") + event("b") + FINISH


async def test_a_body_that_ends_with_the_connection() -> None:
    body = event("a") + FINISH
    async with client_of(after_request(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body)) as (
        client,
        _,
    ):
        assert (await client.call()).out == body


async def test_finish_without_done_and_without_an_end_waits_two_seconds_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Faults 124 on a connection that stays open."""
    monkeypatch.setattr("workers.provider.exchange.TAIL_S", 0.1)
    async with client_of(after_request(SSE_HEAD + chunked(event("a"), FINISH, last=False), close=False)) as (client, _):
        result = await client.call()
        assert result.ended.error is None
        assert result.out == event("a") + FINISH
        assert 0.05 < result.took_s < 1


async def test_a_whole_answer_to_a_stream_request_becomes_a_stream() -> None:
    """Faults 131."""
    async with client_of(WHOLE) as (client, _):
        result = await client.call()
        assert result.ended.error is None
        assert b'"content":"hi"' in result.out
        assert b'"finish_reason":"stop"' in result.out


async def test_the_connection_is_kept_when_the_message_ends_after_done() -> None:
    """The last chunk comes a little later than [DONE]: waited for aside, nobody's answer is held up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        while True:
            await read_request(reader)
            writer.write(SSE_HEAD + chunked(event("a"), FINISH, DONE, last=False))
            await asyncio.sleep(0.05)
            writer.write(b"0\r\n\r\n")

    async with client_of(serve) as (client, server):
        assert (await client.call()).took_s < 0.05
        await asyncio.sleep(0.1)
        assert (await client.call()).ended.error is None
        assert server.connections == 1


# ---- a bad answer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n",
            "upstream_invalid_response",
        ),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            "upstream_invalid_response",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 5 + WHOLE, "upstream_invalid_response"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "upstream_invalid_response"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\n{}", "upstream_invalid_response"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08",
            "upstream_invalid_response",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>", "upstream_invalid_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "upstream_"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "upstream_"),
        (
            b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(10_000)) + b"\r\n",
            "upstream_invalid_response",
        ),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", "upstream_invalid_response"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000, "upstream_invalid_response"),
        (b"HTTP/1.1 200 OK\r\nX-Request-ID: a\rb\r\n\r\n", "upstream_invalid_response"),
        (SSE_HEAD + b"zz\r\nhello\r\n", "upstream_"),
        (SSE_HEAD + b"5;" + b"x" * 200_000, "upstream_invalid_response"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "upstream_invalid_response"),
        (b"", "upstream_error"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_no_answer_is_a_502(answer: bytes, code: str, stream: bool) -> None:
    """Faults 67, 75, 76, 140, 141, 143; redirects are not followed."""
    async with client_of(after_request(answer)) as (client, server):
        result = await client.call(stream=stream)
        assert result.ended.error is not None
        assert result.ended.error.status == 502
        assert result.ended.error.code.startswith(code)
        assert result.out == b""
        assert server.connections == 1


async def test_an_endless_error_body_is_cut() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 400 Bad\r\nContent-Length: 999999999\r\n\r\n" + b'{"error":{"message":"no"}}')
        while True:
            writer.write(b" " * 8192)
            await writer.drain()
            await asyncio.sleep(0)

    async with client_of(serve) as (client, _):
        result = await client.call()
        assert result.ended.error is not None
        assert result.ended.error.status == 400
        assert not result.ended.billed


async def test_a_reused_connection_never_gives_another_call_s_bytes() -> None:
    """I6: bytes after the end of an answer belong to nobody; the connection is not used again."""
    async with client_of(WHOLE + WHOLE) as (client, server):
        for _ in range(3):
            ended = (await client.call(stream=False)).ended
            assert ended.error is not None
            assert ended.error.code == "upstream_invalid_response"
        assert server.connections == 3


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "limits", "retryable"),
    [
        (b"", {"head": 0.1}, True),
        (SSE_HEAD, {"first_token": 0.1}, True),
        (SSE_HEAD + chunked(b": keep-alive\n\n", last=False), {"first_token": 0.1}, True),
        (SSE_HEAD + chunked(event("a"), last=False), {"idle_s": 0.1}, False),
        (SSE_HEAD + chunked(event("a"), last=False), {"deadline": 0.1}, False),
        (b"", {"deadline": 0.1}, False),
    ],
)
async def test_timers(answer: bytes, limits: dict[str, Any], retryable: bool) -> None:
    """Faults 61, 62: each timer alone; retryable only before the first token and before the request's own deadline."""
    async with client_of(after_request(answer, close=False)) as (client, _):
        result = await client.call(**limits)
        assert result.ended.error is not None
        assert result.ended.error.status == 504
        assert result.ended.retryable is retryable
        assert result.ended.billed
        assert 0.05 < result.took_s < 0.6


@pytest.mark.parametrize(
    ("answer", "stream", "limits", "outcome"),
    [
        # by default a whole answer's own deadline comes just before the timer of the endpoint
        (b"", False, {"deadline": 0.1, "blame": 0.05}, False),
        (SSE_HEAD, True, {"deadline": 0.1, "blame": 0.05}, False),
        (b"", False, {"deadline": 0.1}, None),
        (SSE_HEAD, True, {"deadline": 0.1}, None),
        (SSE_HEAD + chunked(event("a"), last=False), True, {"deadline": 0.1, "blame": 0.05}, None),
        # the end of the chain left it less than a first token may take
        (SSE_HEAD, True, {"first_token": 0.1}, None),
        (SSE_HEAD, True, {"first_token": 0.1, "blame": 0.05}, False),
        (b"", True, {"head": 0.1}, False),
        (SSE_HEAD + chunked(event("a"), last=False), True, {"idle_s": 0.1}, False),
    ],
)
async def test_silence_is_the_endpoint_s_fault_if_it_had_its_time(
    answer: bytes, stream: bool, limits: dict[str, Any], outcome: bool | None
) -> None:
    """decisions/0011, I10: whichever timer ends a call, a client in a hurry says nothing to the circuit."""
    async with client_of(after_request(answer, close=False)) as (client, _):
        result = await client.call(stream=stream, **limits)
        assert result.ended.error is not None
        assert result.ended.outcome is outcome


@pytest.mark.parametrize(("blame", "outcome"), [(2, None), (0.05, False)])
async def test_a_dial_that_the_deadline_ends(
    monkeypatch: pytest.MonkeyPatch, blame: float, outcome: bool | None
) -> None:
    """A client in a hurry (X-Timeout-Ms: 100) and a provider far away: no circuit hears of it, nobody else is tried."""

    async def dial(_pool: Pool) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(Pool, "_dial", dial)
    result = await Client("http://127.0.0.1:1").call(connect_s=0.1, deadline=0.1, blame=blame)
    assert result.ended.error is not None
    assert (result.ended.error.status, result.ended.error.code) == (504, "deadline_exceeded")
    assert (result.ended.outcome, result.ended.retryable, result.ended.billed) == (outcome, False, False)


async def test_a_cancel_at_the_deadline_is_the_deadline() -> None:
    """The asker's timer is the same as ours, and its cancel may be here first."""
    async with client_of(b"") as (client, server), asyncio.timeout(5):
        exchange, _ = client.exchange([], stream=False, deadline=0.4, blame=0.0)
        running = asyncio.create_task(exchange.run(client.request()))
        while not server.requests:
            await asyncio.sleep(0.005)
        exchange.cancel()
        ended = await running
        assert (ended.cancelled, ended.outcome) == (True, False)


async def test_a_byte_at_a_time_does_not_keep_a_stream_alive() -> None:
    """Faults 134: the idle timer is per event."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(SSE_HEAD + chunked(event("a"), last=False))
        for byte in event("b" * 500):
            writer.write(chunked(bytes([byte]), last=False))
            await asyncio.sleep(0.02)

    async with client_of(serve) as (client, _):
        result = await client.call(idle_s=0.15)
        assert result.ended.error is not None
        assert result.ended.error.code == "upstream_timeout"


async def test_a_paused_stream_is_not_idle() -> None:
    async with client_of(after_request(STREAM, close=False)) as (client, _):
        out: list[bytes] = []
        exchange, _translator = client.exchange(out, idle_s=0.1)
        running = asyncio.create_task(exchange.run(client.request()))
        exchange.pause(paused=True)
        await asyncio.sleep(0.3)
        assert not running.done()
        assert out == []
        exchange.pause(paused=False)
        assert (await running).error is None


async def test_held_for_the_ledger_and_paused_for_the_client() -> None:
    """DESIGN 4: it is read again when neither is left, whichever went first."""
    for first in ("hold", "pause"):
        async with client_of(after_request(STREAM, close=False)) as (client, _):
            out: list[bytes] = []
            exchange, _translator = client.exchange(out, idle_s=0.1)
            running = asyncio.create_task(exchange.run(client.request()))
            exchange.pause(paused=True)
            exchange.hold(held=True)
            await asyncio.sleep(0.02)
            if first == "hold":
                exchange.hold(held=False)
            else:
                exchange.pause(paused=False)
            await asyncio.sleep(0.15)
            assert not running.done()
            assert out == []
            exchange.hold(held=False)
            exchange.pause(paused=False)
            assert (await running).error is None


# ---- cancel: half-close, then drain ----------------------------------------------------------------------------------


async def test_cancel_counts_everything_that_was_written_before_the_server_noticed() -> None:
    """The server writes on until it sees our end; all of it is read and counted, none of it given out."""
    written = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(SSE_HEAD)
        gone = asyncio.create_task(reader.read())
        while not gone.done():
            written.append("x")
            writer.write(chunked(event("x"), last=False))
            await asyncio.sleep(0.005)

    async with client_of(serve) as (client, _):
        out: list[bytes] = []
        exchange, translator = client.exchange(out)
        running = asyncio.create_task(exchange.run(client.request()))
        while len(out) < 3:
            await asyncio.sleep(0.002)
        exchange.cancel()
        exchange.cancel()
        given = len(out)
        ended = await running
        assert (ended.cancelled, ended.complete, ended.billed) == (True, True, True)
        assert translator.texts() == [("x" * len(written), len(written))]
        assert len(out) == given


async def test_a_server_that_does_not_notice_is_drained_for_the_limit_only() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(SSE_HEAD)
        while True:
            writer.write(chunked(event("x"), last=False))
            await writer.drain()
            await asyncio.sleep(0.01)

    async with client_of(deaf) as (client, _):
        out: list[bytes] = []
        exchange, _translator = client.exchange(out)
        running = asyncio.create_task(exchange.run(client.request()))
        while not out:
            await asyncio.sleep(0.005)
        began = client.loop.time()
        exchange.cancel()
        ended = await running
        assert 0.15 < client.loop.time() - began < 0.5
        assert (ended.cancelled, ended.complete) == (True, False)


async def test_a_finish_that_comes_in_the_drain_brings_the_exact_usage() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(SSE_HEAD + chunked(event("a"), last=False))
        await reader.read()
        writer.write(chunked(event("b"), FINISH, USAGE, DONE))

    async with client_of(serve) as (client, _):
        out: list[bytes] = []
        exchange, translator = client.exchange(out)
        running = asyncio.create_task(exchange.run(client.request()))
        while not out:
            await asyncio.sleep(0.002)
        exchange.cancel()
        assert (await running).cancelled
        assert translator.finished
        assert translator.usage is not None


async def test_cancel_while_dialling() -> None:
    async with client_of(STREAM) as (client, server):
        out: list[bytes] = []
        exchange, _translator = client.exchange(out)
        running = asyncio.create_task(exchange.run(client.request()))
        await asyncio.sleep(0)
        exchange.cancel()
        ended = await running
        assert (ended.cancelled, ended.billed) == (True, False)
        assert server.requests == []


# ---- connections -----------------------------------------------------------------------------------------------------


async def test_a_pooled_connection_that_the_server_closed_is_not_used() -> None:
    """Found out before anything is written: the close lies in the socket, though the loop has not told us yet."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(WHOLE)

    async with client_of(serve) as (client, server):
        for _ in range(20):
            assert (await client.call(stream=False)).ended.error is None
        assert server.connections == 20


async def test_a_close_that_the_loop_has_not_told_us_of_is_seen() -> None:
    """The last look before a request is written: no turn of the loop lies between the close and the next call."""
    listener = socket.create_server(("127.0.0.1", 0))
    closed = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(WHOLE)
            closing.wait(5)
        closed.set()

    closing = threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
    assert (await client.call(stream=False)).ended.error is None
    assert client.pool.open_connections == 1
    closing.set()
    closed.wait(5)
    assert client.pool.take() is None
    thread.join()
    listener.close()
    await asyncio.sleep(0.01)
    assert client.pool.open_connections == 0


async def test_a_request_that_may_have_been_seen_is_never_sent_twice() -> None:
    """I7: the server takes the whole request on a pooled connection and closes it: an error, one request."""
    seen = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        seen.append(await read_request(reader))
        writer.write(WHOLE)
        seen.append(await read_request(reader))

    async with client_of(serve) as (client, server):
        assert (await client.call(stream=False)).ended.error is None
        ended = (await client.call(stream=False)).ended
        assert ended.error is not None
        assert ended.billed
        assert (len(seen), server.connections) == (2, 1)


async def test_a_request_that_was_not_written_whole_is_sent_once_more_on_a_new_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        writer.write(WHOLE)
        if number == 1:
            await reader.read(1000)  # the second request begins to arrive: its rest will never be read
            writer.transport.abort()
        else:
            await reader.read()

    async with client_of(serve) as (client, server):
        assert (await client.call(stream=False)).ended.error is None
        out: list[bytes] = []
        exchange, _translator = client.exchange(out, stream=False)
        ended = await exchange.run(client.request(b'{"x":"' + b"y" * 30_000_000 + b'"}'))
        assert ended.error is None
        assert server.connections == 2


async def test_idle_connections_are_bounded_in_time_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "MAX_IDLE", 2)
    async with client_of(WHOLE) as (client, _):
        await asyncio.gather(*(client.call(stream=False) for _ in range(5)))
        await asyncio.sleep(0.01)
        assert client.pool.open_connections == 2
        for connection in list(client.pool._idle):
            connection.idle_since -= 1000
        client.pool.sweep()
        await asyncio.sleep(0.01)
        assert client.pool.open_connections == 0


async def test_the_pool_is_bounded() -> None:
    async with client_of(after_request(b"", close=False), limit=2) as (client, _):
        calls = [asyncio.create_task(client.call(head=0.3)) for _ in range(3)]
        results = await asyncio.gather(*calls)
        assert sorted(result.ended.error.code for result in results if result.ended.error) == [
            "overloaded", "upstream_timeout", "upstream_timeout",
        ]  # fmt: skip


@pytest.mark.parametrize("header", ["timeout=2", "timeout=2, max=100"])
async def test_keep_alive_of_the_server_is_respected(header: str) -> None:
    answer = WHOLE.replace(b"\r\n\r\n", b"\r\nKeep-Alive: " + header.encode() + b"\r\n\r\n", 1)
    async with client_of(answer) as (client, _):
        await client.call(stream=False)
        assert client.pool._idle[0].keep_s == 1.0


async def test_connection_close_is_respected() -> None:
    async with client_of(WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)) as (client, _):
        await client.call(stream=False)
        await asyncio.sleep(0.01)
        assert client.pool.open_connections == 0


# ---- where it may connect, and to whom -------------------------------------------------------------------------------


async def test_refused_addresses_are_not_dialled() -> None:
    """Faults 74: a name that leads to loopback, for an endpoint that may not go there."""
    async with client_of(STREAM, private=False) as (client, server):
        result = await client.call()
        assert result.ended.error is not None
        assert result.ended.error.message == "The provider's address is not allowed."
        assert server.connections == 0


@pytest.mark.parametrize(
    ("text", "public", "private"),
    [
        ("8.8.8.8", True, True), ("2606:4700::1", True, True), ("127.0.0.1", False, True), ("::1", False, True),
        ("10.1.2.3", False, True), ("192.168.1.1", False, True), ("fd00::1", False, True), ("100.64.0.1", False, True),
        ("169.254.169.254", False, False), ("fe80::1%eth0", False, False), ("0.0.0.0", False, False),
        ("224.0.0.1", False, False), ("255.255.255.255", False, False), ("::ffff:127.0.0.1", False, True),
        ("::ffff:169.254.169.254", False, False), ("64:ff9b::a9fe:a9fe", False, False),
        ("2002:a9fe:a9fe::", False, False),
        ("junk", False, False),
    ],
)  # fmt: skip
def test_addresses(text: str, public: bool, private: bool) -> None:
    assert addresses.allowed(text, private=False) is public
    assert addresses.allowed(text, private=True) is private


async def test_nobody_there() -> None:
    for url in ("http://127.0.0.1:1/v1", "http://no-such-host.invalid/v1"):
        ended = (await Client(url).call()).ended
        assert ended.error is not None
        assert (ended.error.status, ended.retryable, ended.billed, ended.outcome) == (502, True, False, False)


@pytest.mark.parametrize("how", ["paused", "held"])
async def test_tls_that_was_paused_is_read_before_it_is_aborted(how: str) -> None:
    """I1: TLS has no half-close here, but what waited for a client that did not read, or for the ledger, was generated
    and is billed. Held and then cut: the client gets none of it."""
    pem = Path(__file__).parent / "localhost.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(SSE_HEAD + chunked(event("a"), last=False))
        await asyncio.sleep(0.05)
        writer.write(chunked(event("x") * 5000, last=False))
        await reader.read()

    async with serving(serve, context) as server:
        client = Client(server.url, ssl.create_default_context(cafile=str(pem)))
        out: list[bytes] = []
        exchange, translator = client.exchange(out)
        running = asyncio.create_task(exchange.run(client.request()))
        while not out:
            await asyncio.sleep(0.002)
        if how == "paused":
            exchange.pause(paused=True)
        else:
            exchange.hold(held=True)
        await asyncio.sleep(0.2)
        assert translator.texts() == [("a", 1)]
        if how == "paused":
            exchange.cancel()
        else:
            exchange.cut()
        ended = await running
        assert (ended.cancelled, ended.cut) == (how == "paused", how == "held")
        assert (ended.complete, ended.billed, len(out)) == (False, True, 1)
        assert translator.texts() == [("a" + "x" * 5000, 5001)]
        client.pool.close()
        await asyncio.sleep(0.01)


async def test_a_cancel_after_the_finish_waits_for_the_usage() -> None:
    """faults 56: our side stays open, so that the server goes on to its usage; nothing more is generated."""
    go = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _number: int) -> None:
        await read_request(reader)
        writer.write(SSE_HEAD + chunked(event("a"), FINISH, last=False))
        gone = asyncio.create_task(reader.read())
        await asyncio.wait({gone, asyncio.create_task(go.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            writer.write(chunked(USAGE, DONE))

    async with client_of(serve) as (client, _):
        out: list[bytes] = []
        exchange, translator = client.exchange(out)
        running = asyncio.create_task(exchange.run(client.request()))
        while not translator.finished:
            await asyncio.sleep(0.002)
        exchange.pause(paused=True)
        exchange.cancel()
        go.set()
        ended = await running
        assert ended.error is None
        assert translator.usage is not None


async def test_tls() -> None:
    """Faults 72: an unknown issuer is refused; with the issuer known, a call works, and a cancel aborts."""
    pem = Path(__file__).parent / "localhost.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    async with serving(SSE_HEAD + chunked(event("a"), last=False), context) as server:
        stranger = await Client(server.url).call()
        assert stranger.ended.error is not None
        assert "certificate" in stranger.ended.error.message
        client = Client(server.url, ssl.create_default_context(cafile=str(pem)))
        out: list[bytes] = []
        exchange, _translator = client.exchange(out)
        running = asyncio.create_task(exchange.run(client.request()))
        while not out:
            await asyncio.sleep(0.002)
        exchange.cancel()
        ended = await running
        assert (ended.cancelled, ended.complete, ended.billed) == (True, False, True)
        client.pool.close()
        await asyncio.sleep(0.01)
