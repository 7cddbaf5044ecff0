"""The pipelined connection: order, timeouts, the gate, loss and return, addresses (DESIGN 4 "Client", faults 42-50)."""

import asyncio
import contextlib
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from shared.state import pipeline as pipeline_module
from shared.state.address import Address
from shared.state.base import StateUnavailable
from shared.state.pipeline import MAX_PENDING, PROBE_EVERY, Pipeline
from shared.state.resp import pack

PONG = b"+PONG\r\n"


class Scripted:
    """A server that answers the greeting and then only what the test tells it to; `seen` counts bytes of commands."""

    def __init__(self) -> None:
        self.connections: list[asyncio.StreamWriter] = []
        self.seen: list[bytes] = []
        self.arrived = asyncio.Event()
        self.greets = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        greeted = not self.greets
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if not greeted:
                    writer.write(PONG)
                    greeted = True
                    continue
                self.seen.append(data)
                self.arrived.set()
        writer.close()

    def answer(self, data: bytes) -> None:
        self.connections[-1].write(data)

    async def commands(self) -> bytes:
        await self.arrived.wait()
        self.arrived.clear()
        return b"".join(self.seen)


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[Scripted, str]]:
    script = Scripted()
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    yield script, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    for writer in script.connections:
        writer.transport.abort()
    server.close()
    await server.wait_closed()


@pytest.fixture
async def connected() -> AsyncIterator[Callable[[str], "asyncio.Future[Pipeline]"]]:
    """Connects pipelines and closes them."""
    made: list[Pipeline] = []

    async def connect(url: str) -> Pipeline:
        made.append(Pipeline(url, dice=lambda: 0.0))
        await made[-1].connect()
        return made[-1]

    yield connect  # type: ignore[misc]
    for each in made:
        await each.close()


async def until(condition: Callable[[], bool], within: float = 5.0) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)


async def test_commands_of_one_turn_are_one_write_and_replies_keep_their_order(scripted, connected) -> None:
    script, url = scripted
    pipe = await connected(url)
    futures = [pipe.send(pack((b"ECHO", n)), 1.0) for n in range(100)]
    assert (await script.commands()).count(b"ECHO") == 100
    assert len(script.seen) == 1
    script.answer(b"".join(b":%d\r\n" % n for n in range(100)))
    assert await asyncio.gather(*futures) == list(range(100))


async def test_a_timeout_keeps_the_connection_and_drops_the_late_reply_in_its_place(scripted, connected) -> None:
    script, url = scripted
    pipe = await connected(url)
    slow, patient = pipe.send(pack((b"GET", b"a")), 0.05), pipe.send(pack((b"GET", b"b")), 5.0)
    with pytest.raises(StateUnavailable, match="in time"):
        await slow
    script.answer(b":1\r\n:2\r\n")
    assert await patient == 2
    assert len(script.connections) == 1


async def test_a_shorter_timeout_behind_a_longer_one_is_kept(scripted, connected) -> None:
    _, url = scripted
    pipe = await connected(url)
    loop = asyncio.get_running_loop()
    long, began = pipe.send(pack((b"GET", b"a")), 5.0), loop.time()
    with pytest.raises(StateUnavailable):
        await pipe.send(pack((b"GET", b"b")), 0.05)
    assert loop.time() - began < 1.0
    long.cancel()


async def test_a_cancelled_call_leaves_its_place_in_the_order(scripted, connected) -> None:
    script, url = scripted
    pipe = await connected(url)
    first, second = pipe.send(pack((b"GET", b"a")), 1.0), pipe.send(pack((b"GET", b"b")), 1.0)
    first.cancel()
    script.answer(b":1\r\n:2\r\n")
    assert await second == 2


async def test_three_timeouts_in_a_row_close_the_gate_until_a_probe_is_answered_in_time(scripted, connected) -> None:
    """DESIGN 4: fails at once after 3 timeouts in a row; an answer in between starts the count again."""
    script, url = scripted
    pipe = await connected(url)
    for answered in (False, False, True, False, False):
        call = pipe.send(pack((b"GET", b"a")), 0.02 if not answered else 1.0)
        if answered:
            script.answer(b":0\r\n:0\r\n:7\r\n")
            assert await call == 7
        else:
            with pytest.raises(StateUnavailable):
                await call
        assert pipe.available
    with pytest.raises(StateUnavailable):
        await pipe.send(pack((b"GET", b"a")), 0.02)
    assert not pipe.available
    began = asyncio.get_running_loop().time()
    with pytest.raises(StateUnavailable, match="probe"):
        pipe.send(pack((b"GET", b"a")), 0.1)
    assert asyncio.get_running_loop().time() - began < 0.01
    await until(lambda: b"PING" in b"".join(script.seen))
    await asyncio.sleep(PROBE_EVERY)
    script.answer(b":0\r\n:0\r\n:0\r\n" + PONG)  # late: it is asked again, at once
    assert not pipe.available
    await until(lambda: b"".join(script.seen).count(b"PING") == 2, within=0.2)
    script.answer(PONG)
    await until(lambda: pipe.available, within=0.2)
    call = pipe.send(pack((b"GET", b"a")), 1.0)
    script.answer(b":8\r\n")
    assert await call == 8


