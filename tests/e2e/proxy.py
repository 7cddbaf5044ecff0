"""A TCP proxy that misbehaves on command: between a process and NATS, Redis or an upstream (faults, section 1).

    with Proxy(port) as proxy:            proxy.port stands in the URL in place of `port`
        proxy.delay(0.1)                  each piece arrives so much later
        proxy.blackhole(up=True)          bytes of the client are swallowed, the connection stays (down: the server's)
        proxy.throttle(50_000)            bytes per second, each way
        proxy.cut_after(1000, down=True)  every connection is reset once so many more bytes have passed that way
        proxy.half_close(down=True)       FIN one way, the other goes on
        proxy.lose_answer(b"evalsha...")  the next piece with these bytes goes to the server, its answer does not come
                                          back: the connection is reset a moment later
        proxy.reset()                     RST to both sides of every connection
        proxy.refuse()                    new connections are reset, open ones are left alone
        proxy.heal()                      everything as it should be, for the connections that are left and new ones

It runs in a thread of its own with its own loop, so that a test that blocks does not stop it. Every setting holds for
open and for new connections, from the next piece on. Nothing is buffered beyond one piece of 64 KiB a direction.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self

PIECE = 65_536
#: A server has done what it was asked by then.
DONE_S = 0.05
_RST = struct.pack("ii", 1, 0)


class _Way:
    """What happens to bytes in one direction."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.rate = 0.0  # bytes per second; 0 = any
        self.swallow = False
        self.left: int | None = None  # bytes until the cut
        self.passed = 0


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes on to `port` there."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._up, self._down = _Way(), _Way()
        self._refuse = False
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy to {port}", daemon=True)
        self._server: asyncio.Server | None = None
        self.port = 0
        self.accepted = 0
        self._needle = b""

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_exc: object) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    # ---- what a test says

    def delay(self, seconds: float) -> None:
        """Each piece, both ways."""
        self._set(lambda way: setattr(way, "delay", seconds), up=True, down=True)

    def throttle(self, bytes_per_s: float) -> None:
        """Each way."""
        self._set(lambda way: setattr(way, "rate", bytes_per_s), up=True, down=True)

    def blackhole(self, *, up: bool = False, down: bool = False) -> None:
        """Swallow what goes these ways: neither an error nor an end, as behind a firewall that lost its state."""
        self._set(lambda way: setattr(way, "swallow", True), up=up, down=down)

    def cut_after(self, count: int, *, up: bool = False, down: bool = False) -> None:
        """RST once `count` more bytes (of all connections together) have passed; counts once."""
        self._set(lambda way: setattr(way, "left", count), up=up, down=down)

    def lose_answer(self, needle: bytes) -> None:
        """Of the next piece for the server that has these bytes in it: it is done, and nobody hears of it."""
        self._needle = needle

    @property
    def lost(self) -> bool:
        """Whether that has happened."""
        return not self._needle

    def refuse(self) -> None:
        """Nobody new comes in."""
        self._refuse = True

    def reset(self) -> None:
        """RST both sides of all that is open."""
        self._do(self._reset_all())

    def half_close(self, *, up: bool = False, down: bool = False) -> None:
        """FIN to the server (up) or to the client (down) on every open connection."""
        self._do(self._half_close_all(up=up, down=down))

    def heal(self) -> None:
        """No more faults."""
        self._refuse = False
        self._needle = b""

        def mend(way: _Way) -> None:
            way.delay, way.rate, way.swallow, way.left = 0.0, 0.0, False, None

        self._set(mend, up=True, down=True)

    @property
    def open(self) -> int:
        """Connections that pass through now."""
        return len(self._pairs)

    @property
    def passed(self) -> tuple[int, int]:
        """Bytes passed on so far (to the server, to the client)."""
        return self._up.passed, self._down.passed

    # ---- inside

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _set(self, change: Callable[[_Way], None], *, up: bool, down: bool) -> None:
        async def apply() -> None:
            for way, wanted in ((self._up, up), (self._down, down)):
                if wanted:
                    change(way)

        self._do(apply())

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=PIECE)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._reset_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.accepted += 1
        if self._refuse:
            _abort(writer)
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target, limit=PIECE)
        except OSError:
            _abort(writer)
            return
        pair = (back, writer)
        self._pairs.add(pair)
        deaf = asyncio.Event()
        try:
            await asyncio.gather(
                self._pump(reader, back, self._up, deaf, pair), self._pump(there, writer, self._down, deaf)
            )
        finally:
            self._pairs.discard(pair)
            for side in pair:
                side.close()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: _Way, deaf: asyncio.Event,
        pair: tuple[asyncio.StreamWriter, ...] = (),
    ) -> None:  # fmt: skip
        with contextlib.suppress(OSError):
            while piece := await source.read(PIECE):
                if pair and self._needle and self._needle in piece:
                    self._needle = b""
                    deaf.set()
                    sink.write(piece)
                    await asyncio.sleep(DONE_S)
                    for side in pair:
                        _abort(side)
                    return
                if deaf.is_set() and not pair:
                    continue
                if way.delay:
                    await asyncio.sleep(way.delay)
                if way.rate:
                    await asyncio.sleep(len(piece) / way.rate)
                if way.swallow:
                    continue
                if way.left is not None and len(piece) >= way.left:
                    sink.write(piece[: way.left])
                    way.left = None
                    await self._reset_all()
                    return
                if way.left is not None:
                    way.left -= len(piece)
                way.passed += len(piece)
                sink.write(piece)
                await sink.drain()
            if not way.swallow:
                sink.write_eof()

    async def _reset_all(self) -> None:
        for pair in list(self._pairs):
            for side in pair:
                _abort(side)

    async def _half_close_all(self, *, up: bool, down: bool) -> None:
        for back, writer in list(self._pairs):
            with contextlib.suppress(OSError):
                if up:
                    back.write_eof()
                if down:
                    writer.write_eof()


def _abort(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
    writer.transport.abort()
