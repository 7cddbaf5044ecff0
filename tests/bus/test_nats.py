"""NatsBus against a NATS that is killed, frozen, slow to take bytes, or says no."""

import asyncio
import os
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from shared.bus import nats as module
from shared.bus.address import parse_url
from shared.bus.base import BusUnavailable, NotAllowed
from shared.bus.nats import NatsBus
from tests.bus.conftest import Seen, Server


class Changes:
    """An `on_change` to wait on."""

    def __init__(self) -> None:
        self.told: list[bool] = []
        self._event = asyncio.Event()

    def __call__(self, connected: bool) -> None:
        self.told.append(connected)
        self._event.set()

    async def until(self, *wanted: bool) -> None:
        async with asyncio.timeout(8):
            while self.told != list(wanted):
                self._event.clear()
                await self._event.wait()


@pytest.fixture
async def changes() -> Changes:
    return Changes()


@pytest.fixture
async def bus(own_nats: Server, changes: Changes) -> AsyncIterator[NatsBus]:
    made = await NatsBus.connect(own_nats.url, "test", changes)
    yield made
    await made.close()


async def test_killed_and_restarted(bus: NatsBus, own_nats: Server, changes: Changes) -> None:
    """Faults 23: a publish fails at once while NATS is away, nothing of it is sent later, subscriptions come back."""
    seen = Seen()
    await bus.subscribe("t.back", seen)
    os.kill(own_nats.pid, signal.SIGKILL)
    bus.publish("t.back", b"in the moment of the kill")
    await changes.until(False)
    assert not bus.connected
    with pytest.raises(BusUnavailable):
        bus.publish("t.back", b"while away")
    with pytest.raises(BusUnavailable):
        await bus.flush()
    with pytest.raises(BusUnavailable):
        await bus.subscribe("t.other", Seen())
    own_nats.stop()
    own_nats.start()
    await changes.until(False, True)
    bus.publish("t.back", b"after")
    await seen.count(1)
    await bus.flush()
    assert seen.payloads == [b"after"]
    assert bus.reconnects == 1
    assert bus.errors["disconnect"] == 1


async def test_a_publish_in_the_turn_of_the_disconnect_is_not_sent_after_the_reconnect(
    bus: NatsBus, changes: Changes
) -> None:
    """Faults 23: nothing from an old buffer. (nats-py keeps such a message and sends it on the next connection.)"""
    seen = Seen()
    await bus.subscribe("t.stale", seen)
    assert bus._transport is not None
    bus._transport.abort()  # connection_lost comes in the next turn of the loop
    bus.publish("t.stale", b"stale")
    await changes.until(False, True)
    bus.publish("t.stale", b"fresh")
    await seen.count(1)
    assert seen.payloads == [b"fresh"]