async def test_a_connection_silent_under_probes_is_replaced(scripted, connected, monkeypatch) -> None:
    """Its peer may be gone without a FIN: nothing would ever be answered there."""
    monkeypatch.setattr(pipeline_module, "SILENCE", 0.3)
    script, url = scripted
    pipe = await connected(url)
    for _ in range(3):
        with pytest.raises(StateUnavailable):
            await pipe.send(pack((b"GET", b"a")), 0.02)
    await until(lambda: len(script.connections) == 2 and pipe.available)


async def test_a_lost_connection_fails_what_waits_and_comes_back(scripted, connected) -> None:
    script, url = scripted
    pipe = await connected(url)
    call = pipe.send(pack((b"GET", b"a")), 5.0)
    await script.commands()
    script.connections[0].transport.abort()
    with pytest.raises(StateUnavailable, match="lost"):
        await call
    with pytest.raises(StateUnavailable, match="not connected"):
        pipe.send(pack((b"GET", b"a")), 5.0)
    await until(lambda: pipe.available)
    call = pipe.send(pack((b"GET", b"a")), 5.0)
    script.answer(b":5\r\n")
    assert await call == 5


@pytest.mark.parametrize("junk", [b"HTTP/1.1 200 OK\r\n\r\n", b":1\r\n:2\r\n", b"$-5\r\n\r\n"])
async def test_a_reply_out_of_order_or_not_resp_ends_the_connection(scripted, connected, junk: bytes) -> None:
    """I6: never a reply to the wrong command."""
    script, url = scripted
    pipe = await connected(url)
    first = pipe.send(pack((b"GET", b"a")), 5.0)
    await script.commands()
    script.answer(junk)
    if junk.startswith(b":1"):
        assert await first == 1
    else:
        with pytest.raises(StateUnavailable, match="lost"):
            await first
    await until(lambda: len(script.connections) == 2 and pipe.available)


async def test_the_queue_is_bounded(scripted, connected) -> None:
    _, url = scripted
    pipe = await connected(url)
    futures = [pipe.send(pack((b"GET", b"a")), 60.0) for _ in range(MAX_PENDING)]
    with pytest.raises(StateUnavailable, match="too many"):
        pipe.send(pack((b"GET", b"a")), 60.0)
    pipe.cast(pack((b"GET", b"a")))  # dropped
    for future in futures:
        future.cancel()


async def test_many_gives_error_replies_as_values_and_execute_raises_them(connected, valkey_url: str) -> None:
    pipe = await connected(valkey_url)
    ok, wrong = await pipe.many([(b"ECHO", b"x"), (b"NOSUCH",)], 1.0)
    assert ok == b"x"
    assert "unknown command" in str(wrong)
    with pytest.raises(StateUnavailable, match="unknown command"):
        await pipe.execute(b"NOSUCH", within=1.0)


async def test_connect_fails_with_one_clear_error(unused_port: int) -> None:
    pipe = Pipeline(f"redis://:secret@127.0.0.1:{unused_port}/0")
    with pytest.raises(StateUnavailable, match=f"cannot connect to 127.0.0.1:{unused_port}") as failed:
        await pipe.connect()
    assert "secret" not in str(failed.value)
    await pipe.close()


async def test_a_server_that_accepts_and_says_nothing_is_given_up(scripted, monkeypatch) -> None:
    """A frozen server's backlog accepts too."""
    monkeypatch.setattr(pipeline_module, "CONNECT_TIMEOUT", 0.1)
    script, url = scripted
    script.greets = False
    pipe = Pipeline(url)
    with pytest.raises(StateUnavailable, match=r"timed out|in time"):
        await pipe.connect()
    await pipe.close()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_it_runs_on_uvloop(valkey_url: str) -> None:
    """What the processes run on; its transports are not asyncio's classes."""

    async def ask() -> object:
        pipe = Pipeline(valkey_url)
        await pipe.connect()
        try:
            return await pipe.execute(b"PING", within=1.0)
        finally:
            await pipe.close()

    assert uvloop.run(ask()) == b"PONG"


