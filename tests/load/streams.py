"""Raw HTTP clients for what the flow tests ask: hundreds of streams timed cheaply, and readers that do not read.

aiohttp's client reads ahead by 64 KiB and more; these read exactly what they are told to, from a socket whose receive
buffer they choose.
"""

import asyncio
import json
import socket
import struct
from typing import Any, Final
from urllib.parse import urlsplit

from tests.load.report import percentile

_CHUNK: Final = b"data: {"
_DONE: Final = b"data: [DONE]"
_RESET: Final = struct.pack("ii", 1, 0)


def request(key: str, prompt: str, *, timeout_ms: int = 600_000, version: str = "1.1", **body: Any) -> bytes:
    """A POST of a stream, as bytes."""
    asked = {"model": "sim-fast", "messages": [{"role": "user", "content": prompt}], "stream": True, **body}
    data = json.dumps(asked).encode()
    lines = [
        f"POST /v1/chat/completions HTTP/{version}", "Host: x", f"Authorization: Bearer {key}",
        "Content-Type: application/json", f"X-Timeout-Ms: {timeout_ms}", f"Content-Length: {len(data)}",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def connect(url: str, receive_buffer: int = 0) -> socket.socket:
    """A connected socket. `receive_buffer`: bytes of SO_RCVBUF, set before connecting so that the window obeys it."""
    where = urlsplit(url)
    made = socket.socket()
    made.setblocking(False)
    if receive_buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await asyncio.get_running_loop().sock_connect(made, (where.hostname or "", where.port or 80))
    except OSError:
        made.close()
        raise
    return made


def reset(sock: socket.socket) -> None:
    """Close with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


def plain(raw: bytes) -> bytes:
    """The body of an answer in chunked coding, without head and chunk sizes."""
    _, _, rest = raw.partition(b"\r\n\r\n")
    parts = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        parts.append(rest[:length])
        rest = rest[length + 2 :]
        if length == 0:
            break
    return b"".join(parts)


class Timed(asyncio.Protocol):
    """Asks one stream after another on one connection, and notes the milliseconds between its arrivals."""

    def __init__(self, ask: bytes, gaps: list[float]) -> None:
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self._tail = b""
        self.gaps = gaps
        self.streams = 0  # that ended well
        self.broken = ""  # what a stream ended with otherwise
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment] # uvloop's is one, but does not say so
        self._again()

    def _again(self) -> None:
        assert self.transport is not None
        self._last, self._tail = 0.0, b""
        self.transport.write(self._ask)

    def data_received(self, data: bytes) -> None:
        if _CHUNK in data:
            now = self._loop.time()
            if self._last:
                self.gaps.append((now - self._last) * 1000)
            self._last = now
        self._tail = (self._tail + data)[-4096:]
        if self._tail.endswith(b"0\r\n\r\n"):
            if _DONE in self._tail:
                self.streams += 1
                self._again()
            else:
                self.broken = self._tail[-300:].decode(errors="replace")

    def connection_lost(self, exc: Exception | None) -> None:
        self.broken = self.broken or f"connection lost: {exc}"


class Crowd:
    """Many paced streams that go on until `close`. `gaps` may be exchanged for a new list at any time."""

    def __init__(self, url: str, key: str, count: int, *, pace_ms: int, chunks: int) -> None:
        self._url = url
        self._key = key
        self._count = count
        self._prompt = f"[[sim chunks={chunks} pace={pace_ms}]]"
        self._period = pace_ms / 1000
        self._all: list[Timed] = []
        self._gaps: list[float] = []

    async def start(self) -> "Crowd":
        """All of them, spread over one pace so that they do not march in step."""
        loop, where = asyncio.get_running_loop(), urlsplit(self._url)
        ask, host, port = request(self._key, self._prompt), where.hostname or "", where.port or 80
        for _ in range(self._count):
            _, one = await loop.create_connection(lambda: Timed(ask, self._gaps), host, port)
            self._all.append(one)
            await asyncio.sleep(self._period / self._count)
        return self

    async def watch(self, seconds: float) -> list[float]:
        """The gaps of the next so many seconds, sorted (ms)."""
        gaps: list[float] = []
        for one in self._all:
            one.gaps = gaps
        await asyncio.sleep(seconds)
        for one in self._all:
            one.gaps = self._gaps
        self._gaps.clear()
        return sorted(gaps)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def broken(self) -> list[str]:
        """What any of them ended with that was no good end."""
        return [one.broken for one in self._all if one.broken]

    def close(self) -> None:
        """Leave."""
        for one in self._all:
            if one.transport is not None:
                one.transport.abort()


def p99(gaps: list[float]) -> float:
    """Of sorted values; 0 without any."""
    return percentile(gaps, 99) or 0.0


async def trickle(sock: socket.socket, per_second: int, got: list[int]) -> None:
    """Read so many bytes each second, for ever; `got[0]` counts them."""
    loop = asyncio.get_running_loop()
    while True:
        data = await loop.sock_recv(sock, per_second)
        if not data:
            return
        got[0] += len(data)
        await asyncio.sleep(1)