async def test_a_frozen_server_is_noticed_and_left(
    bus: NatsBus, own_nats: Server, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DESIGN 3: ping 2 s x 2; here with a shorter clock."""
    monkeypatch.setattr(module, "PING_S", 0.05)
    monkeypatch.setattr(module, "CONNECT_S", 0.3)
    bus._ping()
    os.kill(own_nats.pid, signal.SIGSTOP)
    await changes.until(False)
    assert bus.errors["stale"] == 1
    os.kill(own_nats.pid, signal.SIGCONT)
    await changes.until(False, True)
    await bus.flush()


async def test_a_server_that_takes_no_bytes_is_not_buffered_for_without_bound(
    own_nats: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_BYTES", 4 * 1024 * 1024)
    bus = await NatsBus.connect(own_nats.url, "test")
    seen = Seen()
    await bus.subscribe("t.full", seen)
    os.kill(own_nats.pid, signal.SIGSTOP)
    accepted = 0
    try:
        while bus.connected and accepted < 200:
            bus.publish("t.full", bytes(1_000_000))
            accepted += 1
            await asyncio.sleep(0)
        with pytest.raises(BusUnavailable, match="does not take"):
            bus.publish("t.full", b"")
    finally:
        os.kill(own_nats.pid, signal.SIGCONT)
    assert not bus.connected
    assert bus.errors["full"] == 1
    await seen.count(accepted)  # what was taken is sent, once, when the server wakes
    assert bus.connected
    await bus.close()


async def test_flushes_that_wait_are_bounded(own_nats: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FLUSHES", 3)
    bus = await NatsBus.connect(own_nats.url, "test")
    os.kill(own_nats.pid, signal.SIGSTOP)
    waiting = [asyncio.create_task(bus.flush()) for _ in range(3)]
    try:
        await asyncio.sleep(0)
        with pytest.raises(BusUnavailable, match="too many"):
            await bus.flush()
    finally:
        os.kill(own_nats.pid, signal.SIGCONT)
    await asyncio.gather(*waiting)
    await bus.flush()
    await bus.close()


async def test_close_does_not_wait_for_a_frozen_server(own_nats: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.1)
    bus = await NatsBus.connect(own_nats.url, "test")
    os.kill(own_nats.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(3):
            await bus.close()
    finally:
        os.kill(own_nats.pid, signal.SIGCONT)


async def test_nobody_there() -> None:
    with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:1"):
        await NatsBus.connect("nats://user:secret@127.0.0.1:1", "test")


async def test_a_server_that_is_no_nats(unused_tcp_port: int) -> None:
    async def http(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(http, "127.0.0.1", unused_tcp_port):
        with pytest.raises(BusUnavailable):
            await NatsBus.connect(f"nats://127.0.0.1:{unused_tcp_port}", "test")


async def test_the_second_server_of_the_url_is_tried(own_nats: Server) -> None:
    bus = await NatsBus.connect(f"nats://127.0.0.1:1,{own_nats.url}", "test")
    assert bus.connected
    await bus.close()


USERS = """authorization { users: [
  { user: "own%er", password: "p:@/ss" }
  { user: "guest", password: "guest", permissions: { publish: ["t.open"], subscribe: ["t.open"] } }
] }"""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, USERS)
    server.start()
    yield server
    server.stop()


async def test_users(guarded: Server, caplog: pytest.LogCaptureFixture) -> None:
    """DESIGN 3: allow-lists. A refused subscription is an error of the caller, a refused publish one of the log."""
    owner = await NatsBus.connect(f"nats://own%25er:p%3A%40%2Fss@127.0.0.1:{guarded.port}", "owner")
    guest = await NatsBus.connect(f"nats://guest:guest@127.0.0.1:{guarded.port}", "guest")
    seen = Seen()
    await owner.subscribe("t.>", seen)
    with pytest.raises(NotAllowed):
        await guest.subscribe("t.secret", Seen())
    guest.publish("t.secret", b"no")
    guest.publish("t.open", b"yes")
    await seen.count(1)
    await guest.flush()
    assert seen.payloads == [b"yes"]
    assert guest.errors["permissions"] == 2
    assert guest.connected
    with pytest.raises(NotAllowed):
        await NatsBus.connect(f"nats://guest:wrong@127.0.0.1:{guarded.port}", "guest")
    assert "wrong" not in caplog.text
    await owner.close()
    await guest.close()


async def test_credentials_revoked_and_given_back(
    guarded: Server, changes: Changes, caplog: pytest.LogCaptureFixture
) -> None:
    """Faults 41: the server throws us out and refuses us; a publish fails at once, it is said, the password is not; we
    try on with what we have (new credentials need a restart) and are back within 2 s of their being good again."""
    guest = await NatsBus.connect(f"nats://guest:guest@127.0.0.1:{guarded.port}", "guest", changes)
    guarded.reload(USERS.replace('"guest", password: "guest"', '"guest", password: "another-one"'))
    await changes.until(False)
    with pytest.raises(BusUnavailable):
        guest.publish("t.open", b"x")
    async with asyncio.timeout(5):
        while guest.errors.get("reconnect", 0) < 2:
            await asyncio.sleep(0.01)
    assert not guest.connected
    assert "Authorization Violation" in caplog.text
    assert "another-one" not in caplog.text
    guarded.reload(USERS)
    async with asyncio.timeout(2):
        await changes.until(False, True)
    guest.publish("t.open", b"x")
    await guest.flush()
    await guest.close()


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server asks for TLS in its INFO; its certificate is checked against the host name."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    server = Server(tmp_path, f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}')
    server.start()
    try:
        url = f"nats://localhost:{server.port}"
        with pytest.raises(BusUnavailable, match=r"(?i)certificate"):
            await NatsBus.connect(url, "test")
        trusting = ssl.create_default_context(cafile=str(certificate))
        monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
        bus = await NatsBus.connect(url, "test")
        seen = Seen()
        await bus.subscribe("t.tls", seen)
        bus.publish("t.tls", bytes(500_000))
        await seen.count(1)
        assert seen.payloads == [bytes(500_000)]
        await bus.close()
    finally:
        server.stop()


@pytest.mark.parametrize("url", ["http://a", "nats://", "", "127.0.0.1:4222", "nats://a:99999"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError):
        parse_url(url)


def test_a_url_shows_no_credentials() -> None:
    servers = parse_url("nats://user:hush@one, tls://token@two:5")
    assert [(s.host, s.port, s.tls) for s in servers] == [("one", 4222, False), ("two", 5, True)]
    assert servers[1].login == {"auth_token": "token"}
    assert "hush" not in repr(servers)