def test_a_stall_of_our_own_loop_is_not_redis_s_fault(valkey_url: str) -> None:
    """The answer came while a reader's callback stood still: libuv runs timers before it reads again."""

    async def ask() -> object:
        pipe = Pipeline(valkey_url)
        await pipe.connect()
        here, there = socket.socketpair()
        loop = asyncio.get_running_loop()

        def stall() -> None:
            here.recv(1)
            loop.remove_reader(here)
            pipe._transport.write(pack((b"PING",)))  # type: ignore[union-attr]  # on its way before the stall
            time.sleep(0.2)

        loop.add_reader(here, stall)
        try:
            with here, there:
                call = pipe._loop.create_future()
                pipe._out.append(b"")  # the command is written by `stall`
                pipe._write(b"", call, pipe.now() + 0.05)
                there.send(b"x")
                return await call
        finally:
            await pipe.close()

    assert uvloop.run(ask()) == b"PONG"


# ---- addresses -------------------------------------------------------------------------------------------------------


def test_urls() -> None:
    address = Address.parse("redis://us%40er:p%3Ass@example.org:7000/3")
    assert (address.host, address.port, address.db) == ("example.org", 7000, 3)
    assert (address.username, address.password) == ("us@er", "p:ss")
    assert "p:ss" not in repr(address) + str(address)
    assert Address.parse("unix:///run/redis.sock?db=2") == Address(host="localhost", path="/run/redis.sock", db=2)
    assert Address.parse("rediss://[::1]/").tls
    assert Address.parse("rediss://[::1]/").host == "::1"
    for wrong in ("http://x", "localhost:6379", "redis://h/abc", "redis://h/-1", "redis://h:99999/"):
        with pytest.raises(ValueError, match=r"Redis URL|[Pp]ort"):
            Address.parse(wrong)


async def test_password_and_database(own_valkey: str, connected) -> None:
    """AUTH and SELECT from the URL, again after a reconnect."""
    port = own_valkey.rpartition(":")[2].partition("/")[0]
    admin = await connected(own_valkey)
    await admin.execute(b"CONFIG", b"SET", b"requirepass", b"p w:d", within=1.0)
    with pytest.raises(StateUnavailable, match="NOAUTH"):
        await connected(own_valkey)
    with pytest.raises(StateUnavailable, match="WRONGPASS"):
        await connected(f"redis://:wrong@127.0.0.1:{port}/5")
    pipe = await connected(f"redis://default:p%20w%3Ad@127.0.0.1:{port}/5")
    await pipe.execute(b"SET", b"here", 1, within=1.0)
    info = await pipe.execute(b"CLIENT", b"INFO", within=1.0)
    assert b" db=5 " in info
    await admin.execute(b"CLIENT", b"KILL", b"TYPE", b"normal", b"SKIPME", b"yes", within=1.0)
    await until(lambda: not pipe.available)
    await until(lambda: pipe.available)
    assert await pipe.execute(b"GET", b"here", within=1.0) == b"1"


async def test_unix_socket(tmp_path: Path, connected) -> None:
    """As two servers on one host would be joined."""
    script = Scripted()
    server = await asyncio.start_unix_server(script.serve, tmp_path / "redis.sock")
    pipe = await connected(f"unix://{tmp_path}/redis.sock")
    assert pipe.available
    await pipe.close()
    server.close()
    await server.wait_closed()


async def test_tls(tmp_path: Path, connected, valkey_url: str) -> None:
    """rediss:// checks the certificate: an unknown one is refused, one of ours is taken (faults 72)."""
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", tmp_path / "key",
         "-out", tmp_path / "cert"], capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl on this machine")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    script = Scripted()
    server = await asyncio.start_server(script.serve, "localhost", 0, ssl=context)
    url = f"rediss://localhost:{server.sockets[0].getsockname()[1]}/0"
    with pytest.raises(StateUnavailable, match="certificate"):
        await connected(url)
    pipe = await connected(f"{url}?ssl_ca_certs={tmp_path / 'cert'}")
    call = pipe.send(pack((b"GET", b"a")), 1.0)
    await script.commands()
    script.answer(b":4\r\n")
    assert await call == 4
    await pipe.close()
    server.close()
    await server.wait_closed()
