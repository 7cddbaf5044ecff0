"""Requests at full speed over raw connections: a mix of whole, streamed, failing and left ones.

aiohttp's client costs as much CPU as all of Hotpath; on two cores it, not Hotpath, would set the pace of a soak.
"""

import asyncio
import random
from collections import Counter
from typing import Final
from urllib.parse import urlsplit

from tests.load.streams import request

#: (weight, name, prompt, streamed, leaves). Whole and streamed answers, refusals and breaks of the upstream, clients
#: that go in mid-stream or before the answer.
MIX: Final = (
    (50, "whole", "[[sim chunks=6]]", False, False),
    (30, "streamed", "[[sim chunks=8]]", True, False),
    (4, "upstream 503", "[[sim status=503]]", False, False),
    (3, "upstream 400", "[[sim status=400]]", True, False),
    (4, "cut", "[[sim chunks=20 cut_after=5]]", True, False),
    (2, "malformed", "[[sim chunks=20 malformed_after=3]]", True, False),
    (4, "left in mid-stream", "[[sim chunks=30 pace=5]]", True, True),
    (3, "left before the answer", "[[sim chunks=40 pace=5]]", False, True),
)
DEADLINE_MS: Final = 5000


class _Asker(asyncio.Protocol):
    """One connection: writes a request, finds the end of its answer, asks the hammer for the next."""

    def __init__(self, hammer: "Hammer") -> None:
        self._hammer = hammer
        self._transport: asyncio.Transport | None = None
        self._got = b""
        self._left = -1  # bytes of a body of known length that are to come; -1: its head is
        self._leaves = False
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._next()

    def _next(self) -> None:
        assert self._transport is not None
        wanted = self._hammer.take()
        if wanted is None:
            self._over = True
            self._transport.close()
            return
        data, streamed, self._leaves = wanted
        self._got, self._left = b"", -1
        self._transport.write(data)
        if self._leaves and not streamed:
            asyncio.get_running_loop().call_later(0.02, self._leave)

    def _leave(self) -> None:
        if self._transport is not None and not self._over:
            self._hammer.ended["left"] += 1
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._left < 0:
            head, found, rest = self._got.partition(b"\r\n\r\n")
            if not found:
                return
            _, length, tail = head.partition(b"\r\nContent-Length: ")
            if length:
                self._left = int(tail.partition(b"\r\n")[0]) - len(rest)
            elif self._leaves:
                self._leave()
                return
            elif self._got.endswith(b"\r\n0\r\n\r\n"):
                self._end(b"ok" if b"[DONE]" in self._got[-64:] else b"in-stream error")
                return
            else:
                return
        else:
            self._left -= len(data)
        if self._left == 0:
            self._end(self._got[9:12])

    def _end(self, how: bytes) -> None:
        self._hammer.ended[how.decode()] += 1
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._hammer.closed(asked_more=True)


class Hammer:
    """`count` requests over `concurrency` connections; `ended` counts how they ended."""

    def __init__(self, url: str, key: str, count: int, concurrency: int, seed: int = 0) -> None:
        self._where = urlsplit(url)
        self._left = count
        self._concurrency = concurrency
        weights, _, prompts, streamed, leaves = zip(*MIX, strict=True)
        bodies = [
            request(key, prompt, timeout_ms=DEADLINE_MS, stream=stream)
            for prompt, stream in zip(prompts, streamed, strict=True)
        ]
        self._kinds = list(zip(bodies, streamed, leaves, strict=True))
        self._weights = weights
        self._dice = random.Random(seed)
        self._open = 0
        self._done: asyncio.Future[None] | None = None
        self._dials: set[asyncio.Task[None]] = set()
        self.ended: Counter[str] = Counter()

    @property
    def asked(self) -> int:
        """Requests that have ended."""
        return sum(self.ended.values())

    def take(self) -> tuple[bytes, bool, bool] | None:
        """The next request; None when all were asked."""
        if self._left <= 0:
            return None
        self._left -= 1
        (kind,) = self._dice.choices(self._kinds, self._weights)
        return kind

    def closed(self, *, asked_more: bool) -> None:
        """A connection is gone: another takes its place while there is something to ask."""
        self._open -= 1
        if asked_more and self._left > 0:
            self._dial()
        elif not self._open and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _dial(self) -> None:
        self._open += 1
        task = asyncio.ensure_future(self._connect())
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: _Asker(self), self._where.hostname or "", self._where.port or 80)
        except OSError:
            self.ended["not connected"] += 1
            self.closed(asked_more=True)

    async def run(self) -> None:
        """Return when every request has ended."""
        self._done = asyncio.get_running_loop().create_future()
        for _ in range(self._concurrency):
            self._dial()
        await self._done
