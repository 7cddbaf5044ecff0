"""The fault proxy does what it says: against a server that echoes."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.e2e.proxy import Proxy


class Echo:
    """Sends back what comes, and keeps what it got."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.got = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                made, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(made,), daemon=True).start()

    def _echo(self, made: socket.socket) -> None:
        with made:
            try:
                while data := made.recv(65_536):
                    self.got += data
                    made.sendall(data)
                made.sendall(b"bye")
            except OSError:
                return


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.listener.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as made:
        yield made


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as made:
        yield made


def said(client: socket.socket, data: bytes = b"hello") -> float:
    """Seconds until the echo was back."""
    began = time.monotonic()
    client.sendall(data)
    got = b""
    while len(got) < len(data):
        piece = client.recv(65_536)
        assert piece, "closed"
        got += piece
    assert got == data
    return time.monotonic() - began


def read_to_the_end(client: socket.socket) -> bytes:
    """What comes before the end or the reset."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(100):
            got += piece
    return got


def test_it_passes_everything_on(client: socket.socket, proxy: Proxy) -> None:
    said(client, b"x" * 1_000_000)
    assert proxy.passed == (1_000_000, 1_000_000)
    client.shutdown(socket.SHUT_WR)
    assert client.recv(10) == b"bye"
    assert client.recv(10) == b""


def test_delay_and_throttle(client: socket.socket, proxy: Proxy) -> None:
    proxy.delay(0.05)
    assert said(client) >= 0.1
    proxy.heal()
    proxy.throttle(100_000)
    assert said(client, b"x" * 10_000) >= 0.2


@pytest.mark.parametrize("up", [True, False])
def test_a_blackhole(client: socket.socket, proxy: Proxy, echo: Echo, up: bool) -> None:
    """Neither an answer nor an end; healed, the connection goes on."""
    proxy.blackhole(up=up, down=not up)
    client.sendall(b"lost")
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(1)
    assert (echo.got == b"") is up
    proxy.heal()
    client.settimeout(5)
    said(client)


def test_a_reset(client: socket.socket, proxy: Proxy) -> None:
    said(client)
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as again:
        said(again)
        proxy.refuse()
        said(again)
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as new:
            assert read_to_the_end(new) == b"", "let in"


def test_a_cut(client: socket.socket, proxy: Proxy) -> None:
    """After exactly so many bytes."""
    said(client)
    proxy.cut_after(7, down=True)
    client.sendall(b"0123456789")
    got = read_to_the_end(client)
    assert got in (b"0123456", b"")  # a reset may overtake them in the client's kernel


def test_a_half_close(client: socket.socket, proxy: Proxy) -> None:
    said(client)
    proxy.half_close(down=True)
    assert client.recv(1) == b""
    client.sendall(b"still heard")
    proxy.half_close(up=True)
